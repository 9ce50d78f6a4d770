"""The frozen suite: what is in it, and that its checks hold and can fail."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from emuworld.envs.tabletop.layout import TablePlan
from emuworld.envs.tabletop.orders import FAMILY_COUNTS
from emuworld.envs.tabletop.plans import VARIATIONS
from emuworld.envs.tabletop.scene import TableScene
from emuworld.tasks.robot.freeze import check, out_of_view, places
from emuworld.tasks.robot.suite import DATA, SuiteError, execute_plan, load_suite, plan_for

TASKS = load_suite()
# The first of each family; all 331 are checked when the suite is frozen.
FIRST = [next(i for i, task in enumerate(TASKS) if task.family == family) for family in FAMILY_COUNTS]


def test_it_holds_what_it_promises() -> None:
    assert len(TASKS) == 331
    assert Counter(task.family for task in TASKS) == FAMILY_COUNTS
    assert [(task.family, task.variation) for task in TASKS] == [(p.family, p.variation) for p in places()]
    assert all(
        place.sort is None or place.sort in task.tags for place, task in zip(places(), TASKS, strict=True)
    )
    variations = Counter(task.variation for task in TASKS)
    assert set(variations) == set(VARIATIONS) and min(variations.values()) >= 30
    assert sum(task.goal_in_picture for task in TASKS) >= 20
    assert all(len(set(task.instructions)) >= 3 for task in TASKS)
    assert len({(task.family, task.seed) for task in TASKS}) == 331


def test_scenes_are_those_of_the_test_split_and_the_frozen_ones() -> None:
    assert {task.scene["origin"]["split"] for task in TASKS} == {"test"}
    for row in json.loads(DATA.read_text())["tasks"][::15]:
        assert TableScene.from_dict(row["scene"]).scene_hash() == row["scene_hash"]


@pytest.mark.parametrize("index", FIRST)
def test_the_oracle_succeeds_and_nothing_does_not(index: int) -> None:
    task = TASKS[index]
    scene = TableScene.from_dict(task.scene)
    assert not execute_plan(task, plan_for(task, "nothing"), scene=scene).success
    done = execute_plan(task, task.oracle, scene=scene)
    assert done.success and done.once


def test_a_check_can_fail() -> None:
    task, other = TASKS[FIRST[-3]], TASKS[FIRST[2]]
    assert check(task) is None
    assert check(replace(task, oracle=other.oracle)) == "oracle fails"
    assert check(replace(task, goal=())) == "nothing succeeds"


def test_what_cannot_be_seen_is_refused() -> None:
    scene = TableScene.from_dict(TASKS[0].scene)
    assert out_of_view(scene) is None
    first, *others = scene.plan.objects
    aside = replace(first, position=(0.5, -0.95, first.position[2]))
    assert out_of_view(TableScene(TablePlan(objects=(aside, *others)))) == first.name


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    values = json.loads(DATA.read_text())
    values["tasks"][3]["instruction"] = "win"
    (tmp_path / "suite.json").write_text(json.dumps(values))
    with pytest.raises(SuiteError, match="changed by hand"):
        load_suite(tmp_path / "suite.json")
    (tmp_path / "old.json").write_text(json.dumps({**values, "format": 0}))
    with pytest.raises(SuiteError, match="format 0"):
        load_suite(tmp_path / "old.json")


def test_an_unknown_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of oracle"):
        plan_for(TASKS[0], "luck")
