"""How `robot-331` was frozen: how many tasks of which family, what is new in them, and the checks of each.

A place in the suite is filled with the first task of its own seeds that passes every check; each place is
filled alone, so the result does not depend on the number of processes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from emuworld.envs.subtasks import parse
from emuworld.envs.table_plans import Task, sample_task, variations_of
from emuworld.envs.table_scene import TableScene
from emuworld.tasks.robot_suite import FORMAT, SUITE, execute_plan, plan_for, suite_hash

COUNTS = {
    "pick-place": 60,
    "sorting": 40,
    "stacking": 40,
    "holders": 40,
    "relations": 30,
    "pushing": 25,
    "drawers": 25,
    "buttons": 15,
    "open-put-close": 26,
    "chains": 30,
}
# Families whose tasks come in sorts: the tags that a family's places ask for, in turn.
SORTS = {
    "pick-place": ("goal in picture", "into a holder", "goal in picture", "into a holder", "in the hand"),
    "sorting": ("by shape", "by colour", "by shape"),
    "stacking": ("tower of two", "tower of three"),
    "holders": ("on a plate", "in a bin"),
    "relations": ("left of", "right of", "behind", "in front of"),
    "pushing": ("left", "right", "away", "closer"),
    "drawers": ("open", "close"),
    "chains": ("3 subtasks", "4 subtasks", "5 subtasks"),
}
# The sorts that can be a new composition, where not all can.
COMPOSED = {
    "pick-place": ("into a holder",),
    "sorting": ("by shape",),
    "holders": ("on a plate",),
    "relations": ("behind",),
    "pushing": ("closer",),
}
RANDOM_SEEDS = (0, 1, 2)  # of the random plans that must all fail
_SEEDS_A_PLACE = 1_000


@dataclass(frozen=True, kw_only=True)
class Place:
    """One of the 331: its number, family, what is new in it, and the tag that it asks for."""

    index: int
    family: str
    variation: str
    sort: str | None


def places() -> tuple[Place, ...]:
    """The 331 places, family by family; each takes its variations ("seen" twice) and sorts in turn."""
    found: list[Place] = []
    for family, count in COUNTS.items():
        turns = ("seen", *variations_of(family))
        for number in range(count):
            variation = turns[number % len(turns)]
            sorts: tuple[str | None, ...] = SORTS.get(family, (None,))
            if variation == "composition":
                sorts = COMPOSED.get(family, sorts)
            sort = sorts[(number + number // len(turns)) % len(sorts)]
            found.append(Place(index=len(found), family=family, variation=variation, sort=sort))
    return tuple(found)


def check(task: Task) -> str | None:
    """Why a task may not be in the suite, or None: the oracle reaches the goal twice with one result, nothing
    and random plans fail, no aim holds at the start, scene and words are stable."""
    scene = TableScene.from_dict(task.scene)
    if scene.to_dict() != json.loads(json.dumps(dict(task.scene))):
        return "scene changes when it is written"
    if scene.scene_hash() != TableScene.from_dict(scene.to_dict()).scene_hash():
        return "scene hash is not stable"
    if any(parse(str(step)) != step for step in task.oracle):
        return "oracle is not words"
    if execute_plan(task, (), scene=scene).success:
        return "nothing succeeds"
    first = execute_plan(task, task.oracle, scene=scene)
    if not first.success:
        return "oracle fails"
    if execute_plan(task, task.oracle) != first:
        return "oracle ends in two states"
    for seed in RANDOM_SEEDS:
        if execute_plan(task, plan_for(task, "random", seed=seed), scene=scene).success:
            return "random succeeds"
    return None


def fill(place: Place) -> tuple[Task, Counter[str]]:
    """The first task of a place's seeds that passes, and why those before it did not."""
    refused: Counter[str] = Counter()
    for seed in range(place.index * _SEEDS_A_PLACE, (place.index + 1) * _SEEDS_A_PLACE):
        task = sample_task(place.family, "test", seed, variation=place.variation)
        if place.sort is not None and place.sort not in task.tags:
            continue
        problem = check(task)
        if problem is None:
            return task, refused
        refused[problem] += 1
    raise AssertionError(f"no task for {place}: {dict(refused)}")


def freeze(path: Path, *, workers: int = 2, on_filled: Callable[[int], None] | None = None) -> Counter[str]:
    """Fill all places and write the suite's file; returns how many candidates were refused, by reason."""
    wanted = places()
    refused: Counter[str] = Counter()
    tasks: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for task, problems in pool.map(fill, wanted):
            scene_hash = TableScene.from_dict(task.scene).scene_hash()
            tasks.append({"scene_hash": scene_hash, **task.to_dict()})
            refused += problems
            if on_filled is not None:
                on_filled(len(tasks))
    values = {"suite": SUITE, "format": FORMAT, "hash": suite_hash(tasks), "tasks": tasks}
    lines = json.dumps({key: value for key, value in values.items() if key != "tasks"})[:-1]
    rows = ",\n".join(json.dumps(task, separators=(",", ":")) for task in tasks)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{lines}, "tasks": [\n{rows}\n]}}\n')
    return refused
