"""Key-value caches of worlds, found again by their ids: what makes branching and batching cheap, and nothing
else.

A world's ids fall into chunks (the prompt, then one chunk up to each EOI). A finished chunk's keys and values
are those of one forward pass over that chunk alone, in a row by itself, whoever drew it and however: the
canonical form. So a world that ran on, one that was restored and one that was forked hold equal bits, and
draw equal frames. Where a model's keys and values do not depend on how tokens are cut into calls (the CPU
form), what was just drawn is in canonical form already; else the pass is made.

Two stores, both only a matter of speed: `Chunks`, a bounded LRU of chunks, each found by the hash of all ids
up to its end, so that branches share what they have in common; and one working cache whose rows keep what
they held at the last call. Nothing here is ever saved.

Shapes: L layers, K = 2 x key-value heads, T tokens of a chunk, d head_dim, D hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from emuworld.chunks import Chunk, Chunks, default_bytes
from emuworld.decoding.autoregressive import LanguageModel
from emuworld.decoding.cache_rows import (
    filled_up,
    index_tensor,
    passes_over,
    rides_along,
    tokens_at_once,
)
from emuworld.model.cache import StaticCache, token_bytes
from emuworld.model.config import TransformerConfig
from emuworld.readings import Ids, Reading
from emuworld.shares import one_thread

_GROWTH = 1.5  # a working cache that fills up grows by this factor, so that copying it stays rare
# One on a GPU takes the model's whole context at once, within the bound of the stored chunks and this share
# of the memory that is free: there growing also waits for the GPU, and what was recorded over it is lost.
_SHARE_OF_FREE = 4
_PATIENCE = 64  # small calls before an oversized working cache is given up: resets are no reason


class CachedModel(LanguageModel, Protocol):
    """A transformer whose caches can be made here."""

    @property
    def config(self) -> TransformerConfig: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def cache_dtype(self) -> torch.dtype: ...

    def __call__(
        self,
        ids_BT: Tensor,
        *,
        cache: StaticCache,
        advance_B: Sequence[bool] | np.ndarray | None = None,
        causal: bool = True,
        last_B: Tensor | None = None,
    ) -> Tensor:
        """With `last_B` the hidden states [B, 1, D] of each row's token there, and no others."""


@dataclass
class _Held:
    """What one row of the working cache holds: keys of its path, where each chunk ends, the hidden states
    there.

    `last_call` is the number of the call that used the row last.
    """

    last_call: int = 0
    keys: list[bytes] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    hiddens_D: list[Tensor] = field(default_factory=list)

    def common(self, keys: Sequence[bytes]) -> int:
        """Number of leading chunks in common with a path."""
        if self.keys == keys:
            return len(keys)
        count = 0
        for mine, theirs in zip(self.keys, keys, strict=False):
            if mine != theirs:
                break
            count += 1
        return count

    def cut(self, num_chunks: int) -> int:
        """Forget all but the first chunks; the number of tokens left."""
        del self.keys[num_chunks:], self.stops[num_chunks:], self.hiddens_D[num_chunks:]
        return self.stops[-1] if self.stops else 0

    def extend(self, key: bytes, num_tokens: int, hidden_D: Tensor) -> None:
        self.keys.append(key)
        self.stops.append((self.stops[-1] if self.stops else 0) + num_tokens)
        self.hiddens_D.append(hidden_D)


class Prepared(NamedTuple):
    """Rows of a cache that hold exactly the asked-for sequences, and the hidden state [D] behind each."""

    cache: StaticCache
    hiddens_D: list[Tensor]
    refill: Callable[[int, Sequence[Ids], int], Tensor]
    """A row, the sequence that it shall hold instead, the room behind it -> the hidden state [D] there."""


class CachePool:
    """Gives rows that hold given sequences, from the cheapest source: working rows, stored chunks, or a
    prefill.

    Args:
        model: the transformer; CPU form or not.
        max_bytes: bound of the stored chunks; default: a quarter of the memory, at most 8 GiB. The working
            cache comes on top: as large as the largest batch needs, and given up where it exceeds the bound
            and smaller batches have come for long.
    """

    def __init__(self, model: CachedModel, *, max_bytes: int | None = None) -> None:
        self._model = model
        max_bytes = default_bytes(model.device) if max_bytes is None else max_bytes
        self._chunks = Chunks(max_bytes=max_bytes)
        self._num_calls = 0
        self._small_calls = 0  # calls in a row that needed at most half of the working rows
        self._working: StaticCache | None = None
        self._held: list[_Held] = []
        self._num_clears = 0
        self.num_prefills = 0  # chunks computed so far, for tests and figures

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored chunks."""
        return self._chunks.num_bytes

    def prepare(self, sequences: Sequence[Sequence[Ids]], *, room: int) -> Prepared:
        """Rows that hold the sequences (each a list of chunks), in this order, with `room` free tokens in
        each.

        What is written behind them is forgotten at the next call. A sequence without chunks is a row to be
        filled later (`Prepared.refill`); one of them has some.
        """
        self._num_calls += 1
        readings = list(map(Reading.of, sequences))
        paths = [reading.keys for reading in readings]
        longest = max(reading.num_tokens for reading in readings)
        cache = self._make_room(len(sequences), longest + room)
        slots = self._assign(paths)
        rows = cache if slots == list(range(cache.num_rows)) else cache.rows(slots)
        held = [self._held[slot] for slot in slots]
        hiddens = []
        if rides_along(self._model.device):
            self._fill_together(rows, held, paths, sequences)
            hiddens = [held[row].hiddens_D[-1] for row, path in enumerate(paths) if path]
        else:
            for row, (path, chunks) in enumerate(zip(paths, sequences, strict=True)):
                hiddens += [self._fill(rows.rows([row]), held[row], path, chunks)] if chunks else []

        def refill(row: int, chunks: Sequence[Ids], room: int) -> Tensor:
            reading = Reading.of(chunks)
            self._reserve(rows, reading.num_tokens + room)
            return self._fill(rows.rows([row]), held[row], reading.keys, chunks)

        return Prepared(rows, hiddens, refill)

    def read_ahead(self, sequences: Sequence[Reading]) -> None:
        """Put the last chunk of each into the row that holds all before it, if there is one, it has room and
        passes are what costs. A GPU works at it meanwhile; a `prepare` that asks for them finds them, and any
        other finds what it would have found.
        """
        cache = self._working
        if cache is None or not rides_along(self._model.device):
            return
        room = min(cache.capacity, self._model.config.max_position_embeddings)
        ending = self._ending()
        found: dict[int, Reading] = {}
        for chunks in sequences:
            fits = len(chunks) > 1 and chunks.num_tokens <= room and chunks.keys[-1] not in ending
            if fits and (slots := ending.get(chunks.keys[-2])):
                found[slots.popleft()] = chunks
        if found:
            held, paths = [self._held[slot] for slot in found], [chunks.keys for chunks in found.values()]
            self._fill_together(cache.rows(list(found)), held, paths, list(found.values()))

    @contextmanager
    def lend(self, sequences: Sequence[Sequence[Ids]], *, room: int) -> Iterator[Prepared]:
        """`prepare`, with the rows kept from other calls until the end: those get a working cache of their
        own."""
        prepared = self.prepare(sequences, room=room)
        lent, num_clears = (self._working, self._held), self._num_clears
        self._working, self._held = None, []
        try:
            yield prepared
        finally:
            if self._working is None and self._num_clears == num_clears:
                self._working, self._held = lent

    def clear(self) -> None:
        """Give all memory back. Results stay the same; the next call computes again."""
        self._chunks = Chunks(max_bytes=self._chunks.max_bytes)
        self._working, self._held = None, []
        self._num_clears += 1

    def forget(self) -> None:
        """The weights have changed: nothing that is held is true any more. The memory of the working cache
        stays where it is, and with it what was recorded over it."""
        self._chunks = Chunks(max_bytes=self._chunks.max_bytes)
        for row, held in enumerate(self._held):
            assert self._working is not None
            self._working.truncate(row, held.cut(0))

    def _make_room(self, num_rows: int, capacity: int) -> StaticCache:
        """The working cache with at least this many rows and tokens a row."""
        self._give_up_if_oversized(num_rows)
        cache = self._working
        if cache is None or cache.num_rows < num_rows:
            grown = StaticCache(
                self._model.config,
                num_rows=num_rows,
                capacity=max(capacity, self._ample(num_rows)),
                device=self._model.device,
                dtype=self._model.cache_dtype,
            )
            for row, held in enumerate(self._held):
                assert cache is not None
                cache.truncate(row, held.stops[-1] if held.stops else 0)
                grown.copy_row(row, row, origin=cache)
            self._held += [_Held() for _ in range(num_rows - len(self._held))]
            self._working = cache = grown
        self._reserve(cache, capacity)
        return cache

    def _reserve(self, cache: StaticCache, capacity: int) -> None:
        if cache.capacity < capacity:
            grown = int(cache.capacity * _GROWTH)
            cache.reserve(max(capacity, min(grown, self._model.config.max_position_embeddings)))

    def _ample(self, num_rows: int) -> int:
        """Tokens of so many rows that there is memory for, where growing is dear."""
        if self._model.device.type != "cuda":
            return 0
        free_bytes, _ = torch.cuda.mem_get_info(self._model.device)
        row_bytes = token_bytes(self._model.config, self._model.cache_dtype) * num_rows
        most = min(self._chunks.max_bytes, free_bytes // _SHARE_OF_FREE) // row_bytes
        return min(most, self._model.config.max_position_embeddings)

    def _give_up_if_oversized(self, num_rows: int) -> None:
        """Drop a working cache that is above the bound and has been half empty for long."""
        cache = self._working
        small = cache is not None and 2 * num_rows <= cache.num_rows
        self._small_calls = self._small_calls + 1 if small else 0
        if cache is not None and self._small_calls > _PATIENCE and cache.num_bytes > self._chunks.max_bytes:
            self._working, self._held, self._small_calls = None, [], 0

    def _assign(self, paths: Sequence[Sequence[bytes]]) -> list[int]:
        """A row for each path: one that holds it and nothing else; else the one with most in common, among
        equals the one that was not used for longest."""
        ending = self._ending()
        queues = (ending.get(path[-1]) if path else None for path in paths)
        exact = [queue.popleft() if queue else None for queue in queues]
        slots = [slot for slot in exact if slot is not None]
        if len(slots) < len(exact):
            taken = set(slots)
            order = sorted(
                set(range(len(self._held))) - taken,
                key=lambda slot: (self._held[slot].last_call, len(self._held[slot].keys)),
            )
            holding: dict[bytes | None, deque[int]] = {None: deque(order)}
            for slot in order:
                for key in self._held[slot].keys:
                    holding.setdefault(key, deque()).append(slot)
            slots = [
                _likest(path, holding, taken) if slot is None else slot
                for path, slot in zip(paths, exact, strict=True)
            ]
        for slot in slots:
            self._held[slot].last_call = self._num_calls
        return slots

    def _ending(self) -> dict[bytes, deque[int]]:
        """The rows of the working cache by the path that they hold."""
        ending: dict[bytes, deque[int]] = {}
        for slot, held in enumerate(self._held):
            if held.keys:
                ending.setdefault(held.keys[-1], deque()).append(slot)
        return ending

    def _fill_together(
        self,
        rows: StaticCache,
        held: Sequence[_Held],
        paths: Sequence[Sequence[bytes]],
        sequences: Sequence[Sequence[Ids]],
    ) -> None:
        """What `_fill` does, with chunks of about equal length in one pass: for a GPU, where passes are what
        costs and equal bits are promised for equal batches only.
        """
        unfinished = [row for row, path in enumerate(paths) if path]
        kept_R, most_tokens = rows.lengths, tokens_at_once(self._model.config)
        for row in unfinished:
            kept_R[row] = held[row].cut(held[row].common(paths[row]))
        rows.truncate_all(kept_R)
        while unfinished:
            row_of: dict[bytes, int] = {}  # chunks to compute, and a row for each
            for row in unfinished:
                path, own = paths[row], held[row]
                while len(own.keys) < len(path) and (chunk := self._chunks.get(path[len(own.keys)])):
                    _append(rows.rows([row]), chunk)
                    own.extend(path[len(own.keys)], chunk.num_tokens, chunk.hidden_D)
                if (at := len(own.keys)) < len(path):
                    row_of.setdefault(path[at], row)
            lengths = {row: len(sequences[row][len(held[row].keys)]) for row in row_of.values()}
            for some, num_tokens in passes_over(lengths, cache=rows, most_tokens=most_tokens):
                ids_R = [sequences[row][len(held[row].keys)] for row in some]
                chunks = self._prefill(rows.rows(some), ids_R, num_tokens=num_tokens)
                for row, chunk in zip(some, chunks, strict=True):
                    computed = paths[row][len(held[row].keys)]
                    self._chunks.put(computed, chunk)
                    held[row].extend(computed, chunk.num_tokens, chunk.hidden_D)
            unfinished = [row for row in unfinished if len(held[row].keys) < len(paths[row])]
        for path in paths:
            self._chunks.touch(path)

    def _fill(self, row: StaticCache, held: _Held, path: Sequence[bytes], chunks: Sequence[Ids]) -> Tensor:
        """Make a row hold these chunks; the hidden state [D] behind the last.

        What was written behind the last common chunk is kept as far as it is the next one: see
        `StaticCache.ids`.
        """
        common = held.common(path)
        start = held.cut(common)
        num_kept = 0
        if common < len(chunks) and self._chunks.get(path[common]) is None:
            num_kept = _num_common(row.ids(0, start), chunks[common][:-1])
        row.truncate(0, start + num_kept)
        for key, ids in zip(path[common:], chunks[common:], strict=True):
            chunk = self._chunks.get(key)
            if chunk is None:
                (chunk,) = self._prefill(row, [ids], num_tokens=len(ids), num_held=num_kept)
                self._chunks.put(key, chunk)
            else:
                _append(row, chunk)
            num_kept = 0
            held.extend(key, len(ids), chunk.hidden_D)
        self._chunks.touch(path)
        return held.hiddens_D[-1]

    def _prefill(
        self, rows: StaticCache, ids_R: Sequence[Ids], *, num_tokens: int, num_held: int = 0
    ) -> list[Chunk]:
        """One forward pass of so many tokens over a chunk of each row, shorter ones filled up, behind what
        the rows hold, which may be the first tokens of the chunk."""
        device, starts_R = self._model.device, rows.lengths - num_held
        lengths_R = np.array([len(ids) for ids in ids_R])
        ids_RT = filled_up(ids_R, num_tokens, device=device)
        last_R = index_tensor((lengths_R - 1 - num_held).tolist(), device)
        hidden_R1D = self._model(ids_RT[:, num_held:], cache=rows, last_B=last_R)
        self.num_prefills += len(ids_R)
        rows.truncate_all(starts_R + lengths_R)
        hiddens_D = hidden_R1D[:, 0].unbind()
        with one_thread(device):
            return list(map(Chunk, rows.read_parts(starts_R, lengths_R), hiddens_D))


def _likest(path: Sequence[bytes], holding: Mapping[bytes | None, deque[int]], taken: set[int]) -> int:
    """The first row that is not taken of those that hold most of a path; taken then."""
    for end in (*reversed(path), None):  # a key stands for all before it
        queue = holding.get(end, deque())
        while queue and queue[0] in taken:
            queue.popleft()
        if queue:
            taken.add(queue[0])
            return queue.popleft()
    raise ValueError("there is a row for each path")


def _num_common(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many ids two sequences begin with in common."""
    pairs = enumerate(zip(ids, others, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(ids), len(others)))


def _append(row: StaticCache, chunk: Chunk) -> None:
    """Copy a stored chunk behind what the row holds."""
    step = row.begin(chunk.num_tokens)
    with one_thread(row.device):
        for layer, new in enumerate(zip(*chunk.parts_LKT, strict=True)):
            row.write_parts(layer, [part_KT[None] for part_KT in new], step=step)
    row.finish(step)
