"""`robot-331`: 331 frozen tasks on the table-top, and a runner that executes plans on them in physics.

The tasks are data (`data/robot_331.json`, made by `emuworld.tasks.robot_freeze`): later changes of the
samplers do not change them. A record says what held at the end and once, what each step gave and the hash of
the last state; it depends on nothing but the task and the plan. Runs are parallel and go on where they were
stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import mujoco

from emuworld.envs.predicates import Predicate
from emuworld.envs.subtasks import Subtask
from emuworld.envs.table_plans import Task, random_plan
from emuworld.envs.table_scene import TableScene
from emuworld.tasks.run_folder import append_records, read_records

SUITE = "robot-331"
DATA = Path(__file__).parent / "data" / "robot_331.json"
PLANS = ("oracle", "nothing", "random")
FORMAT = 1


class SuiteError(ValueError):
    """The suite's file, or a folder of records, is not what this release wrote."""


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


# Running --------------------------------------------------------------------------------------------------

OnDone = Callable[[int, int], None]


def run_suite(
    out: Path,
    *,
    plan: str = "oracle",
    tasks: Sequence[Task] | None = None,
    workers: int = 0,
    repeats: int = 1,
    on_done: OnDone | None = None,
) -> list[dict[str, Any]]:
    """Execute a plan of `PLANS` on every task; returns all records, in the order of the tasks.

    Records are kept in `out`/records.jsonl as they come, and those that are there already are not run again.
    `workers`: processes, 0 = one a core; `repeats`: executions of each task from a fresh scene, of which a
    record says in `same` whether they ended in one state. `on_done(done, total)` reports progress.
    Raises SuiteError where `out` holds records of other tasks, plans or versions.
    """
    tasks = load_suite() if tasks is None else tuple(tasks)
    _open_folder(out, tasks, plan=plan, repeats=repeats)
    stored = {record["index"]: record for record in read_records(out / "records.jsonl")}
    missing = [index for index in range(len(tasks)) if index not in stored]
    total = len(tasks)
    if missing:
        with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
            waiting = [
                pool.submit(_record, index, tasks[index].to_dict(), plan, repeats) for index in missing
            ]
            for future in as_completed(waiting):
                record = future.result()
                append_records(out / "records.jsonl", [record])
                stored[record["index"]] = record
                if on_done is not None:
                    on_done(len(stored), total)
    return [stored[index] for index in range(total)]


def _record(index: int, values: dict[str, Any], plan: str, repeats: int) -> dict[str, Any]:
    """One task's record; runs in a worker."""
    task = Task.from_dict(values)
    steps = plan_for(task, plan)
    runs = [execute_plan(task, steps) for _ in range(repeats)]
    return {
        "kind": plan,
        "index": index,
        "family": task.family,
        "variation": task.variation,
        "tags": list(task.tags),
        "instruction": task.instruction,
        "same": all(run == runs[0] for run in runs),
        **dataclasses.asdict(runs[0]),
    }


def _open_folder(out: Path, tasks: Sequence[Task], *, plan: str, repeats: int) -> None:
    """Write what the records belong to, or check that those which are there belong to the same."""
    mine = {
        "suite": SUITE,
        "format": FORMAT,
        "plan": plan,
        "repeats": repeats,
        "tasks": suite_hash([task.to_dict() for task in tasks]),
        "mujoco": mujoco.__version__,
    }
    path = out / "run.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mine, indent=1) + "\n")
        return
    stored = json.loads(path.read_text())
    differ = [key for key in mine if stored.get(key) != mine[key]]
    if differ:
        raise SuiteError(
            f"{out} holds records of another run ({', '.join(differ)} differ); choose another folder"
        )
