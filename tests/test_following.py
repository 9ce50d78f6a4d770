"""One process leads, another follows: the same worlds as from the model in one piece, told by the leader."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_together

from emuworld import checkpoint_folder, cli, following, parallel, world_model
from emuworld.decoding.dida import Painter
from emuworld.decoding.noise import Noise
from emuworld.manifest import Manifest
from emuworld.model import checkpoint
from emuworld.model.adapter import Adapter, load_adapter, merge_adapter, save_adapter
from emuworld.model.fused import fused
from emuworld.world_model import Sampling, Truncation, WorldModel

GREEDY = Sampling(text=Truncation(top_k=1), image=Truncation(top_k=1), guidance=2.0)


def _worlds(model: WorldModel) -> list[tuple[int, ...]]:
    """Answers of two worlds together, then one alone that is told as it is written, from a cleared cache, and
    pictures drawn at once.
    """
    states = [
        model.begin(mode="explore", prompt=f"a room {seed}", seed=seed, size=(32, 32)) for seed in (1, 2)
    ]
    first = [state for state, _ in model.imagine_batch(states, ["turn left", "look up"], sampling=GREEDY)]
    model.caches.clear()
    *told, done = model.stream(first[0], "move forward", sampling=GREEDY)
    assert told
    drawn = model.imagine(first[1], "turn right")[0]  # with the checkpoint's own sampling
    at_once = dataclasses.replace(GREEDY, passes=3)
    painted = [state for state, _ in model.imagine_batch(first, ["look up", "turn left"], sampling=at_once)]
    return [state.ids for state in (*first, done.state, drawn, *painted)]  # type: ignore[union-attr]


def _work(rank: int, folder: str, out: str) -> None:
    parallel.join()
    model = world_model.load(folder, device="cpu")
    if rank > 0:
        model.follow()
        return
    np.savez(Path(out, "led.npz"), *[np.array(ids) for ids in _worlds(model)])
    following.end()


def test_a_led_model_draws_the_same_worlds(tiny_folder: str, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")
    dataclasses.replace(Manifest.load(folder), dida=Noise()).save(folder)
    adapter = Adapter(checkpoint.load(folder), rank=2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for up_Or in adapter.up_Or.values():
            up_Or.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
    save_adapter(folder, adapter)
    run_together(_work, str(folder), str(tmp_path))
    parts = checkpoint_folder.open_parts(folder, device=torch.device("cpu"))
    whole = fused(checkpoint.load(folder, dtype=torch.float32))  # fp32, as the parts are
    adapted = checkpoint.load(folder, dtype=torch.float32)
    merge_adapter(adapted, load_adapter(folder, adapted))
    painter = Painter(
        fused(adapted),
        vocabulary=parts.manifest.vocabulary,
        noise=Noise(),
        codebook_KE=parts.vision.quantize.embedding.weight.detach(),
    )
    expected = _worlds(WorldModel(dataclasses.replace(parts, transformer=whole, painter=painter)))
    with np.load(tmp_path / "led.npz") as led:
        assert len(led.files) == 6
        for name, ids in zip(led.files, expected, strict=True):
            assert led[name].tolist() == list(ids), name


def test_one_process_alone_is_told_to_start_several(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "mode=t2i", "prompt=a room", "parallel=tp"]) == 2
    assert "torchrun --nproc-per-node" in capsys.readouterr().err
