"""Products of few rows with a matrix of 16 bits as a Triton kernel: what a decoding step spends its time on.

Import it only where Triton is installed. Sums are fp32. Shapes: M rows, K inputs, N outputs.
"""

import torch
import triton
import triton.language as tl

from emuworld.model.kernels import num_multiprocessors

MOST_ROWS = 16  # what a matrix unit takes
_FEWEST_OUTPUTS, _MOST_OUTPUTS = 16, 64  # of one program


def pays(weight_NK: torch.Tensor) -> bool:
    """Whether a matrix has two programs of the widest kind for every multiprocessor. On an H200 such ones
    (gate and up of the 34 B, its head) are read at 4.1 and 4.5 TB/s, 6 and 60 % faster than by the library;
    narrower ones at 1.8 to 2.9, slower.
    """
    return len(weight_NK) >= 2 * num_multiprocessors(weight_NK.device) * _MOST_OUTPUTS


def linear(x_MK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """x @ weight.T for at most `MOST_ROWS` rows: the weight is read once, in long runs."""
    num_rows, num_inputs = x_MK.shape
    num_outputs = len(weight_NK)
    out_MN = x_MK.new_empty((num_rows, num_outputs))
    outputs = outputs_a_program(num_outputs, device=x_MK.device)
    _linear[(triton.cdiv(num_outputs, outputs),)](
        x_MK.contiguous(),
        weight_NK,
        out_MN,
        num_rows,
        num_inputs,
        num_outputs,
        rows=MOST_ROWS,
        outputs=outputs,
        block=128 if outputs == _MOST_OUTPUTS else 256,
        num_warps=4,
        num_stages=4,
    )
    return out_MN


def outputs_a_program(num_outputs: int, *, device: torch.device) -> int:
    """A power of two that gives every multiprocessor at least two programs, where there are so many."""
    wanted = num_outputs // (2 * num_multiprocessors(device))
    return min(_MOST_OUTPUTS, max(_FEWEST_OUTPUTS, 1 << max(0, wanted.bit_length() - 1)))


@triton.jit
def _linear(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_inputs: tl.tensor,
    num_outputs: tl.tensor,
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
    weight_at = output.to(tl.int64)[:, None] * num_inputs + at[None, :]
    total = tl.zeros((outputs, rows), tl.float32)
    for start in range(0, num_inputs, block):
        inside = start + at < num_inputs
        weight = tl.load(weight_ptr + weight_at + start, mask=is_output[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptr + x_at + start, mask=is_row[:, None] & inside[None, :], other=0.0)
        total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")
    out_at = row[None, :] * num_outputs + output[:, None]
    tl.store(out_ptr + out_at, total.to(out_ptr.dtype.element_ty), mask=is_output[:, None] & is_row[None, :])
