"""The row of several processes: its figures, who speaks, and that parts of random weights make the whole."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_together

from emuworld import cli, parallel
from emuworld.model.cache import StaticCache
from emuworld.model.transformer import Transformer, sized
from emuworld.tasks.run_log import Figures
from emuworld.tasks.speed import split
from emuworld.tasks.speed.shared_log import SharedLog

CPU = torch.device("cpu")
WORDS = ["device=cpu", "size=tiny", "num_layers=1", "contexts=[40]", "steps=2", "prefill=20", "side=4"]
WORDS += ["passes=2", "top_k=50"]
PARTS = {
    "machine",
    "weights",
    "graphs and processes agree",
    "token, context 40",
    "draw",
    "prefill of 20",
    "picture of 4x4, a pass without its draw",
    "picture of 4x4 in 2 passes",
    "summary",
}


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _parts_make_the_whole() -> None:
    """Logits of cut random weights, of any range of ids, against those of one transformer with all."""
    config = sized("tiny", vocab_size=301, max_position_embeddings=64, tie_word_embeddings=False)
    tensors = dict(split.random_tensors(config, device=CPU, dtype=torch.float32, seed=3))
    whole = Transformer(config).eval()
    whole.load_state_dict(tensors)
    ids_2T = torch.randint(0, 301, (2, 9), generator=torch.Generator().manual_seed(1))
    cut = {
        weights: parallel.SplitTransformer(
            config,
            split.random_tensors(config, device=CPU, dtype=torch.float32, seed=3),
            group=parallel.tensor_group(),
            device=CPU,
            dtype=torch.float32,
            weights=weights,
        )
        for weights in ("bf16", "fp8")
    }
    with torch.no_grad():
        expected = whole.logits(whole(ids_2T))
    scale = expected.abs().max()
    for weights, model in cut.items():
        hidden = model(ids_2T, cache=StaticCache(model.config, num_rows=2, capacity=9))
        for start, stop in ((0, 301), (7, 290), (8, 9), (9, 10), (150, 301)):
            worst = (model.logits(hidden, start=start, stop=stop) - expected[..., start:stop]).abs().max()
            assert worst < scale * (1e-5 if weights == "bf16" else 0.2), (weights, start, stop)
    unsummed = cut["bf16"].variant(reduce=lambda parts: parts)
    alone = unsummed(ids_2T, cache=StaticCache(unsummed.config, num_rows=2, capacity=9))
    assert (unsummed.logits(alone) - expected).abs().max() > 0.1 * scale  # the sums are what is left out


def _failures_are_shared(rank: int, folder: str) -> None:
    log = SharedLog(
        Path(folder, "shared.jsonl"),
        budget_s=1e9 if rank == 0 else -1e9,  # what the first has time for, all do
        group=parallel.tensor_group(),
    )

    def fails_in_the_second() -> Figures:
        if rank == 1:
            raise RuntimeError("out of memory")
        return {"ms": 1.0}

    assert log.run("one fails", fails_in_the_second, expected_s=1.0) is None
    assert log.run("after it", lambda: {"ms": 2.0}, expected_s=1.0) == {"ms": 2.0}


def _work(rank: int, folder: str) -> None:
    parallel.join()
    _parts_make_the_whole()
    _failures_are_shared(rank, folder)
    if rank == 1:
        sys.stdout = Path(folder, "said").open("w")  # noqa: SIM115
    assert cli.main(["bench", "what=parallel-34b", *WORDS, f"out={folder}/{rank}"]) == 0
    assert rank == 0 and parallel.tensor_group() is None  # the second has ended in good order


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    assert cli.main(["bench", "what=parallel-34b", *WORDS, f"out={tmp_path}/0"]) == 0
    run_together(_work, str(tmp_path))
    records = _read(tmp_path / "0" / "records.jsonl")
    one, two = records[: len(PARTS)], records[len(PARTS) :]
    for number, run in enumerate((one, two), start=1):
        figures = {record["part"]: record for record in run}
        assert figures.keys() == PARTS and not any("error" in record for record in run)
        assert figures["machine"]["processes"] == number
        assert figures["weights"]["heads_here"] == 8 // number
        assert ("ms_without_sums" in figures["prefill of 20"]) == (number == 2)
        assert figures["token, context 40"]["tokens_a_second"] == pytest.approx(
            1e3 / figures["token, context 40"]["ms"], rel=0.01
        )
        assert all(value > 0.0 for value in figures["summary"]["ms"].values())
        assert figures["picture of 4x4 in 2 passes"]["a_pass"]["n"] == 2
    faster = two[-1]["times_faster_than_one"]
    assert faster.keys() == one[-1]["ms"].keys()
    for part, times in faster.items():
        assert times == pytest.approx(one[-1]["ms"][part] / two[-1]["ms"][part], abs=1e-3)
    assert (tmp_path / "said").read_text() == "" and not list((tmp_path / "1").iterdir())
    failed, after = _read(tmp_path / "shared.jsonl")
    assert "failed in 1 of 2 processes" in failed["error"] and after["ms"] == 2.0


def _work_on_gpus(rank: int, folder: str) -> None:
    words = ["device=cuda" if word == "device=cpu" else word for word in WORDS]
    assert cli.main(["bench", "what=parallel-34b", *words, f"out={folder}"]) == 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_graph_holds_the_sums_over_two_gpus(tmp_path: Path) -> None:
    """A replayed step with NCCL's sums inside gives what its launches give; so do the default's."""
    run_together(_work_on_gpus, str(tmp_path))
    figures = {record["part"]: record for record in _read(tmp_path / "records.jsonl")}
    assert not any("error" in record for record in figures.values())
    assert figures["graphs and processes agree"]["graph_against_eager"] < 0.01
    assert figures["NCCL's sums"]["against_default"] < 0.02


def test_settings_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="weights bf16 or fp8"):
        split.SplitSpeed(weights="int8")
    with pytest.raises(ValueError, match="at least 1"):
        split.SplitSpeed(passes=0)
