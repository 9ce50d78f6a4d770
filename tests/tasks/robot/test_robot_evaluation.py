"""The robot suite from end to end: files, resumption, figures, and what is refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from emuworld.tasks import evaluate
from emuworld.tasks.robot.evaluation import _mixed, all_cases
from emuworld.tasks.robot.scene_cases import spoken_task
from emuworld.tasks.robot.suite import load_suite
from emuworld.tasks.run_folder import read_records
from emuworld.tasks.suites import RobotSuite

TASKS = load_suite()


def suite(out: Path, **named: object) -> RobotSuite:
    settings = RobotSuite(
        agent="oracle", families="buttons", first=1, out=str(out), device="cpu", renderer="rays",
        size_px=96, workers=1, num_judged=0,
    )  # fmt: skip
    return replace(settings, **named)


def test_oracle_succeeds_resumes_and_pairs_with_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, int, int]] = []
    mine = suite(tmp_path / "oracle", repeats=2)
    figures = evaluate.run(mine, on_progress=lambda *call: calls.append(call))
    assert figures["ladder"]["success"]["value"] == 1.0 and figures["same"]["value"] == 1.0
    assert calls == [("robot-331: oracle", 1, 1)]
    (record,) = first = read_records(tmp_path / "oracle" / "records.jsonl")
    assert record["steps"][0]["reached"] and record["in_a_row"] == 1 and record["blame"] is None
    assert "met    oracle: success at the end, 1 scenes" in capsys.readouterr().out

    nothing = suite(tmp_path / "none", agent="none")
    assert evaluate.run(nothing)["failures"]["blame"]["plan"]["value"] == 1.0
    compared = evaluate.run(replace(mine, against=str(tmp_path / "none"), score_only=True))
    pair = compared["comparisons"]["none"]["all scenes"]
    assert (pair["only_mine"], pair["only_other"], pair["p"]) == (1, 0, 1.0)
    assert "scene by scene" in (tmp_path / "oracle" / "index.html").read_text()
    assert read_records(tmp_path / "oracle" / "records.jsonl") == first, "scoring runs nothing"
    assert {one.name for one in (tmp_path / "none" / "pictures").iterdir()} == {
        f"failure_buttons_{record['index']:05d}.npz"
    }
    with pytest.raises(ValueError, match="resume=false"):
        evaluate.run(replace(mine, repeats=1))
    for wrong, said in (
        ({"against": str(tmp_path / "nowhere")}, "holds no run"),
        ({"families": "x"}, "families=x"),
    ):
        with pytest.raises(ValueError, match=said):  # before anything runs
            evaluate.run(replace(mine, out=str(tmp_path / "new"), **wrong))
        assert not (tmp_path / "new").exists()


def test_a_planner_that_knows_nothing_has_the_words_alone(tiny_folder: str, tmp_path: Path) -> None:
    mine = suite(tmp_path, agent="planner", model=tiny_folder, size_px=64, num_plans=2, max_pictures=4)
    figures = evaluate.run(replace(mine, in_words=False, out=str(tmp_path / "own")))
    assert figures["ladder"]["success"]["value"] == 0.0
    assert not figures["bars"]["planner: success at the end, 1 scenes"]["met"]
    assert evaluate.run(mine)["ladder"]["valid"]["value"] == 1.0


def test_a_guide_that_knows_nothing_is_followed_all_the_same(tiny_folder: str, tmp_path: Path) -> None:
    mine = suite(tmp_path, agent="guide", model=tiny_folder, size_px=64, max_pictures=3, max_steps=2)
    assert evaluate.run(mine)["ladder"]["success"]["value"] == 0.0
    (record,) = read_records(tmp_path / "records.jsonl")
    assert record["num_imagined"] == len(record["steps"]) <= 2
    assert all(step["keyframe"] is not None for step in record["steps"])


@pytest.mark.parametrize("agent", ["oracle", "guide"])
def test_cases_are_scenes_uses_and_judges(agent: str) -> None:
    cases = all_cases(RobotSuite(agent=agent, families="pick-place, buttons", num_judged=5), TASKS)
    kinds = [case.kind for case in cases]
    picture_only = sum(task.goal_in_picture for task in TASKS)
    assert kinds.count("scene") == 75 and kinds.count("judges") == 5
    assert kinds.count("use text") == kinds.count("use keyframe") == picture_only
    assert {case.kind for case in all_cases(RobotSuite(agent="scripted"), TASKS)} == {"scene"}
    assert [case.index for case in all_cases(RobotSuite(agent="none", first=3), TASKS)] == [0, 1, 2]
    assert cases[-1].use == "both" and cases[75].use in ("text", "keyframe")


def test_a_run_cut_short_has_done_some_of_every_family() -> None:
    cases = all_cases(RobotSuite(agent="oracle"), TASKS)
    mixed = _mixed(cases)
    assert sorted((c.kind, c.index) for c in mixed) == sorted((c.kind, c.index) for c in cases)
    assert [c.kind for c in mixed] == [c.kind for c in cases], "scenes first, as before"
    families = [TASKS[case.index].family for case in mixed[:60]]
    assert len(set(families)) == len({task.family for task in TASKS})
    left = _mixed(cases[100:])
    assert left == [case for case in mixed if case in left], "what is left goes on in the same order"


def test_phrasings_take_turns() -> None:
    task = TASKS[0]
    count = len(task.instructions)
    turns = [spoken_task(task, "turns", index) for index in range(count)]
    assert [one.instruction for one, _ in turns] == list(task.instructions)
    assert turns[0][1] == "plain" and turns[-1][1] == "held out" and turns[1][1] == "other"
    assert spoken_task(task, "held-out", 0)[0].instruction == task.instructions[-1]


def test_wrong_settings_are_refused_before_anything_runs() -> None:
    for wrong in ({"agent": "luck"}, {"use": "hope"}, {"phrasing": "rude"}, {"repeats": 0}, {"first": -1}):
        with pytest.raises(ValueError, match="expected"):
            RobotSuite(**wrong)
    with pytest.raises(ValueError, match="families=cooking are unknown; expected some of pick-place"):
        all_cases(RobotSuite(families="cooking"), TASKS)
