"""Drawing a token on CUDA by Triton: guidance, temperature, top-k, top-p and the draw, no sort.

What `sampling.guide` and `sampling.pick` say, but for two things: of exactly equal scores at the edge of
top-k or top-p all stay (the CPU's form cuts them by id), and what is kept is drawn in the order of ids, not
of likelihood. The distribution is the same; which id a uniform number gives is not.

The least score that stays is found by search (`draw_search`). Rows of up to 8,192 ids stay in registers
throughout, longer ones are read again in every pass, few of them by many programs each (`draw_spread`). The
draw sums the weights in parts first and goes through the ids of one part only.

Import it only where Triton is installed. A row's result depends on no order of execution, and on no other
row but in this: a row of more than 8,192 ids is summed in one order among up to 32 rows and in another among
more, and where its uniform number lies within rounding of the edge between two ids, either may be drawn.

Shapes: R rows, V ids, P parts of a row.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from emuworld.decoding import draw_spread
from emuworld.decoding.draw_search import (
    LOG2_E,
    LOWEST,
    finish,
    guided_scores,
    part_of,
    search_long,
    search_short,
)

if TYPE_CHECKING:  # it imports this module
    from emuworld.decoding.sampling import Truncation

MOST_IDS = 1 << 20  # of a row
# Which forms are fastest where is measured; each is right with any power of two.
SHORT_IDS = 8192  # up to which a row is kept in registers
SHORT_WAYS, LONG_WAYS = 4, 8  # thresholds of a pass
SHORT_IDS_A_WARP = 1024
MOST_SPREAD_ROWS = 32  # of more ids, up to which many programs share a row
LONG_BLOCK, LONG_TILE, LONG_WARPS = 2048, 4096, 8  # ids at once in the search, in the sums by part
_FEWEST_IDS = 1024  # below it all rows share a kernel: to compile one takes seconds
_SHORT_PART = 64


def supports(rows: Sequence[Tensor]) -> bool:
    """Whether `draw` takes such logits."""
    types = (torch.bfloat16, torch.float16, torch.float32)
    return rows[0].shape[1] <= MOST_IDS and all(row.stride(1) == 1 and row.dtype in types for row in rows)


def draw(
    rows: Sequence[Tensor],
    uniforms_R: Tensor,
    *,
    truncation: "Truncation",
    guidance: float = 1.0,
    image_guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Draw one id of each row, int64 [R], and say how likely it was, fp32 [R].

    Args:
        rows: one to three tensors [R, V] of logits (conditional, unguided, blind) in bf16, fp16 or fp32, with
            any stride between rows. -inf in the conditional one = cannot be drawn; where only another one is
            -inf, the id is not guided.
        uniforms_R: float64 in [0, 1), one a row.
        truncation: temperature (above 0), top-k, top-p, in this order. Of equal scores at an edge all stay.
        guidance, image_guidance: as in `sampling.guide`, on the logits: what normalises a row is a constant.

    Returns:
        The ids, and the natural logarithms of their probabilities under the guided scores as they are, at
        temperature 1 and with every id.
    """
    conditional_RV, unguided_RV, blind_RV = (*rows, rows[0], rows[0])[:3]
    num_rows, size = conditional_RV.shape
    assert supports(rows) and truncation.temperature > 0.0
    assert all(row.shape == (num_rows, size) for row in rows) and uniforms_R.shape == (num_rows,)
    ids_R = torch.empty(num_rows, dtype=torch.int64, device=conditional_RV.device)
    logs_R = torch.empty(num_rows, dtype=torch.float32, device=conditional_RV.device)
    if not num_rows:
        return ids_R, logs_R
    outside = 1.0 - truncation.top_p
    by_mass = truncation.top_p < 1.0
    tensors = (conditional_RV, unguided_RV, blind_RV, uniforms_R, ids_R, logs_R)
    numbers = (
        float(guidance),
        float(image_guidance),
        LOG2_E.value / truncation.temperature,
        float(truncation.top_k),
        float(truncation.top_p),
        # Ids that hold less than this share each (its logarithm to base 2) are outside even together.
        math.log2(0.5 * outside / size) if by_mass else 0.0,
    )
    arguments = (*tensors, *(tensor.stride(0) for tensor in tensors[:4]), *numbers, size)
    options: dict[str, Any] = {
        "rows": len(rows),
        "tempered": truncation.temperature != 1.0,
        "by_count": 0 < truncation.top_k < size,
        "by_mass": by_mass,
    }
    with torch.cuda.device_of(conditional_RV):
        if size <= SHORT_IDS:
            block = max(_FEWEST_IDS, triton.next_power_of_2(size))
            _draw_short[(num_rows,)](
                *arguments,
                **options,
                ways=SHORT_WAYS,
                block=block,
                part=_SHORT_PART,
                num_warps=max(1, block // SHORT_IDS_A_WARP),
            )
        elif num_rows <= MOST_SPREAD_ROWS:
            draw_spread.draw(*tensors, *numbers, **options)
        else:
            parts = 64 if size <= 1 << 17 else 128
            width = max(1, LONG_TILE // parts)
            part = triton.cdiv(triton.cdiv(size, parts), width) * width
            _draw_long[(num_rows,)](
                *arguments,
                part,
                **options,
                ways=LONG_WAYS,
                block=LONG_BLOCK,
                parts=parts,
                width=width,
                part_block=triton.next_power_of_2(part),
                num_warps=LONG_WARPS,
            )
    return ids_R, logs_R


@triton.jit(do_not_specialize=["uniform_stride"])
def _draw_short(
    c_ptr: tl.tensor,
    u_ptr: tl.tensor,
    b_ptr: tl.tensor,
    uniforms_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    logs_ptr: tl.tensor,
    c_stride: tl.tensor,
    u_stride: tl.tensor,
    b_stride: tl.tensor,
    uniform_stride: tl.tensor,
    guidance: tl.tensor,
    image_guidance: tl.tensor,
    scale: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    log2_share: tl.tensor,
    size: tl.tensor,
    rows: tl.constexpr,
    tempered: tl.constexpr,
    by_count: tl.constexpr,
    by_mass: tl.constexpr,
    ways: tl.constexpr,
    block: tl.constexpr,
    part: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    c_ptr += row * c_stride
    u_ptr += row * u_stride
    b_ptr += row * b_stride
    scores = guided_scores(c_ptr, u_ptr, b_ptr, tl.arange(0, block), size, guidance, image_guidance, rows)
    top = tl.max(scores, axis=0)
    weights = tl.exp2((scores - top) * LOG2_E)
    total = tl.sum(weights, axis=0)
    mass = total
    if tempered:
        weights = tl.exp2((scores - top) * scale)
        mass = tl.sum(weights, axis=0)
    least = tl.full((), LOWEST, tl.float32)
    if by_count:
        lowest = tl.min(tl.where(scores > float("-inf"), scores, top), axis=0)
        ones = tl.full((block,), 1.0, tl.float32)
        least = search_short(scores, ones, lowest, top, top_k, ways, block)
        weights = tl.where(scores >= least, weights, 0.0)
        mass = tl.sum(weights, axis=0)
    if by_mass:
        low = tl.maximum(least, top + (tl.log2(mass) + log2_share) / scale)
        least = search_short(scores, weights, low, top, top_p * mass, ways, block)
    if by_count or by_mass:
        weights = tl.where(scores >= least, weights, 0.0)
    sums_P = tl.sum(tl.reshape(weights, (block // part, part)), axis=1).to(tl.float64)
    target = tl.load(uniforms_ptr + row * uniform_stride) * tl.sum(sums_P, axis=0)
    chosen, rest = part_of(sums_P, target, block // part)
    at = chosen * part + tl.arange(0, part)
    scores = guided_scores(c_ptr, u_ptr, b_ptr, at, size, guidance, image_guidance, rows)
    finish(scores, at, least, top, total, scale, rest, size, ids_ptr, logs_ptr, row)


@triton.jit
def _sums_by_part(
    c_ptr: tl.tensor,
    u_ptr: tl.tensor,
    b_ptr: tl.tensor,
    size: tl.tensor,
    guidance: tl.tensor,
    image_guidance: tl.tensor,
    rows: tl.constexpr,
    least: tl.tensor,
    top: tl.tensor,
    scale: tl.tensor,
    part: tl.tensor,
    parts: tl.constexpr,
    width: tl.constexpr,
) -> tl.tensor:
    """The weights of the scores from `least` on, summed over the ids of each part, fp64 [P]."""
    at_PC = tl.arange(0, parts)[:, None] * part + tl.arange(0, width)[None, :]
    sums_PC = tl.zeros((parts, width), tl.float32)
    for start in range(0, part, width):
        scores = guided_scores(c_ptr, u_ptr, b_ptr, at_PC + start, size, guidance, image_guidance, rows)
        sums_PC += tl.where(scores >= least, tl.exp2((scores - top) * scale), 0.0)
    return tl.sum(sums_PC.to(tl.float64), axis=1)


@triton.jit(do_not_specialize=["uniform_stride"])
def _draw_long(
    c_ptr: tl.tensor,
    u_ptr: tl.tensor,
    b_ptr: tl.tensor,
    uniforms_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    logs_ptr: tl.tensor,
    c_stride: tl.tensor,
    u_stride: tl.tensor,
    b_stride: tl.tensor,
    uniform_stride: tl.tensor,
    guidance: tl.tensor,
    image_guidance: tl.tensor,
    scale: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    log2_share: tl.tensor,
    size: tl.tensor,
    part: tl.tensor,
    rows: tl.constexpr,
    tempered: tl.constexpr,
    by_count: tl.constexpr,
    by_mass: tl.constexpr,
    ways: tl.constexpr,
    block: tl.constexpr,
    parts: tl.constexpr,
    width: tl.constexpr,
    part_block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    c_ptr += row * c_stride
    u_ptr += row * u_stride
    b_ptr += row * b_stride
    # The highest and the lowest score, and the sums of the weights of each part, in one pass: each lane has
    # the highest score that it has met and sums relative to it.
    at_PC = tl.arange(0, parts)[:, None] * part + tl.arange(0, width)[None, :]
    top_PC = tl.full((parts, width), LOWEST, tl.float32)
    lowest_PC = tl.full((parts, width), float("inf"), tl.float32)
    total_PC = tl.zeros((parts, width), tl.float32)
    mass_PC = tl.zeros((parts, width), tl.float32)
    for start in range(0, part, width):
        scores = guided_scores(c_ptr, u_ptr, b_ptr, at_PC + start, size, guidance, image_guidance, rows)
        highest_PC = tl.maximum(top_PC, scores)
        shrunk, grown = top_PC - highest_PC, scores - highest_PC
        total_PC = total_PC * tl.exp2(shrunk * LOG2_E) + tl.exp2(grown * LOG2_E)
        if tempered:
            mass_PC = mass_PC * tl.exp2(shrunk * scale) + tl.exp2(grown * scale)
        if by_count:
            lowest_PC = tl.minimum(lowest_PC, tl.where(scores > float("-inf"), scores, float("inf")))
        top_PC = highest_PC
    top = tl.max(tl.max(top_PC, axis=1), axis=0)
    total_PC *= tl.exp2((top_PC - top) * LOG2_E)
    sums_P = tl.sum(total_PC.to(tl.float64), axis=1)
    total = tl.sum(sums_P, axis=0).to(tl.float32)
    if tempered:
        mass_PC *= tl.exp2((top_PC - top) * scale)
        sums_P = tl.sum(mass_PC.to(tl.float64), axis=1)
    least = tl.full((), LOWEST, tl.float32)
    infinity = tl.full((), float("inf"), tl.float32)
    if by_count:
        low = tl.min(tl.min(lowest_PC, axis=1), axis=0)
        least = search_long(
            c_ptr, u_ptr, b_ptr, size, guidance, image_guidance, rows, True,
            top, scale, low, top, infinity, top_k, ways, block,
        )  # fmt: skip
        sums_P = _sums_by_part(
            c_ptr, u_ptr, b_ptr, size, guidance, image_guidance, rows,
            least, top, scale, part, parts, width,
        )  # fmt: skip
    if by_mass:
        mass = tl.sum(sums_P, axis=0).to(tl.float32)
        low = tl.maximum(least, top + (tl.log2(mass) + log2_share) / scale)
        least = search_long(
            c_ptr, u_ptr, b_ptr, size, guidance, image_guidance, rows, False,
            top, scale, low, top, infinity, top_p * mass, ways, block,
        )  # fmt: skip
        sums_P = _sums_by_part(
            c_ptr, u_ptr, b_ptr, size, guidance, image_guidance, rows,
            least, top, scale, part, parts, width,
        )  # fmt: skip
    target = tl.load(uniforms_ptr + row * uniform_stride) * tl.sum(sums_P, axis=0)
    chosen, rest = part_of(sums_P, target, parts)
    within = tl.arange(0, part_block)
    at = tl.where(within < part, chosen * part + within, size)
    scores = guided_scores(c_ptr, u_ptr, b_ptr, at, size, guidance, image_guidance, rows)
    finish(scores, at, least, top, total, scale, rest, size, ids_ptr, logs_ptr, row)
