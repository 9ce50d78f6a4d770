"""Why a task failed: at which step it was lost, and whether the plan or its execution is to blame.

The simulator's own plan is the witness: from any state it is asked whether it could still reach the goal. The
first step after which it no longer can is the failing one; where it still could at the end, the plan stopped
short. The step is the plan's fault where it is none of those that could be done next, or shows another place
than the goal's; else it is the execution's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emuworld.envs.tabletop.plans import Task
from emuworld.envs.tabletop.predicates import AT_M, Predicate
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.subtasks import Subtask
from emuworld.tasks.robot.plan_scores import goal_of


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A step as it was carried out: what was understood of it (None: nothing), the goal place that its
    picture gave, and the state after it."""

    subtask: Subtask | None
    place: Sequence[float] | None
    state: bytes


@dataclass(frozen=True, kw_only=True)
class Failure:
    """`step`: index of the failing step; the number of steps where the plan stopped short. `blame`: "plan"
    or "execution"."""

    step: int
    blame: str


def effect_of(task: Task, subtask: Subtask) -> Predicate | None:
    """What is true once a subtask of this task is done, the place that only the picture shows included."""
    if subtask.from_picture and task.goal_position is not None:
        x, y, _ = task.goal_position
        return Predicate("At", (subtask.target, f"{x:.4f}", f"{y:.4f}"))
    return goal_of(subtask)


def still_to_do(task: Task, scene: TableScene) -> tuple[Subtask, ...]:
    """The steps of the task's own plan that are needed from the present state, in its order."""

    def is_undone(step: Subtask) -> bool:
        effect = effect_of(task, step)
        return effect is not None and not scene.holds(effect)

    used = {step.destination for step in task.oracle if step.skill in ("place", "stack") and is_undone(step)}
    aims = {(one.name, one.args) for one in task.aims}
    steps: list[Subtask] = []
    opened: set[str] = set()
    for step in task.oracle:
        if step.skill == "open":
            needed = is_undone(step) and (step.target in used or ("Open", (step.target,)) in aims)
        elif step.skill == "close":
            needed = is_undone(step) or any(
                one.skill == "open" and one.target == step.target for one in steps
            )
        else:
            needed = is_undone(step)
        if needed:
            steps.append(step)
            opened |= {step.target} if step.skill == "open" else set()
    return tuple(steps)


def can_finish(task: Task, scene: TableScene, state: bytes) -> bool:
    """Whether the task's own plan reaches the goal from a state; the scene is left where that ends."""
    scene.restore(state)
    if any(one.name == "NotMoved" and not scene.holds(one) for one in task.goal):
        return False  # nothing puts a bystander back
    for step in still_to_do(task, scene):
        scene.execute(step, goal_position=task.goal_position if step.from_picture else None)
    return all(scene.holds(one) for one in task.goal)


def first_failure(task: Task, scene: TableScene, start: bytes, tried: Sequence[Tried]) -> Failure | None:
    """Where a failed task was lost; None where not even the start could be finished.

    Looks for the step by halving: a state that is lost is taken to stay so. The scene's state is changed.
    """
    states = [start, *(one.state for one in tried)]
    last = len(tried)
    if can_finish(task, scene, states[last]):
        scene.restore(states[last])
        left = still_to_do(task, scene)
        said = any(one.subtask == left[0] and _shows_goal(task, one) for one in tried) if left else False
        return Failure(step=last, blame="execution" if said else "plan")
    good, lost = 0, last
    while lost - good > 1:
        middle = (good + lost) // 2
        if can_finish(task, scene, states[middle]):
            good = middle
        else:
            lost = middle
    if good == 0 and not can_finish(task, scene, start):
        return None
    scene.restore(states[good])
    one = tried[good]
    right = one.subtask in _next(still_to_do(task, scene)) and _shows_goal(task, one)
    return Failure(step=good, blame="execution" if right else "plan")


def _next(steps: Sequence[Subtask]) -> list[Subtask]:
    """Those of the steps that need not wait for one before them: none of these moves what they are about, or
    goes into it."""
    return [
        step
        for index, step in enumerate(steps)
        if not any(
            one.target in (step.target, step.destination) or one.destination == step.target
            for one in steps[:index]
        )
    ]


def _shows_goal(task: Task, one: Tried) -> bool:
    """Whether the step is to end where the task wants it, as far as a place was said."""
    if one.subtask is None or not one.subtask.from_picture:
        return True
    if task.goal_position is None or one.place is None:
        return False
    return float(np.linalg.norm(np.array(one.place[:2]) - np.array(task.goal_position[:2]))) < AT_M
