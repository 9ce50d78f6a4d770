"""Figures of the robot suite out of records whose values are known, its bars, its table and its page."""

from pathlib import Path
from typing import Any

import pytest

from emuworld.tasks.robot.suite_page import robot_page, robot_table
from emuworld.tasks.robot.suite_summary import compare, mcnemar, summarise_robot


def step(*, done: bool = True, clean: bool = True) -> dict[str, Any]:
    keyframe = {
        "num_expected": 3,
        "num_seen": 3 if clean else 2,
        "missing": [] if clean else ["red cube"],
        "duplicated": [],
        "moved_bystanders": [],
        "unsupported": [],
        "is_clean": clean,
        "drift": {"photometric": 1.0, "camera_px": 0.5, "residual": 2.0, "ssim": 0.9},
    }
    return {
        "text": "put the red cube in the blue bin",
        "subtask": {},
        "executable": True,
        "done": done,
        "reached": done,
        "reason": "done" if done else "there is no free place for the red cube there",
        "keyframe": keyframe,
    }


def scene(index: int, *, success: bool, picture: bool = False, kind: str = "scene") -> dict[str, Any]:
    return {
        "kind": kind,
        "index": index,
        "family": "holders" if index % 2 else "sorting",
        "variation": "seen",
        "phrasing": "plain",
        "goal_in_picture": picture,
        "success": success,
        "once": True,
        "facts": {"In(a, b)": success, "On(c, d)": True, "NotMoved(e)": True},
        "aims": ["In(a, b)", "On(c, d)"],
        "valid": True,
        "executable": True,
        "in_a_row": 2 if success else 1,
        "num_subtasks": 2,
        "num_imagined": 12,
        "steps": [step(), step(done=success, clean=success)],
        "failing_step": None if success else 1,
        "blame": None if success else "plan",
    }


def judged(index: int, *, finds: bool, alarm: bool) -> dict[str, Any]:
    none: dict[str, list[str]] = {name: [] for name in ("missing", "duplicated", "moved", "unsupported")}
    found = none | ({"missing": ["red cube"]} if finds else {})
    true = none | ({"duplicated": ["blue ball"]} if alarm else {})
    return {
        "kind": "judges",
        "index": index,
        "place_error_m": 0.002,
        "pictures": [
            {"name": "true frame", "there": none, "found": true},
            {"name": "missing", "there": none | {"missing": ["red cube"]}, "found": found},
        ],
    }


def run(agent: str = "planner", *, wall_s: float = 60.0) -> dict[str, Any]:
    return {"settings": {"agent": agent, "use": "both"}, "wall_s": wall_s}


def test_mcnemar_is_the_exact_binomial() -> None:
    assert mcnemar(0, 0) == 1.0 and mcnemar(4, 4) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32) and mcnemar(0, 5) == mcnemar(5, 0)
    assert mcnemar(9, 1) == pytest.approx(2 * 11 / 1024)


def test_runs_are_compared_on_the_scenes_that_both_have() -> None:
    mine = [scene(index, success=index < 8) for index in range(10)]
    other = [scene(index, success=index < 2) for index in range(1, 12)]
    found = compare(mine, other)
    assert [found[key] for key in ("num_scenes", "both", "only_mine", "only_other", "neither")] == [
        9,
        1,
        6,
        0,
        2,
    ]
    assert found["difference"]["value"] == pytest.approx(6 / 9) and found["p"] == pytest.approx(2 / 64)


def test_figures_are_those_of_the_records() -> None:
    records = [scene(index, success=index != 3, picture=index < 2) for index in range(4)]
    records += [scene(index, success=False, picture=True, kind="use text") for index in range(2)]
    records += [judged(0, finds=True, alarm=False), judged(1, finds=False, alarm=True)]
    figures = summarise_robot(records, run())
    assert figures["num_scenes"] == 4 and figures["ladder"]["success"]["value"] == 0.75
    assert figures["ladder"]["all_reached"]["value"] == 0.75 and figures["ladder"]["valid"]["value"] == 1.0
    assert figures["by"]["family"]["holders"]["success"]["value"] == 0.5
    assert figures["by"]["goal place"]["only in the picture"]["success"]["count"] == 2
    assert figures["share_of_goals"]["value"] == pytest.approx(3.5 / 4)
    assert figures["subgoals"]["value"] == pytest.approx(7 / 8)
    assert figures["in_a_row"]["mean"]["value"] == 1.75
    assert figures["in_a_row"]["at_least"]["2"]["value"] == 0.75
    failures = figures["failures"]
    assert failures["count"] == 1 and failures["blame"]["plan"]["value"] == 1.0
    assert failures["first_failing_step"] == {"2": 1} and failures["stopped_short"]["value"] == 0.0
    assert failures["reasons"] == {"there is no free place for the cube there": 1}
    assert figures["keyframes"]["num_pictures"] == 8
    assert figures["keyframes"]["missing"]["value"] == pytest.approx(1 / 8)
    assert figures["keyframes"]["drift"]["camera_px"]["value"] == pytest.approx(0.5)
    assert {name: rate["value"] for name, rate in figures["uses"].items()} == {"text": 0.0, "both": 1.0}
    faults = figures["judges"]["faults"]
    assert (
        faults["missing"]["false_negative"]["value"] == faults["duplicated"]["false_positive"]["value"] == 0.5
    )
    assert figures["judges"]["place_error_mm"]["value"] == pytest.approx(2.0)


def test_bars_are_met_exactly_where_the_figures_reach_them() -> None:
    solved = [scene(index, success=index < 6, picture=True) for index in range(10)]
    poor = [scene(index, success=False, picture=True) for index in range(10)]
    bars = summarise_robot(solved, run(), {"text-only": poor, "self": solved})["bars"]
    assert [one["met"] for one in bars.values()] == [True, True, True, True, False]
    assert not any(one["met"] for name, one in summarise_robot(poor, run())["bars"].items() if "succ" in name)
    oracle = summarise_robot(solved, run("oracle", wall_s=901.0))["bars"]
    assert [one["met"] for one in oracle.values()] == [False, False]
    assert [one["met"] for one in summarise_robot(poor, run("none"))["bars"].values()] == [True]
    assert [one["met"] for one in summarise_robot(solved, run("random"))["bars"].values()] == [False]


def test_table_and_page_hold_the_figures(tmp_path: Path) -> None:
    records = [scene(index, success=index != 3, picture=index < 2) for index in range(4)]
    records += [scene(0, success=False, picture=True, kind="use text"), judged(0, finds=True, alarm=True)]
    other = [scene(index, success=False, picture=True) for index in range(4)]
    figures = summarise_robot(records, run(), {"text-only": other})
    lines = robot_table(figures).splitlines()
    assert lines[1].split()[:4] == ["all", "4", "100.0", "%"] and len({len(x) for x in lines[:2]}) == 1
    page = "".join(robot_page(figures, tmp_path))
    assert all(
        words in page for words in ("text-only", "words alone", "to blame: plan", "hovers", "bystander")
    )


def test_nothing_run_is_no_figure(tmp_path: Path) -> None:
    figures = summarise_robot([], run("oracle"))
    assert figures["bars"] == {} and figures["ladder"]["success"]["value"] is None
    assert robot_page(figures, tmp_path) and robot_table(figures)
