"""A static key-value cache: room for `capacity` tokens in each of `num_rows` rows, each at its own length.

Guided and unguided sequences are rows of one cache. The lengths live on the host: no step asks the device.

Shapes: R rows, G key-value heads, C capacity, S keys seen, T new tokens, d head_dim, K = 2 G (keys, values).
"""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from emuworld.model import int8_cache
from emuworld.model.config import TransformerConfig
from emuworld.model.huge_pages import HugePages
from emuworld.shares import one_thread
from emuworld.staging import moved

if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    from emuworld.model import cache_kernels
else:
    cache_kernels = None  # type: ignore[assignment]

_WORTH_PAGES = 128 << 10  # bytes of a layer; few of these are found again in the processor's own caches
CAPACITY_STEP = 64  # capacities are multiples of this, so that masks and loads stay aligned


class Memory:
    """Where a cache's keys and values lie, until the cache grows and takes another `Memory`.

    Whatever holds addresses (a captured graph) belongs to one of these.
    """

    def __init__(self, kv_RKCd: list[torch.Tensor]) -> None:
        self.kv_RKCd = kv_RKCd
        """One tensor a layer: the keys of all heads, then their values; in 8 bits see `int8_cache`."""

    @cached_property
    def addresses_L(self) -> np.ndarray:
        """int64: where each of them begins."""
        assert all(kv_RKCd.is_contiguous() for kv_RKCd in self.kv_RKCd)
        return np.array([kv_RKCd.data_ptr() for kv_RKCd in self.kv_RKCd])


@dataclass(kw_only=True)
class _Store:
    memory: Memory
    lengths: np.ndarray
    """[R] int64: how many tokens each row holds."""
    ids_RC: np.ndarray | None = None
    """int64: the ids of the tokens that it holds, -1 where nobody told them; see `StaticCache.ids`."""

    @property
    def kv_RKCd(self) -> list[torch.Tensor]:
        return self.memory.kv_RKCd


@dataclass(frozen=True, kw_only=True)
class CacheStep:
    """T new tokens for every row of a cache: where they go and what they may see; one for all layers.

    A new token sees what its row holds and, of the new ones, those up to itself, or all where not `causal`.
    """

    starts: np.ndarray
    """[R] int64, the row lengths before the step."""
    num_tokens: int
    device: torch.device
    causal: bool = True
    _masks: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)

    @cached_property
    def positions_RT(self) -> torch.Tensor:
        return moved(torch.from_numpy(self.starts[:, None] + np.arange(self.num_tokens)), self.device)

    @property
    def longest(self) -> int:
        """Tokens of the longest row, the new ones included."""
        return int(self.starts.max()) + self.num_tokens

    @property
    def uniform(self) -> bool:
        """Whether all rows have the same length."""
        return bool((self.starts == self.starts[0]).all())

    def mask_TS(self, start: int, *, num_keys: int, repeats: int) -> torch.Tensor:
        """[repeats * T, S] bool, True = may attend: `repeats` times the T queries from position `start`."""
        key = (start, num_keys, repeats)
        if key not in self._masks:
            last_T1 = torch.arange(start, start + self.num_tokens, device=self.device)[:, None]
            last_T1 = last_T1 if self.causal else last_T1[-1:].expand_as(last_T1)
            self._masks[key] = (torch.arange(num_keys, device=self.device) <= last_T1).repeat(repeats, 1)
        return self._masks[key]

    def row_mask_R1TS(self, *, num_keys: int, repeats: int) -> torch.Tensor:
        """[R, 1, repeats * T, S] bool, True = may attend, for rows of different lengths."""
        key = (-1, num_keys, repeats)
        if key not in self._masks:
            keys_S = torch.arange(num_keys, device=self.device)
            last_RT = (
                self.positions_RT if self.causal else self.positions_RT[:, -1:].expand_as(self.positions_RT)
            )
            mask_RTS = keys_S <= last_RT[:, :, None]
            self._masks[key] = mask_RTS.repeat(1, repeats, 1)[:, None]
        return self._masks[key]


class StaticCache:
    """Keys and values of every layer for `num_rows` sequences of up to `capacity` tokens."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        num_rows: int,
        capacity: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_rows < 1 or capacity < 1:
            raise ValueError(f"a cache needs at least one row and one token, got {num_rows} x {capacity}")
        shape = (num_rows, 2 * config.num_kv_heads, _round_up(capacity), config.head_dim)
        # Zeros, not empty: a masked key still meets its value as 0 * value, and 0 * nan is nan.
        pages = HugePages()
        like = torch.empty(0, device=device, dtype=dtype)
        layers = [_zeros(shape, like=like, pages=pages) for _ in range(config.num_layers)]
        self.config = config
        self._store = _Store(memory=Memory(layers), lengths=np.zeros(num_rows, dtype=np.int64))
        self._index = np.arange(num_rows)

    @property
    def num_rows(self) -> int:
        return len(self._index)

    @property
    def capacity(self) -> int:
        return self._store.kv_RKCd[0].shape[2]

    @property
    def lengths(self) -> np.ndarray:
        """[R] int64, how many tokens each row holds (a copy)."""
        return self._store.lengths[self._index]

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for kv_RKCd in self.memory.kv_RKCd for part in int8_cache.parts(kv_RKCd))

    @property
    def memory(self) -> Memory:
        """Where the whole cache lies, shared with every view that `rows` made."""
        return self._store.memory

    @property
    def indices(self) -> np.ndarray:
        """[R] int64, which rows of the memory these are."""
        return self._index

    @property
    def device(self) -> torch.device:
        return self._store.kv_RKCd[0].device

    @property
    def dtype(self) -> torch.dtype:
        return self._store.kv_RKCd[0].dtype

    def ids(self, row: int, start: int) -> list[int]:
        """The ids that a row holds from `start` on; -1 where they are not known.

        Only a model tells them whose keys and values are the same however tokens are cut into calls.
        """
        index = int(self._index[row])
        stop = int(self._store.lengths[index])
        known_RC = self._store.ids_RC
        return [-1] * (stop - start) if known_RC is None else known_RC[index, start:stop].tolist()

    def rows(self, indices: slice | Sequence[int] | np.ndarray) -> "StaticCache":
        """A cache over these rows that shares memory and lengths with this one."""
        chosen = self._index[indices] if isinstance(indices, slice) else self._index[np.asarray(indices)]
        if len(chosen) == 0 or len(set(chosen.tolist())) != len(chosen):
            raise ValueError(f"rows must be distinct and not empty, got {indices}")
        view = object.__new__(StaticCache)
        view.config, view._store, view._index = self.config, self._store, chosen
        return view

    def truncate(self, row: int, length: int) -> None:
        """Forget all but the first `length` tokens of a row."""
        held = int(self._store.lengths[self._index[row]])
        if not 0 <= length <= held:
            raise ValueError(f"row {row} holds {held} tokens: it cannot be cut to {length}")
        self._store.lengths[self._index[row]] = length

    def truncate_all(self, lengths_R: np.ndarray) -> None:
        """`truncate` of every row."""
        if not ((lengths_R >= 0) & (lengths_R <= self.lengths)).all():
            raise ValueError(f"rows hold {self.lengths} tokens: they cannot be cut to {lengths_R}")
        self._store.lengths[self._index] = lengths_R

    def copy_row(self, source: int, target: int, *, origin: "StaticCache | None" = None) -> None:
        """Make row `target` equal to row `source` of `origin` (of this cache by default)."""
        origin = self if origin is None else origin
        source_row, target_row = int(origin._index[source]), int(self._index[target])
        length = int(origin._store.lengths[source_row])
        self.reserve(length)
        with one_thread(self.device):
            for mine, theirs in zip(self._store.kv_RKCd, origin._store.kv_RKCd, strict=True):
                for my_part, part in zip(int8_cache.parts(mine), int8_cache.parts(theirs), strict=True):
                    my_part[target_row, :, :length].copy_(part[source_row, :, :length])
        self._store.lengths[target_row] = length
        self._note(np.array([target_row]), np.arange(length)[None], np.array([origin.ids(source, 0)]))

    def reserve(self, capacity: int) -> None:
        """Grow to at least this capacity; what the rows hold stays. Views made by `rows` grow along."""
        if capacity <= self.capacity:
            return
        used = int(self._store.lengths.max())
        if self._store.ids_RC is not None:
            added = ((0, 0), (0, _round_up(capacity) - self.capacity))
            self._store.ids_RC = np.pad(self._store.ids_RC, added, constant_values=-1)
        layers: list[torch.Tensor] = []
        old_layers = self._store.kv_RKCd
        self._store.memory, pages = Memory(layers), HugePages()
        with one_thread(old_layers[0].device):
            while old_layers:  # one layer at a time is there twice
                old = old_layers.pop(0)
                grown = _zeros((*old.shape[:2], _round_up(capacity), old.shape[3]), like=old, pages=pages)
                for part, old_part in zip(int8_cache.parts(grown), int8_cache.parts(old), strict=True):
                    part[:, :, :used].copy_(old_part[:, :, :used])
                layers.append(grown)

    def begin(self, num_tokens: int, *, causal: bool = True) -> CacheStep:
        """Plan the writing of `num_tokens` more tokens in every row; ValueError when one would not fit."""
        step = CacheStep(starts=self.lengths, num_tokens=num_tokens, device=self.device, causal=causal)
        if step.longest > self.capacity:
            raise ValueError(
                f"the cache has room for {self.capacity} tokens a row; {step.longest - num_tokens} + "
                f"{num_tokens} do not fit: reserve more, or truncate"
            )
        return step

    def write(self, layer: int, kv_RKTd: torch.Tensor, *, step: CacheStep) -> None:
        """Put the new keys and values of one layer at the end of every row (lengths change in `finish`)."""
        self.write_parts(layer, int8_cache.narrowed(kv_RKTd, self.dtype), step=step)

    def write_parts(self, layer: int, new: Sequence[torch.Tensor], *, step: CacheStep) -> None:
        """The same for what is as the cache has it: [R, K, T, ...] of each of `int8_cache.parts`."""
        for whole_RKCd, kv_RKTd in zip(int8_cache.parts(self._store.kv_RKCd[layer]), new, strict=True):
            self._write(whole_RKCd, kv_RKTd, step)

    def _write(self, whole_RKCd: torch.Tensor, kv_RKTd: torch.Tensor, step: CacheStep) -> None:
        block = self._block()
        if step.uniform and block is not None:
            start = int(step.starts[0])
            whole_RKCd[block, :, start : start + step.num_tokens] = kv_RKTd
        elif self.device.type == "cpu":
            for row, start, kv_KTd in zip(self._index.tolist(), step.starts.tolist(), kv_RKTd, strict=True):
                whole_RKCd[row, :, start : start + step.num_tokens] = kv_KTd
        else:
            rows_R1 = torch.from_numpy(self._index)[:, None].to(self.device, non_blocking=True)
            whole_RKCd[rows_R1, :, step.positions_RT] = kv_RKTd.transpose(1, 2).to(whole_RKCd.dtype)

    def finish(
        self,
        step: CacheStep,
        *,
        advance_B: Sequence[bool] | np.ndarray | None = None,
        ids_RT: np.ndarray | None = None,
    ) -> None:
        """Keep what was written in every row, or only where `advance_B` is True; `ids_RT` is for `ids`."""
        advance = (
            np.ones(self.num_rows, dtype=bool) if advance_B is None else np.asarray(advance_B, dtype=bool)
        )
        if advance.shape != (self.num_rows,):
            raise ValueError(
                f"advance_B needs one truth value for each of {self.num_rows} rows, got {advance.shape}"
            )
        self._store.lengths[self._index] = step.starts + step.num_tokens * advance
        self._note(self._index, step.starts[:, None] + np.arange(step.num_tokens), ids_RT)

    def _note(self, rows_N: np.ndarray, places_NT: np.ndarray, ids_NT: np.ndarray | None) -> None:
        store = self._store
        if store.ids_RC is None and ids_NT is not None:
            store.ids_RC = np.full((len(store.lengths), self.capacity), -1)
        if store.ids_RC is not None:
            store.ids_RC[rows_N[:, None], places_NT] = -1 if ids_NT is None else ids_NT

    def read_parts(self, starts_R: np.ndarray, lengths_R: np.ndarray) -> list[tuple[torch.Tensor, ...]]:
        """Of each row so many tokens from its start on, of all layers: [L, K, T, ...] of each of
        `int8_cache.parts`, each row's in memory of its own, which goes when it goes.
        """
        layers = zip(*map(int8_cache.parts, self.memory.kv_RKCd), strict=True)
        if cache_kernels is not None and self.device.type == "cuda":
            read = [cache_kernels.read_rows(part_L, self._index, starts_R, lengths_R) for part_L in layers]
        else:
            spans = list(zip(self._index.tolist(), starts_R.tolist(), lengths_R.tolist(), strict=True))
            read = [
                [
                    torch.stack([part[row, :, at : at + length] for part in part_L])
                    for row, at, length in spans
                ]
                for part_L in layers
            ]
        return list(zip(*read, strict=True))

    def row_kv(
        self, layer: int, row: int, num_keys: int, *, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [1, G, S, d] of the first S keys and values of one row; copies of this type where they are in
        8 bits.
        """
        index = int(self._index[row])
        kv_1KSd = self._read(layer, slice(index, index + 1), num_keys, dtype)
        return kv_1KSd[:, : self.config.num_kv_heads], kv_1KSd[:, self.config.num_kv_heads :]

    def all_kv(
        self, layer: int, num_keys: int, *, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, G, S, d] keys and values of all rows: views where the rows are neighbours, else a copy; of this
        type where they are in 8 bits.
        """
        block = self._block()
        rows = torch.from_numpy(self._index).to(self.device, non_blocking=True) if block is None else block
        kv_RKSd = self._read(layer, rows, num_keys, dtype)
        return kv_RKSd[:, : self.config.num_kv_heads], kv_RKSd[:, self.config.num_kv_heads :]

    def _read(
        self, layer: int, rows: slice | torch.Tensor, num_keys: int, dtype: torch.dtype
    ) -> torch.Tensor:
        whole_RKCd = self._store.kv_RKCd[layer]
        held = (part[:, :, :num_keys][rows] for part in int8_cache.parts(whole_RKCd))
        return int8_cache.widened(*held, dtype=dtype)

    def _block(self) -> slice | None:
        """The rows as a slice, where they are neighbours in ascending order."""
        first, last = int(self._index[0]), int(self._index[-1])
        if last - first + 1 == len(self._index) and (np.diff(self._index) == 1).all():
            return slice(first, last + 1)
        return None


def token_bytes(config: TransformerConfig, dtype: torch.dtype) -> int:
    """Of the keys and values of a token in all layers."""
    head_bytes = config.head_dim * dtype.itemsize + int8_cache.SCALE_BYTES * (dtype == int8_cache.FORMAT)
    return 2 * config.num_kv_heads * head_bytes * config.num_layers


def _round_up(num_tokens: int) -> int:
    return -(-num_tokens // CAPACITY_STEP) * CAPACITY_STEP


def _zeros(shape: tuple[int, ...], *, like: torch.Tensor, pages: HugePages) -> torch.Tensor:
    if like.dtype == int8_cache.FORMAT:
        return int8_cache.zeros(shape, device=like.device)
    num_bytes = math.prod(shape) * like.itemsize
    if like.device.type != "cpu" or num_bytes < _WORTH_PAGES:
        return like.new_zeros(shape)
    return pages.take(num_bytes).view(like.dtype).view(shape)
