"""Every row of `emuworld bench` with sizes that a CPU bears: the same code, every part gives figures."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emuworld.tasks.run_log import RunLog
from emuworld.tasks.speed import accuracy, drafting, everything, published, small, worlds
from emuworld.world_model import WorldModel

SIZE: dict[str, Any] = {
    "device": "cpu",
    "size": "tiny",
    "num_layers": 1,
    "vision": "tiny",
    "text": "",
    "contexts": (40,),
    "steps": 2,
    "published_tokens": 2,
}


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Figures by part; none failed or was left out."""
    parts = {record["part"]: record for record in map(json.loads, path.read_text().splitlines())}
    assert not [part for part, figures in parts.items() if "error" in figures or "skipped" in figures]
    return parts


def test_fp8_beside_bf16(tmp_path: Path) -> None:
    parts = read(published.run_fp8(published.Fp8Speed(out=str(tmp_path), rows=(2, 3), sides=(8,), **SIZE)))
    errors = parts["fp8 against bf16, random weights"]
    assert 0.001 < errors["one_token"] < 0.2 and 0.001 < errors["many_tokens"] < 0.2
    faster = parts["summary"]["times_faster"]["1 of 8x8, fp8"]
    expected = parts["summary"]["two_passes_ms"] / parts["1 of 8x8, fp8"]["ms_a_token"]
    assert faster == pytest.approx(expected, abs=0.01)


def test_steps_by_window(tmp_path: Path) -> None:
    config = published.DraftingStepSpeed(out=str(tmp_path), windows=(1, 3), side=8, weights="fp8", **SIZE)
    parts = read(published.run_drafting(config))
    assert {"draw, window 3", "step, fp8, 2 rows of 3, context 40"} <= parts.keys()
    # Noise comes true once in a hundred thousand: a call a token, but for the EOLs that a window takes along.
    assert parts["1 of 8x8, window 3"]["ms_a_call"] < 1.5 * parts["1 of 8x8, window 3"]["ms_a_token"]


@pytest.mark.parametrize(("cache", "name"), [("bf16", "bf16"), ("int8", "bf16, cache in int8")])
def test_many_pictures_at_once(tmp_path: Path, cache: str, name: str) -> None:
    config = published.BatchSpeed(out=str(tmp_path), num_images=2, sides=(8,), cache=cache, **SIZE)
    figures = read(published.run_batch(config))[f"2 of 8x8, {name}"]
    assert figures["pictures_a_minute"] == pytest.approx(120 / figures["total_s"], rel=0.05)


def test_everything_over_one_set_of_weights(tmp_path: Path) -> None:
    config = everything.EverythingSpeed(
        out=str(tmp_path),
        **{**SIZE, "contexts": (40, 60)},
        published_contexts=(40,),
        pictures=(8, 9),
        story_side=8,
        story_pictures=1,
        windows=(1, 2),
        num_images=2,
        batch_side=8,
        rows=(2, 4),
        sides=(8,),
        passes=2,
    )
    parts = read(everything.run(config))
    assert {"t2i 8x8", "t2i 9x9", "story", "2 of 8x8, bf16", "t2i 8x8, fp8"} <= parts["summary"][
        "times_faster"
    ].keys() | {"story"}
    assert {f"picture of 8x8, {weights}, in 2 passes" for weights in ("bf16", "fp8")} <= parts.keys()
    assert (tmp_path / "story.pb").is_file()
    many = parts["summary"]["2 of 9x9, fp8, as steps and draws give it"]
    assert many["pictures_a_minute"] > many["with_pixels"] > 0.0


def test_everything_but_pictures_from_words(tmp_path: Path) -> None:
    config = everything.EverythingSpeed(
        out=str(tmp_path),
        pictures=(),
        story_pictures=0,
        windows=(),
        sides=(),
        rows=(2,),
        num_images=1,
        **SIZE,
    )
    parts = read(everything.run(config))
    assert not any(name.startswith("t2i") for name in parts)
    assert "a guided token with its draw by context, fp8, ms" in parts["summary"]
    alone = replace(config, out=str(tmp_path / "fp8"), bf16=False)
    parts = read(everything.run(alone))
    assert not any("bf16" in name and name.startswith("step") for name in parts)
    assert "a guided token with its draw by context, fp8, ms" in parts["summary"]
    with pytest.raises(ValueError, match="got none"):
        everything.EverythingSpeed(out=str(tmp_path), published_contexts=())
    with pytest.raises(ValueError, match="nothing to measure"):
        everything.EverythingSpeed(out=str(tmp_path), bf16=False, fp8=False)


def test_what_comes_later_keeps_its_time(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "records.jsonl", budget_s=10.0)
    assert log.run("dear", dict, expected_s=6.0, keep_s=5.0) is None
    assert log.run("cheap", dict, expected_s=6.0) == {}


def test_a_budget_leaves_out_what_would_not_end_in_time(tmp_path: Path) -> None:
    config = published.BatchSpeed(out=str(tmp_path), num_images=2, sides=(64,), budget_s=1.0, **SIZE)
    lines = [json.loads(line) for line in published.run_batch(config).read_text().splitlines()]
    (left_out,) = [line for line in lines if line["part"] == "2 of 64x64, bf16"]
    assert left_out["skipped"].startswith("would take")


def test_tokens_a_pass_by_window(tmp_path: Path, tiny_folder: str) -> None:
    config = drafting.DraftingSpeed(
        out=str(tmp_path), model=tiny_folder, device="cpu", windows=(0, 1, 4), num_worlds=1, num_steps=1
    )
    parts = read(drafting.run(config))
    for mode, pictures in (("t2i", 1), ("explore", 2)):
        assert parts[f"{mode}, window 0"]["tokens_a_pass"] == 1.0
        assert parts[f"{mode}, window 4"]["pictures"] == pictures
        # A pass a place, of which those behind a row's end bring no token of the picture.
        assert 0.8 < parts[f"{mode}, window 1"]["tokens_a_pass"] <= 1.0
        assert parts[f"{mode}, window 4"]["tokens_a_pass"] > parts[f"{mode}, window 1"]["tokens_a_pass"]


def test_many_worlds(tmp_path: Path, tiny_folder: str) -> None:
    config = worlds.ManyWorldsSpeed(
        out=str(tmp_path), model=tiny_folder, device="cpu", num_worlds=3, num_steps=2, draft_window=4
    )
    parts = read(worlds.run(config))
    assert parts["summary"]["frames_a_second"] == pytest.approx(parts["frame 2"]["frames_a_second"], rel=0.02)


def test_time_between_two_steps_of_many_worlds_counts(tmp_path: Path, tiny_model: WorldModel) -> None:
    """A GPU could finish in it what a step has left to do."""
    config = worlds.ManyWorldsSpeed(out=str(tmp_path), num_worlds=1, num_steps=2)
    walk = worlds._Walk(config, tiny_model, passes=0)
    walk.step()
    time.sleep(0.3)
    figures = walk.step()
    assert figures["total_s"] == pytest.approx(figures["drawing_s"] + figures["pixels_s"], abs=2e-4)
    assert figures["drawing_s"] > 0.3 > figures["pixels_s"]


def test_what_8_bits_cost(tmp_path: Path, tiny_folder: str) -> None:
    config = accuracy.Fp8Accuracy(
        out=str(tmp_path), model=tiny_folder, device="cpu", num_worlds=2, num_pictures=2
    )
    parts = read(accuracy.run(config))
    assert parts["t2i: bf16"]["places"] == 2 * 64 and parts["explore: bf16"]["places"] == 4 * 64
    errors = [
        parts[f"t2i: {name}"]["logit_error"]
        for name in (
            "int8, the exact form",
            "fp8, few rows (weights alone)",
            "fp8, many rows (activations too)",
        )
    ]
    assert 0.0 < errors[0] < errors[1] < errors[2] < 0.3


def test_the_small_model_on_a_cpu(tmp_path: Path, tiny_folder: str) -> None:
    config = small.SmallSpeed(
        out=str(tmp_path), model=tiny_folder, num_processes=1, num_steps=2, num_pictures=1, rows=(1, 2)
    )
    parts = read(small.run(config))
    assert parts["import to first frame"]["ms"] > parts["import emuworld"]["ms"] > 0.0
    assert parts["frames of a walk"]["n"] == 2
    assert parts["pictures from words"]["times_faster_than_two_passes"] > 0.0
