"""Grouped-query attention: one function for training, one over a static cache.

Both choose FlashAttention where it is installed and the tensors allow it (CUDA, 16 bits), else PyTorch's
`scaled_dot_product_attention`. Over a cache, queries that share a key-value head are laid side by side as
more queries of that head, so keys and values are never repeated in memory; rows of a GPU that see all their
keys need not be, which saves a pass over pictures two copies.

On the CPU every row of a cache is its own call over exactly its own keys: what a row gets cannot depend on
the rows beside it, neither on their number nor on their lengths.

Shapes: B batch or R cache rows, H query heads, G key-value heads, T new tokens, S keys, d head_dim,
n = T H / G queries of a key-value head.
"""

import contextlib
import importlib.util
from typing import Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from emuworld.model.cache import CacheStep, StaticCache

_KEY_STEP = (
    16  # on CUDA the keys are read up to a multiple of this: an unaligned mask would be copied every time
)

# cuDNN's attention is the fastest, but it makes a plan for every new shape, which the layers of a small model
# should not win back (a guess: not measured apart). Operations of all layers from which on it may be chosen:
_PLANNED_WORK = 1e13
_HALF_PRECISION = (torch.float16, torch.bfloat16)  # fast kernels with `enable_gqa` know no other types
_WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

if torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None:
    from flash_attn import flash_attn_func, flash_attn_with_kvcache
else:
    flash_attn_func = flash_attn_with_kvcache = None


class AttentionFunction(Protocol):
    """Attention of a whole sequence to itself, e.g. with another mask than the causal one."""

    def __call__(self, q_BHTd: torch.Tensor, k_BGTd: torch.Tensor, v_BGTd: torch.Tensor, /) -> torch.Tensor:
        """Returns [B, H, T, d]."""


def causal_attention(
    q_BHTd: torch.Tensor, k_BGTd: torch.Tensor, v_BGTd: torch.Tensor, *, dropout: float = 0.0
) -> torch.Tensor:
    """Each token attends to itself and to those before it; returns [B, H, T, d]."""
    if _flash_attention_fits(q_BHTd):
        out_BTHd = flash_attn_func(
            q_BHTd.transpose(1, 2),
            k_BGTd.transpose(1, 2),
            v_BGTd.transpose(1, 2),
            dropout_p=dropout,
            causal=True,
        )
        return out_BTHd.transpose(1, 2)
    return scaled_dot_product_attention(
        q_BHTd,
        k_BGTd,
        v_BGTd,
        dropout_p=dropout,
        is_causal=True,
        enable_gqa=q_BHTd.shape[1] != k_BGTd.shape[1],
    )


def cached_attention(
    q_RHTd: torch.Tensor, cache: StaticCache, *, layer: int, step: CacheStep
) -> torch.Tensor:
    """The T new tokens of every row attend to the row's cache, where `cache.write` has put their own keys.

    Each sees the new tokens up to itself, or all of them where the step is not causal. Returns [R, H, T, d].
    """
    if q_RHTd.device.type == "cpu" or (step.num_tokens > 1 and not step.uniform):
        return _row_by_row(q_RHTd, cache, layer=layer, step=step)
    work = 4 * q_RHTd.numel() * step.longest * cache.config.num_layers
    with sdpa_kernel(_WITHOUT_PLANS) if work < _PLANNED_WORK else contextlib.nullcontext():
        return _all_rows(q_RHTd, cache, layer=layer, step=step)


def _row_by_row(q_RHTd: torch.Tensor, cache: StaticCache, *, layer: int, step: CacheStep) -> torch.Tensor:
    num_rows, num_heads, num_tokens, head_dim = q_RHTd.shape
    num_groups = cache.config.num_kv_heads
    repeats = num_heads // num_groups
    q_RGnd = q_RHTd.reshape(num_rows, num_groups, repeats * num_tokens, head_dim)
    rows = []
    for row, start in enumerate(step.starts.tolist()):
        num_keys = start + num_tokens
        k_1GSd, v_1GSd = cache.row_kv(layer, row, num_keys, dtype=q_RHTd.dtype)
        mask = None
        if num_tokens > 1 and step.causal:
            mask = step.mask_TS(start, num_keys=num_keys, repeats=repeats)
        rows.append(scaled_dot_product_attention(q_RGnd[row : row + 1], k_1GSd, v_1GSd, attn_mask=mask))
    out_RGnd = rows[0] if num_rows == 1 else torch.cat(rows)
    return out_RGnd.reshape(num_rows, num_heads, num_tokens, head_dim)


def _all_rows(q_RHTd: torch.Tensor, cache: StaticCache, *, layer: int, step: CacheStep) -> torch.Tensor:
    """One call for all rows, for a device where the number of calls is what costs."""
    num_rows, num_heads, num_tokens, head_dim = q_RHTd.shape
    dtype = q_RHTd.dtype
    longest = int(step.starts.max()) + num_tokens
    if step.uniform and step.starts[0] == 0 and num_tokens > 1 and step.causal:
        return causal_attention(q_RHTd, *cache.all_kv(layer, num_tokens, dtype=dtype))
    if _flash_attention_fits(q_RHTd):
        k_RGSd, v_RGSd = cache.all_kv(layer, longest, dtype=dtype)
        out_RTHd = flash_attn_with_kvcache(
            q_RHTd.transpose(1, 2),
            k_RGSd.transpose(1, 2),
            v_RGSd.transpose(1, 2),
            cache_seqlens=(step.positions_RT[:, -1] + 1).int(),
            causal=step.causal,
        )
        return out_RTHd.transpose(1, 2)
    if step.uniform and not step.causal and dtype in _HALF_PRECISION:
        return scaled_dot_product_attention(
            q_RHTd, *cache.all_kv(layer, longest, dtype=dtype), enable_gqa=True
        )
    repeats = num_heads // cache.config.num_kv_heads
    q_RGnd = q_RHTd.reshape(num_rows, cache.config.num_kv_heads, repeats * num_tokens, head_dim)
    num_keys, mask = longest, None  # which is all that is seen where the new tokens see each other
    if not step.uniform or (num_tokens > 1 and step.causal):
        num_keys = min(-(-longest // _KEY_STEP) * _KEY_STEP, cache.capacity)
        if step.uniform:
            mask = step.mask_TS(int(step.starts[0]), num_keys=num_keys, repeats=repeats)
        else:
            mask = step.row_mask_R1TS(num_keys=num_keys, repeats=repeats)
    kv = cache.all_kv(layer, num_keys, dtype=dtype)
    out_RGnd = scaled_dot_product_attention(q_RGnd, *kv, attn_mask=mask)
    return out_RGnd.reshape(num_rows, num_heads, num_tokens, head_dim)


def _flash_attention_fits(q: torch.Tensor) -> bool:
    return flash_attn_func is not None and q.is_cuda and q.dtype in _HALF_PRECISION
