"""How kernels of a step follow each other on a GPU: each begins when the one before has ended, or products of
few rows may come earlier (programmatic dependent launch, compute capability 9.0).

Such a product's programs are there before those of the kernel before have ended, which saves what a launch
takes. Whatever it reads and writes, it does after `begin`, which waits until that kernel has ended; and since
that one has waited for its own, all before it have ended too. So no result changes.

Import it only where Triton is installed.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
import triton
import triton.language as tl

_programmatic: ContextVar[bool] = ContextVar("programmatic", default=False)


def supports(device: torch.device) -> bool:
    """Whether kernels may be launched before others have ended, by this GPU and this Triton."""
    has_instructions = hasattr(tl.extra.cuda, "gdc_wait")
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0) and has_instructions


@contextlib.contextmanager
def programmatic() -> Iterator[None]:
    """Products that are launched inside may come before what they follow has ended."""
    token = _programmatic.set(True)
    try:
        yield
    finally:
        _programmatic.reset(token)


def follows(*, is_product: bool = False) -> dict[str, bool]:
    """The options with which a kernel is launched now."""
    if not _programmatic.get():
        return {"pdl": False}
    return {"pdl": True, "launch_pdl": is_product}


@triton.jit
def begin(pdl: tl.constexpr) -> None:
    """Before anything is read or written: lets the next kernel come, waits for the one before."""
    if pdl:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
