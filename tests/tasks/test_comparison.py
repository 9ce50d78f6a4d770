"""Runs side by side: paired differences that are known beforehand, and a suite run from end to end."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emuworld.decoding.noise import Noise
from emuworld.manifest import Manifest
from emuworld.tasks import evaluate
from emuworld.tasks.comparison import LOSS, NO_DIFFERENCE, write_comparison
from emuworld.tasks.detector import Detector, DetectorConfig
from emuworld.tasks.run_folder import FORMAT, append_records
from emuworld.tasks.suites import TextToImage


def _run(folder: Path, found: list[bool], *, suite: str = "t2i") -> Path:
    folder.mkdir()
    run = {"suite": suite, "format": FORMAT, "wall_s": 1.0, "command": "emuworld eval"}
    (folder / "run.json").write_text(json.dumps(run))
    judged = [
        {"dream": dict.fromkeys(("all_present", "colours_present", "shapes_present"), f)} for f in found
    ]
    append_records(
        folder / "records.jsonl",
        [{"kind": "prompt", "index": i, "judged": one} for i, one in enumerate(judged)],
    )
    return folder


def test_differences_are_paired(tmp_path: Path) -> None:
    """Cases that are lost are lost significantly, though the two rates' own intervals overlap."""
    rng = np.random.default_rng(0)
    base = (rng.random(60) < 0.5).tolist()
    some_lost = [found and i % 3 > 0 for i, found in enumerate(base)]
    swapped = base[::-1]
    runs = {
        0: _run(tmp_path / "0", base),
        1: _run(tmp_path / "1", some_lost),
        2: _run(tmp_path / "2", swapped[:40]),
    }
    figures = write_comparison(tmp_path, runs)["figures"]["all named objects there"]
    lost = figures["1"]
    assert lost["difference"]["value"] == pytest.approx((sum(some_lost) - sum(base)) / 60)
    assert lost["verdict"] == LOSS and lost["after"]["high"] > lost["before"]["low"]
    assert figures["0"]["difference"]["value"] == 0 and figures["0"]["verdict"] == NO_DIFFERENCE
    assert figures["2"]["difference"]["count"] == 40, "only what both have is compared"
    assert figures["2"]["verdict"] != LOSS
    assert "significant loss" in (tmp_path / "index.html").read_text()
    with pytest.raises(ValueError, match="nothing cannot be compared yet"):
        write_comparison(tmp_path, {0: _run(tmp_path / "3", base, suite="nothing")})


def test_a_suite_runs_with_several_passes(tiny_folder: str, tmp_path: Path) -> None:
    model, judge = tmp_path / "model", tmp_path / "detector.safetensors"
    shutil.copytree(tiny_folder, model)
    replace(Manifest.load(model), dida=Noise()).save(model)
    Detector(DetectorConfig(width=16, dilations=(1,))).save(judge)
    suite = TextToImage(
        model=str(model),
        detector=str(judge),
        out=str(tmp_path / "out"),
        device="cpu",
        size_px=64,
        workers=1,
        renderer="rays",
        num_prompts=2,
        passes=(0, 2),
    )
    figures: dict[str, Any] = evaluate.run(suite)
    assert set(figures["figures"]["all shapes there"]) == {"0", "2"}
    stored = [json.loads((tmp_path / f"out/passes-{n}/run.json").read_text()) for n in (0, 2)]
    assert [run["settings"]["passes"] for run in stored] == [[0], [2]]
    with pytest.raises(ValueError, match="has not learnt"):
        evaluate.run(replace(suite, model=tiny_folder, out=str(tmp_path / "other")))
