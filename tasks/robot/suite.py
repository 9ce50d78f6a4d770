"""`robot-331`: 331 frozen tasks on the table-top, and the bare execution of known plans on them.

The tasks are data (`data/robot_331.json`, made by `emuworld.tasks.robot.freeze`): later changes of the
samplers do not change them. Agents are run by `emuworld.tasks.robot.evaluation`; here a plan is carried out
without a camera, which is what the suite's own checks do.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emuworld.envs.tabletop.plans import Task, random_plan
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.subtasks import Subtask

SUITE = "robot-331"
DATA = Path(__file__).parents[1] / "data" / "robot_331.json"
PLANS = ("oracle", "nothing", "random")
FORMAT = 1


class SuiteError(ValueError):
    """The suite's file is not what this release wrote."""


@dataclass(frozen=True, kw_only=True)
class Execution:
    """What a plan did. `facts`: each goal by its words, at the end; `once`: all aims held after some step."""

    success: bool
    once: bool
    facts: dict[str, bool]
    steps: tuple[dict[str, Any], ...]
    control_steps: int
    state_hash: str


def load_suite(path: Path = DATA) -> tuple[Task, ...]:
    """The frozen tasks in order. SuiteError where the file's tasks are not those it was written with."""
    values = json.loads(path.read_text())
    if values.get("format") != FORMAT:
        raise SuiteError(f"{path} is of format {values.get('format')}; this release reads {FORMAT}")
    if suite_hash(values["tasks"]) != values["hash"]:
        raise SuiteError(f"the tasks in {path} were changed by hand; freeze the suite again")
    return tuple(Task.from_dict(one) for one in values["tasks"])


def suite_hash(tasks: Sequence[dict[str, Any]]) -> str:
    """SHA-256 over the tasks' JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(tasks, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def plan_for(task: Task, plan: str, *, seed: int = 0) -> tuple[Subtask, ...]:
    """The task's own plan, none, or as many random subtasks as its own plan has."""
    if plan not in PLANS:
        raise ValueError(f"plan={plan!r} is unknown; expected one of {', '.join(PLANS)}")
    if plan == "nothing":
        return ()
    if plan == "random":
        return random_plan(task.names, len(task.oracle), seed=task.seed + seed)
    return task.oracle


def execute_plan(task: Task, plan: Sequence[Subtask], *, scene: TableScene | None = None) -> Execution:
    """Carry out a plan from the task's start; steps that cannot be done change nothing.

    The goal place of a task in the picture is given to a step that names none. `scene` may hand in the
    task's scene where it is compiled already; it is reset first.
    """
    scene = TableScene.from_dict(task.scene) if scene is None else scene
    scene.reset()
    steps: list[dict[str, Any]] = []
    once = _all_hold(scene, task.aims)
    for subtask in plan:
        place = task.goal_position if subtask.from_picture else None
        result = scene.execute(subtask, goal_position=place)
        steps.append({"text": str(subtask), **dataclasses.asdict(result)})
        once = once or _all_hold(scene, task.aims)
    facts = {str(one): scene.holds(one) for one in task.goal}
    return Execution(
        success=all(facts.values()),
        once=once,
        facts=facts,
        steps=tuple(steps),
        control_steps=sum(step["control_steps"] for step in steps),
        state_hash=scene.state_hash(),
    )


def _all_hold(scene: TableScene, goal: Sequence[Predicate]) -> bool:
    return all(scene.holds(one) for one in goal)
