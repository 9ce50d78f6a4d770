"""What makes an imagined plan good, as far as pictures alone tell. Each objective is a function of a plan,
0 (bad) to 1 (good).

Objectives that need to know what a scene is (which objects are where, what an instruction asks for, whether
a state could stand in physics) are made by `emuworld.tasks.robot.plan_scores` and handed to the planner
beside these.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from emuworld.agents.agent import Assignment, Frame, Step

_CELL_PX = 8  # differences are read on means of 8 x 8 pixels: a tokenizer's noise and edges stay below
_CHANGED = 20.0  # of 255, in any channel of a cell: half of what the nearest two object colours differ by
# Share of the cells that one subtask changes: an object of 4 cm that goes, comes and takes its shadow along
# is about one cell in a hundred; an arm across the view and everything that it hides is a third.
_LEAST_CHANGE, _MOST_CHANGE, _ANOTHER_SCENE = 0.003, 0.35, 0.7


@dataclass(frozen=True, kw_only=True, eq=False)
class ImaginedPlan:
    """A plan as it was imagined: what was seen before it, its steps, and whether the answer ended."""

    assignment: Assignment
    frame: Frame  # seen before the first step, uint8 [H, W, 3]
    steps: tuple[Step, ...]
    complete: bool
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def keyframes(self) -> list[Frame]:
        """The pictures of the steps that have one, in order."""
        return [step.keyframe for step in self.steps if step.keyframe is not None]


Objective = Callable[[ImaginedPlan], float]


def consistency(plan: ImaginedPlan) -> float:
    """Whether every keyframe changes something of the one before, and not the whole scene; the mean of both.

    0 for a plan without pictures.
    """
    pictures = [plan.frame, *plan.keyframes]
    pairs = list(itertools.pairwise(pictures))
    return float(np.mean([_step_size(changed_share(*pair)) for pair in pairs])) if pairs else 0.0


def goal_picture(plan: ImaginedPlan) -> float:
    """How much of the way from the first view to the goal picture the last keyframe has gone, 0 to 1.

    1 without a goal picture, so that it favours no plan.
    """
    goal = plan.assignment.goal
    if goal is None:
        return 1.0
    if not plan.keyframes:
        return 0.0
    before, after = (_distance(picture, goal) for picture in (plan.frame, plan.keyframes[-1]))
    return float(np.clip(1.0 - after / max(before, 1e-6), 0.0, 1.0))


def completeness(plan: ImaginedPlan) -> float:
    """1 for an answer that came to its own end, one half for one that was cut off."""
    return 1.0 if plan.complete else 0.5


def changed_share(one: Frame, other: Frame) -> float:
    """Share of 8 x 8 cells in which two frames differ once their mean colours are made equal."""
    first, second = cells(one), cells(resized(other, one.shape[:2]))
    second = second + np.median(first - second, axis=(0, 1))
    return float((np.abs(first - second).max(axis=2) > _CHANGED).mean())


def cells(frame: Frame) -> NDArray[np.float32]:
    """Mean colour of each 8 x 8 pixels, [H // 8, W // 8, 3] of 0 to 255; a ragged rest is left out."""
    height, width = (side // _CELL_PX for side in frame.shape[:2])
    whole = frame[: height * _CELL_PX, : width * _CELL_PX].astype(np.float32)
    means: NDArray[np.float32] = whole.reshape(height, _CELL_PX, width, _CELL_PX, 3).mean(axis=(1, 3))
    return means


def resized(frame: Frame, size: tuple[int, ...]) -> Frame:
    """The frame at another height and width, nearest pixels; itself where it has them already."""
    if frame.shape[:2] == tuple(size):
        return frame
    rows = (np.arange(size[0]) + 0.5) * frame.shape[0] / size[0]
    columns = (np.arange(size[1]) + 0.5) * frame.shape[1] / size[1]
    return frame[rows.astype(int)[:, None], columns.astype(int)[None]]


def _step_size(share: float) -> float:
    if share < _LEAST_CHANGE:
        return share / _LEAST_CHANGE
    return float(np.clip((_ANOTHER_SCENE - share) / (_ANOTHER_SCENE - _MOST_CHANGE), 0.0, 1.0))


def _distance(one: Frame, other: Frame) -> float:
    """Mean of what cells differ by beyond noise."""
    difference = np.abs(cells(one) - cells(resized(other, one.shape[:2]))).max(axis=2)
    return float(np.maximum(difference - _CHANGED / 2, 0.0).mean())
