"""Before and after training: differences known beforehand, what is named as worse, what is refused."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emuworld import cli
from emuworld.tasks.compare import Compare, run
from emuworld.tasks.comparison import GAIN, LOSS, NO_DIFFERENCE, verdict
from emuworld.tasks.metrics import Estimate, bootstrap, bootstrap_of_groups
from emuworld.tasks.run_folder import FORMAT, PictureRow, Pictures, append_records, save_pictures

CASES: dict[str, Any] = {
    "model": "m",
    "passes": [],
    "seed": 0,
    "size_px": 64,
    "split": "test",
    "detector": "judge",
}
SETS = {"all_present": 0, "colours_present": 1, "shapes_present": 2}


def _store(folder: Path, suite: str, records: Sequence[dict[str, Any]], **case_settings: Any) -> Path:
    folder.mkdir(parents=True)
    settings = CASES | case_settings
    told = {
        "suite": suite,
        "format": FORMAT,
        "settings": settings,
        "case_settings": settings,
        "model_fingerprint": settings["model"] * 4,
        "date": "2026-01-01",
        "wall_s": 1.0,
        "command": "emuworld eval",
    }
    (folder / "run.json").write_text(json.dumps(told))
    append_records(folder / "records.jsonl", records)
    return folder


def _t2i(folder: Path, *found: Sequence[bool], prompt: str = "a ball", **case_settings: Any) -> Path:
    """A run whose cases have all objects, all colours and all shapes as told; one list serves for all."""
    columns = found if len(found) == 3 else found * 3
    records = [
        {"kind": "prompt", "index": i, "prompt": f"{prompt} {i}",
         "judged": {"dream": {name: bool(columns[at][i]) for name, at in SETS.items()}}}
        for i in range(len(columns[0]))
    ]  # fmt: skip
    return _store(folder, "t2i", records, **case_settings)


def _explore(folder: Path, psnrs: Sequence[float | None], **case_settings: Any) -> Path:
    records = [
        {"kind": "start", "index": i, "branches": {"hits": [True]},
         "psnr": {region: {"dream": [value]} for region in ("whole", "seen")}}
        for i, value in enumerate(psnrs)
    ]  # fmt: skip
    return _store(folder, "explore-twin", records, **case_settings)


def _robot(folder: Path, successes: Sequence[bool], agent: str) -> Path:
    records = [
        {"kind": "scene", "index": i, "success": one, "facts": {"on": one}} for i, one in enumerate(successes)
    ]
    return _store(folder, "robot-331", records, agent=agent, use="both")


def _settings(place: Path, log: str = "") -> Compare:
    return Compare(before=str(place / "before"), after=str(place / "after"), log=log, out=str(place / "page"))


def _log(path: Path, lines: Sequence[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return str(path)


# What is better and what is worse ------------------------------------------------------------------------


def test_known_differences_are_found_and_a_loss_is_named(tmp_path: Path) -> None:
    half = [i % 2 == 0 for i in range(80)]
    _t2i(tmp_path / "before/t2i", half, half, half)
    most = [i % 2 == 0 or i % 4 == 1 for i in range(80)]  # a quarter of the cases gained
    fewer = [found and i % 8 > 0 for i, found in enumerate(half)]  # an eighth lost
    one_less = [found and i > 0 for i, found in enumerate(half)]
    _t2i(tmp_path / "after/t2i", most, fewer, one_less, model="n")
    summary = run(_settings(tmp_path))
    assert json.loads((tmp_path / "page/summary.json").read_text()) == summary
    scores = summary["suites"]["t2i"]["scores"]
    assert [one["difference"]["value"] for one in scores.values()] == pytest.approx([0.25, -0.125, -0.0125])
    assert [one["verdict"] for one in scores.values()] == [GAIN, LOSS, NO_DIFFERENCE]
    assert scores["all named objects there"]["before"]["value"] == 0.5
    html = (tmp_path / "page/index.html").read_text()
    top = html[: html.index("Every score")]
    assert "<p>Significantly worse: t2i: all colours there, -12.5 points (" in top
    assert (
        "<p>Lower, but not significantly (chance may explain it): t2i: all shapes there, -1.2 points" in top
    )
    assert "all named objects" not in top
    assert '<td class="ok">significant gain</td>' in html and '<td class="miss">significant loss</td>' in html


def test_where_nothing_is_lower_the_page_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for side in ("before", "after"):
        _t2i(tmp_path / side, [True, False] * 10)
    summary = run(_settings(tmp_path))
    assert "No score is lower than before." in (tmp_path / "page/index.html").read_text()
    assert "No score is lower than before." in capsys.readouterr().out
    assert {one["verdict"] for one in summary["suites"]["t2i"]["scores"].values()} == {NO_DIFFERENCE}
    assert "both runs are of one model (mmmm)" in (tmp_path / "page/index.html").read_text()


def test_only_cases_with_a_value_in_both_runs_count(tmp_path: Path) -> None:
    """A value that one run lacks would move the means of the two sides by what is no difference."""
    base = [20.0 + i for i in range(12)]
    _explore(tmp_path / "before", [None, *base[1:]])
    _explore(tmp_path / "after", [value + 2.0 for value in base[:10]])
    step = run(_settings(tmp_path))["suites"]["explore-twin"]["scores"]["one step ahead, dB"]
    assert step["difference"] == {"value": 2.0, "low": 2.0, "high": 2.0, "count": 9}
    assert (
        step["before"]["value"] == np.mean(base[1:10]) and step["after"]["value"] == np.mean(base[1:10]) + 2
    )


def test_suites_count_alike_in_the_mean_and_decibels_are_brought_to_its_scale(tmp_path: Path) -> None:
    _explore(tmp_path / "before/explore", [20.0] * 10)
    _explore(tmp_path / "after/explore", [22.0] * 10)  # a tenth of the way from 10 to 30 dB
    _t2i(tmp_path / "before/t2i", [False] * 40)
    _t2i(tmp_path / "after/t2i", [i < 20 for i in range(40)])
    mean = run(_settings(tmp_path))["mean"]
    assert mean["before"]["value"] == pytest.approx(0.25) and mean["after"]["value"] == pytest.approx(0.55)
    assert mean["difference"]["value"] == pytest.approx(0.3) and mean["verdict"] == GAIN
    assert mean["difference"]["count"] == 50


def test_runs_are_paired_by_suite_and_agent(tmp_path: Path) -> None:
    for side, planned in (("before", 2), ("after", 9)):
        _robot(tmp_path / side / "robot-331/planner", [i < planned for i in range(10)], "planner")
        _robot(tmp_path / side / "robot-331/oracle", [True] * 10, "oracle")
    _t2i(tmp_path / "before/t2i", [True])
    summary = run(_settings(tmp_path))
    found = {name: one["scores"]["success at the end"] for name, one in summary["suites"].items()}
    assert {name: one["difference"]["value"] for name, one in found.items()} == {
        "robot-331, planner": pytest.approx(0.7),
        "robot-331, oracle": 0.0,
    }
    assert summary["only_before"] == ["t2i"]
    assert "Run before only, and left out: t2i." in (tmp_path / "page/index.html").read_text()


def test_other_numbers_of_passes_pair_and_are_told(tmp_path: Path) -> None:
    _t2i(tmp_path / "before", [True] * 8, passes=[0])
    _t2i(tmp_path / "after", [False] * 8, passes=[4])
    assert run(_settings(tmp_path))["suites"]["t2i"]["scores"]["all shapes there"]["verdict"] == LOSS
    html = (tmp_path / "page/index.html").read_text()
    assert "in other numbers of passes, token by token before and 4 after" in html


def test_few_cases_give_no_verdict() -> None:
    sure = Estimate(value=1.0, low=1.0, high=1.0, count=6)
    assert verdict(sure) == GAIN and verdict(replace(sure, count=5)) == NO_DIFFERENCE
    assert verdict(Estimate(value=-1.0, low=-2.0, high=0.0, count=99)) == NO_DIFFERENCE


def test_groups_of_other_sizes_count_alike_and_one_is_the_plain_bootstrap() -> None:
    rng = np.random.default_rng(0)
    few, many = rng.normal(0.0, 1.0, 50), rng.normal(4.0, 1.0, 5000)
    both = bootstrap_of_groups([few, many])
    assert both.value == pytest.approx((few.mean() + many.mean()) / 2) and both.count == 5050
    by_hand = 1.96 / 2 * np.hypot(few.std() / 50**0.5, many.std() / 5000**0.5)
    assert (both.high - both.low) / 2 == pytest.approx(by_hand, rel=0.15)
    assert bootstrap_of_groups([few]) == bootstrap(few)


# Pictures and curves -------------------------------------------------------------------------------------


def test_pictures_of_both_runs_stand_beside_each_other(tmp_path: Path) -> None:
    true = np.full((4, 4, 3), 7, np.uint8)
    for side, grey in (("before", 60), ("after", 200)):
        folder = _t2i(tmp_path / side, [True] * 8)
        painted = np.full((4, 4, 3), grey, np.uint8)
        row = PictureRow(name="", frames=[painted, true], notes=[f"judge: {side}", ""])
        kept = Pictures(title="a <red> ball", columns=["painted", "simulated"], rows=[row])
        save_pictures(folder / "pictures/prompt_00000.npz", kept)
        save_pictures(folder / f"pictures/prompt_0000{1 + (side == 'after')}.npz", kept)  # one run's alone
    run(_settings(tmp_path))
    html = (tmp_path / "page/index.html").read_text()
    assert html.count("<img ") == 3 and html.count("a &lt;red&gt; ball") == 1
    heads = [f"<th scope=col>{one}</th>" for one in ("painted, before", "painted, after", "simulated")]
    assert "".join(heads) in html
    assert html.index("judge: before") < html.index("judge: after")


def test_rewards_by_term_are_drawn_training_and_held_out_apart(tmp_path: Path) -> None:
    for side in ("before", "after"):
        _t2i(tmp_path / side, [True] * 8)
    steps: list[dict[str, Any]] = [
        {"step": i, "reward": 4.0 + i / 100, "reward_objects": 3.0, "kl": 0.1, "loss": 0.0}
        for i in range(1, 101)
    ]
    steps[49] |= {"held_out_reward": 6.0, "held_out_reward_objects": 5.0}
    (tmp_path / "grpo").mkdir()
    (tmp_path / "grpo/before.json").write_text(json.dumps({"held_out_reward": 5.0}))
    log = _log(tmp_path / "grpo/grpo.log.jsonl", steps)
    with Path(log).open("a") as file:
        file.write('{"step": 101, "rew')  # a kill
    run(_settings(tmp_path, log))
    html = (tmp_path / "page/index.html").read_text()
    training, held = html.index("On training prompts"), html.index("On held-out prompts")
    charts = {at: html[at : html.index("</svg></div>", at)] for at in (training, held)}
    for words in charts.values():
        assert words.count("<svg ") == 2 and "reward, whole" in words and "reward: objects" in words
    assert charts[training].count("<circle ") == 80, "100 steps are put together into 40 points a curve"
    assert charts[held].count("<circle ") == 3, "one measurement of each, and the whole before"
    assert "KL to the start" in html[held:]


# What is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 1}, "seed was 0 before and 1 after"),
        ({"split": "train"}, "split was 'test' before and 'train' after"),
        ({"size_px": 128}, "size_px was 64 before and 128 after"),
        ({"detector": "other"}, "detector was 'judge' before and 'other' after"),
    ],
)
def test_runs_of_other_settings_do_not_pair(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    _t2i(tmp_path / "before", [True] * 8)
    _t2i(tmp_path / "after", [True] * 8, **changed)
    with pytest.raises(ValueError, match=f"{said}; run one of them again"):
        run(_settings(tmp_path))
    assert not (tmp_path / "page").exists()


def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    _t2i(tmp_path / "before/t2i", [True] * 8)
    (tmp_path / "after").mkdir()
    config = _settings(tmp_path)
    with pytest.raises(ValueError, match=r"after=.* holds no run .* give the out= of emuworld eval"):
        run(config)
    robot = _robot(tmp_path / "after/robot", [True] * 8, "none")
    with pytest.raises(ValueError, match=r"no suite was run on both sides: .* t2i, .* robot-331, none;"):
        run(config)
    _t2i(tmp_path / "before/again", [True] * 8)
    with pytest.raises(ValueError, match=r"before=.* holds two runs of t2i"):
        run(config)
    with pytest.raises(ValueError, match="holds a run, whose page would be overwritten"):
        run(replace(config, out=str(robot)))
    _store(tmp_path / "after/nothing", "nothing", [])
    with pytest.raises(ValueError, match="nothing cannot be compared yet"):
        run(replace(config, before=str(tmp_path / "before/t2i")))


def test_runs_without_a_common_case_and_of_other_cases_are_refused(tmp_path: Path) -> None:
    _t2i(tmp_path / "before", [True] * 8)
    _t2i(tmp_path / "after", [])
    with pytest.raises(ValueError, match=r"no case in common: .* holds 8 cases, .* 0; let both runs end"):
        run(_settings(tmp_path))
    _t2i(tmp_path / "other", [True] * 8, prompt="a box")
    with pytest.raises(ValueError, match=r"its prompt was 'a ball 0' before and 'a box 0' after"):
        run(replace(_settings(tmp_path), after=str(tmp_path / "other")))


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("", "holds no whole line"),
        ("not json\n", "line 1: not valid JSON"),
        ('{"step": 1, "reward": 1.0}\n[2]\n', "line 2: no JSON object"),
        ('{"step": 1, "loss": 1.0}\n', "line 1 has no step with its reward"),
        (b"\xff\xfe\n", "is not UTF-8"),
        (None, "is no file"),
    ],
)
def test_a_log_that_is_none_is_refused(tmp_path: Path, written: str | bytes | None, said: str) -> None:
    for side in ("before", "after"):
        _t2i(tmp_path / side, [True] * 8)
    log = tmp_path / "grpo.log.jsonl"
    if written is not None:
        log.write_bytes(written if isinstance(written, bytes) else written.encode())
    with pytest.raises(ValueError, match=f"{said}.*expected grpo.log.jsonl"):
        run(_settings(tmp_path, str(log)))


def test_the_command_line_tells_what_got_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _t2i(tmp_path / "before", [True] * 8)
    _t2i(tmp_path / "after", [False] * 8)
    words = [f"{side}={tmp_path / side}" for side in ("before", "after")]
    assert cli.main(["compare", *words, f"out={tmp_path / 'page'}"]) == 0
    assert "Significantly worse: t2i: all named objects there, -100.0 points" in capsys.readouterr().out
    assert cli.main(["compare", *words, f"out={tmp_path / 'page'}", f"log={tmp_path / 'no'}"]) == 1
    assert "is no file" in capsys.readouterr().err
