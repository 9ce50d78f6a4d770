"""The judges of keyframes and how often they err: right pictures and pictures with a planted fault, whose
truth physics knows.

A judge is right about a fault that is there (else a miss) and about one that is not (else a false alarm). The
pictures are the simulator's: what a generated one adds (blur, tint) is not in these rates.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from emuworld.envs.render import Renderer
from emuworld.envs.tabletop import layout as sizes
from emuworld.envs.tabletop.plans import Task
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.subtasks import Subtask
from emuworld.tasks.robot.calibration import Frame
from emuworld.tasks.robot.keyframe_execution import read_all, see, take_up
from emuworld.tasks.robot.keyframe_readout import Position, Reading
from emuworld.tasks.robot.keyframe_scores import STAYED_M, KeyframeScores, in_view, scores_of
from emuworld.tasks.robot.table_view import TableView

FAULTS = ("missing", "duplicated", "moved", "unsupported")
FALLS_M = 0.03  # what moves so far when physics is let go did not stand where the picture has it
_SETTLE_S = 0.5
_STRAYED_M = 0.10  # a planted stray lies at least so far from its place and from everything else
_HOVER_M = 0.08
_AWAY = np.array([0.0, 0.0, -20.0])
_WAYS = [np.array(way) for way in ((0.0, 1.0), (0.0, -1.0), (1.0, 0.0), (-1.0, 0.0))]


@dataclass(frozen=True, kw_only=True)
class JudgedKeyframe:
    """What is wrong with a keyframe, and which of the things that it moves would not stay where it has them
    when physics is let go."""

    scores: KeyframeScores
    unsupported: tuple[str, ...]

    @property
    def faults(self) -> Mapping[str, Collection[str]]:
        """Names of objects by fault, of `FAULTS`."""
        return {
            "missing": self.scores.missing,
            "duplicated": self.scores.duplicated,
            "moved": self.scores.moved_bystanders,
            "unsupported": self.unsupported,
        }

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return self.scores.to_dict() | {"unsupported": list(self.unsupported)}


def judged_keyframe(
    picture: Frame, scene: TableScene, view: TableView, *, subtask: Subtask | None
) -> JudgedKeyframe:
    """Judge a picture of the moment after a subtask. `view` and `scene`: the moment before it; the scene's
    state is put back."""
    keyframe = take_up(picture, view)
    moved, hidden = moved_by(subtask), hidden_by(scene, subtask)
    names = [name for name in view.names if name not in hidden and in_view(view, name)]
    readings = read_all(keyframe.picture, view, names)
    scores = scores_of(keyframe, view, readings, moved=moved)
    return JudgedKeyframe(scores=scores, unsupported=unsupported(scene, readings, moved))


def moved_by(subtask: Subtask | None) -> tuple[str, ...]:
    """What a subtask moves: all other things are bystanders."""
    return () if subtask is None else (subtask.target,)


def hidden_by(scene: TableScene, subtask: Subtask | None) -> tuple[str, ...]:
    """What need not be seen after a subtask: what is in the hand, under another thing, or in the drawer that
    is closed."""
    if subtask is None:
        return ()
    if subtask.skill == "stack":
        return (str(subtask.destination),)
    if subtask.skill == "pick":
        return (subtask.target,)
    if subtask.skill != "close":
        return ()
    if subtask.target not in scene.furniture:
        return ()
    things = (item.name for item in scene.objects)
    return tuple(name for name in things if scene.holds(Predicate("In", (name, subtask.target))))


def unsupported(
    scene: TableScene, readings: Mapping[str, Reading], moved: Collection[str]
) -> tuple[str, ...]:
    """Which of the moved things, put where they were read, move on by themselves."""
    start, falling = scene.save(), []
    try:
        for name in moved:
            if name in readings and readings[name].found:
                scene.restore(start)
                if falls(scene, name, readings[name].position):
                    falling.append(name)
    finally:
        scene.restore(start)
    return tuple(falling)


def falls(scene: TableScene, name: str, position: Position) -> bool:
    """Whether a thing put somewhere moves on by itself. Changes the scene's state."""
    scene.place_object(name, position.tolist())
    scene.settle(_SETTLE_S)
    return float(np.linalg.norm(scene.state(name).position - position)) > FALLS_M


# The judges judged ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Planted:
    """A picture with at most one fault, and the thing that has it."""

    name: str  # "true frame", or of `FAULTS`, or "hovering"
    picture: Frame
    thing: str


def judge_the_judges(task: Task, *, renderer: Renderer, size: tuple[int, int], seed: int) -> dict[str, Any]:
    """Show the judges the simulator's own frame after the first step of the task's plan and pictures with
    planted faults.

    Returns `pictures`: for each, which faults are in it and which were found; `place_error_m`: how far the
    moved thing was read from where it is, None where nothing was moved or read.
    """
    scene = TableScene.from_dict(task.scene)
    start = scene.save()
    step = task.oracle[0]
    hidden = hidden_by(scene, step)
    scene.execute(step, goal_position=task.goal_position if step.from_picture else None)
    after = see(scene, renderer, size=size)
    end, truth = after.frame, {name: after.position(name) for name in after.names}
    shown = [name for name in after.names if in_view(after, name)]
    judged = [name for name in shown if name not in hidden]
    planted = list(_planted(scene, after, judged, target=step.target, seed=seed))
    scene.restore(start)
    view = see(scene, renderer, size=size)
    strayed = [
        name for name in shown
        if name != step.target and np.linalg.norm(truth[name] - view.position(name)) > STAYED_M
    ]  # fmt: skip
    own = Planted(name="true frame", picture=end, thing="")
    pictures = []
    for one in (own, *planted):
        found = judged_keyframe(one.picture, scene, view, subtask=step).faults
        there: dict[str, list[str]] = {fault: [] for fault in FAULTS}
        there["moved"] = list(strayed)
        there["missing"] = [n for n in view.names if in_view(view, n) and n not in (*shown, *hidden)]
        if one.name in FAULTS:
            there[one.name].append(one.thing)
        elif one.name == "hovering":
            there["unsupported"].append(one.thing)
        pictures.append({"name": one.name, "there": there, "found": {k: list(v) for k, v in found.items()}})
    error = None if step.target in hidden else _place_error(end, view, step.target, truth)
    return {"num_objects": len(shown), "pictures": pictures, "place_error_m": error}


def _place_error(picture: Frame, view: TableView, target: str, truth: Mapping[str, Position]) -> float | None:
    if target not in truth or np.linalg.norm(truth[target] - view.position(target)) < STAYED_M:
        return None
    reading = read_all(take_up(picture, view).picture, view, [target])[target]
    return round(float(np.linalg.norm(reading.position - truth[target])), 5) if reading.found else None


def _planted(
    scene: TableScene, view: TableView, shown: list[str], *, target: str, seed: int
) -> Iterator[Planted]:
    """One picture a fault, drawn from the state after the step; faults that find no room are left out."""
    rng = np.random.default_rng(seed)
    others = [name for name in shown if name != target]
    if others:
        name = others[int(rng.integers(len(others)))]
        gone = view.drawn_with({name: _AWAY})
        yield Planted(name="missing", picture=gone, thing=name)
        if (place := _free_place(view, name, rng)) is not None:
            strayed = view.drawn_with({name: place})
            yield Planted(name="moved", picture=strayed, thing=name)
            here = np.abs(strayed.astype(int) - gone).max(axis=2) > 0  # it and its shadow, at the new place
            twice = np.where(here[..., None], strayed, view.frame)
            yield Planted(name="duplicated", picture=twice, thing=name)
    if target in shown:
        if (edge := _edge(scene, view, target, shown)) is not None:
            yield Planted(name="unsupported", picture=view.drawn_with({target: edge}), thing=target)
        if (place := _free_place(view, target, rng)) is not None:
            hovering = view.drawn_with({target: place + np.array([0.0, 0.0, _HOVER_M])})
            yield Planted(name="hovering", picture=hovering, thing=target)


def _free_place(view: TableView, name: str, rng: np.random.Generator) -> Position | None:
    """On the bare table, away from everything and from where the thing stood, within the picture."""
    away = [view.position(other) for other in view.names]
    away += [view.scene.state(other).position for other in view.scene.furniture]
    for _ in range(60):
        x, y = rng.uniform(0.40, 0.58), rng.uniform(-0.28, 0.28)
        spot = view.target(name).resting(float(x), float(y))
        near = min(float(np.hypot(*(one[:2] - [x, y]))) for one in away)
        if spot is not None and spot[1] == "table" and near > _STRAYED_M:
            return spot[0]
    return None


def _edge(scene: TableScene, view: TableView, name: str, shown: list[str]) -> Position | None:
    """On a bin's wall or another thing's edge, where physics lets it fall. Changes the scene's state."""
    state = scene.save()
    for other, point in _edges(scene, [one for one in shown if one != name]):
        spot = view.target(name).resting(float(point[0]), float(point[1]))
        if spot is not None and spot[1] == other:
            fell = falls(scene, name, spot[0])
            scene.restore(state)
            if fell:
                return spot[0]
    return None


def _edges(scene: TableScene, others: list[str]) -> Iterator[tuple[str, Position]]:
    """Off the middle of balls, at the edge of cubes and cylinders, at last on the walls of bins."""
    for other in others:
        state = scene.state(other)
        off = (0.3 if other.endswith("ball") else 0.97) * state.half_m[0]
        yield from ((other, state.position[:2] + off * way) for way in _WAYS)
    for piece in scene.plan.furniture:
        if piece.kind == "bin":
            wall = sizes.BIN_INNER_M + sizes.BIN_WALL_M / 2
            yield from ((piece.name, np.array(piece.position) + wall * way) for way in _WAYS)
