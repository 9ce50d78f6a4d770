"""How kernels of a step follow each other on a GPU: each begins when the one before has ended, or all but
attention may come earlier (programmatic dependent launch, compute capability 9.0). And what their sizes
depend on.

Such a kernel's programs are there before those of the kernel before have ended, which saves what a launch
takes. Whatever it reads and writes, it does after `begin`, which waits until that kernel has ended; and since
that one has waited for its own, all before it have ended too. So no result changes. Only then may the next
one come: no two wait at a time.

Import it only where Triton is installed.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache as memoise

import torch
import triton
import triton.language as tl

MANY_ROWS = 256  # from which on a program of the small kernels takes several
_programmatic: ContextVar[bool] = ContextVar("programmatic", default=False)


def supports(device: torch.device) -> bool:
    """Whether kernels may be launched before others have ended, by this GPU and this Triton."""
    has_instructions = hasattr(tl.extra.cuda, "gdc_wait")
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) and has_instructions


@contextlib.contextmanager
def programmatic() -> Iterator[None]:
    """Kernels that are launched inside may come before what they follow has ended."""
    token = _programmatic.set(True)
    try:
        yield
    finally:
        _programmatic.reset(token)


def follows(*, early: bool = True) -> dict[str, bool]:
    """The options with which a kernel is launched now; not `early`: it comes when all before has ended."""
    if not _programmatic.get():
        return {"pdl": False}
    return {"pdl": True, "launch_pdl": early}


@memoise
def num_multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4  # Triton's interpreter on the CPU: a few parts, so that tests meet them


@triton.jit
def begin(pdl: tl.constexpr) -> None:
    """Before anything is read or written: waits for the kernel before, lets the next one come."""
    if pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
