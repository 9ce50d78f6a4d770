"""How `robot-331` was frozen: how many tasks of which family, what is new in them, and the checks of each.

A place in the suite is filled with the first task of its own seeds that passes every check; each place is
filled alone, so the result does not depend on the number of processes. Made by

    python -m emuworld.tasks.robot.freeze

which refuses to write a suite where an oracle ends in another state in a second process.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from emuworld.envs.render import shared_renderer
from emuworld.envs.tabletop.orders import FAMILY_COUNTS
from emuworld.envs.tabletop.plans import Task, sample_task, variations_of
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.subtasks import parse
from emuworld.files import write_bytes
from emuworld.tasks.robot.suite import DATA, FORMAT, SUITE, execute_plan, plan_for, suite_hash

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
_SIDE_PX = 256  # of the picture in which everything has to be in view
_LEAST_SHARE = 0.6  # of the disc of an object's smallest radius that must be seen of it


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
    for family, count in FAMILY_COUNTS.items():
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
    """Why a task may not be in the suite, or None: everything is in view, the oracle reaches the goal twice
    with one result, nothing and random plans fail, scene and words are stable."""
    scene = TableScene.from_dict(task.scene)
    if (hidden := out_of_view(scene)) is not None:
        return f"{hidden.split()[-1]} is hidden or out of the picture"
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


def out_of_view(scene: TableScene) -> str | None:
    """A thing that the picture's border cuts, or a loose object of which too little is seen; None if all are
    well in view."""
    camera = scene.camera()  # rays: the same pixels on every machine
    geoms = shared_renderer("rays").segmentation(
        scene.model, scene.data, camera, height=_SIDE_PX, width=_SIDE_PX
    )
    owners = np.array([*(scene.identity_of_geom(geom) for geom in range(scene.model.ngeom)), ""])
    seen = owners[geoms]  # [H, W] names, "" where nothing is
    focal_px = _SIDE_PX / 2 / math.tan(camera.fovy_rad / 2)
    border = {*seen[0], *seen[-1], *seen[:, 0], *seen[:, -1]}
    for item in scene.plan.furniture:
        if item.name in border or not (seen == item.name).any():
            return item.name
    for one in scene.plan.objects:
        distance = float(np.linalg.norm(scene.state(one.name).position - camera.position))
        disc_px = math.pi * (min(one.size_m) * focal_px / distance) ** 2
        if one.name in border or (seen == one.name).sum() < _LEAST_SHARE * disc_px:
            return one.name
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
    """Fill all places and write the suite's file; returns how many candidates were refused, by reason.

    Raises RuntimeError where an oracle ends in another state in a second process.
    """
    refused: Counter[str] = Counter()
    tasks: list[Task] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for task, problems in pool.map(fill, places()):
            tasks.append(task)
            refused += problems
            if on_filled is not None:
                on_filled(len(tasks))
        ends = list(pool.map(end_of_oracle, tasks))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        again = list(pool.map(end_of_oracle, reversed(tasks)))[::-1]
    if ends != again:
        differ = [index for index, pair in enumerate(zip(ends, again, strict=True)) if pair[0] != pair[1]]
        raise RuntimeError(f"the oracle ends elsewhere in a second process at the places {differ}")
    write_suite(path, tasks)
    return refused


def end_of_oracle(task: Task) -> str:
    """Hash of the state after the oracle's plan."""
    return execute_plan(task, task.oracle).state_hash


def write_suite(path: Path, tasks: Sequence[Task]) -> None:
    """The suite's file: one task a line, with the hashes that tell changes of it."""
    rows = [{"scene_hash": TableScene.from_dict(one.scene).scene_hash(), **one.to_dict()} for one in tasks]
    head = json.dumps({"suite": SUITE, "format": FORMAT, "hash": suite_hash(rows)})[:-1]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    write_bytes(path, f'{head}, "tasks": [\n{lines}\n]}}\n'.encode())


if __name__ == "__main__":
    print(dict(freeze(DATA, on_filled=lambda done: print(f"{done} of {len(places())}", flush=True))))
