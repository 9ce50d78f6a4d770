"""One process leads, another follows: the same worlds as from the model in one piece, told by the leader."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_together

from emuworld import checkpoint_folder, cli, following, parallel, world_model
from emuworld.model import checkpoint
from emuworld.model.fused import fused
from emuworld.world_model import Sampling, Truncation, WorldModel

GREEDY = Sampling(text=Truncation(top_k=1), image=Truncation(top_k=1), guidance=2.0)


def _worlds(model: WorldModel) -> list[tuple[int, ...]]:
    """Answers of two worlds together, then one alone that is told as it is written, from a cleared cache."""
    states = [
        model.begin(mode="explore", prompt=f"a room {seed}", seed=seed, size=(32, 32)) for seed in (1, 2)
    ]
    first = [state for state, _ in model.imagine_batch(states, ["turn left", "look up"], sampling=GREEDY)]
    model.caches.clear()
    *told, done = model.stream(first[0], "move forward", sampling=GREEDY)
    assert told
    drawn = model.imagine(first[1], "turn right")[0]  # with the checkpoint's own sampling
    return [state.ids for state in (*first, done.state, drawn)]  # type: ignore[union-attr]


def _work(rank: int, folder: str, out: str) -> None:
    parallel.join()
    model = world_model.load(folder, device="cpu")
    if rank > 0:
        model.follow()
        return
    np.savez(Path(out, "led.npz"), *[np.array(ids) for ids in _worlds(model)])
    following.end()


def test_a_led_model_draws_the_same_worlds(tiny_folder: str, tmp_path: Path) -> None:
    run_together(_work, tiny_folder, str(tmp_path))
    parts = checkpoint_folder.open_parts(Path(tiny_folder), device=torch.device("cpu"))
    whole = fused(checkpoint.load(tiny_folder, dtype=torch.float32))  # fp32, as the parts are
    expected = _worlds(WorldModel(dataclasses.replace(parts, transformer=whole)))
    with np.load(tmp_path / "led.npz") as led:
        for name, ids in zip(led.files, expected, strict=True):
            assert led[name].tolist() == list(ids), name


def test_one_process_alone_is_told_to_start_several(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "mode=t2i", "prompt=a room", "parallel=tp"]) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err
