"""`operations.write_heads` as a Triton kernel: heads normed and rotated, keys and values put into the cache.

A program takes one head, of one token where there are few, else of some.

Import it only where Triton is installed. All arithmetic between a load and a store is fp32. Shapes as in
`operations`.
"""

import torch
import triton
import triton.language as tl

from emuworld.model import int8_attention
from emuworld.model.launches import MANY_ROWS, begin, follows
from emuworld.model.operations import Norms, Place, Rotary

_AT_ONCE, _WARPS = 2048, 4  # of a program of many tokens: elements


def write_heads(
    qkv_MX: torch.Tensor, cache_RKCd: torch.Tensor, *, place: Place, norms: Norms, rotary: Rotary
) -> torch.Tensor:
    """See `operations.write_heads`."""
    num_groups, head_dim = cache_RKCd.shape[1] // 2, cache_RKCd.shape[3]
    num_heads = qkv_MX.shape[1] // head_dim - 2 * num_groups
    q_MHd = qkv_MX.new_empty((len(qkv_MX), num_heads, head_dim))
    tokens = 1 if len(qkv_MX) < MANY_ROWS else max(1, _AT_ONCE // head_dim)
    _write_heads[(triton.cdiv(len(qkv_MX), tokens), num_heads + 2 * num_groups)](
        qkv_MX,
        q_MHd,
        cache_RKCd,
        norms.q_d,
        norms.k_d,
        rotary.cos_Ph,
        rotary.sin_Ph,
        place.rows_R,
        place.starts_R,
        norms.eps,
        len(qkv_MX),
        len(qkv_MX) // len(place.rows_R),
        cache_RKCd.stride(0),
        cache_RKCd.stride(1),
        **follows(),
        num_heads=num_heads,
        num_groups=num_groups,
        head_dim=head_dim,
        tokens=tokens,
        num_warps=1 if tokens == 1 else _WARPS,
    )
    return q_MHd


@triton.jit
def _write_heads(
    qkv_ptr: tl.tensor,
    q_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    q_norm_ptr: tl.tensor,
    k_norm_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    eps: tl.tensor,
    num_all: tl.tensor,
    num_tokens: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    pdl: tl.constexpr,
    num_heads: tl.constexpr,
    num_groups: tl.constexpr,
    head_dim: tl.constexpr,
    tokens: tl.constexpr,
) -> None:
    """One program for a head of a few tokens, one half of it beside the other: norm and rotation for queries
    and keys, a copy for values.
    """
    begin(pdl)
    token = tl.program_id(0).to(tl.int64) * tokens + tl.arange(0, tokens)
    there = token < num_all
    row = token // num_tokens
    position = tl.load(starts_ptr + row, mask=there, other=0) + token % num_tokens
    cache_row = tl.load(rows_ptr + row, mask=there, other=0).to(tl.int64)
    half: tl.constexpr = head_dim // 2
    at = tl.arange(0, half)
    is_real = there[:, None] & (at >= 0)[None, :]
    angle = position[:, None] * half + at[None, :]
    cos = tl.load(cos_ptr + angle, mask=is_real, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=is_real, other=0.0)
    q_norm, k_norm = tl.load(q_norm_ptr + at), tl.load(k_norm_ptr + at)
    q_norm_2, k_norm_2 = tl.load(q_norm_ptr + half + at), tl.load(k_norm_ptr + half + at)
    head = tl.program_id(1)
    is_query, is_value = head < num_heads, head >= num_heads + num_groups
    from_at = ((token * (num_heads + 2 * num_groups) + head) * head_dim)[:, None] + at[None, :]
    x = tl.load(qkv_ptr + from_at, mask=is_real, other=0.0).to(tl.float32)
    x_2 = tl.load(qkv_ptr + from_at + half, mask=is_real, other=0.0).to(tl.float32)
    scale = (1.0 / tl.sqrt(tl.sum(x * x + x_2 * x_2, axis=1) / head_dim + eps))[:, None]
    normed = x * scale * tl.where(is_query, q_norm, k_norm).to(tl.float32)[None, :]
    normed_2 = x_2 * scale * tl.where(is_query, q_norm_2, k_norm_2).to(tl.float32)[None, :]
    x = tl.where(is_value, x, normed * cos - normed_2 * sin)
    x_2 = tl.where(is_value, x_2, normed_2 * cos + normed * sin)
    to_at = q_ptr + ((token * num_heads + head) * head_dim)[:, None] + at[None, :]
    tl.store(to_at, x.to(q_ptr.dtype.element_ty), mask=is_real & is_query)
    tl.store(to_at + half, x_2.to(q_ptr.dtype.element_ty), mask=is_real & is_query)
    place = cache_ptr + cache_row * row_stride + (head - num_heads).to(tl.int64) * head_stride
    if cache_ptr.dtype.element_ty == tl.int8:
        int8_attention.write(place, position, x, x_2, head_stride, is_value, there & (head >= num_heads))
    else:
        to_at = (place + position * head_dim)[:, None] + at[None, :]
        tl.store(to_at, x.to(cache_ptr.dtype.element_ty), mask=is_real & (head >= num_heads))
        tl.store(to_at + half, x_2.to(cache_ptr.dtype.element_ty), mask=is_real & (head >= num_heads))
