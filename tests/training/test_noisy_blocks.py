"""Rows with noisy copies: who sees whom, counted pair by pair, and the three ways to compute it agree."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from emuworld.model.transformer import StaticCache, Transformer, sized
from emuworld.tokens.sequence import AnswerSegment, answer, image_length, prompt_ids
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vocabulary import builtin
from emuworld.training.noisy_blocks import NoisyRows, dense_attention, flex_attention, lay_out

TOKENIZER = TextTokenizer(
    {bytes([i]): i for i in range(256)}, vocabulary=builtin(num_text_tokens=256, num_visual_tokens=16)
)
V = TOKENIZER.vocabulary
SIZE = (3, 4)
LENGTH = SIZE[0] * (SIZE[1] + 1)


def sequence(seed: int, *, pictures: int, references: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    given = [rng.integers(0, 16, SIZE) for _ in range(references)]
    segments = [AnswerSegment(text="go on", codes=rng.integers(0, 16, SIZE)) for _ in range(pictures)]
    prompt = prompt_ids("explore", question="a room", images=given, tokenizer=TOKENIZER)
    return prompt + answer(segments, tokenizer=TOKENIZER)[0]


def rows(*sequences: list[int], num_blocks: int = 2) -> NoisyRows:
    longest = max(map(len, sequences))
    ids = np.array([one + [V.pad] * (longest - len(one)) for one in sequences])
    return lay_out(ids, num_blocks=num_blocks, block_length=LENGTH, vocabulary=V)


def tensors(laid: NoisyRows) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(a) for a in (laid.blocks, laid.starts, laid.reach))


@pytest.fixture(scope="module")
def model() -> Transformer:
    transformer = Transformer(sized("tiny", vocab_size=V.size, initializer_range=0.2)).eval()
    transformer.init_weights(torch.Generator().manual_seed(0))
    return transformer


def test_blocks_are_copies_in_place_and_predict_the_next_code() -> None:
    ids = sequence(0, pictures=2, references=1)
    laid = rows(ids)
    ends = [at for at, token in enumerate(ids) if token == V.eoi]
    assert len(ends) == 3, "one is given"
    for number, end in enumerate(ends[1:], start=1):
        own = np.flatnonzero(laid.blocks[0] == number)
        start = end - LENGTH
        assert laid.ids[0, own].tolist() == ids[start:end]
        assert laid.ids[0, own[0]] == V.img
        assert laid.positions[0, own].tolist() == list(range(start, end))
        assert set(laid.reach[0, own]) == {start - 1}
        following = [
            token - V.visual_start if V.is_visual(token) else -1 for token in ids[start + 1 : end + 1]
        ]
        assert laid.targets[0, own].tolist() == following
    assert (laid.targets >= 0).sum() == 2 * SIZE[0] * SIZE[1]
    assert laid.ids.shape[1] % 128 == 0


def test_who_sees_whom() -> None:
    """The rule of the paper's figure 9, read off the attention: equal scores, values that name keys."""
    laid = rows(sequence(1, pictures=2))
    length = laid.ids.shape[1]
    q = torch.zeros(1, 1, length, length)
    attended = dense_attention(*tensors(laid))(q, q, torch.eye(length)[None, None])[0, 0] > 0
    blocks, positions = laid.blocks[0], laid.positions[0]
    img = {n: positions[blocks == n].min() for n in (1, 2)}
    for query in range(length):
        if blocks[query] == 0:
            expected = (blocks == 0) & (positions <= positions[query])
        elif blocks[query] > 0:
            expected = (blocks == blocks[query]) | ((blocks == 0) & (positions < img[blocks[query]]))
        else:
            continue
        assert attended[query].tolist() == expected.tolist()


def test_flex_attention_equals_the_dense_mask() -> None:
    laid = tensors(rows(sequence(2, pictures=2), sequence(3, pictures=1, references=1)))
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, laid[0].shape[1], 16, generator=generator)
    k, v = (torch.randn(2, 2, laid[0].shape[1], 16, generator=generator) for _ in range(2))
    dense, flex = (make(*laid)(q, k, v) for make in (dense_attention, flex_attention))
    torch.testing.assert_close(flex, dense, rtol=1e-5, atol=1e-5)


def packed(*sequences: list[int], num_blocks: int) -> NoisyRows:
    """All in one row, padding behind them."""
    ids = np.array([[*itertools.chain(*sequences), *[V.pad] * 5]])
    numbers = np.repeat(np.arange(len(sequences) + 1), [*map(len, sequences), 5])[None]
    return lay_out(ids, documents_BT=numbers, num_blocks=num_blocks, block_length=LENGTH, vocabulary=V)


@torch.inference_mode()
def test_packed_documents_compute_what_they_do_alone(model: Transformer) -> None:
    """Clean and noisy tokens alike, and in FlexAttention's form too."""
    sequences = [sequence(6, pictures=2), sequence(7, pictures=1, references=1), sequence(8, pictures=1)]
    laid, at, number = packed(*sequences, num_blocks=4), 0, 0
    both = [
        model(
            torch.from_numpy(laid.ids),
            attention=make(*tensors(laid)),
            positions_BT=torch.from_numpy(laid.positions),
        )[0]
        for make in (dense_attention, flex_attention)
    ]
    for ids in sequences:
        alone = rows(ids)
        hidden = model(
            torch.from_numpy(alone.ids),
            attention=dense_attention(*tensors(alone)),
            positions_BT=torch.from_numpy(alone.positions),
        )[0]
        for packed_hidden in both:
            torch.testing.assert_close(
                packed_hidden[at : at + len(ids)], hidden[: len(ids)], rtol=1e-4, atol=1e-4
            )
            for block in range(1, int(alone.blocks.max()) + 1):
                torch.testing.assert_close(
                    packed_hidden[torch.from_numpy(laid.blocks[0] == number + block)],
                    hidden[torch.from_numpy(alone.blocks[0] == block)],
                    rtol=1e-4,
                    atol=1e-4,
                )
        at, number = at + len(ids), number + int(alone.blocks.max())
    assert number == 4 == int(laid.blocks.max())
    assert int(packed(*sequences, num_blocks=3).blocks.max()) == 3, "what has no room is not learnt"


@torch.inference_mode()
def test_clean_tokens_compute_what_they_always_did(model: Transformer) -> None:
    ids = sequence(4, pictures=2)
    laid = rows(ids)
    hidden = model(
        torch.from_numpy(laid.ids),
        attention=dense_attention(*tensors(laid)),
        positions_BT=torch.from_numpy(laid.positions),
    )
    alone = model(torch.tensor([ids]))
    torch.testing.assert_close(hidden[:, : len(ids)], alone, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_training_rows_compute_what_a_refinement_pass_does(model: Transformer) -> None:
    """The noisy copies in one row, and each as a block behind a cache that holds what came before."""
    ids = sequence(5, pictures=2)
    laid = rows(ids)
    noisy = laid.ids.copy()
    rng = np.random.default_rng(0)
    codes = (laid.blocks > 0) & (noisy >= V.visual_start)
    noisy[codes] = V.visual_start + rng.integers(0, 16, int(codes.sum()))
    hidden = model(
        torch.from_numpy(noisy),
        attention=dense_attention(*tensors(laid)),
        positions_BT=torch.from_numpy(laid.positions),
    )
    for number in (1, 2):
        own = laid.blocks[0] == number
        before = int(laid.reach[0, own][0]) + 1
        cache = StaticCache(model.config, num_rows=1, capacity=len(ids) + image_length(SIZE))
        model(torch.tensor([ids[:before]]), cache=cache)
        block = model(torch.from_numpy(noisy[:, own]), cache=cache, advance_B=[False], causal=False)
        assert cache.lengths.tolist() == [before]
        torch.testing.assert_close(block[0], hidden[0, torch.from_numpy(own)], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_flex_attention_equals_the_dense_mask_with_gradients_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    laid = tuple(t.cuda() for t in tensors(rows(sequence(2, pictures=2), sequence(3, pictures=1))))
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (2, 4, laid[0].shape[1], 64)
    q = torch.randn(shape, generator=generator, device="cuda")
    k, v = (torch.randn((2, 2, *shape[2:]), generator=generator, device="cuda") for _ in range(2))
    results = []
    for make in (dense_attention, flex_attention):
        inputs = [t.clone().requires_grad_(True) for t in (q, k, v)]
        real = (laid[0] >= 0)[:, None, :, None]
        out = make(*laid)(*inputs) * real
        out.square().sum().backward()
        results.append([out.detach(), *(t.grad for t in inputs)])
    for dense, flex in zip(*results, strict=True):
        torch.testing.assert_close(flex, dense, rtol=2e-2, atol=2e-2)
