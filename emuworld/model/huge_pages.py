"""Memory in large pages, where the system has them: weights that are read once a token come nearly twice as
fast. With pages of 4 KiB the core waits for the next page's address every 4 KiB, and pages lie where others
push them out of the shared cache."""

import mmap
from contextlib import suppress

import torch

_PAGE = 2 << 20
_AT_ONCE = 64 << 20  # asked of the system; what is never touched costs nothing


class HugePages:
    """Hands out memory of one kind after the other from large pages."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.int8)

    def take(self, num_bytes: int) -> torch.Tensor:
        """int8 [num_bytes], beginning at a multiple of 64 bytes. It lives as long as someone holds it."""
        if num_bytes > len(self._rest):
            self._rest = _mapped(max(num_bytes, _AT_ONCE))
        taken = self._rest[:num_bytes]
        self._rest = self._rest[-(-num_bytes // 64) * 64 :]
        return taken


def _mapped(num_bytes: int) -> torch.Tensor:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(num_bytes, dtype=torch.int8)
    memory = mmap.mmap(-1, num_bytes + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    bytes_N = torch.frombuffer(memory, dtype=torch.int8)
    return bytes_N[-bytes_N.data_ptr() % _PAGE :][:num_bytes]
