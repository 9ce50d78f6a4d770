"""Key-value caches of worlds, found again by their ids: what makes branching and batching cheap, and nothing
else.

A world's ids fall into chunks (the prompt, then one chunk up to each EOI). A finished chunk's keys and values
come from one forward pass over that chunk alone, in a row by itself, whoever drew it and however: the
canonical form. So a world that ran on, one that was restored and one that was forked hold equal bits, and
draw equal frames.

Two stores, both only a matter of speed: `_Chunks`, a bounded LRU of chunks, each found by the hash of all ids
up to its end, so that branches share what they have in common; and one working cache whose rows keep what
they held at the last call. Nothing here is ever saved.

Shapes: L layers, K = 2 x key-value heads, T tokens of a chunk, d head_dim, D hidden size.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from emuworld.decoding.autoregressive import LanguageModel
from emuworld.decoding.runs import have_room, read_runs
from emuworld.model.cache import StaticCache
from emuworld.model.config import TransformerConfig

Ids = tuple[int, ...]
_GROWTH = 1.5  # a working cache that fills up grows by this factor, so that copying it stays rare
_PATIENCE = (
    64  # small calls before an oversized working cache is given up: resets between steps are no reason
)


class CachedModel(LanguageModel, Protocol):
    """A transformer whose caches can be made here."""

    @property
    def config(self) -> TransformerConfig: ...

    @property
    def dtype(self) -> torch.dtype: ...


class Chunk(NamedTuple):
    """Keys and values of one chunk [L, K, T, d], and the hidden state [D] behind its last token."""

    kv_LKTd: Tensor
    hidden_D: Tensor

    @property
    def num_bytes(self) -> int:
        return self.kv_LKTd.nbytes + self.hidden_D.nbytes


class _Chunks:
    """Least recently used chunks go first once `max_bytes` are held."""

    def __init__(self, *, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._chunks: OrderedDict[bytes, Chunk] = OrderedDict()

    def __len__(self) -> int:
        return len(self._chunks)

    def get(self, key: bytes) -> Chunk | None:
        return self._chunks.get(key)

    def put(self, key: bytes, chunk: Chunk) -> None:
        if key in self._chunks:
            return
        self._chunks[key] = chunk
        self.num_bytes += chunk.num_bytes
        while self.num_bytes > self.max_bytes:
            _, dropped = self._chunks.popitem(last=False)
            self.num_bytes -= dropped.num_bytes

    def touch(self, keys: Sequence[bytes]) -> None:
        """Mark a path as used: its first chunk last, so that a branch goes before the trunk it grows from."""
        for key in reversed(keys):
            if key in self._chunks:
                self._chunks.move_to_end(key)


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

    def extend(self, key: bytes, ids: Ids, hidden_D: Tensor) -> None:
        self.keys.append(key)
        self.stops.append((self.stops[-1] if self.stops else 0) + len(ids))
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
        self._chunks = _Chunks(max_bytes=max_bytes)
        self._num_calls = 0
        self._small_calls = 0  # calls in a row that needed at most half of the working rows
        self._working: StaticCache | None = None
        self._held: list[_Held] = []
        self._num_clears = 0
        self.in_bulk = False
        """Whether rows read their chunks together: faster on a GPU, and not the canonical form to the bit."""
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
        paths = [_path(chunks) for chunks in sequences]
        longest = max(sum(map(len, chunks)) for chunks in sequences)
        cache = self._make_room(len(sequences), longest + room)
        slots = self._assign(paths)
        rows = cache if slots == list(range(cache.num_rows)) else cache.rows(slots)
        held = [self._held[slot] for slot in slots]
        filled = self.in_bulk and len(sequences) > 1 and self._fill_in_bulk(rows, held, paths, sequences)
        hiddens = []
        for row, (path, chunks) in enumerate(zip(paths, sequences, strict=True)):
            if chunks:
                one = held[row]
                hidden_D = one.hiddens_D[-1] if filled else self._fill(rows.rows([row]), one, path, chunks)
                hiddens.append(hidden_D)

        def refill(row: int, chunks: Sequence[Ids], room: int) -> Tensor:
            self._reserve(rows, sum(map(len, chunks)) + room)
            return self._fill(rows.rows([row]), held[row], _path(chunks), chunks)

        return Prepared(rows, hiddens, refill)

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
        self._chunks = _Chunks(max_bytes=self._chunks.max_bytes)
        self._working, self._held = None, []
        self._num_clears += 1

    def _make_room(self, num_rows: int, capacity: int) -> StaticCache:
        """The working cache with at least this many rows and tokens a row."""
        self._give_up_if_oversized(num_rows)
        cache = self._working
        if cache is None or cache.num_rows < num_rows:
            grown = StaticCache(
                self._model.config,
                num_rows=num_rows,
                capacity=capacity,
                device=self._model.device,
                dtype=self._model.dtype,
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
            grown_by = min(int(cache.capacity * _GROWTH), self._model.config.max_position_embeddings)
            cache.reserve(max(capacity, grown_by))

    def _give_up_if_oversized(self, num_rows: int) -> None:
        """Drop a working cache that is above the bound and has been half empty for long."""
        cache = self._working
        small = cache is not None and 2 * num_rows <= cache.num_rows
        self._small_calls = self._small_calls + 1 if small else 0
        if (
            cache is not None
            and self._small_calls > _PATIENCE
            and self._working_bytes(cache) > self._chunks.max_bytes
        ):
            self._working, self._held, self._small_calls = None, [], 0

    def _working_bytes(self, cache: StaticCache) -> int:
        config = self._model.config
        tokens = cache.num_rows * cache.capacity
        return (
            tokens
            * config.num_layers
            * 2
            * config.num_kv_heads
            * config.head_dim
            * self._model.dtype.itemsize
        )

    def _assign(self, paths: Sequence[Sequence[bytes]]) -> list[int]:
        """A row for each path: the one with most in common; among equals the one that was not used for
        longest."""
        order = sorted(
            range(len(self._held)), key=lambda slot: (self._held[slot].last_call, len(self._held[slot].keys))
        )
        free = dict.fromkeys(order)
        with_chunk: dict[bytes, deque[int]] = {}  # slots whose path goes through a chunk, in that order
        for slot in order:
            for key in self._held[slot].keys:
                with_chunk.setdefault(key, deque()).append(slot)
        slots = []
        for path in paths:
            best = next((slot for key in reversed(path) for slot in _first(with_chunk.get(key), free)), None)
            best = next(iter(free)) if best is None else best
            del free[best]
            slots.append(best)
        for slot in slots:
            self._held[slot].last_call = self._num_calls
        return slots

    def _fill_in_bulk(
        self,
        rows: StaticCache,
        held: Sequence[_Held],
        paths: Sequence[Sequence[bytes]],
        sequences: Sequence[Sequence[Ids]],
    ) -> bool:
        """Make the rows hold their chunks, the next of all rows together. False: the context is too full for
        it, and each is to be filled by itself."""
        rows.cut(np.array([one.cut(one.common(path)) for one, path in zip(held, paths, strict=True)]))
        while True:
            depths = [len(one.keys) for one in held]
            missing = {
                row: (paths[row][d], sequences[row][d]) for row, d in enumerate(depths) if d < len(paths[row])
            }
            if not missing:
                break
            stored = {row: chunk for row, (key, _) in missing.items() if (chunk := self._chunks.get(key))}
            _append_in_bulk(rows, stored)
            for row, chunk in stored.items():
                held[row].extend(*missing[row], chunk.hidden_D)
            runs = [
                missing[row][1] if row in missing and row not in stored else () for row in range(len(held))
            ]
            if not any(runs):
                continue
            if not have_room(rows, runs):
                return False
            starts_R = rows.lengths
            hidden_RD = read_runs(self._model, rows, runs)
            for row, ids in enumerate(runs):
                if not ids:
                    continue
                self.num_prefills += 1
                key, start, index = missing[row][0], int(starts_R[row]), int(rows.indices[row])
                layers = [kv_RKCd[index, :, start : start + len(ids)] for kv_RKCd in rows.memory.kv_RKCd]
                self._chunks.put(key, Chunk(torch.stack(layers), hidden_RD[row]))
                held[row].extend(key, ids, hidden_RD[row])
        for path in paths:
            self._chunks.touch(path)
        return True

    def _fill(self, row: StaticCache, held: _Held, path: Sequence[bytes], chunks: Sequence[Ids]) -> Tensor:
        """Make a row hold these chunks; the hidden state [D] behind the last."""
        common = held.common(path)
        row.truncate(0, held.cut(common))
        for key, ids in zip(path[common:], chunks[common:], strict=True):
            chunk = self._chunks.get(key)
            if chunk is None:
                chunk = self._prefill(row, ids)
                self._chunks.put(key, chunk)
            else:
                _append(row, chunk)
            held.extend(key, ids, chunk.hidden_D)
        self._chunks.touch(path)
        return held.hiddens_D[-1]

    def _prefill(self, row: StaticCache, ids: Ids) -> Chunk:
        """One forward pass over a chunk, behind what the row holds."""
        start = int(row.lengths[0])
        hidden_1TD = self._model(torch.tensor([ids], device=self._model.device), cache=row)
        self.num_prefills += 1
        layers = []
        for layer in range(self._model.config.num_layers):
            k_1GSd, v_1GSd = row.row_kv(layer, 0, start + len(ids))
            layers.append(torch.cat((k_1GSd[0, :, start:], v_1GSd[0, :, start:])))
        return Chunk(torch.stack(layers), hidden_1TD[0, -1].clone())


def _append(row: StaticCache, chunk: Chunk) -> None:
    """Copy a stored chunk behind what the row holds."""
    step = row.begin(chunk.kv_LKTd.shape[2])
    for layer, kv_KTd in enumerate(chunk.kv_LKTd):
        row.write(layer, kv_KTd[None], step=step)
    row.finish(step)


def _append_in_bulk(rows: StaticCache, chunks: Mapping[int, Chunk]) -> None:
    """Copy a stored chunk behind what each of these rows holds; chunks of one length together."""
    groups: dict[int, list[int]] = {}
    for row, chunk in chunks.items():
        groups.setdefault(chunk.kv_LKTd.shape[2], []).append(row)
    for num_tokens, members in groups.items():
        view = rows.rows(members)
        step = view.begin(num_tokens)
        for layer in range(rows.config.num_layers):
            view.write(layer, torch.stack([chunks[row].kv_LKTd[layer] for row in members]), step=step)
        view.finish(step)


def _first(slots: deque[int] | None, free: Mapping[int, None]) -> Sequence[int]:
    """The first slot that is free, if there is one; those before it are dropped."""
    while slots and slots[0] not in free:
        slots.popleft()
    return (slots[0],) if slots else ()


def _path(chunks: Sequence[Ids]) -> list[bytes]:
    """A key for each chunk: the hash of all ids up to its end."""
    keys, digest = [], hashlib.blake2b(digest_size=16)
    for ids in chunks:
        digest.update(np.asarray(ids, dtype=np.int32).tobytes())
        digest.update(b"|")  # chunk boundaries are part of the canonical form
        keys.append(digest.copy().digest())
    return keys


def default_bytes(device: torch.device) -> int:
    """A quarter of the device's memory, at most 8 GiB; 1 GiB where the system does not tell."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        memory = 4 << 30
    return min(memory // 4, 8 << 30)
