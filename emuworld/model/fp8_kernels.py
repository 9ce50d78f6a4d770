"""Products of few rows with 8-bit weights as Triton kernels, which read a weight once, as 8 bits: `linear`
widens it in registers, `linear_in_parts` brings the activations to 8 bits instead, without loss, and
`linear_of_parts` takes them as `fp8_norms` has brought them there. And the rounding of activations for
products of many rows, which are left to the library.

Import it only where Triton is installed. `emuworld.model.fp8` says what it computes.

Shapes: M rows, K inputs, N outputs.
"""

import torch
import triton
import triton.language as tl

from emuworld.model.few_rows import Plan, launched, outputs_of, plan_for, write, write_gated
from emuworld.model.fp8_numbers import LARGEST, TINY, Rounded, TwoParts
from emuworld.model.launches import begin, follows, num_multiprocessors

_FEWEST_ROWS = 16  # what a matrix unit takes, with 8 bits on both sides too
_FEWEST_OUTPUTS, _MOST_OUTPUTS = 16, 64  # of one program
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
    outputs = _outputs_a_program(num_outputs, device=x_MK.device)
    rows = max(_FEWEST_ROWS, triton.next_power_of_2(num_rows))
    _linear[(triton.cdiv(num_outputs, outputs),)](
        x_MK.contiguous(),
        values_NK,
        scales_N,
        out_MN,
        num_rows,
        num_inputs,
        num_outputs,
        **follows(),
        shrink=_SHRINK,
        rows=rows,
        outputs=outputs,
        block=_INPUTS_A_BLOCK if rows == _FEWEST_ROWS else _INPUTS_A_BLOCK // 2,
        num_warps=4,
        num_stages=4,
    )
    return out_MN


def _outputs_a_program(num_outputs: int, *, device: torch.device) -> int:
    """A power of two that gives every multiprocessor at least two programs, where there are so many."""
    wanted = num_outputs // (2 * num_multiprocessors(device))
    return min(_MOST_OUTPUTS, max(_FEWEST_OUTPUTS, 1 << max(0, wanted.bit_length() - 1)))


def linear_in_parts(
    x_MK: torch.Tensor,
    values_NK: torch.Tensor,
    scales_N: torch.Tensor,
    *,
    plan: Plan | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """The same for at most `few_rows.MOST_ROWS` rows, with matrix units that take 8 bits: each activation is
    the sum of two 8-bit numbers, which hold the 8 bits of a bfloat16's mantissa. A plan needs 64 outputs or
    more: for smaller tiles Triton takes older instructions, which widen. `gated` as in `few_rows.linear`.
    """
    return launched(
        _linear_in_parts,
        (x_MK.contiguous(), values_NK, scales_N),
        values_NK,
        num_rows=len(x_MK),
        dtype=x_MK.dtype,
        fewest_rows=_FEWEST_ROWS // 2,
        plan=plan or plan_for(values_NK),
        gated=gated,
    )


def linear_of_parts(
    x: TwoParts,
    values_NK: torch.Tensor,
    scales_N: torch.Tensor,
    *,
    dtype: torch.dtype,
    plan: Plan | None = None,
    gated: bool = False,
) -> torch.Tensor:
    """The same of activations that come in their parts: nothing but products is left to do."""
    return launched(
        _linear_of_parts,
        (*x, values_NK, scales_N),
        values_NK,
        num_rows=len(x.scales_M),
        dtype=dtype,
        fewest_rows=_FEWEST_ROWS // 2,
        plan=plan or plan_for(values_NK),
        gated=gated,
    )


def round_rows(x_MK: torch.Tensor) -> Rounded:
    """In 8 bits: each row's largest becomes the largest of the format."""
    num_rows, size = x_MK.shape
    values_MK = torch.empty_like(x_MK, dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
    scales_M1 = x_MK.new_empty((num_rows, 1), dtype=torch.float32)
    _round_rows[(num_rows,)](
        x_MK.contiguous(),
        values_MK,
        scales_M1,
        size,
        largest=LARGEST,
        tiny=TINY,
        block=min(_ROUNDED_AT_ONCE, triton.next_power_of_2(size)),
        num_warps=8,
    )
    return Rounded(values_MK, scales_M1)


@triton.jit
def _linear(
    x_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_inputs: tl.tensor,
    num_outputs: tl.tensor,
    pdl: tl.constexpr,
    shrink: tl.constexpr,
    rows: tl.constexpr,
    outputs: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program for a few outputs of all rows."""
    begin(pdl)
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
def _linear_in_parts(
    x_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_inputs: tl.tensor,
    num_outputs: tl.tensor,
    pdl: tl.constexpr,
    rows: tl.constexpr,
    outputs: tl.constexpr,
    block: tl.constexpr,
    split: tl.constexpr,
    gated: tl.constexpr,
) -> None:
    """One program for a few outputs of all rows and a part of their inputs. Matrix units add up 8-bit
    products with some 14 bits, so a sum of theirs covers one block and is added to the others in fp32.
    """
    row = tl.arange(0, rows)
    output, is_output = outputs_of(tl.program_id(1), num_outputs, outputs, gated)
    at = tl.arange(0, block)
    is_row = row < num_rows
    x_at = row[:, None] * num_inputs + at[None, :]
    values_at = output.to(tl.int64)[:, None] * num_inputs + at[None, :]
    part = tl.cdiv(tl.cdiv(num_inputs, split), block) * block
    first = tl.program_id(0) * part
    begin(pdl)
    total = tl.zeros((outputs, rows), tl.float32)
    for start in range(first, tl.minimum(first + part, num_inputs), block):
        inside = start + at < num_inputs
        values = tl.load(values_ptr + values_at + start, mask=is_output[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptr + x_at + start, mask=is_row[:, None] & inside[None, :], other=0.0)
        parts, scale = _in_parts(x.to(tl.float32), rows, block)
        both = tl.reshape(tl.dot(values, tl.trans(parts)), (outputs, rows, 2))
        high, low = tl.split(both)
        total += (high + low * 0.0625) * scale[None, :]
    scales = tl.load(scales_ptr + output, mask=is_output, other=0.0)
    total *= scales[:, None]
    if gated:
        write_gated(total, row, out_ptr, num_rows, num_outputs, outputs, rows)
    else:
        write(total, row, output, out_ptr, sums_ptr, counters_ptr, num_rows, num_outputs, split)


@triton.jit
def _linear_of_parts(
    parts_ptr: tl.tensor,
    row_scales_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_inputs: tl.tensor,
    num_outputs: tl.tensor,
    pdl: tl.constexpr,
    rows: tl.constexpr,
    outputs: tl.constexpr,
    block: tl.constexpr,
    split: tl.constexpr,
    gated: tl.constexpr,
) -> None:
    """As `_linear_in_parts`, with a scale for each row."""
    row, part_row = tl.arange(0, rows), tl.arange(0, 2 * rows)
    output, is_output = outputs_of(tl.program_id(1), num_outputs, outputs, gated)
    at = tl.arange(0, block)
    is_part = part_row < 2 * num_rows
    parts_at = part_row[:, None] * num_inputs + at[None, :]
    values_at = output.to(tl.int64)[:, None] * num_inputs + at[None, :]
    part = tl.cdiv(tl.cdiv(num_inputs, split), block) * block
    first = tl.program_id(0) * part
    begin(pdl)
    both = tl.zeros((outputs, 2 * rows), tl.float32)
    for start in range(first, tl.minimum(first + part, num_inputs), block):
        inside = start + at < num_inputs
        values = tl.load(values_ptr + values_at + start, mask=is_output[:, None] & inside[None, :], other=0.0)
        parts = tl.load(parts_ptr + parts_at + start, mask=is_part[:, None] & inside[None, :], other=0.0)
        both += tl.dot(values, tl.trans(parts))
    high, low = tl.split(tl.reshape(both, (outputs, rows, 2)))
    total = (high + low * 0.0625) * tl.load(row_scales_ptr + row, mask=row < num_rows, other=0.0)[None, :]
    total *= tl.load(scales_ptr + output, mask=is_output, other=0.0)[:, None]
    if gated:
        write_gated(total, row, out_ptr, num_rows, num_outputs, outputs, rows)
    else:
        write(total, row, output, out_ptr, sums_ptr, counters_ptr, num_rows, num_outputs, split)


@triton.jit
def _in_parts(x: tl.tensor, rows: tl.constexpr, block: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Two 8-bit numbers for each of [rows, block] as [2 rows, block], and a scale for each row, such that
    x = (high + low / 16) * scale.

    The scale is a power of two that brings a row's largest to 128..256 (the format ends at 448), the high
    part the first four bits of a number, the low one the next four. Nothing is lost of a bfloat16 that is no
    less than an 8,000th of its row's largest; of smaller ones, less than a 100,000th of that.
    """
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-30)  # rows of zeros have a scale too
    # The bits of a power of two are its exponent, from bit 23 on, and 127 more than it.
    exponent = (largest.to(tl.int32, bitcast=True) & 0x7F800000) - (7 << 23)
    scale = exponent.to(tl.float32, bitcast=True)
    x *= ((254 << 23) - exponent).to(tl.float32, bitcast=True)[:, None]
    high = (x.to(tl.int32, bitcast=True) & ~0xFFFFF).to(tl.float32, bitcast=True)
    low = (x - high) * 16.0
    parts = tl.join(high, low).to(tl.float8e4nv)
    return tl.reshape(tl.permute(parts, (0, 2, 1)), (2 * rows, block)), scale


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
    scale = scale_of(tl.max(most, axis=0), largest, tiny)
    tl.store(scales_ptr + tl.program_id(0), scale)
    for start in range(0, size, block):
        x = tl.load(x_ptr + row + start + at, mask=start + at < size, other=0.0)
        value = in_8_bits(x.to(tl.float32), scale, largest)
        tl.store(values_ptr + row + start + at, value.to(values_ptr.dtype.element_ty), mask=start + at < size)


@triton.jit
def scale_of(most: tl.tensor, largest: tl.constexpr, tiny: tl.constexpr) -> tl.tensor:
    """Of a row with this largest number, which becomes the largest of the format."""
    return tl.div_rn(tl.maximum(most, tiny), largest)


@triton.jit
def in_8_bits(x: tl.tensor, scale: tl.tensor, largest: tl.constexpr) -> tl.tensor:
    """What is left to store of a row in 16 bits, fp32.

    Many quotients of such numbers lie in the middle of two of the format, and what is a hair off goes the
    other way: so it must be what a division by IEEE 754 gives. Here the product with the inverse, set right
    by what is left over: the same (tried with all pairs of mantissas) in a quarter of the instructions.
    """
    inverse = tl.div_rn(1.0, scale)
    quotient = x * inverse
    quotient = tl.fma(tl.fma(-quotient, scale, x), inverse, quotient)
    return tl.minimum(tl.maximum(quotient, -largest), largest)
