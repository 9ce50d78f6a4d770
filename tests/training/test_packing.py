"""Packed documents learn what they learn alone: equal losses and gradients, in both forms of the mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from emuworld.model.documents import documents
from emuworld.model.transformer import Transformer, sized
from emuworld.tokens.bpe import train_bpe
from emuworld.tokens.sequence import template_texts
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vocabulary import builtin
from emuworld.training.data import TokenStory
from emuworld.training.examples import Bucket, ExampleSampler, Mixture
from emuworld.training.objective import Objective
from emuworld.training.packing import Packing, packed, packed_batches, row_of

BUCKETS = (Bucket(kind="walk", frames=3, batch_size=1), Bucket(kind="picture", batch_size=3))


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> ExampleSampler:
    path = tmp_path_factory.mktemp("words") / "text.tiktoken"
    train_bpe(["turn left", "a red wall", *template_texts()] * 4, num_tokens=300, path=path)
    words = TextTokenizer.builtin(path, vocabulary=builtin(num_text_tokens=300, num_visual_tokens=40))
    sampler = ExampleSampler(tokenizer=words, mixture=Mixture(code_noise=0.0), size=(2, 3))
    rng = np.random.default_rng(0)
    for number in range(4):
        sampler.add(
            [
                TokenStory(
                    question="look around",
                    texts=("", *("turn left",) * 5),
                    captions=tuple(f"a red wall {i}" for i in range(6)),
                    codes=rng.integers(0, 40, (6, 2, 3)).astype(np.uint16),
                )
            ],
            shard=str(number),
        )
    return sampler


def lively_objective(sampler: ExampleSampler) -> Objective:
    """Of random weights that are large enough for a wrong neighbour to show."""
    vocabulary = sampler.tokenizer.vocabulary
    model = Transformer(sized("tiny", vocab_size=vocabulary.size))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return Objective(model, vocabulary=vocabulary, autocast=None, tensor_mesh=None, loss_tokens=10_000)


def _gradients(objective: Objective) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    objective.zero_grad()
    return found


def test_packed_is_unpacked(sampler: ExampleSampler) -> None:
    """Each example alone in a row, then all in one row: losses to 1e-5 nats, gradients to 1e-5 of the
    largest.
    """
    rng = np.random.default_rng(3)
    examples = [sampler.example(BUCKETS[i % 2], rng) for i in range(4)]
    objective = lively_objective(sampler)
    alone = []
    for example in examples:
        row = row_of(sampler, [example], tokens=len(example.ids) - 1, rng=rng)
        ids, inputs, weights = (torch.from_numpy(a) for a in (row.ids, row.inputs, row.weights))
        alone.append(objective.losses(inputs, ids[:, 1:])[0] * weights[0])
    torch.cat(alone).sum().backward()
    expected = _gradients(objective)
    length = sum(len(example.ids) for example in examples)
    row = row_of(sampler, examples, tokens=length + 20, rng=rng)
    assert row.documents is not None
    ids, inputs, weights, numbers = (
        torch.from_numpy(a) for a in (row.ids, row.inputs, row.weights, row.documents)
    )
    together = objective.losses(inputs, ids[:, 1:], documents(numbers)) * weights
    together.sum().backward()
    start = 0
    for losses in alone:
        torch.testing.assert_close(together[0, start : start + len(losses)], losses, rtol=0, atol=1e-5)
        start += len(losses) + 1  # the target behind a document is the next one's first id: no weight
        assert together[0, start - 1] == 0
    assert not together[0, start:].any()
    for name, gradient in _gradients(objective).items():
        worst = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        assert worst < 1e-5, f"{name}: {worst}"
    other = objective.losses(inputs, ids[:, 1:])[0, : len(alone[0])].detach()
    torch.testing.assert_close(other * weights[0, : len(other)], alone[0].detach(), rtol=0, atol=1e-5)
    blind = objective.losses(inputs, ids[:, 1:])[0, len(alone[0]) + 1 :][: len(alone[1])]
    assert not torch.allclose(blind * (alone[1] > 0), alone[1], atol=1e-3)  # without the mask it shows


def test_rows_are_filled_and_drawn_again_alike(sampler: ExampleSampler) -> None:
    packing = Packing(tokens=400, rows=6, rows_at_once=2)

    def rows(rank: int, world: int) -> list[np.ndarray]:
        batches = packed_batches(sampler, BUCKETS, packing=packing, seed=5, step=9, rank=rank, world=world)
        assert all(batch.ids.shape[1] == 401 and batch.weights.shape[1] == 400 for batch in batches)
        return [row for batch in batches for row in batch.ids]

    whole = rows(0, 1)
    shared = [row for rank in range(3) for row in rows(rank, 3)]
    assert len(whole) == 6 and len({row.tobytes() for row in whole}) == 6
    for one, other in zip(whole, shared, strict=True):
        np.testing.assert_array_equal(one, other)
    padding = np.mean([np.mean(row == sampler.tokenizer.vocabulary.pad) for row in whole])
    assert padding < 0.15
    with pytest.raises(ValueError, match=r"packing\.tokens higher"):
        packed(sampler, BUCKETS, tokens=10, rng=np.random.default_rng(0))


def test_fine_tuning_learns_answers_alone(sampler: ExampleSampler) -> None:
    rng = np.random.default_rng(1)
    tuned = ExampleSampler(
        tokenizer=sampler.tokenizer, mixture=Mixture(answers_only=True, visual_weight=1.0), size=(2, 3)
    )
    tuned.add(sampler._stories)
    row = packed(tuned, BUCKETS[1:], tokens=100, rng=rng)
    targets, weights = row.ids[0, 1:], row.weights[0]
    bss = sampler.tokenizer.vocabulary.bss
    assert row.documents is not None
    for number in np.unique(row.documents)[:-1]:
        of_one = np.flatnonzero(row.documents[0] == number)[:-1]
        behind = of_one[np.flatnonzero(targets[of_one] == bss)[0] + 1 :]
        before = np.setdiff1d(of_one, behind)
        assert (weights[behind] == 1.0).all() and not weights[before].any()


@torch.no_grad()
def test_flex_attention_is_the_dense_mask() -> None:
    """Its eager form on the CPU, which has no backward pass."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.sort(torch.randint(0, 5, (2, 150), generator=generator)).values
    q, k, v = (torch.randn(2, heads, 150, 16, generator=generator) for heads in (8, 2, 2))
    dense, flex = (documents(numbers, blocks=blocks) for blocks in (False, True))
    torch.testing.assert_close(flex.attend(q, k, v), dense.attend(q, k, v), rtol=0, atol=1e-5)
    assert torch.equal(flex.positions_BT, dense.positions_BT)
    assert dense.positions_BT[0, :3].tolist() == [0, 1, 2] and (dense.positions_BT == 0).sum() == 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_flex_attention_on_cuda_is_the_dense_mask() -> None:
    """Proves on the GPU what the test above proves of the eager form, and of gradients."""
    generator = torch.Generator("cuda").manual_seed(0)
    numbers = torch.sort(torch.randint(0, 5, (2, 700), device="cuda", generator=generator)).values
    given = [
        torch.randn(2, heads, 700, 64, device="cuda", generator=generator, requires_grad=True)
        for heads in (8, 2, 2)
    ]
    results = []
    for blocks in (False, True):
        out = documents(numbers, blocks=blocks).attend(*given)
        results.append((out, *torch.autograd.grad(out.square().sum(), given)))
    for dense, flex in zip(*results, strict=True):
        torch.testing.assert_close(flex, dense, rtol=1e-2, atol=1e-2)
