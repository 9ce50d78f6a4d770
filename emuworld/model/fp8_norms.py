"""Norms before products of few rows with 8-bit weights as a Triton kernel: what they make leaves it in the
two 8-bit parts that `fp8_kernels.linear_of_parts` takes. Otherwise each of a product's programs would make
them again.

The sum of the parts is what `kernels.add_rms_norm` gives. Import it only where Triton is installed.

Shapes: M rows, D hidden_size, P = 2 M parts.
"""

import torch
import triton
import triton.language as tl

from emuworld.model.fp8_numbers import FORMAT, TwoParts
from emuworld.model.launches import begin, follows

_NUMBERS_A_WARP = 256  # 32 warps a row of the 34 B: fastest of 8, 16 and 32 on an H200


def add_rms_norm_in_parts(
    x_MD: torch.Tensor, delta_MD: torch.Tensor | None, weight_D: torch.Tensor, *, eps: float
) -> TwoParts:
    """See `operations.add_rms_norm`."""
    num_rows, size = x_MD.shape
    parts = TwoParts(
        torch.empty((2 * num_rows, size), dtype=FORMAT, device=x_MD.device),
        x_MD.new_empty(num_rows, dtype=torch.float32),
    )
    block = triton.next_power_of_2(size)
    _add_rms_norm_in_parts[(num_rows,)](
        x_MD,
        x_MD if delta_MD is None else delta_MD,
        weight_D,
        *parts,
        eps,
        size,
        **follows(),
        adds=delta_MD is not None,
        block=block,
        num_warps=min(32, max(4, block // _NUMBERS_A_WARP)),
    )
    return parts


@triton.jit
def _add_rms_norm_in_parts(
    x_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    eps: tl.tensor,
    size: tl.tensor,
    pdl: tl.constexpr,
    adds: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program a row. The scale is a power of two that brings the row's largest to 128..256; high parts
    are the first four bits of a number, or what is a multiple of the format's least.
    """
    begin(pdl)
    at = tl.arange(0, block)
    inside = at < size
    row = tl.program_id(0).to(tl.int64) * size
    normed = added_and_normed(
        x_ptr + row + at, delta_ptr + row + at, weight_ptr + at, inside, size, eps, adds
    )
    most = tl.maximum(tl.max(tl.abs(normed), axis=0), 1e-30)  # rows of zeros have a scale too
    # The bits of a power of two are its exponent, from bit 23 on, and 127 more than it.
    exponent = (most.to(tl.int32, bitcast=True) & 0x7F800000) - (7 << 23)
    tl.store(scales_ptr + tl.program_id(0), exponent.to(tl.float32, bitcast=True))
    normed *= ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    high = (normed.to(tl.int32, bitcast=True) & ~0xFFFFF).to(tl.float32, bitcast=True)
    high = tl.where(tl.abs(normed) < 0.015625, (normed * 512.0).to(tl.int32).to(tl.float32) / 512.0, high)
    low = (normed - high) * 16.0
    parts_ptr += 2 * row
    tl.store(parts_ptr + at, high.to(parts_ptr.dtype.element_ty), mask=inside)
    tl.store(parts_ptr + size + at, low.to(parts_ptr.dtype.element_ty), mask=inside)


@triton.jit
def added_and_normed(
    x_ptrs: tl.tensor,
    delta_ptrs: tl.tensor,
    weight_ptrs: tl.tensor,
    inside: tl.tensor,
    size: tl.tensor,
    eps: tl.tensor,
    adds: tl.constexpr,
) -> tl.tensor:
    """A row as `kernels.add_rms_norm` gives it, in fp32, of a program that holds all of it. Where it `adds`,
    the sum takes the place of x.
    """
    x = tl.load(x_ptrs, mask=inside, other=0.0)
    if adds:
        delta = tl.load(delta_ptrs, mask=inside, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x_ptrs.dtype.element_ty)
        tl.store(x_ptrs, x, mask=inside)
    x = x.to(tl.float32)
    weight = tl.load(weight_ptrs, mask=inside, other=0.0).to(tl.float32)
    shrink = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / size + eps)
    return (x * shrink * weight).to(x_ptrs.dtype.element_ty).to(tl.float32)
