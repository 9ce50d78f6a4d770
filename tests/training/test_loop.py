"""What the loop keeps beside a stage: its log, and its state or the reason why there is none."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from emuworld.tokens.vision import VisionConfig, VisionTokenizer
from emuworld.training.loop import TrainingLog
from emuworld.training.ranks import Ranks
from emuworld.training.states import FileStore, ShardedStore, newest

CPU = torch.device("cpu")


@pytest.mark.parametrize(("resumed_at", "kept"), [(0, []), (2, [1, 2])])
def test_a_log_holds_no_step_twice(tmp_path: Path, resumed_at: int, kept: list[int]) -> None:
    """Also where a run was killed before its first state, and begins anew."""
    path = tmp_path / "text.log.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"st')
    log = TrainingLog(path, step=resumed_at)
    log.write(step=resumed_at + 1)
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [*kept, resumed_at + 1]


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file of this process grows beyond 4 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_said_in_words(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    whole = FileStore(
        tmp_path / "tokenizer.state.pt", get=model.state_dict, put=model.load_state_dict, device=CPU
    )
    parts = ShardedStore(tmp_path, "pretrain", module=model, optimizers=[], ranks=Ranks(CPU))
    for store in (whole, parts):
        with pytest.raises(
            OSError, match=r"the training state .*state.* cannot be written .*room on the disk"
        ):
            store.save({"step": 3.0})
    with pytest.raises(OSError, match=r"vision\.safetensors"):
        VisionTokenizer(VisionConfig(width=8, num_codes=64)).save(tmp_path)
    assert not whole.place.exists() and newest(tmp_path, "pretrain") is None
