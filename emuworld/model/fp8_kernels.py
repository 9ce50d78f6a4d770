"""Products of few rows with 8-bit weights as a Triton kernel: a weight is read once, as 8 bits, and widened
in registers. And the rounding of activations for products of many rows, which are left to the library.

Import it only where Triton is installed. `emuworld.model.fp8` says what it computes.

Shapes: M rows, K inputs, N outputs.
"""

import torch
import triton
import triton.language as tl

from emuworld.model.few_rows import outputs_a_program

_FEWEST_ROWS = 16  # what a matrix unit takes
_INPUTS_A_BLOCK = 256  # for few rows; half as many for more, whose blocks take as much shared memory again
_ROUNDED_AT_ONCE = 4096  # numbers of a row
# Activations are taken to 16-bit floating point with a sixteenth of their size: three bits of mantissa more
# than bfloat16, and room up to a million. From 8 bits to there is one instruction for two numbers.
_SHRINK = 1.0 / 16.0


def linear(x_MK: torch.Tensor, values_NK: torch.Tensor, scales_N: torch.Tensor) -> torch.Tensor:
    """x @ (values * scales).T in the type of x; at most 64 rows."""
    num_rows, num_inputs = x_MK.shape
    num_outputs = len(values_NK)
    out_MN = x_MK.new_empty((num_rows, num_outputs))
    outputs = outputs_a_program(num_outputs, device=x_MK.device)
    rows = max(_FEWEST_ROWS, triton.next_power_of_2(num_rows))
    _linear[(triton.cdiv(num_outputs, outputs),)](
        x_MK.contiguous(),
        values_NK,
        scales_N,
        out_MN,
        num_rows,
        num_inputs,
        num_outputs,
        shrink=_SHRINK,
        rows=rows,
        outputs=outputs,
        block=_INPUTS_A_BLOCK if rows == _FEWEST_ROWS else _INPUTS_A_BLOCK // 2,
        num_warps=4,
        num_stages=4,
    )
    return out_MN


def round_rows(x_MK: torch.Tensor, *, largest: float, tiny: float) -> tuple[torch.Tensor, torch.Tensor]:
    """8-bit values [M, K] and fp32 scales [M, 1]: each row's largest becomes the largest of the format."""
    num_rows, size = x_MK.shape
    values_MK = torch.empty_like(x_MK, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    scales_M1 = x_MK.new_empty((num_rows, 1), dtype=torch.float32)
    _round_rows[(num_rows,)](
        x_MK.contiguous(),
        values_MK,
        scales_M1,
        size,
        largest=largest,
        tiny=tiny,
        block=min(_ROUNDED_AT_ONCE, triton.next_power_of_2(size)),
        num_warps=8,
    )
    return values_MK, scales_M1


@triton.jit
def _linear(
    x_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_inputs: tl.tensor,
    num_outputs: tl.tensor,
    shrink: tl.constexpr,
    rows: tl.constexpr,
    outputs: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program for a few outputs of all rows."""
    row = tl.arange(0, rows)
    output = tl.program_id(0) * outputs + tl.arange(0, outputs)
    at = tl.arange(0, block)
    is_row, is_output = row < num_rows, output < num_outputs
    x_at = row[:, None] * num_inputs + at[None, :]
    values_at = output.to(tl.int64)[:, None] * num_inputs + at[None, :]
    total = tl.zeros((outputs, rows), tl.float32)
    for start in range(0, num_inputs, block):
        inside = start + at < num_inputs
        values = tl.load(values_ptr + values_at + start, mask=is_output[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptr + x_at + start, mask=is_row[:, None] & inside[None, :], other=0.0)
        x16 = (x.to(tl.float32) * shrink).to(tl.float16)
        total = tl.dot(values.to(tl.float16), tl.trans(x16), total)
    scales = tl.load(scales_ptr + output, mask=is_output, other=0.0) / shrink
    result = (total * scales[:, None]).to(out_ptr.dtype.element_ty)
    out_at = row[None, :] * num_outputs + output[:, None]
    tl.store(out_ptr + out_at, result, mask=is_output[:, None] & is_row[None, :])


@triton.jit
def _round_rows(
    x_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    size: tl.tensor,
    largest: tl.constexpr,
    tiny: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program a row, which reads it twice; the second time it is still in a cache."""
    at = tl.arange(0, block)
    row = tl.program_id(0).to(tl.int64) * size
    most = tl.zeros((block,), tl.float32)
    for start in range(0, size, block):
        x = tl.load(x_ptr + row + start + at, mask=start + at < size, other=0.0)
        most = tl.maximum(most, tl.abs(x.to(tl.float32)))
    scale = tl.maximum(tl.max(most, axis=0), tiny) / largest
    tl.store(scales_ptr + tl.program_id(0), scale)
    for start in range(0, size, block):
        x = tl.load(x_ptr + row + start + at, mask=start + at < size, other=0.0)
        value = tl.minimum(tl.maximum(x.to(tl.float32) / scale, -largest), largest)
        tl.store(values_ptr + row + start + at, value.to(values_ptr.dtype.element_ty), mask=start + at < size)
