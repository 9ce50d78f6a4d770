"""Two processes compute what one computes: logits, gradients, greedy tokens. 301 ids do not divide by two."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_together
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from emuworld import parallel
from emuworld.model.cache import StaticCache
from emuworld.model.transformer import Transformer, sized
from emuworld.training import sharding

NUM_IDS = 301


def _built(*, tied: bool) -> Transformer:
    config = sized("tiny", vocab_size=NUM_IDS, max_position_embeddings=256, tie_word_embeddings=tied)
    model = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def _ids(rows: int, length: int) -> Tensor:
    return torch.randint(0, NUM_IDS, (rows, length), generator=torch.Generator().manual_seed(2))


class _Losses(nn.Module):
    def __init__(self, model: Transformer, mesh: object = None) -> None:
        super().__init__()
        self.model, self.mesh = model, mesh

    def forward(self, ids: Tensor) -> Tensor:
        logits, targets = self.model.lm_head(self.model(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten()
        if self.mesh is None:
            return F.cross_entropy(logits, targets, reduction="none")
        return sharding.vocabulary_losses(logits, targets, mesh=self.mesh, num_ids=NUM_IDS)  # type: ignore[arg-type]


def _train_form(rank: int, *, tensor: int, tied: bool) -> None:
    reference, model = _built(tied=tied), _built(tied=tied)
    ids = _ids(4, 17)
    expected = _Losses(reference)(ids)
    expected.mean().backward()
    mesh = init_device_mesh("cpu", (2 // tensor, tensor), mesh_dim_names=("data", "tensor"))
    if tensor > 1:
        sharding.tensor_parallel(model, mesh["tensor"])
        logits = model.lm_head(model(ids[:, :-1]))
        part = slice(*sharding.vocabulary_part(NUM_IDS, rank=rank, world=2))
        whole = reference.logits(reference(ids[:, :-1]))
        torch.testing.assert_close(logits, whole[..., part], rtol=0, atol=2e-5)
    sharding.checkpoint_layers(model)
    losses = _Losses(model, mesh["tensor"] if tensor > 1 else None)
    sharding.fully_sharded(losses, model, mesh["data"])
    rows = slice(None) if tensor > 1 else slice(2 * rank, 2 * rank + 2)
    mine = losses(ids[rows])
    torch.testing.assert_close(mine, expected.view(4, -1)[rows].flatten(), rtol=0, atol=1e-5)
    mine.mean().backward()
    for (name, ours), theirs in zip(losses.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        gradient = ours.grad.full_tensor()  # type: ignore[attr-defined]
        worst = (gradient - theirs.grad).abs().max() / theirs.grad.abs().max()
        assert worst < 1e-5, f"{name}: {worst}"
    whole_weights = sharding.whole_tensors(model, keep=rank == 0)
    assert (rank == 0) == bool(whole_weights)
    for name, tensor_ in whole_weights.items():
        assert torch.equal(tensor_, reference.state_dict()[name]), name


def _drawn(model: object, config: object) -> list[int]:
    """Forty greedy tokens after a prompt, in a cache of two rows of which one stands still at times."""
    cache = StaticCache(config, num_rows=2, capacity=64)  # type: ignore[arg-type]
    hidden = model(_ids(2, 5), cache=cache)  # type: ignore[operator]
    tokens: list[int] = []
    for step in range(40):
        scores = model.logits(hidden[:, -1], start=7, stop=290)  # type: ignore[attr-defined]
        drawn = scores.argmax(dim=-1) + 7
        tokens += drawn.tolist()
        hidden = model(drawn[:, None], cache=cache, advance_B=[True, step % 3 > 0])  # type: ignore[operator]
    return tokens


def _work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo")
    _train_form(rank, tensor=1, tied=False)
    _train_form(rank, tensor=2, tied=False)  # a tied one trains in tests/training/test_ranks.py
    assert dist.group.WORLD is not None
    for tied in (False, True):
        model = _built(tied=tied).eval()
        with torch.no_grad():
            expected = _drawn(model, model.config)
        part = parallel.SplitTransformer(
            model.config,
            model.state_dict().items(),
            group=dist.group.WORLD,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
        assert part.config.num_kv_heads == 1
        assert tied or len(set(expected)) > 10  # a tied random model mostly repeats itself
        assert _drawn(part, part.config) == expected
    Path(folder, str(rank)).touch()
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    run_together(_work, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_the_published_vocabulary_is_cut_without_gaps() -> None:
    for world in (1, 2, 4, 8):
        parts = [sharding.vocabulary_part(282_926, rank=rank, world=world) for rank in range(world)]
        assert parts[0][0] == 0 and parts[-1][1] == 282_926
        assert all(a[1] == b[0] for a, b in itertools.pairwise(parts))
        assert [len(piece) for piece in torch.empty(282_926).chunk(world)] == [b - a for a, b in parts]


def test_heads_that_do_not_divide_are_refused() -> None:
    config = sized("tiny", vocab_size=NUM_IDS)
    with pytest.raises(ValueError, match="2 key-value heads cannot be cut among 4"):
        parallel.check_divides(config, 4)
