"""Triton functions behind `draw_kernel`: the guided scores of a row, and the least of them that stays.

The search narrows a range of scores from pass to pass: each sums what lies above a few thresholds (ids for
top-k, their weights for top-p) and looks up the least and the highest score between the two thresholds that
enclose the sought one; where they are equal, that is it.

Import it only where Triton is installed.

Shapes: B ids of a block, W thresholds of a pass.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.0e38)  # a start for maxima that can be subtracted from itself
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def guided_scores(
    c_ptr: tl.tensor,
    u_ptr: tl.tensor,
    b_ptr: tl.tensor,
    at: tl.tensor,
    size: tl.tensor,
    guidance: tl.tensor,
    image_guidance: tl.tensor,
    rows: tl.constexpr,
) -> tl.tensor:
    """Guided, fp32; -inf beyond the row."""
    inside = at < size
    c = tl.load(c_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
    if rows == 1:
        return c
    u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
    base = u
    if rows == 3:
        b = tl.load(b_ptr + at, mask=inside, other=0.0).to(tl.float32)
        base = tl.fma(u - b, image_guidance, b)
    # Products and sums are joined by hand: wherever an id is read again, its score has the same bits.
    guided = tl.fma(c - u, guidance, base)
    return tl.where(guided == guided, guided, c)  # infinities that cancel


@triton.jit
def thresholds(
    low: tl.tensor,
    high: tl.tensor,
    ways: tl.constexpr,
) -> tl.tensor:  # of a pass: the last is `high`, and none is `low`
    share_W = (tl.arange(0, ways) + 1).to(tl.float32) / ways
    # Not low + share (high - low), which may overflow.
    return tl.minimum(tl.maximum(low * (1.0 - share_W) + high * share_W, low), high)


@triton.jit
def _repeated(
    x_B: tl.tensor,
    ways: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """[B, W] with equal columns. By joins the copies stay with the thread that has the original; what
    broadcasting makes is laid out anew, through shared memory.
    """
    x = tl.join(x_B, x_B)
    if ways >= 4:
        x = tl.join(x, x)
    if ways >= 8:
        x = tl.join(x, x)
    if ways >= 16:
        x = tl.join(x, x)
    return tl.reshape(x, (block, ways))


@triton.jit
def narrowed(
    thresholds_W: tl.tensor,
    sums_W: tl.tensor,
    least: tl.tensor,
    highest: tl.tensor,
    below: tl.tensor,
    target: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """From a pass over scores in [low, below), the next `low`, `high` and `below`, and whether to go on.

    `low` is the highest known with enough at and above it, `below` the least known without.
    """
    enough_W = sums_W >= target
    low = tl.maximum(least, tl.max(tl.where(enough_W, thresholds_W, least), axis=0))
    below = tl.minimum(below, tl.min(tl.where(enough_W, below, thresholds_W), axis=0))
    fewest = tl.min(tl.where(enough_W, sums_W, float("inf")), axis=0)
    return low, tl.minimum(below, highest), below, (least < highest) & (fewest > target)


@triton.jit
def search_short(
    scores: tl.tensor,
    weights: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    target: tl.tensor,
    ways: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """The highest score at and above which the weights reach the target; they do at and above `low`."""
    below = tl.full((), float("inf"), tl.float32)
    scores_BW, weights_BW = _repeated(scores, ways, block), _repeated(weights, ways, block)
    searching = low < high
    while searching:
        thresholds_W = thresholds(low, high, ways)
        sums_W = tl.sum(tl.where(scores_BW >= thresholds_W[None, :], weights_BW, 0.0), axis=0)
        inside = (scores >= low) & (scores < below)
        least = tl.min(tl.where(inside, scores, float("inf")), axis=0)
        highest = tl.max(tl.where(inside, scores, float("-inf")), axis=0)
        low, high, below, searching = narrowed(thresholds_W, sums_W, least, highest, below, target)
    return low


@triton.jit
def search_long(
    c_ptr: tl.tensor,
    u_ptr: tl.tensor,
    b_ptr: tl.tensor,
    size: tl.tensor,
    guidance: tl.tensor,
    image_guidance: tl.tensor,
    rows: tl.constexpr,
    counts: tl.constexpr,
    top: tl.tensor,
    scale: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    below: tl.tensor,
    target: tl.tensor,
    ways: tl.constexpr,
    block: tl.constexpr,
) -> tl.tensor:
    """As `search_short`, with a pass over the row a step; by the number of ids where it `counts`, else by
    their weights. `high` and `below` as `narrowed` gives them, at first the highest score and infinity.
    """
    searching = low < high
    while searching:
        thresholds_W = thresholds(low, high, ways)
        sums_BW = tl.zeros((block, ways), tl.float32)
        least_B = tl.full((block,), float("inf"), tl.float32)
        highest_B = tl.full((block,), float("-inf"), tl.float32)
        for start in range(0, size, block):
            at = start + tl.arange(0, block)
            scores = guided_scores(c_ptr, u_ptr, b_ptr, at, size, guidance, image_guidance, rows)
            above_BW = _repeated(scores, ways, block) >= thresholds_W[None, :]
            if counts:
                sums_BW += tl.where(above_BW, 1.0, 0.0)
            else:
                weights = tl.exp2((scores - top) * scale)
                sums_BW += tl.where(above_BW, _repeated(weights, ways, block), 0.0)
            inside = (scores >= low) & (scores < below)
            least_B = tl.minimum(least_B, tl.where(inside, scores, float("inf")))
            highest_B = tl.maximum(highest_B, tl.where(inside, scores, float("-inf")))
        least, highest = tl.min(least_B, axis=0), tl.max(highest_B, axis=0)
        sums_W = tl.sum(sums_BW, axis=0)
        low, high, below, searching = narrowed(thresholds_W, sums_W, least, highest, below, target)
    return low


@triton.jit
def part_of(
    sums_P: tl.tensor,
    target: tl.tensor,
    parts: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The part in which the running sum passes the target, and how far into it that is."""
    index_P = tl.arange(0, parts)
    running_P = tl.cumsum(sums_P, axis=0)
    first = tl.min(tl.where(running_P > target, index_P, parts), axis=0)
    # The target is below the sum but for rounding; then the last part with weight is meant.
    last = tl.max(tl.where(sums_P > 0.0, index_P, 0), axis=0)
    chosen = tl.minimum(first, last)
    before = tl.sum(tl.where(index_P < chosen, sums_P, 0.0), axis=0)
    return chosen, tl.maximum(target - before, 0.0)


@triton.jit
def finish(
    scores: tl.tensor,
    at: tl.tensor,
    least: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    scale: tl.tensor,
    rest: tl.tensor,
    size: tl.tensor,
    ids_ptr: tl.tensor,
    logs_ptr: tl.tensor,
    row: tl.tensor,
) -> None:
    """Draw within a part, and write."""
    weights = tl.where((scores >= least) & (at < size), tl.exp2((scores - top) * scale), 0.0)
    running = tl.cumsum(weights.to(tl.float64), axis=0)
    first = tl.min(tl.where((running > rest) & (weights > 0.0), at, size), axis=0)
    last = tl.max(tl.where(weights > 0.0, at, 0), axis=0)
    drawn = tl.minimum(first, last)
    own = tl.max(tl.where(at == drawn, scores, float("-inf")), axis=0)
    tl.store(ids_ptr + row, drawn.to(tl.int64))
    tl.store(logs_ptr + row, own - top - tl.log2(total) * _LN_2)
