"""Activations brought to 8 bits by the Triton kernel that makes them, so that they are neither stored in 16
bits nor read again: norms and SwiGLU before products of many rows.

Each gives what its form in `kernels` gives, rounded by `fp8_kernels.round_rows`, to the bit but for the order
of a norm's sum: all round by `fp8_kernels.in_8_bits`. Import it only where Triton is installed.

Shapes: M rows, D hidden_size, I intermediate_size.
"""

import torch
import triton
import triton.language as tl

from emuworld.model.fp8_kernels import in_8_bits, scale_of
from emuworld.model.fp8_norms import added_and_normed
from emuworld.model.fp8_numbers import FORMAT, LARGEST, TINY, Rounded
from emuworld.model.kernels import silu_times

_MOST_AT_ONCE = 65536  # numbers of a row, which a program holds in registers
_NORMED_A_WARP, _GATED_A_WARP = 1024, 2048


def supports(*, size: int) -> bool:
    """Whether a program can hold so many numbers of a row."""
    return size <= _MOST_AT_ONCE // 2


def add_rms_norm(
    x_MD: torch.Tensor, delta_MD: torch.Tensor | None, weight_D: torch.Tensor, *, eps: float
) -> Rounded:
    """See `operations.add_rms_norm`."""
    num_rows, size = x_MD.shape
    rounded = _places(x_MD, size)
    block = triton.next_power_of_2(size)
    _add_rms_norm[(num_rows,)](
        x_MD,
        x_MD if delta_MD is None else delta_MD,
        weight_D,
        *rounded,
        eps,
        size,
        adds=delta_MD is not None,
        largest=LARGEST,
        tiny=TINY,
        block=block,
        num_warps=_warps(block, _NORMED_A_WARP),
    )
    return rounded


def swiglu(gate_up_MX: torch.Tensor) -> Rounded:
    """See `operations.swiglu`."""
    num_rows, size = len(gate_up_MX), gate_up_MX.shape[1] // 2
    rounded = _places(gate_up_MX, size)
    block = triton.next_power_of_2(size)
    _swiglu[(num_rows,)](
        gate_up_MX,
        *rounded,
        size,
        largest=LARGEST,
        tiny=TINY,
        block=block,
        num_warps=_warps(block, _GATED_A_WARP),
    )
    return rounded


def _places(x_MX: torch.Tensor, size: int) -> Rounded:
    values_MK = torch.empty((len(x_MX), size), dtype=FORMAT, device=x_MX.device)
    return Rounded(values_MK, x_MX.new_empty((len(x_MX), 1), dtype=torch.float32))


def _warps(block: int, numbers_a_warp: int) -> int:
    return min(32, max(4, block // numbers_a_warp))


@triton.jit
def _add_rms_norm(
    x_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    eps: tl.tensor,
    size: tl.tensor,
    adds: tl.constexpr,
    largest: tl.constexpr,
    tiny: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program a row."""
    at = tl.arange(0, block)
    inside = at < size
    row = tl.program_id(0).to(tl.int64) * size
    result = added_and_normed(
        x_ptr + row + at, delta_ptr + row + at, weight_ptr + at, inside, size, eps, adds
    )
    _write(result, at, inside, values_ptr + row, scales_ptr, largest, tiny)


@triton.jit
def _swiglu(
    gate_up_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    size: tl.tensor,
    largest: tl.constexpr,
    tiny: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program a row."""
    at = tl.arange(0, block)
    inside = at < size
    row = tl.program_id(0).to(tl.int64) * size
    gate = tl.load(gate_up_ptr + 2 * row + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + 2 * row + size + at, mask=inside, other=0.0).to(tl.float32)
    result = silu_times(gate, up).to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    _write(result, at, inside, values_ptr + row, scales_ptr, largest, tiny)


@triton.jit
def _write(
    x: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    values_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    largest: tl.constexpr,
    tiny: tl.constexpr,
) -> None:
    """A row in 8 bits, by a program that has it in 16."""
    scale = scale_of(tl.max(tl.abs(x), axis=0), largest, tiny)
    tl.store(scales_ptr + tl.program_id(0), scale)
    tl.store(values_ptr + at, in_8_bits(x, scale, largest).to(values_ptr.dtype.element_ty), mask=inside)
