"""The measuring script with next to no cases: stages end at their limit, go on, and are scored later."""

import importlib.util
import json
import shutil
import tarfile
import time
from pathlib import Path
from types import ModuleType

import pytest

from emuworld.tasks.detector import Detector, DetectorConfig
from emuworld.tasks.run_folder import read_records

SCRIPT = Path(__file__).parents[1] / "scripts" / "measure_small.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_small", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_body_that_takes_too_long_is_left(script: ModuleType) -> None:
    with pytest.raises(script.OutOfTime), script.time_limit(0.05):
        time.sleep(5.0)
    with script.time_limit(0.05):
        pass
    time.sleep(0.1)  # nothing rings afterwards


def test_stages_are_cut_short_go_on_and_are_scored_later(
    script: ModuleType, tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    Detector(DetectorConfig(width=16, dilations=(1,))).save(model / "detector.safetensors")
    words = [f"out={tmp_path}", f"model={model}", "device=cpu", "size_px=64", "renderer=rays", "workers=1"]
    words += ["share=0.006", "stages=t2i"]
    assert script.main([*words, "limit=0.001"]) == 0
    assert script.main(words) == 0
    ends = [json.loads(line)["end"] for line in (tmp_path / "stages.jsonl").read_text().splitlines()]
    assert ends == ["cut short", "done"]
    assert len(read_records(tmp_path / "t2i" / "records.jsonl")) == 2
    assert not (tmp_path / "t2i" / "summary.json").exists(), "nothing is scored while the clock runs"
    assert script.main([f"out={tmp_path}", "stages=score,pack"]) == 0
    assert json.loads((tmp_path / "t2i" / "summary.json").read_text())["figures"]["num_prompts"] == 2
    with tarfile.open(tmp_path / "t2i.tar.gz") as tar:
        assert "t2i/records.jsonl" in tar.getnames()
    assert script.main(["stages=t2i", "surprise=1"]) == 2
    assert "share=0.1 takes a tenth" in capsys.readouterr().out
