"""Suites from end to end on a tiny random model: files, resumption, and figures that say so when they are
bad.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emuworld.envs.requests import HELD_OUT_OPENINGS
from emuworld.tasks import compare, evaluate
from emuworld.tasks.detector import Detector, DetectorConfig
from emuworld.tasks.edit_summary import BY_SHAPE, KNOWN_WORDS, OTHER_WORDS, UNHEARD_WORDS
from emuworld.tasks.run_folder import read_records
from emuworld.tasks.suites import EditPictures, ExploreTwin, TellTales, TextToImage


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An untrained detector: the files and shapes of any, the judgement of none."""
    path = tmp_path_factory.mktemp("judge") / "detector.safetensors"
    Detector(DetectorConfig(width=16, dilations=(1,))).save(path)
    return str(path)


def _twin(tiny_folder: str, judge: str, out: Path) -> ExploreTwin:
    return ExploreTwin(
        model=tiny_folder,
        detector=judge,
        out=str(out),
        device="cpu",
        size_px=64,
        workers=1,
        renderer="rays",
        num_starts=1,
        num_steps=2,
        num_shuffled=1,
        num_walks=1,
        walk_steps=4,
        num_turns=1,
        num_pictures=1,
    )


def test_explore_twin_writes_its_figures_resumes_and_scores_again(
    tiny_folder: str, judge: str, tmp_path: Path
) -> None:
    suite = _twin(tiny_folder, judge, tmp_path)
    calls: list[tuple[str, int, int]] = []
    figures = evaluate.run(suite, on_progress=lambda *call: calls.append(call))
    first = read_records(tmp_path / "records.jsonl")
    assert {(r["kind"], r["index"]) for r in first} == {("start", 0), ("walk", 0), ("turn", 0)}
    assert figures["psnr"]["whole"]["dream"][0]["value"] < 20, "random weights do not know the room"
    assert figures["psnr"]["whole"]["copy"][0]["count"] == 1
    assert ("explore-twin: starts", 1, 1) in calls
    page = (tmp_path / "index.html").read_text()
    assert "missed" in page and "MuJoCo" in page and "<svg" in page

    more = evaluate.run(replace(suite, num_starts=2, batch=4))
    second = read_records(tmp_path / "records.jsonl")
    assert [r for r in second if r["index"] == 0] == first, "what is stored is not made again"
    assert more["num_starts"] == 2 and more["shuffle_gap_db"][0]["count"] == 1
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["settings"]["num_starts"] == 2 and run["wall_s"] > 0 and "mujoco" in run["versions"]

    again = evaluate.run(replace(suite, score_only=True))
    assert again == more
    with pytest.raises(ValueError, match=r"of another run: num_steps was 2 and is 3; .*resume=false"):
        evaluate.run(replace(suite, num_steps=3))
    run["format"] = 1
    (tmp_path / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="format 1"):
        evaluate.run(replace(suite, score_only=True))


def test_t2i_judges_pictures_and_the_judge(tiny_folder: str, judge: str, tmp_path: Path) -> None:
    suite = TextToImage(
        model=tiny_folder,
        detector=judge,
        out=str(tmp_path),
        device="cpu",
        size_px=64,
        workers=1,
        renderer="rays",
        num_prompts=2,
    )
    figures = evaluate.run(suite)
    assert figures["num_prompts"] == 2
    assert figures["dream"]["one object"]["all_present"]["count"] == 1
    assert figures["dream"]["two objects"]["all_present"]["count"] == 1
    assert set(figures["detector"]) == {"precision", "recall"}
    assert "judge" in (tmp_path / "index.html").read_text()
    evaluate.run(replace(suite, phrasing="requests", out=str(tmp_path / "asked")))
    own, asked = (read_records(folder / "records.jsonl") for folder in (tmp_path, tmp_path / "asked"))
    for one, other in zip(own, asked, strict=True):
        assert one["asked"] == other["asked"] and one["prompt"] != other["prompt"]
        assert other["prompt"].lower().startswith(HELD_OUT_OPENINGS)


def test_a_summary_of_nothing_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without score_only"):
        evaluate.run(ExploreTwin(out=str(tmp_path / "none"), score_only=True))


def test_a_run_that_failed_before_its_first_case_bars_no_other(
    tiny_folder: str, judge: str, tmp_path: Path
) -> None:
    suite = replace(_twin(tiny_folder, judge, tmp_path), num_starts=0, num_walks=0)
    with pytest.raises(ValueError, match=r"no detector at .*detector=FILE"):
        evaluate.run(replace(suite, detector=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="holds no case: run the suite without score_only"):
        evaluate.run(replace(suite, score_only=True))
    with pytest.raises(ValueError, match="holds no case: these settings ask for none"):
        evaluate.run(replace(suite, num_turns=0))
    assert evaluate.run(suite)["num_turns"] == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"split": "tset"}, "split='tset' is unknown; expected one of train"),
        ({"phrasing": "plain"}, "phrasing='plain' is unknown"),
        ({"size_px": 100}, "size_px=100; expected a multiple of 16"),
        ({"num_starts": -1}, "num_starts=-1; expected 0 or more"),
        ({"num_branches": 0}, "num_branches=0; expected 1 or more"),
        ({"passes": (-1,)}, "passes"),
        ({"temperature": -0.5}, "temperature"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ExploreTwin(**wrong)


def test_x2i_judges_edits_and_the_judge(tiny_folder: str, judge: str, tmp_path: Path) -> None:
    suite = EditPictures(
        model=tiny_folder,
        detector=judge,
        out=str(tmp_path),
        device="cpu",
        size_px=64,
        workers=1,
        renderer="rays",
        num_edits=2,
    )
    figures = evaluate.run(suite)
    assert figures["num_edits"] == 2
    assert set(figures["groups"]) - {KNOWN_WORDS, OTHER_WORDS} == {"all", "rooms", "tables", "add"}
    assert figures["groups"]["rooms"]["dream"]["success"]["count"] == 1
    assert figures["judged"]["after"]["kept"]["value"] == 1.0
    first = read_records(tmp_path / "records.jsonl")
    assert evaluate.run(replace(suite, score_only=True)) == figures
    page = (tmp_path / "index.html").read_text()
    assert "rest kept" in page and first[0]["instruction"] in page

    figures = evaluate.run(replace(suite, phrasing="made-up", out=str(tmp_path / "made-up")))
    assert figures["groups"][UNHEARD_WORDS]["dream"]["success"]["count"] == 2
    unheard = read_records(tmp_path / "made-up/records.jsonl")
    for plain, other in zip(first, unheard, strict=True):
        assert plain["target"] == other["target"] and plain["instruction"] != other["instruction"]
        assert other["instruction"].endswith(plain["instruction"].partition(" ")[2])
    figures = evaluate.run(replace(suite, phrasing="by-shape", num_edits=3, out=str(tmp_path / "by-shape")))
    assert figures["groups"][BY_SHAPE]["dream"]["success"]["count"] == 1  # adding names nothing that is there
    with pytest.raises(ValueError, match="phrasing='canonical' is unknown; expected one of split, made-up"):
        replace(suite, phrasing="canonical")


def test_story_judges_tales_resumes_and_compares(
    tiny_folder: str, judge: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = TellTales(
        model=tiny_folder,
        detector=judge,
        out=str(tmp_path / "one"),
        device="cpu",
        size_px=64,
        workers=1,
        renderer="rays",
        num_tales=1,
        num_pictures=1,
    )
    figures = evaluate.run(suite)
    first = read_records(tmp_path / "one/records.jsonl")
    assert len(first) == 1 and figures["num_panels"] == len(first[0]["commands"]) >= 4
    assert "other tale" in capsys.readouterr().out
    page = (tmp_path / "one/index.html").read_text()
    assert first[0]["prompt"] in page and first[0]["commands"][1] in page and "judge sees" in page

    figures = evaluate.run(replace(suite, num_tales=3, batch=2))
    second = read_records(tmp_path / "one/records.jsonl")
    assert second[0] == first[0], "what is stored is not made again"
    assert figures["num_tales"] == 3 and figures["overall"]["dream"]["right"]["value"] < 0.5
    assert figures["overall"]["shuffled"]["cast"]["count"] == 3
    assert evaluate.run(replace(suite, score_only=True)) == figures

    evaluate.run(replace(suite, num_tales=3, out=str(tmp_path / "two")))
    assert read_records(tmp_path / "two/records.jsonl") == second, "alone and in a batch"
    sides = {"before": str(tmp_path / "one"), "after": str(tmp_path / "two")}
    compared = compare.run(compare.Compare(**sides, out=str(tmp_path / "compared")))
    scores = compared["suites"]["story"]["scores"]
    assert scores["panels with everybody there"]["difference"]["value"] == 0.0
    assert scores["panels that show what happens"]["difference"]["count"] == 3
