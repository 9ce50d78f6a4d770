"""How well keyframes can be told and read: a task's own plan, shown as pictures, carried out again from them.

The oracle carries a task out and the camera takes the frame at the end of each subtask. Then the table is
put back, and words, pictures or both are carried out by `keyframe_execution`. What is lost on the way is the
read-out's fault and nobody else's, because the plan is right. `via` changes the pictures before they are
read: a tokenizer's round trip shows how far generated frames could be read at best.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from emuworld.agents.agent import Step
from emuworld.agents.baselines import KnownPlan
from emuworld.envs.render import Renderer
from emuworld.envs.tabletop.plans import Task
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.subtasks import canonical
from emuworld.tasks.robot.calibration import Frame
from emuworld.tasks.robot.episode import Outcome, Workplace, run_agent
from emuworld.tasks.robot.keyframe_execution import PLACING, see
from emuworld.tasks.robot.keyframe_readout import Position

Via = Callable[[Frame], Frame]


@dataclass(frozen=True, kw_only=True, eq=False)
class Told:
    """A task's own plan as pictures: its steps with the frame at the end of each, and where each step's
    thing was then (None where it is fixed to the table)."""

    steps: tuple[Step, ...]
    ends: tuple[Position | None, ...]


@dataclass(frozen=True, kw_only=True)
class StepTrial:
    """What was read of one step: `error_mm` between the read and the true place, level (None: no place was
    read), and what became of it."""

    text: str
    error_mm: float | None
    used_picture: bool
    done: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One task carried out from its own pictures."""

    family: str
    seed: int
    variation: str
    goal_in_picture: bool
    use: str
    success: bool
    steps: tuple[StepTrial, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def tell(
    task: Task, scene: TableScene, *, renderer: Renderer, size: tuple[int, int] = (256, 256)
) -> Told | None:
    """Carry out the task's own plan and take the pictures; None where the plan itself fails."""
    scene.reset()
    steps, ends = [], []
    for subtask in task.oracle:
        goal = task.goal_position if subtask.from_picture else None
        if not scene.execute(subtask, goal_position=goal).done:
            return None
        steps.append(Step(text=canonical(subtask), keyframe=see(scene, renderer, size=size).frame))
        loose = subtask.target in {item.name for item in scene.objects}
        ends.append(scene.state(subtask.target).position if loose else None)
    if not all(scene.holds(one) for one in task.goal):
        return None
    return Told(steps=tuple(steps), ends=tuple(ends))


def try_again(
    task: Task,
    scene: TableScene,
    told: Told,
    *,
    renderer: Renderer,
    size: tuple[int, int] = (256, 256),
    use: str = "both",
    via: Via | None = None,
) -> Trial:
    """Carry the task out from what was told, the pictures changed by `via`."""
    steps = [
        step if via is None or step.keyframe is None else Step(text=step.text, keyframe=via(step.keyframe))
        for step in told.steps
    ]
    place = Workplace(task=task, scene=scene, renderer=renderer, size=size)
    episode = run_agent(place, KnownPlan(steps), use=use)
    return Trial(
        family=task.family,
        seed=task.seed,
        variation=task.variation,
        goal_in_picture=task.goal_in_picture,
        use=use,
        success=episode.success,
        steps=tuple(_step(one, end) for one, end in zip(episode.outcomes, told.ends, strict=True)),
    )


def _step(outcome: Outcome, end: Position | None) -> StepTrial:
    executed, error = outcome.executed, None
    placing = executed.subtask is not None and executed.subtask.skill in PLACING
    if placing and executed.reading is not None and end is not None:
        error = 1000 * float(np.linalg.norm((executed.reading.position - end)[:2]))
    return StepTrial(
        text=outcome.step.text,
        error_mm=error,
        used_picture=executed.used_picture,
        done=executed.result.done,
        reason=executed.result.reason,
    )
