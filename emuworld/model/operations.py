"""What a layer does between its matrix products, in plain PyTorch: works anywhere, also inside a CUDA graph.

`emuworld.model.kernels` has the same four functions as Triton kernels. Where rows lie in the cache and how
much they hold comes in as tensors on the device (`Place`), so that a captured graph serves any rows.

Shapes: R rows, T new tokens of each, M = R T, D hidden_size, H query heads, G key-value heads, d head_dim,
K = 2 G, C capacity, S keys, h = d / 2, I intermediate_size, X = (H + 2 G) d.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from emuworld.model import int8_cache


class Place(NamedTuple):
    """Where the new tokens of every row go."""

    rows_R: torch.Tensor
    """int32: the rows of the cache's memory, all different."""
    starts_R: torch.Tensor
    """int32: how many tokens each row holds before."""
    num_keys: int
    """No row holds more than this with its new tokens; a bound, so that one graph serves many lengths."""


class Norms(NamedTuple):
    """Weights [d] of the norms on each query and key head."""

    q_d: torch.Tensor
    k_d: torch.Tensor
    eps: float


class Rotary(NamedTuple):
    """Cosines and sines [positions, h] of the rotary angles, fp32."""

    cos_Ph: torch.Tensor
    sin_Ph: torch.Tensor


def add_rms_norm(
    x_MD: torch.Tensor, delta_MD: torch.Tensor | None, weight_D: torch.Tensor, *, eps: float
) -> torch.Tensor:
    """Adds `delta_MD` to the residual stream `x_MD` in place; returns its norm [M, D]."""
    if delta_MD is not None:
        x_MD += delta_MD
    return F.rms_norm(x_MD, weight_D.shape, weight_D, eps)


def write_heads(
    qkv_MX: torch.Tensor, cache_RKCd: torch.Tensor, *, place: Place, norms: Norms, rotary: Rotary
) -> torch.Tensor:
    """Queries [M, H, d], normed and rotated; keys (normed, rotated) and values go into one layer's cache."""
    num_rows, num_groups, head_dim = len(place.rows_R), cache_RKCd.shape[1] // 2, cache_RKCd.shape[3]
    num_tokens = len(qkv_MX) // num_rows
    heads_MNd = qkv_MX.unflatten(-1, (-1, head_dim))
    num_heads = heads_MNd.shape[1] - 2 * num_groups
    q_MHd, k_MGd, v_MGd = heads_MNd.split((num_heads, num_groups, num_groups), dim=1)
    positions_RT = positions(place, num_tokens=num_tokens)
    angles = (rotary.cos_Ph[positions_RT.flatten()][:, None], rotary.sin_Ph[positions_RT.flatten()][:, None])
    k_MGd = _rotated(F.rms_norm(k_MGd, (head_dim,), norms.k_d, norms.eps), *angles)
    new = int8_cache.narrowed(torch.cat((k_MGd, v_MGd.to(k_MGd.dtype)), dim=1), cache_RKCd.dtype)
    for part, new_MK in zip(int8_cache.parts(cache_RKCd), new, strict=True):
        part[place.rows_R.long()[:, None], :, positions_RT] = new_MK.unflatten(0, (num_rows, num_tokens))
    return _rotated(F.rms_norm(q_MHd, (head_dim,), norms.q_d, norms.eps), *angles).to(qkv_MX.dtype)


def attend(
    q_MHd: torch.Tensor, cache_RKCd: torch.Tensor, *, place: Place, causal: bool = True
) -> torch.Tensor:
    """Each token sees its row's cache up to itself, or to the last new token where not `causal`: [M, H d]."""
    num_rows, num_groups = len(place.rows_R), cache_RKCd.shape[1] // 2
    num_tokens = len(q_MHd) // num_rows
    repeats = q_MHd.shape[1] // num_groups
    # Queries that share a key-value head lie side by side as more queries of that head: [R, G, repeats T, d].
    q_RGnd = q_MHd.view(num_rows, num_tokens, num_groups, repeats, -1).permute(0, 2, 3, 1, 4).flatten(2, 3)
    held = (part[:, :, : place.num_keys] for part in int8_cache.parts(cache_RKCd))
    kv_RKSd = int8_cache.widened(*(part.index_select(0, place.rows_R) for part in held), dtype=q_MHd.dtype)
    keys_S = torch.arange(kv_RKSd.shape[2], device=q_MHd.device)
    last_RT = positions(place, num_tokens=num_tokens)
    visible_RTS = keys_S <= (last_RT if causal else last_RT[:, -1:].expand_as(last_RT))[:, :, None]
    out_RGnd = F.scaled_dot_product_attention(
        q_RGnd,
        kv_RKSd[:, :num_groups],
        kv_RKSd[:, num_groups:],
        attn_mask=visible_RTS.repeat(1, repeats, 1)[:, None],
    )
    out_RGrTd = out_RGnd.unflatten(2, (repeats, num_tokens))
    return out_RGrTd.permute(0, 3, 1, 2, 4).reshape(len(q_MHd), -1)


def swiglu(gate_up_MX: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [M, 2 I], gate first: [M, I]."""
    gate_MI, up_MI = gate_up_MX.chunk(2, dim=-1)
    return F.silu(gate_MI) * up_MI


def only(x_RTX: torch.Tensor, last_R: torch.Tensor | None) -> torch.Tensor:
    """Of every row this token alone, [R, 1, ...]; all, where None is said."""
    if last_R is None:
        return x_RTX
    return x_RTX[torch.arange(len(x_RTX), device=x_RTX.device), last_R][:, None]


def positions(place: Place, *, num_tokens: int) -> torch.Tensor:
    """[R, T] int64 positions of the new tokens."""
    return place.starts_R[:, None] + torch.arange(num_tokens, device=place.starts_R.device)


def _rotated(x_MNd: torch.Tensor, cos_M1h: torch.Tensor, sin_M1h: torch.Tensor) -> torch.Tensor:
    """Rotate-half layout, in fp32."""
    first, second = x_MNd.float().chunk(2, dim=-1)
    return torch.cat((first * cos_M1h - second * sin_M1h, second * cos_M1h + first * sin_M1h), dim=-1)
