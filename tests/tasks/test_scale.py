"""`emuworld bench what=published-34b` with sizes that a CPU bears: the same code, the same parts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from emuworld.answers import load_story
from emuworld.tasks import scale, step_times
from emuworld.tasks.published_rig import PublishedSpeed
from emuworld.tasks.run_log import RunLog

TINY: dict[str, Any] = {
    "device": "cpu",
    "size": "tiny",
    "num_layers": 1,
    "vision": "tiny",
    "text": "",
    "pictures": (8,),
    "story_side": 8,
    "story_pictures": 2,
    "contexts": (40,),
    "rows": (2, 3),
    "steps": 3,
    "published_tokens": 2,
}


def read(path: Path) -> dict[str, dict[str, Any]]:
    return {record["part"]: record for record in map(json.loads, path.read_text().splitlines())}


def test_every_part_gives_figures_and_the_answers_can_be_read(tmp_path: Path) -> None:
    parts = read(scale.run(PublishedSpeed(out=str(tmp_path), **TINY)))
    assert not [part for part, figures in parts.items() if "error" in figures or "skipped" in figures]
    assert parts["weights"]["text_tokenizer"] == "built-in"
    assert parts["agreement"]["plain, eager, 1 tokens"]["logits"] == 0.0
    picture, story = parts["t2i 8x8"], parts["story"]
    assert picture["tokens"] == 1 + 3 + 1 + 8 * 9 and picture["ms_a_token"] > 0.0
    assert story["ended"] and story["pb_bytes"] == (tmp_path / "story.pb").stat().st_size
    faster = parts["summary"]["8x8"]
    assert faster["times_faster"] == pytest.approx(
        faster["published_ms_a_token"] / picture["ms_a_token"], abs=0.01
    )
    drawn = load_story(tmp_path / "t2i-8.pb").segments
    assert [image.to_array().shape for segment in drawn for image in segment.images] == [(128, 128, 3)]
    told = load_story(tmp_path / "story.pb")
    assert sum(len(segment.images) for segment in told.segments) == 2 and len(told.reference_images) == 1


def test_a_part_that_fails_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **settings: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(step_times, "published_way", broken)
    parts = read(scale.run(PublishedSpeed(out=str(tmp_path), **{**TINY, "story_pictures": 0})))
    assert parts["published way, context 40, sdpa attention"]["error"] == "RuntimeError: out of memory"
    assert parts["summary"].keys() == {"part", "took_s"} and parts["t2i 8x8"]["ms_a_token"] > 0.0


def test_parts_without_time_are_skipped(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "log.jsonl", budget_s=5.0)
    assert log.run("short", lambda: {"ms": 1.0}, expected_s=1.0) == {"ms": 1.0}
    assert log.run("long", lambda: {"ms": 2.0}, expected_s=100.0) is None
    assert "would take 100 s" in read(tmp_path / "log.jsonl")["long"]["skipped"] and set(log.figures) == {
        "short"
    }


def test_settings_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'huge'"):
        PublishedSpeed(size="huge")
    with pytest.raises(ValueError, match="story_pictures must be 0 to"):
        PublishedSpeed(story_pictures=9)


def test_spread_is_the_median_between_its_tenths() -> None:
    assert step_times.spread([float(i) for i in range(101)]) == {
        "ms": 50.0,
        "p10_ms": 10.0,
        "p90_ms": 90.0,
        "n": 101,
    }
    assert len(step_times.timed(lambda: torch.ones(1), times=4, device=torch.device("cpu"))) == 4
