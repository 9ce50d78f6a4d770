"""Writing keys and values in 8 bits (`int8_cache`) and attention over them: what `kernels` launches there.

Half the bytes are read, so there is half the time to take them apart. Keys are not taken apart: queries
become numbers of 16 bits, each two rows of 8 bits in a matrix unit, which would have had zeros there (8
queries share a key-value head of the 34 B, and it takes 16), and products are exact integers; a key's scale
is its scores'. Values become halves, which hold all their numbers; a value's scale is its probability's, in
units of the largest scale of the first block, lest halves be too coarse. A matrix unit wants values of
neighbouring keys side by side, where memory has those of neighbouring dimensions; 16 bits are turned on their
way to it, 8 are not. So two dimensions of a value travel as one number of 16 bits, and even and odd ones
become two sums.

Import it only where Triton is installed.
"""

import triton
import triton.language as tl

from emuworld.model.attention_parts import own_work, softened
from emuworld.model.launches import begin

_AS_ASSEMBLY = tl.constexpr(not triton.knobs.runtime.interpret)  # which knows none
_SCALE_BYTES = tl.constexpr(4)
_LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit
def write(
    head_ptr: tl.tensor,
    position: tl.tensor,
    x: tl.tensor,
    x_2: tl.tensor,
    head_stride: tl.tensor,
    is_value: tl.tensor,
    there: tl.tensor,
) -> None:
    """Write the halves [tokens, head_dim / 2] of vectors to these places of heads from `head_ptr` on."""
    half: tl.constexpr = x.shape[1]
    scale = tl.maximum(tl.max(tl.abs(x), axis=1), tl.max(tl.abs(x_2), axis=1)) / 127.0
    at = (head_ptr + position * 2 * half)[:, None] + tl.arange(0, half)[None, :]
    tl.store(at, _in_8_bits(x, scale, is_value), mask=there[:, None])
    tl.store(at + half, _in_8_bits(x_2, scale, is_value), mask=there[:, None])
    tl.store(_scales(head_ptr, head_stride, 2 * half) + position, scale, mask=there)


@triton.jit
def _in_8_bits(x: tl.tensor, scale: tl.tensor, is_value: tl.tensor) -> tl.tensor:
    numbers = _rounded(x / tl.maximum(scale, 1e-30)[:, None]).to(tl.int32)
    return tl.where(is_value, numbers ^ 0x80, numbers).to(tl.int8)


@triton.jit
def attend_part(
    q_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    log2_scale: tl.tensor,
    num_tokens: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    pdl: tl.constexpr,
    num_groups: tl.constexpr,
    repeats: tl.constexpr,
    head_dim: tl.constexpr,
    queries: tl.constexpr,
    parts: tl.constexpr,
    causal: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """As `kernels._attend_part`; all queries stand twice where a matrix unit takes them."""
    begin(pdl)
    pair, part, row, group, query, first, last, last_seen = own_work(
        starts_ptr, num_tokens, num_groups, repeats, queries, parts, causal, block
    )
    if not causal:
        last_seen -= 1

    at = tl.arange(0, head_dim)
    twice = tl.arange(0, 2 * queries)
    one = tl.program_id(0) * queries + twice % queries
    real = (one < num_tokens * repeats)[:, None]
    head = group * repeats + one % repeats
    q_at = ((row.to(tl.int64) * num_tokens + one // repeats) * (num_groups * repeats) + head) * head_dim
    q = tl.load(q_ptr + q_at[:, None] + at[None, :], mask=real, other=0.0).to(tl.float32)
    q, q_scale = _as_two_rows(q, twice, queries)
    q_scale *= log2_scale
    factors = tl.where(tl.arange(0, 2) == 0, 256, 1)[:, None, None]

    half: tl.constexpr = head_dim // 2
    couple = tl.arange(0, half)
    k_ptr = cache_ptr + tl.load(rows_ptr + row).to(tl.int64) * row_stride + group.to(tl.int64) * head_stride
    v_ptr = k_ptr + num_groups * head_stride
    k_scales = _scales(k_ptr, head_stride, head_dim)
    v_scales = _scales(v_ptr, head_stride, head_dim)
    v_ptr = v_ptr.to(tl.pointer_type(tl.int16))
    keys = first + tl.arange(0, block)
    unit = tl.max(tl.load(v_scales + keys, mask=keys < last, other=0.0), axis=0)
    unit = tl.where(unit > 0.0, unit, 1.0)
    units = 1.0 / unit
    maximum = tl.full((queries,), float("-inf"), tl.float32)
    weight = tl.zeros((queries, block), tl.float32)  # summed at the end
    even = tl.zeros((2 * queries, half), tl.float32)
    odd = tl.zeros((2 * queries, half), tl.float32)
    for key in range(first, last, block):
        keys = key + tl.arange(0, block)
        there = keys < last
        k = tl.load(k_ptr + keys[:, None] * head_dim + at[None, :], mask=there[:, None], other=0)
        v = tl.load(v_ptr + keys[:, None] * half + couple[None, :], mask=there[:, None], other=0)
        k_scale = tl.load(k_scales + keys, mask=there, other=0.0)
        v_scale = tl.load(v_scales + keys, mask=there, other=0.0)
        products = tl.sum(tl.reshape(tl.dot(q, tl.trans(k)), (2, queries, block)) * factors, axis=0)
        scores = products.to(tl.float32) * q_scale[:, None] * k_scale[None, :]
        # No query that counts sees a key that is not there.
        scores = tl.where(keys[None, :] <= last_seen[:, None], scores, float("-inf"))
        p, shrink, maximum = softened(scores, 1.0, maximum)
        weight = weight * shrink[:, None] + p
        p = tl.minimum(p * (v_scale * units)[None, :], _LARGEST_HALF).to(tl.float16)
        p = tl.reshape(tl.broadcast_to(p[None, :, :], (2, queries, block)), (2 * queries, block))
        shrink = tl.reshape(tl.broadcast_to(shrink[None, :], (2, queries)), (2 * queries,))[:, None]
        even = even * shrink + tl.dot(p, _halves(v, upper=False))
        odd = odd * shrink + tl.dot(p, _halves(v, upper=True))
    total = tl.sum(weight, axis=1)
    out_at = (pair.to(tl.int64) * parts + part) * (tl.num_programs(0) * queries)
    if parts > 1:
        tl.store(maxima_ptr + out_at + query, maximum)
        tl.store(weights_ptr + out_at + query, total)
        out_at = sums_ptr + (out_at + one)[:, None] * head_dim + 2 * couple[None, :]
        tl.store(out_at, even * unit)
        tl.store(out_at + 1, odd * unit)
    else:
        total = tl.reshape(tl.broadcast_to(total[None, :], (2, queries)), (2 * queries,))
        factor = (unit / total)[:, None]
        out_at = out_ptr + q_at[:, None] + 2 * couple[None, :]
        tl.store(out_at, (even * factor).to(out_ptr.dtype.element_ty), mask=real)
        tl.store(out_at + 1, (odd * factor).to(out_ptr.dtype.element_ty), mask=real)


# Kernel, queries of one program; keys of a block and stages where queries are few.
PLAN = (attend_part, (8, 16, 64, 128), 128, 2)


@triton.jit
def _scales(head_ptr: tl.tensor, head_stride: tl.tensor, head_dim: tl.constexpr) -> tl.tensor:
    """Where the scales of a head begin: behind its numbers."""
    capacity = head_stride // (head_dim + _SCALE_BYTES)
    return (head_ptr + capacity * head_dim).to(tl.pointer_type(tl.float32))


@triton.jit
def _rounded(x: tl.tensor) -> tl.tensor:
    """The nearest whole number, of two the even one, of numbers below 2 ** 22: 1.5 * 2 ** 23 is added."""
    return (x + 12582912.0) - 12582912.0


# One 16-bit number a value in, two halves out; 0x6400 is the half 1024, whose last bit is 1.
_LOWER = tl.constexpr("""{ .reg .b32 sum, less;
        lop3.b32 sum, $1, 0x00FF00FF, 0x64006400, 0xEA;
        mov.b32 less, 0x64806480;
        sub.f16x2 $0, sum, less; }""")
_UPPER = tl.constexpr("""{ .reg .b32 sum, less;
        mov.b32 less, 0x64006400;
        prmt.b32 sum, $1, less, 0x5351;
        mov.b32 less, 0x64806480;
        sub.f16x2 $0, sum, less; }""")


@triton.jit
def _halves(pair: tl.tensor, upper: tl.constexpr) -> tl.tensor:
    """The lower or the upper bytes of numbers of 16 bits, 128 less, as halves, two at once."""
    if not _AS_ASSEMBLY:
        return (((pair >> (8 if upper else 0)) & 0xFF) - 128).to(tl.float16)
    return tl.inline_asm_elementwise(
        _UPPER if upper else _LOWER, "=r,r", [pair], dtype=tl.float16, is_pure=True, pack=2
    )


@triton.jit
def _as_two_rows(q: tl.tensor, twice: tl.tensor, queries: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Queries [2 queries, head_dim], which stand twice, as numbers of 16 bits: the upper halves of their bits
    and behind these the lower ones; and what one unit of each query is worth.
    """
    q_scale = tl.maximum(tl.max(tl.abs(q), axis=1), 1e-30) / (127.0 * 256.0)
    number = _rounded(q / q_scale[:, None]).to(tl.int32)
    high = (number + 128) >> 8
    q = tl.where((twice < queries)[:, None], high, number - (high << 8)).to(tl.int8)
    return q, tl.max(tl.reshape(q_scale, (2, queries)), axis=0)
