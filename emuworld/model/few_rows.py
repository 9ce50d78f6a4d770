"""Products of few rows with a matrix of 16 bits as a Triton kernel: what a decoding step spends its time on.

Import it only where Triton is installed. Sums are fp32. Where a matrix has too few outputs to keep a GPU
busy, several programs share an output's inputs; the last of them to finish adds what each has summed, always
in the same order, so results do not depend on chance.

Shapes: M rows, K inputs, N outputs.
"""

import threading
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from emuworld.model.kernels import silu_times
from emuworld.model.launches import begin, follows, num_multiprocessors

MOST_ROWS = 16  # what a matrix unit takes
MOST_ROWS_16_BITS = 64  # of a matrix in 16 bits that has a plan for so many
_FEWEST_OUTPUTS, _MOST_OUTPUTS = 16, 64  # of one program
_PROGRAMS = 4  # for each multiprocessor, so that enough is on its way from memory
_FEWEST_BLOCKS, _MOST_SPLIT = 4, 8
_MOST_TILES = 4096  # of a matrix whose inputs are split


class Plan(NamedTuple):
    """How a product is cut up; what is computed does not depend on it but for rounding of fp32 sums."""

    outputs: int
    """Of one program; where gates and ups are one matrix, half of them are gates."""
    block: int
    """Inputs that a program reads at a time."""
    split: int
    """Programs that share the inputs of an output."""
    warps: int
    stages: int


# By type and [N, K], what `scripts/sweep_products.py` found fastest for two rows on an H200: the matrices of
# the 34 B. In bf16 a matrix that is not here is left to the library unless it is wide.
BEST = {
    (torch.bfloat16, 10240, 5120): Plan(outputs=64, block=128, split=2, warps=4, stages=3),
    (torch.bfloat16, 5120, 8192): Plan(outputs=64, block=128, split=3, warps=4, stages=3),
    (torch.bfloat16, 51200, 5120): Plan(outputs=32, block=256, split=1, warps=4, stages=4),
    (torch.bfloat16, 5120, 25600): Plan(outputs=64, block=128, split=3, warps=4, stages=4),
    (torch.bfloat16, 131072, 5120): Plan(outputs=64, block=128, split=1, warps=4, stages=4),
    (torch.float8_e4m3fn, 10240, 5120): Plan(outputs=128, block=256, split=3, warps=8, stages=3),
    (torch.float8_e4m3fn, 5120, 8192): Plan(outputs=128, block=128, split=6, warps=8, stages=4),
    (torch.float8_e4m3fn, 51200, 5120): Plan(outputs=128, block=256, split=1, warps=8, stages=3),
    (torch.float8_e4m3fn, 5120, 25600): Plan(outputs=128, block=256, split=6, warps=4, stages=3),
    # As for gate and up, not swept.
    (torch.float8_e4m3fn, 131072, 5120): Plan(outputs=128, block=256, split=1, warps=8, stages=3),
}

# The same for 64 rows (`--rows 64`): attention's output of the 34 B, in seven eighths of the library's time.
# What is not here is left to the library from 17 rows on, which is as fast or faster for the others.
BEST_OF_MANY = {
    (torch.bfloat16, 5120, 8192): Plan(outputs=64, block=128, split=3, warps=4, stages=3),
}


def plan_for(weight_NK: torch.Tensor, *, num_rows: int = 1) -> Plan:
    """What was measured; else programs of the widest kind, with so much split that there are enough."""
    num_outputs, num_inputs = weight_NK.shape
    best = _best(num_rows).get((weight_NK.dtype, num_outputs, num_inputs))
    if best is not None:
        return best
    outputs = min(_MOST_OUTPUTS, max(_FEWEST_OUTPUTS, 1 << (num_outputs.bit_length() - 1)))
    block = 256 // weight_NK.element_size()
    wanted = _PROGRAMS * num_multiprocessors(weight_NK.device) // triton.cdiv(num_outputs, outputs)
    possible = num_inputs // (_FEWEST_BLOCKS * block)
    split = max(1, min(triton.next_power_of_2(wanted), possible, _MOST_SPLIT))
    return Plan(outputs, block, split, warps=4, stages=4)


def _best(num_rows: int) -> dict[tuple[torch.dtype, int, int], Plan]:
    return BEST if num_rows <= MOST_ROWS else BEST_OF_MANY


def pays(weight_NK: torch.Tensor, *, num_rows: int = 1) -> bool:
    """Whether the kernel is known to be faster than the library: where a plan was measured, and up to
    `MOST_ROWS` for matrices with two programs of the widest kind for every multiprocessor. On an H200 such
    ones (gate and up of the 34 B, its head) are read at 4.1 and 4.5 TB/s, 6 and 60 % faster than by the
    library.
    """
    if (weight_NK.dtype, *weight_NK.shape) in _best(num_rows):
        return num_rows <= MOST_ROWS_16_BITS
    if num_rows > MOST_ROWS:
        return False
    return len(weight_NK) >= 2 * num_multiprocessors(weight_NK.device) * _MOST_OUTPUTS


def gates(weight_NK: torch.Tensor, *, num_rows: int = 1) -> bool:
    """Whether gates and ups may be multiplied where they are summed: each program has whole sums."""
    return plan_for(weight_NK, num_rows=num_rows).split == 1


def linear(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, *, plan: Plan | None = None, gated: bool = False
) -> torch.Tensor:
    """x @ weight.T for at most `MOST_ROWS_16_BITS` rows: the weight is read once, in long runs. `gated`,
    with a plan without split: silu(gate) * up of that, [M, N / 2], bit for bit what two kernels give.
    """
    return launched(
        _linear,
        (x_MK.contiguous(), weight_NK),
        weight_NK,
        num_rows=len(x_MK),
        dtype=x_MK.dtype,
        fewest_rows=MOST_ROWS,
        plan=plan or plan_for(weight_NK, num_rows=len(x_MK)),
        gated=gated,
    )


def launched(
    kernel: Any,
    tensors: tuple[torch.Tensor, ...],
    weight_NK: torch.Tensor,
    *,
    num_rows: int,
    dtype: torch.dtype,
    fewest_rows: int,
    plan: Plan,
    gated: bool,
) -> torch.Tensor:
    """What a kernel of few rows makes of its `tensors`, activations and weight: [M, N], gated [M, N / 2].

    Args:
        weight_NK: for its sides.
        dtype: of the result.
        fewest_rows: that the kernel takes, filled up.
    """
    assert plan.split == 1 or not gated
    num_inputs, num_outputs = weight_NK.shape[1], len(weight_NK) // (1 + gated)
    out_MN = weight_NK.new_empty((num_rows, num_outputs), dtype=dtype)
    kernel[(plan.split, triton.cdiv(len(weight_NK), plan.outputs))](
        *tensors,
        out_MN,
        *_shared_sums(out_MN, plan),
        num_rows,
        num_inputs,
        num_outputs,
        **follows(),
        rows=max(fewest_rows, triton.next_power_of_2(num_rows)),
        outputs=plan.outputs,
        block=plan.block,
        split=plan.split,
        gated=gated,
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    return out_MN


def _shared_sums(out_MN: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Places for what each program sums, fp32 [split, M, N], and for how many are done, int32 zeros by tile
    of outputs. Neither is touched where inputs are not split.
    """
    if plan.split == 1:
        return out_MN, out_MN
    assert triton.cdiv(out_MN.shape[1], plan.outputs) <= _MOST_TILES, "so many need no split"
    return out_MN.new_empty((plan.split, *out_MN.shape), dtype=torch.float32), counters(out_MN.device)


_counters_of: dict[tuple[torch.device, int, int], torch.Tensor] = {}


def counters(device: torch.device) -> torch.Tensor:
    """Zeros, and zeros again after each kernel that counts. A thread has its own on each stream, as cuBLAS
    has its workspaces: kernels that run side by side must not share them. Asked for the first time while a
    graph is recorded they belong to that graph, which sets them to zero whenever it is replayed.
    """
    on_cuda = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_cuda else 0
    key = (device, stream, threading.get_ident())
    if key in _counters_of:
        return _counters_of[key]
    counters = torch.zeros(_MOST_TILES, dtype=torch.int32, device=device)
    if not (on_cuda and torch.cuda.is_current_stream_capturing()):
        _counters_of[key] = counters
    return counters


@triton.jit
def _linear(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
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
    """One program for a few outputs of all rows and a part of their inputs."""
    row = tl.arange(0, rows)
    output, is_output = outputs_of(tl.program_id(1), num_outputs, outputs, gated)
    at = tl.arange(0, block)
    is_row = row < num_rows
    x_at = row[:, None] * num_inputs + at[None, :]
    weight_at = output.to(tl.int64)[:, None] * num_inputs + at[None, :]
    part = tl.cdiv(tl.cdiv(num_inputs, split), block) * block
    first = tl.program_id(0) * part
    begin(pdl)
    total = tl.zeros((outputs, rows), tl.float32)
    for start in range(first, tl.minimum(first + part, num_inputs), block):
        inside = start + at < num_inputs
        weight = tl.load(weight_ptr + weight_at + start, mask=is_output[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptr + x_at + start, mask=is_row[:, None] & inside[None, :], other=0.0)
        total = tl.dot(weight, tl.trans(x), total, input_precision="ieee")
    if gated:
        write_gated(total, row, out_ptr, num_rows, num_outputs, outputs, rows)
    else:
        write(total, row, output, out_ptr, sums_ptr, counters_ptr, num_rows, num_outputs, split)


@triton.jit
def outputs_of(
    program: tl.tensor, num_outputs: tl.tensor, outputs: tl.constexpr, gated: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Which of a weight's rows are a program's, and whether there are such; gated, all gates of the weight
    stand before all ups, in a program only its own.
    """
    at = tl.arange(0, outputs)
    if gated:
        half: tl.constexpr = outputs // 2
        output = program * half + at % half
        return output + at // half * num_outputs, output < num_outputs
    else:
        output = program * outputs + at
        return output, output < num_outputs


@triton.jit
def write_gated(
    total: tl.tensor,
    row: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    outputs: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    """silu(gate) * up of the sums [outputs, rows], rounded before as if they had been stored."""
    half: tl.constexpr = outputs // 2
    gate, up = tl.split(tl.permute(tl.reshape(total, (2, half, rows)), (1, 2, 0)))
    gate = gate.to(out_ptr.dtype.element_ty).to(tl.float32)
    up = up.to(out_ptr.dtype.element_ty).to(tl.float32)
    output = tl.program_id(1) * half + tl.arange(0, half)
    real = (row < num_rows)[None, :] & (output < num_outputs)[:, None]
    out_at = row[None, :] * num_outputs + output[:, None]
    tl.store(out_ptr + out_at, silu_times(gate, up).to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def write(
    total: tl.tensor,
    row: tl.tensor,
    output: tl.tensor,
    out_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_outputs: tl.tensor,
    split: tl.constexpr,
) -> None:
    """The sums [outputs, rows] of this program; those of all that share its outputs if it is the last one."""
    at = row[None, :] * num_outputs + output[:, None]
    real = (row < num_rows)[None, :] & (output < num_outputs)[:, None]
    if split == 1:
        tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=real)
    else:
        size = num_rows * num_outputs
        tl.store(sums_ptr + tl.program_id(0) * size + at, total, mask=real)
        tl.debug_barrier()  # all threads have stored before one of them says so
        counter_ptr = counters_ptr + tl.program_id(1)
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == split - 1:
            total = tl.zeros_like(total)
            for part in tl.static_range(split):  # past the first cache, which others' stores do not reach
                total += tl.load(sums_ptr + part * size + at, mask=real, other=0.0, cache_modifier=".cg")
            tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=real)
            tl.store(counter_ptr, 0)
