"""The cache pool: any sequence of requests gives rows equal to fresh ones, within its bound of memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emuworld.cache_pool import CachePool, Ids
from emuworld.model.cache import StaticCache
from emuworld.model.exact import ExactTransformer, exact
from emuworld.model.fused import fused
from emuworld.model.transformer import Transformer, sized

VOCAB = 97
TOKEN_BYTES = 2 * 2 * 2 * 16 * 2  # layers, keys and values, key-value heads, head_dim, fp16


@pytest.fixture(scope="module")
def transformer() -> ExactTransformer:
    model = Transformer(sized("tiny", vocab_size=VOCAB, initializer_range=0.2))
    model.init_weights(torch.Generator().manual_seed(0))
    return exact(model)


def chunk(seed: int, length: int = 7) -> Ids:
    return tuple(np.random.default_rng(seed).integers(0, VOCAB, length).tolist())


def held(cache: StaticCache, row: int) -> torch.Tensor:
    length = int(cache.lengths[row])
    layers = [torch.cat(cache.row_kv(layer, row, length)) for layer in range(cache.config.num_layers)]
    return torch.stack(layers)


def fresh(transformer: ExactTransformer, chunks: list[Ids]) -> tuple[torch.Tensor, torch.Tensor]:
    """The canonical form by definition: one pass a chunk, in a cache of one row."""
    cache = StaticCache(transformer.config, num_rows=1, capacity=400, dtype=transformer.dtype)
    hidden = torch.empty(0)
    for ids in chunks:
        hidden = transformer(torch.tensor([ids]), cache=cache)[0, -1]
    return held(cache, 0), hidden


@pytest.mark.parametrize("max_bytes", [1, 30 * TOKEN_BYTES, 1 << 30])
def test_rows_equal_fresh_ones_whatever_came_before(transformer: ExactTransformer, max_bytes: int) -> None:
    """Random walks on a tree of chunks: going on and back, forking, fewer and more rows, scribbling."""
    rng = np.random.default_rng(0)
    pool = CachePool(transformer, max_bytes=max_bytes)
    with torch.inference_mode():
        for _ in range(25):
            sequences = [
                [
                    chunk(0),
                    *(
                        chunk(10 * depth + int(rng.integers(3)), 5 + depth)
                        for depth in range(rng.integers(4))
                    ),
                ]
                for _ in range(rng.integers(1, 5))
            ]
            room = int(rng.integers(1, 80))
            cache, hiddens, _ = pool.prepare(sequences, room=room)
            assert cache.num_rows == len(sequences)
            for row, chunks in enumerate(sequences):
                expected, hidden = fresh(transformer, chunks)
                assert torch.equal(held(cache, row), expected)
                assert torch.equal(hiddens[row], hidden)
            transformer(torch.full((len(sequences), room), 5), cache=cache)
            assert pool.num_bytes <= max_bytes


def test_rows_are_filled_together_where_passes_cost(
    transformer: ExactTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: the same rows, from fewer passes. The exact form gives equal bits in any company."""
    monkeypatch.setattr("emuworld.cache_pool.rides_along", lambda device: True)
    forward, passes = transformer.forward, []
    monkeypatch.setattr(
        transformer, "forward", lambda ids, **more: passes.append(len(ids)) or forward(ids, **more)
    )
    walks = [[chunk(world % 2), *(chunk(10 * world + i) for i in range(2))] for world in range(4)]
    for max_bytes in (1, 1 << 30):
        pool = CachePool(transformer, max_bytes=max_bytes)
        with torch.inference_mode():
            for length in (1, 3):
                passes.clear()
                cache, hiddens, _ = pool.prepare([walk[:length] for walk in walks], room=9)
                assert sum(passes) == {1: 2 if max_bytes > 1 else 4, 3: 8}[length]
                assert len(passes) <= 2
                for row, walk in enumerate(walks):
                    expected, hidden = fresh(transformer, walk[:length])
                    assert torch.equal(held(cache, row), expected) and torch.equal(hiddens[row], hidden)


def test_chunks_of_unequal_length_share_a_pass(
    transformer: ExactTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shorter ones are filled up; what is kept of them is as if they had been alone. None goes beyond the
    cache, however little room there is behind the longest row."""
    monkeypatch.setattr("emuworld.cache_pool.rides_along", lambda device: True)
    forward, passes = transformer.forward, []
    monkeypatch.setattr(
        transformer, "forward", lambda ids, **more: passes.append(ids.shape) or forward(ids, **more)
    )
    walks = [[chunk(0), chunk(1 + world, 3 + 2 * world), chunk(9 + world, 9 - world)] for world in range(4)]
    for room in (1, 60):
        pool = CachePool(transformer)
        passes.clear()
        with torch.inference_mode():
            cache, hiddens, _ = pool.prepare(walks, room=room)
        assert passes == [(1, 16), (4, 16), (4, 16)]
        for row, walk in enumerate(walks):
            expected, hidden = fresh(transformer, walk)
            assert torch.equal(held(cache, row), expected) and torch.equal(hiddens[row], hidden)
        assert pool.num_bytes == (7 + 3 + 5 + 7 + 9 + 9 + 8 + 7 + 6) * TOKEN_BYTES + 9 * 64 * 4
        assert pool.num_prefills == 9


def test_what_was_computed_is_not_computed_again(transformer: ExactTransformer) -> None:
    pool = CachePool(transformer, max_bytes=1 << 30)
    walk = [chunk(i) for i in range(4)]
    with torch.inference_mode():
        pool.prepare([walk[:2]], room=1)
        assert pool.num_prefills == 2
        pool.prepare([walk[:3]] * 4, room=1)
        assert pool.num_prefills == 3, "four branches, one new chunk"
        pool.prepare([walk[:1], walk, walk[:2]], room=1)
        assert pool.num_prefills == 4
        pool.prepare([[walk[1], walk[0]]], room=1)
        assert pool.num_prefills == 6, "the same chunks in another order are another sequence"
        assert pool.num_bytes == 6 * (7 * TOKEN_BYTES + 64 * 4)
        pool.clear()
        assert pool.num_bytes == 0
        pool.prepare([walk], room=1)
        assert pool.num_prefills == 10


def test_what_was_drawn_is_not_read_again(
    transformer: ExactTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token, in pieces, with tokens taken back and others in their place: only what is missing of
    the chunk that came of it goes through the model, and the rows are as if all of it had."""
    forward, read = transformer.forward, []
    monkeypatch.setattr(
        transformer, "forward", lambda ids, **more: read.append(ids.shape[1]) or forward(ids, **more)
    )
    drawn, other = chunk(1, 20), chunk(2, 20)
    pool = CachePool(transformer, max_bytes=1 << 30)
    with torch.inference_mode():
        for num_written in (0, 1, 12, 19, 20):
            pool.clear()
            cache, *_ = pool.prepare([[chunk(0)], [chunk(0)]], room=40)
            for row, ids in ((0, drawn), (1, other)):
                for at in range(0, num_written, 5):
                    piece = torch.tensor([ids[at : min(at + 5, num_written)]])
                    transformer(piece, cache=cache.rows([row]))
            if num_written == 12:
                cache.truncate(0, 7 + 9)
                transformer(torch.tensor([other[9:12]]), cache=cache.rows([0]))
            read.clear()
            again = pool.prepare([[chunk(0), drawn], [chunk(0), drawn]], room=1)
            assert read == [20 - {0: 0, 1: 1, 12: 9, 19: 19, 20: 19}[num_written]], "once for both rows"
            for row in range(2):
                expected, hidden = fresh(transformer, [chunk(0), drawn])
                assert torch.equal(held(again.cache, row), expected)
                assert torch.equal(again.hiddens_D[row], hidden)


def test_a_running_row_needs_no_stored_chunks(transformer: ExactTransformer) -> None:
    """A bound too small for anything: the working rows themselves still spare a walk its past."""
    pool = CachePool(transformer, max_bytes=1)
    walks = [[chunk(10 * world + i) for i in range(4)] for world in range(3)]
    with torch.inference_mode():
        for length in range(1, 5):
            pool.prepare([walk[:length] for walk in walks], room=20)
            assert pool.num_prefills == 3 * length


def test_the_least_used_branches_go_first(transformer: ExactTransformer) -> None:
    per_chunk = 7 * TOKEN_BYTES + 64 * 4
    pool = CachePool(transformer, max_bytes=3 * per_chunk)
    trunk, left, right, new = (chunk(i) for i in range(4))
    with torch.inference_mode():
        for branch in (left, right, new):  # the third branch displaces the first, not the trunk
            pool.prepare([[trunk, branch]], room=1)
        pool.prepare([[chunk(9)]], room=1)  # takes the working row away, and displaces `right`
        count = pool.num_prefills
        pool.prepare([[trunk, new]], room=1)
        assert pool.num_prefills == count
        pool.prepare([[trunk, left]], room=1)
        assert pool.num_prefills == count + 1


def test_a_row_that_holds_a_path_and_no_more_is_taken_for_it(transformer: ExactTransformer) -> None:
    """And not one that would have to be cut, whatever stands first."""
    pool = CachePool(transformer, max_bytes=1)
    long, short = [chunk(0), chunk(1), chunk(2)], [chunk(0), chunk(1)]
    with torch.inference_mode():
        pool.prepare([long, short], room=9)
        before = pool.num_prefills
        for chunks, row in ((short, 1), (short, 1), (long, 0)):
            cache, hiddens, _ = pool.prepare([chunks], room=9)
            expected, hidden = fresh(transformer, chunks)
            assert cache.indices.tolist() == [row] and pool.num_prefills == before
            assert torch.equal(held(cache, 0), expected) and torch.equal(hiddens[0], hidden)


@pytest.mark.gpu
def test_a_gpu_has_room_for_the_whole_context_at_once() -> None:
    """Proves that a working cache on a GPU does not grow where there is memory, and keeps to its bound."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    model = Transformer(sized("tiny", vocab_size=VOCAB, initializer_range=0.2))
    model.init_weights(torch.Generator().manual_seed(0))
    fast = fused(model.to("cuda", torch.bfloat16))
    with torch.inference_mode():
        whole = CachePool(fast).prepare([[chunk(0)]], room=9).cache
        assert whole.capacity == fast.config.max_position_embeddings
        num_bytes = whole.num_bytes // whole.capacity * 640
        small = CachePool(fast, max_bytes=num_bytes).prepare([[chunk(0)], [chunk(1)]], room=9).cache
        assert small.capacity == 320 and small.num_bytes == num_bytes


def test_lent_rows_stay_while_others_work(transformer: ExactTransformer) -> None:
    """Other calls meanwhile get rows of their own; afterwards the lent ones spare their past again."""
    pool = CachePool(transformer, max_bytes=1)
    mine, other = [chunk(0), chunk(1)], [chunk(2)]
    with torch.inference_mode():
        with pool.lend([mine], room=5) as (cache, _, _):
            before = held(cache, 0).clone()
            pool.prepare([other], room=30)
            with pool.lend([other], room=5) as (second, _, _):
                transformer(torch.full((1, 5), 5), cache=second)
            assert torch.equal(held(cache, 0), before)
            transformer(torch.full((1, 5), 6), cache=cache)
        pool.clear()
        with pool.lend([mine], room=5):
            pass
        count = pool.num_prefills
        pool.prepare([mine], room=1)
        assert pool.num_prefills == count, "given back"
        with pool.lend([mine], room=5):
            pool.clear()
        pool.prepare([mine], room=1)
        assert pool.num_prefills == count + 2, "what was cleared meanwhile does not come back"


def test_lent_rows_come_back_after_an_error(transformer: ExactTransformer) -> None:
    pool = CachePool(transformer, max_bytes=1)
    with torch.inference_mode():
        with pytest.raises(KeyError), pool.lend([[chunk(0)]], room=5):
            raise KeyError
        count = pool.num_prefills
        pool.prepare([[chunk(0)]], room=1)
        assert pool.num_prefills == count


def test_what_is_forgotten_is_computed_again_in_the_same_memory(transformer: ExactTransformer) -> None:
    pool = CachePool(transformer)
    sequences = [[chunk(0), chunk(1)], [chunk(0)]]
    with torch.inference_mode():
        memory = pool.prepare(sequences, room=3).cache.memory
        assert pool.num_prefills == 2
        pool.forget()
        again = pool.prepare(sequences, room=3)
        assert pool.num_prefills == 4 and again.cache.memory is memory
        for row, chunks in enumerate(sequences):
            kv, hidden = fresh(transformer, chunks)
            assert torch.equal(held(again.cache, row), kv) and torch.equal(again.hiddens_D[row], hidden)


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [0, 1])
@torch.inference_mode()
def test_a_gpu_fills_rows_of_unequal_chunks_as_if_each_were_alone(spread: int) -> None:
    """Proves the kernels on rows that are filled up, and on equal ones: keys, values and hidden states within
    rounding of passes over each chunk alone, and equal bits for equal batches. So with a picture behind
    them, whose tokens see each other."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    plain = Transformer(sized("small", vocab_size=VOCAB, num_layers=3, max_position_embeddings=1024))
    plain.init_weights(torch.Generator().manual_seed(0))
    model = fused(plain.cuda().bfloat16().eval())
    lengths = [(20 + 3 * at, 270 + 5 * at, 3 + at) for at in (spread * world for world in range(6))]
    picture = torch.arange(200, device="cuda")[None] % VOCAB
    walks = [
        [chunk(10 * world + i, length) for i, length in enumerate(row)] for world, row in enumerate(lengths)
    ]
    found = []
    for _ in range(2):
        cache, hiddens, _ = CachePool(model).prepare(walks, room=200)
        drawn = model(picture.expand(6, -1), cache=cache, advance_B=[False] * 6, causal=False)
        found.append([(held(cache, row), *both) for row, both in enumerate(zip(hiddens, drawn, strict=True))])
    for (kv, hidden, drawn), again, walk in zip(*found, walks, strict=True):
        assert all(map(torch.equal, (kv, hidden, drawn), again))
        alone = StaticCache(model.config, num_rows=1, capacity=600, device="cuda", dtype=model.cache_dtype)
        for ids in walk:
            expected = model(torch.tensor([ids], device="cuda"), cache=alone)[0, -1]
        whole = model(picture, cache=alone, advance_B=[False], causal=False)[0]
        pairs = ((kv, held(alone, 0), 0.02), (hidden, expected, 0.02), (drawn, whole, 0.05))
        for ours, theirs, largest in pairs:
            assert (ours - theirs).float().norm() < largest * theirs.float().norm()
