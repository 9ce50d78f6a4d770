"""Memory in pages of 2 MiB, where the system has them.

What is read once a token and does not fit into the caches (weights, keys and values) comes up to twice as
fast from them: in pages of 4 KiB a core finds its way anew every 64 cache lines.
"""

import mmap
from contextlib import suppress

import torch

_PAGE = 2 << 20
_AT_ONCE = 64 << 20  # asked of the system; what is never touched costs nothing


class HugePages:
    """Hands out pieces of memory that lie one behind the other."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.int8)

    def take(self, num_bytes: int) -> torch.Tensor:
        """Zeros, int8 [num_bytes], from a multiple of 64 bytes on; they stay while someone holds them."""
        if num_bytes > len(self._rest):
            self._rest = _mapped(max(num_bytes, _AT_ONCE))
        taken = self._rest[:num_bytes]
        self._rest = self._rest[-(-num_bytes // 64) * 64 :]
        return taken


def _mapped(num_bytes: int) -> torch.Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_bytes, dtype=torch.int8)
    memory = mmap.mmap(-1, num_bytes + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    bytes_N = torch.frombuffer(memory, dtype=torch.int8)
    return bytes_N[-bytes_N.data_ptr() % _PAGE :][:num_bytes]
