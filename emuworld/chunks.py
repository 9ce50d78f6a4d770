"""Keys and values of chunks that worlds have read, kept as long as there is memory for them.

Shapes: L layers, K = 2 x key-value heads, T tokens of a chunk, d head_dim, D hidden size.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Chunk(NamedTuple):
    """Keys and values of one chunk, and the hidden state [D] behind its last token."""

    parts_LKT: tuple[Tensor, ...]
    """[L, K, T, d] of all layers; in 8 bits more: `int8_cache.parts`."""
    hidden_D: Tensor

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts_LKT) + self.hidden_D.nbytes

    @property
    def num_tokens(self) -> int:
        return self.parts_LKT[0].shape[2]


class Chunks:
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


def default_bytes(device: torch.device) -> int:
    """A quarter of the device's memory, at most 8 GiB; 1 GiB where the system does not tell."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        memory = 4 << 30
    return min(memory // 4, 8 << 30)
