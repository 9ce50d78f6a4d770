"""The frozen suite: what is in it, that its checks hold, and that runs stop and go on."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from emuworld.envs.tabletop.scene import TableScene
from emuworld.tasks.robot.freeze import COUNTS, check, places
from emuworld.tasks.robot.suite import (
    DATA,
    SuiteError,
    execute_plan,
    load_suite,
    plan_for,
    run_suite,
)

TASKS = load_suite()
# Short ones of several families; all 331 are checked when the suite is frozen.
CHECKED = [next(i for i, task in enumerate(TASKS) if task.family == family) for family in COUNTS]


def test_it_holds_what_it_promises() -> None:
    assert len(TASKS) == 331
    assert Counter(task.family for task in TASKS) == COUNTS
    assert [(task.family, task.variation) for task in TASKS] == [(p.family, p.variation) for p in places()]
    assert all(
        place.sort is None or place.sort in task.tags for place, task in zip(places(), TASKS, strict=True)
    )
    assert min(Counter(task.variation for task in TASKS).values()) >= 30
    assert sum(task.goal_in_picture for task in TASKS) >= 20
    assert all(len(set(task.instructions)) >= 3 for task in TASKS)
    assert len({(task.family, task.seed) for task in TASKS}) == 331


def test_scenes_are_the_frozen_ones() -> None:
    for row in json.loads(DATA.read_text())["tasks"][::15]:
        assert TableScene.from_dict(row["scene"]).scene_hash() == row["scene_hash"]


@pytest.mark.parametrize("index", CHECKED)
def test_the_oracle_succeeds_twice_and_others_fail(index: int) -> None:
    assert check(TASKS[index]) is None


def test_a_check_can_fail() -> None:
    task = TASKS[CHECKED[0]]
    other = TASKS[CHECKED[2]]
    assert check(replace(task, oracle=other.oracle)) == "oracle fails"
    assert check(replace(task, goal=())) == "nothing succeeds"
    assert not execute_plan(task, plan_for(task, "nothing")).once


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    values = json.loads(DATA.read_text())
    values["tasks"][3]["instruction"] = "win"
    (tmp_path / "suite.json").write_text(json.dumps(values))
    with pytest.raises(SuiteError, match="changed by hand"):
        load_suite(tmp_path / "suite.json")
    (tmp_path / "old.json").write_text(json.dumps({**values, "format": 0}))
    with pytest.raises(SuiteError, match="format 0"):
        load_suite(tmp_path / "old.json")


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    tasks = [TASKS[index] for index in CHECKED[6:8]]
    done: list[tuple[int, int]] = []
    first = run_suite(tmp_path, tasks=tasks, workers=1, on_done=lambda *counts: done.append(counts))
    assert [record["success"] for record in first] == [True, True] and done == [(1, 2), (2, 2)]
    lines = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    # Killed while the last record was written.
    (tmp_path / "records.jsonl").write_text(lines[0] + lines[1][:40])
    again = run_suite(tmp_path, tasks=tasks, workers=1, on_done=lambda *counts: done.append(counts))
    assert again == first and done[2:] == [(2, 2)]
    with pytest.raises(SuiteError, match="plan differ"):
        run_suite(tmp_path, tasks=tasks, plan="nothing")


def test_an_unknown_plan_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one of oracle"):
        plan_for(TASKS[0], "luck")
