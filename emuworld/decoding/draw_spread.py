"""Drawing from few long rows: the same as `draw_kernel`, with many programs for each row.

One program a row leaves all multiprocessors but as many idle, and reads the row once for each step of its
search. Here each program has a share of the ids, and a launch for each step: the last of a row's programs to
finish joins what all have found, always in the same order, and says where the next launch goes on.

Import it only where Triton is installed. A row's result depends on no other row and on no order of execution.

Shapes: R rows, S shares of a row (programs), B ids of a share, W thresholds of a step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from emuworld.decoding.draw_search import (
    LOG2_E,
    LOWEST,
    finish,
    guided_scores,
    narrowed,
    part_of,
    search_long,
    thresholds,
)
from emuworld.model.few_rows import counters

_FEWEST_IDS_A_SHARE, _MOST_SHARES = 1024, 256
WAYS, STEPS = 64, 4  # what is left to find after so many steps, one program finds: hardly ever anything
_ALONE_WAYS, _ALONE_BLOCK = 8, 2048
_WARPS = 8
_STATE = tl.constexpr(8)
# Of a row: the highest score, the sum of all weights at temperature 1, then the search: `low` (in the end the
# least score that stays), `high`, `below` and `target` as in `draw_search`, and whether it goes on.
_TOP, _TOTAL, _LOW, _HIGH, _BELOW, _TARGET, _SEARCHES = map(tl.constexpr, range(7))


def draw(
    conditional_RV: Tensor,
    unguided_RV: Tensor,
    blind_RV: Tensor,
    uniforms_R: Tensor,
    ids_R: Tensor,
    logs_R: Tensor,
    guidance: float,
    image_guidance: float,
    scale: float,
    top_k: float,
    top_p: float,
    log2_share: float,
    *,
    rows: int,
    tempered: bool,
    by_count: bool,
    by_mass: bool,
) -> None:
    """Fills `ids_R` and `logs_R`; arguments as `draw_kernel` has them for its own kernels."""
    num_rows, size = conditional_RV.shape
    block = max(_FEWEST_IDS_A_SHARE, triton.next_power_of_2(triton.cdiv(size, _MOST_SHARES)))
    shares = triton.next_power_of_2(triton.cdiv(size, block))
    grid = (shares, num_rows)
    scores = conditional_RV.new_empty((num_rows, shares * block), dtype=torch.float32)
    state = conditional_RV.new_empty((num_rows, _STATE.value), dtype=torch.float32)
    found = conditional_RV.new_empty((num_rows, WAYS + 2, shares), dtype=torch.float32)
    sums = conditional_RV.new_empty((num_rows, shares), dtype=torch.float64)
    counters_R = counters(conditional_RV.device)
    options = {"shares": shares, "block": block, "num_warps": _WARPS}
    _rate[grid](
        conditional_RV, unguided_RV, blind_RV, scores, state, found, counters_R,
        conditional_RV.stride(0), unguided_RV.stride(0), blind_RV.stride(0),
        guidance, image_guidance, scale, top_k, top_p, log2_share, size,
        rows=rows, tempered=tempered, by_count=by_count, by_mass=by_mass, ways=WAYS, **options,
    )  # fmt: skip
    for counts in (True,) * by_count + (False,) * by_mass:
        if by_count and not counts:
            _weigh[grid](
                scores, state, sums, counters_R, uniforms_R, ids_R, logs_R,
                uniforms_R.stride(0), scale, top_p, log2_share, size, draws=False, **options,
            )  # fmt: skip
        for step in range(STEPS):
            _narrow[grid](
                scores, state, found, counters_R, scale, size,
                counts=counts, ends=step == STEPS - 1, ways=WAYS,
                alone_ways=_ALONE_WAYS, alone_block=_ALONE_BLOCK, **options,
            )  # fmt: skip
    _weigh[grid](
        scores, state, sums, counters_R, uniforms_R, ids_R, logs_R,
        uniforms_R.stride(0), scale, top_p, log2_share, size, draws=True, **options,
    )  # fmt: skip


@triton.jit
def _is_last(counters_ptr: tl.tensor, shares: tl.constexpr) -> tl.tensor:
    """Whether all other programs of the row have come here, having stored what they found."""
    tl.debug_barrier()  # all threads have stored before one of them says so
    return tl.atomic_add(counters_ptr + tl.program_id(1), 1, sem="acq_rel") == shares - 1


@triton.jit
def _of_all(ptrs: tl.tensor) -> tl.tensor:
    """What others have stored: past the first cache, which their stores do not reach."""
    return tl.load(ptrs, cache_modifier=".cg")


@triton.jit
def _begin_search(state_ptr: tl.tensor, low: tl.tensor, high: tl.tensor, target: tl.tensor) -> None:
    tl.store(state_ptr + _LOW, low)
    tl.store(state_ptr + _HIGH, high)
    tl.store(state_ptr + _BELOW, float("inf"))
    tl.store(state_ptr + _TARGET, target)
    tl.store(state_ptr + _SEARCHES, (low < high).to(tl.float32))


@triton.jit
def _rate(
    c_ptr: tl.tensor,
    u_ptr: tl.tensor,
    b_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    state_ptr: tl.tensor,
    found_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    c_stride: tl.tensor,
    u_stride: tl.tensor,
    b_stride: tl.tensor,
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
    shares: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """Guided scores, the highest and the lowest of them, and the sums of their weights."""
    share, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = share * block + tl.arange(0, block)
    scores = guided_scores(
        c_ptr + row * c_stride, u_ptr + row * u_stride, b_ptr + row * b_stride,
        at, size, guidance, image_guidance, rows,
    )  # fmt: skip
    tl.store(scores_ptr + row * (shares * block) + at, scores)
    top = tl.maximum(tl.max(scores, axis=0), LOWEST)
    lowest = tl.min(tl.where(scores > float("-inf"), scores, float("inf")), axis=0)
    found_ptr += row * ((ways + 2) * shares)
    tl.store(found_ptr + share, top)
    tl.store(found_ptr + shares + share, lowest)
    tl.store(found_ptr + 2 * shares + share, tl.sum(tl.exp2((scores - top) * LOG2_E), axis=0))
    if tempered:
        tl.store(found_ptr + 3 * shares + share, tl.sum(tl.exp2((scores - top) * scale), axis=0))
    if _is_last(counters_ptr, shares):
        at_S = tl.arange(0, shares)
        top_S = _of_all(found_ptr + at_S)
        low = tl.min(_of_all(found_ptr + shares + at_S), axis=0)
        total_S = _of_all(found_ptr + 2 * shares + at_S)
        top = tl.max(top_S, axis=0)
        total_S *= tl.exp2((top_S - top) * LOG2_E)
        total = tl.sum(total_S.to(tl.float64), axis=0).to(tl.float32)
        mass = total
        if tempered:
            mass_S = _of_all(found_ptr + 3 * shares + at_S) * tl.exp2((top_S - top) * scale)
            mass = tl.sum(mass_S.to(tl.float64), axis=0).to(tl.float32)
        state_ptr += row * _STATE
        tl.store(state_ptr + _TOP, top)
        tl.store(state_ptr + _TOTAL, total)
        if by_count:
            _begin_search(state_ptr, low, top, top_k)
        elif by_mass:
            low = tl.maximum(top + (tl.log2(mass) + log2_share) / scale, LOWEST)
            _begin_search(state_ptr, low, top, top_p * mass)
        else:
            tl.store(state_ptr + _LOW, LOWEST)
        tl.store(counters_ptr + row, 0)


@triton.jit
def _narrow(
    scores_ptr: tl.tensor,
    state_ptr: tl.tensor,
    found_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    scale: tl.tensor,
    size: tl.tensor,
    counts: tl.constexpr,
    ends: tl.constexpr,
    ways: tl.constexpr,
    alone_ways: tl.constexpr,
    alone_block: tl.constexpr,
    shares: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """A step of the search: as in `draw_search.search_long`. Where it `ends`, to its end."""
    share, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    state_ptr += row * _STATE
    if tl.load(state_ptr + _SEARCHES) > 0.0:
        top = tl.load(state_ptr + _TOP)
        low, high = tl.load(state_ptr + _LOW), tl.load(state_ptr + _HIGH)
        below, target = tl.load(state_ptr + _BELOW), tl.load(state_ptr + _TARGET)
        scores_ptr += row * (shares * block)
        scores = tl.load(scores_ptr + share * block + tl.arange(0, block))
        thresholds_W = thresholds(low, high, ways)
        weights = tl.full((block,), 1.0, tl.float32)
        if not counts:
            weights = tl.exp2((scores - top) * scale)
        sums_W = tl.sum(tl.where(scores[:, None] >= thresholds_W[None, :], weights[:, None], 0.0), axis=0)
        inside = (scores >= low) & (scores < below)
        found_ptr += row * ((ways + 2) * shares)
        at_W = tl.arange(0, ways)
        tl.store(found_ptr + share, tl.min(tl.where(inside, scores, float("inf")), axis=0))
        tl.store(found_ptr + shares + share, tl.max(tl.where(inside, scores, float("-inf")), axis=0))
        tl.store(found_ptr + 2 * shares + share * ways + at_W, sums_W)
        if _is_last(counters_ptr, shares):
            at_S = tl.arange(0, shares)
            least = tl.min(_of_all(found_ptr + at_S), axis=0)
            highest = tl.max(_of_all(found_ptr + shares + at_S), axis=0)
            sums_SW = _of_all(found_ptr + 2 * shares + at_S[:, None] * ways + at_W[None, :])
            sums_W = tl.sum(sums_SW, axis=0)
            low, high, below, goes_on = narrowed(thresholds_W, sums_W, least, highest, below, target)
            if ends:  # noqa: SIM102 (`and` would make one condition of both, for the GPU)
                if goes_on:
                    low = search_long(
                        scores_ptr, scores_ptr, scores_ptr, size, 1.0, 1.0, 1, counts,
                        top, scale, low, high, below, target, alone_ways, alone_block,
                    )  # fmt: skip
            tl.store(state_ptr + _LOW, low)
            tl.store(state_ptr + _HIGH, high)
            tl.store(state_ptr + _BELOW, below)
            tl.store(state_ptr + _SEARCHES, goes_on.to(tl.float32))
            tl.store(counters_ptr + row, 0)


@triton.jit(do_not_specialize=["uniform_stride"])
def _weigh(
    scores_ptr: tl.tensor,
    state_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    uniforms_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    logs_ptr: tl.tensor,
    uniform_stride: tl.tensor,
    scale: tl.tensor,
    top_p: tl.tensor,
    log2_share: tl.tensor,
    size: tl.tensor,
    draws: tl.constexpr,
    shares: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """The weights of the scores that stay, summed; then the draw, or the search by mass begins."""
    share, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    state_ptr += row * _STATE
    scores_ptr += row * (shares * block)
    sums_ptr += row * shares
    top, least = tl.load(state_ptr + _TOP), tl.load(state_ptr + _LOW)
    within = tl.arange(0, block)
    scores = tl.load(scores_ptr + share * block + within)
    weights = tl.where(scores >= least, tl.exp2((scores - top) * scale), 0.0)
    tl.store(sums_ptr + share, tl.sum(weights.to(tl.float64), axis=0))
    if _is_last(counters_ptr, shares):
        sums_S = _of_all(sums_ptr + tl.arange(0, shares))
        mass = tl.sum(sums_S, axis=0)
        if draws:
            target = tl.load(uniforms_ptr + row * uniform_stride) * mass
            chosen, rest = part_of(sums_S, target, shares)
            at = chosen * block + within
            scores = _of_all(scores_ptr + at)
            total = tl.load(state_ptr + _TOTAL)
            finish(scores, at, least, top, total, scale, rest, size, ids_ptr, logs_ptr, row)
        else:
            mass = mass.to(tl.float32)
            low = tl.maximum(least, top + (tl.log2(mass) + log2_share) / scale)
            _begin_search(state_ptr, low, top, top_p * mass)
        tl.store(counters_ptr + row, 0)
