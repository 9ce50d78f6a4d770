"""`emuworld.model.operations` as Triton kernels: what stands between the matrix products, in few launches.

A decoding step reads every weight once and does little else, so a layer's dozens of small operations would
add a third to its time. The attention splits each row's keys over the multiprocessors (flash decoding) and
reads the row's length on the device: only the used part of the cache is read, and one captured graph serves
every length.

Import it only where Triton is installed. All arithmetic between a load and a store is fp32.

Shapes as in `operations`; Q = queries of one key-value head and row, in blocks of a power of two of at least
16 (what a matrix unit takes); Z = parts that the keys of a row are split into.
"""

import torch
import triton
import triton.language as tl

from emuworld.model import int8_attention
from emuworld.model.attention_parts import own_work, read_keys
from emuworld.model.head_kernels import write_heads
from emuworld.model.launches import MANY_ROWS, begin, follows, num_multiprocessors
from emuworld.model.operations import Place

__all__ = ["add_rms_norm", "attend", "silu_times", "supports", "swiglu", "write_heads"]

_KEYS_A_BLOCK = 64
_FEW = 16  # queries of a program
# Of one program. Few sizes, of which each that is met takes a second to compile; so with the parts.
_QUERIES = (_FEW, 64, 128)
_SMALL_HEADS = 64  # of which many queries read ahead as few do, and 128 are no faster than 64
_MOST_PARTS = 64
_NORMED_AT_ONCE, _NORM_WARPS = 2048, 4  # elements of such a program; warps of one of small rows
_GATED_AT_ONCE, _LEAST_GATED = 1024, 128  # gates side by side in a program, at most and at least
_MANY_GATED, _GATE_WARPS = 2048, 4  # gates of a program of several rows
_LOG2_E = 1.4426950408889634


def supports(*, head_dim: int) -> bool:
    """Whether there are kernels for heads of this size."""
    return head_dim in (16, 32, 64, 128, 256)


def add_rms_norm(
    x_MD: torch.Tensor, delta_MD: torch.Tensor | None, weight_D: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """See `operations.add_rms_norm`."""
    num_rows, size = x_MD.shape
    out_MD = torch.empty_like(x_MD)
    block = triton.next_power_of_2(size)
    rows = 1 if num_rows < MANY_ROWS else max(1, _NORMED_AT_ONCE // block)
    _add_rms_norm[(triton.cdiv(num_rows, rows),)](
        x_MD,
        x_MD if delta_MD is None else delta_MD,
        weight_D,
        out_MD,
        eps,
        num_rows,
        size,
        **follows(),
        adds=delta_MD is not None,
        rows=rows,
        block=block,
        num_warps=8 if size > 1024 else _NORM_WARPS,
    )
    return out_MD


def attend(
    q_MHd: torch.Tensor, cache_RKCd: torch.Tensor, *, place: Place, causal: bool = True
) -> torch.Tensor:
    """See `operations.attend`; `place.num_keys` is not needed."""
    num_rows, num_groups = len(place.rows_R), cache_RKCd.shape[1] // 2
    num_heads, head_dim = q_MHd.shape[1:]
    num_tokens, repeats = len(q_MHd) // num_rows, num_heads // num_groups
    in_8_bits = cache_RKCd.dtype == torch.int8
    plan = int8_attention.PLAN if in_8_bits else (_attend_part, _QUERIES, _KEYS_A_BLOCK, 3)
    attend_part, sizes, block, stages = plan
    most = 64 if head_dim <= _SMALL_HEADS and not in_8_bits else sizes[-1]
    queries = next((size for size in sizes if size >= min(num_tokens * repeats, most)), most)
    blocks = triton.cdiv(num_tokens * repeats, queries)
    parts = _num_parts(num_rows * num_groups * blocks, device=q_MHd.device)
    out_MX = torch.empty_like(q_MHd)
    kept = (num_rows * num_groups, parts, blocks * queries) if parts > 1 else (1, 1, 1)
    sums = q_MHd.new_empty((*kept, head_dim), dtype=torch.float32)
    scales = q_MHd.new_empty((2, *kept), dtype=torch.float32)
    attend_part[(blocks, num_rows * num_groups, parts)](
        q_MHd,
        cache_RKCd,
        out_MX,
        sums,
        scales[0],
        scales[1],
        place.rows_R,
        place.starts_R,
        head_dim**-0.5 * _LOG2_E,
        num_tokens,
        cache_RKCd.stride(0),
        cache_RKCd.stride(1),
        **follows(early=False),
        num_groups=num_groups,
        repeats=repeats,
        head_dim=head_dim,
        queries=queries,
        parts=parts,
        causal=causal,
        block=block if queries <= _FEW else _KEYS_A_BLOCK,
        num_warps=4 if queries <= 64 else 8,
        num_stages=stages if queries <= _FEW or head_dim <= _SMALL_HEADS else 2,
    )
    if parts == 1:
        return out_MX.flatten(1)
    _join_parts[(num_rows * num_groups, num_tokens * repeats)](
        sums,
        scales[0],
        scales[1],
        out_MX,
        num_tokens,
        blocks * queries,
        **follows(),
        num_groups=num_groups,
        repeats=repeats,
        head_dim=head_dim,
        parts=parts,
        num_warps=4,
    )
    return out_MX.flatten(1)


def swiglu(gate_up_MX: torch.Tensor) -> torch.Tensor:
    """See `operations.swiglu`."""
    num_rows, size = len(gate_up_MX), gate_up_MX.shape[1] // 2
    out_MI = gate_up_MX.new_empty((num_rows, size))
    many = num_rows >= MANY_ROWS  # in blocks that a row is made of: programs are full, and fewer
    block = max(_LEAST_GATED, min(_GATED_AT_ONCE, size & -size)) if many else _GATED_AT_ONCE
    rows = _MANY_GATED // block if many else 1
    grid = (triton.cdiv(size, block), triton.cdiv(num_rows, rows))  # neighbours lie side by side in memory
    warps = _GATE_WARPS if many else 4
    _swiglu[grid](gate_up_MX, out_MI, num_rows, size, rows=rows, block=block, num_warps=warps)
    return out_MI


def _num_parts(num_pairs: int, *, device: torch.device) -> int:
    """A power of four that gives every multiprocessor two programs or more."""
    wanted, parts = 2 * num_multiprocessors(device) // num_pairs, 1
    while parts < min(wanted, _MOST_PARTS):
        parts *= 4
    return parts


@triton.jit
def _add_rms_norm(
    x_ptr: tl.tensor,
    delta_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    eps: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    pdl: tl.constexpr,
    adds: tl.constexpr,
    rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program for a few rows."""
    begin(pdl)
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    at = tl.arange(0, block)
    weight = tl.load(weight_ptr + at, mask=at < size, other=0.0).to(tl.float32)
    inside = (row < num_rows)[:, None] & (at < size)[None, :]
    places = row[:, None] * size + at[None, :]
    x = tl.load(x_ptr + places, mask=inside, other=0.0)
    if adds:
        delta = tl.load(delta_ptr + places, mask=inside, other=0.0)
        x = (x.to(tl.float32) + delta.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr + places, x, mask=inside)
    x = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / size + eps)
    result = x * scale[:, None] * weight[None, :]
    tl.store(out_ptr + places, result.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _attend_part(
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
    """One program a row, key-value head, part of its keys and block of its queries: a running softmax
    (online, base 2).
    """
    begin(pdl)
    pair, part, row, group, query, first, last, last_seen = own_work(
        starts_ptr, num_tokens, num_groups, repeats, queries, parts, causal, block
    )
    token = query // repeats

    at = tl.arange(0, head_dim)
    head = group * repeats + query % repeats
    real = query < num_tokens * repeats
    q_at = ((row.to(tl.int64) * num_tokens + token) * (num_groups * repeats) + head) * head_dim
    q = tl.load(q_ptr + q_at[:, None] + at[None, :], mask=real[:, None], other=0.0)

    k_ptr = cache_ptr + tl.load(rows_ptr + row).to(tl.int64) * row_stride + group.to(tl.int64) * head_stride
    v_ptr = k_ptr + num_groups * head_stride
    maximum = tl.full((queries,), float("-inf"), tl.float32)
    weight = tl.zeros((queries,), tl.float32)
    total = tl.zeros((queries, head_dim), tl.float32)
    whole = first  # so far go whole blocks that all queries see, of which nothing is masked
    if queries > 16:
        seen = tl.minimum(last, tl.min(last_seen, axis=0) + 1)
        whole += tl.maximum(seen - first, 0) // block * block
        maximum, weight, total = read_keys(
            q, k_ptr, v_ptr, first, whole, last_seen, log2_scale, maximum, weight, total, block, masked=False
        )
    maximum, weight, total = read_keys(
        q, k_ptr, v_ptr, whole, last, last_seen, log2_scale, maximum, weight, total, block, masked=True
    )
    if parts == 1:
        result = (total / weight[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + q_at[:, None] + at[None, :], result, mask=real[:, None])
    else:
        out_at = (pair.to(tl.int64) * parts + part) * (tl.num_programs(0) * queries) + query
        tl.store(maxima_ptr + out_at, maximum)
        tl.store(weights_ptr + out_at, weight)
        tl.store(sums_ptr + out_at[:, None] * head_dim + at[None, :], total)


@triton.jit
def _join_parts(
    sums_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_tokens: tl.tensor,
    queries: tl.tensor,
    pdl: tl.constexpr,
    num_groups: tl.constexpr,
    repeats: tl.constexpr,
    head_dim: tl.constexpr,
    parts: tl.constexpr,
) -> None:
    """One program a query; there is room for `queries` of each row and key-value head."""
    begin(pdl)
    pair = tl.program_id(0)
    query = tl.program_id(1)
    part = tl.arange(0, parts)
    at = tl.arange(0, head_dim)
    from_at = (pair.to(tl.int64) * parts + part) * queries + query
    maxima = tl.load(maxima_ptr + from_at)
    shares = tl.exp2(maxima - tl.max(maxima, axis=0))
    weight = tl.sum(tl.load(weights_ptr + from_at) * shares, axis=0)
    sums = tl.load(sums_ptr + from_at[:, None] * head_dim + at[None, :])
    result = tl.sum(sums * shares[:, None], axis=0) / weight
    head = (pair % num_groups) * repeats + query % repeats
    token = (pair // num_groups).to(tl.int64) * num_tokens + query // repeats
    to_at = (token * (num_groups * repeats) + head) * head_dim + at
    tl.store(out_ptr + to_at, result.to(out_ptr.dtype.element_ty))


@triton.jit
def _swiglu(
    gate_up_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_rows: tl.tensor,
    size: tl.tensor,
    rows: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program for a block of outputs of a few rows."""
    row = (tl.program_id(1).to(tl.int64) * rows + tl.arange(0, rows))[:, None]
    at = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    inside = (row < num_rows) & (at < size)
    gate = tl.load(gate_up_ptr + row * 2 * size + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + at, mask=inside, other=0.0).to(tl.float32)
    result = silu_times(gate, up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * size + at, result, mask=inside)


@triton.jit
def silu_times(gate: tl.tensor, up: tl.tensor) -> tl.tensor:
    return gate / (1.0 + tl.exp(-gate)) * up
