"""A decoder-only transformer with the mathematics and state-dict keys of transformers' `Qwen3ForCausalLM`.

Pre-norm, grouped-query attention with RMS norms on each head's queries and keys before the rotary positions
(rotate-half layout), SwiGLU, no biases, tied or untied head. Single device: parallelism is applied from
outside. Differs from Qwen3 in keeping the rotary positions in fp32 when the weights are 16-bit, and in the
published Emu3.5's dropout (arXiv 2510.26583; 0 by default).

Shapes: B batch or cache rows, T tokens, D hidden_size, H query heads, G key-value heads, d head_dim.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from emuworld.model.attention import AttentionFunction, cached_attention, causal_attention
from emuworld.model.cache import CacheStep, StaticCache
from emuworld.model.config import SIZES, TransformerConfig, sized
from emuworld.model.operations import only

__all__ = ["SIZES", "StaticCache", "Transformer", "TransformerConfig", "sized"]


class Transformer(nn.Module):
    """ids in, hidden states out; `logits` turns hidden states into scores for a range of the vocabulary."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head the embedding matrix where the configuration says so (again after loading)."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.dtype

    def forward(
        self,
        ids_BT: torch.Tensor,
        *,
        cache: StaticCache | None = None,
        advance_B: Sequence[bool] | np.ndarray | None = None,
        attention: AttentionFunction | None = None,
        positions_BT: torch.Tensor | None = None,
        causal: bool = True,
        last_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, D] after the final norm; with `last_B` (int64, there, causal) that token's of
        each row alone, [B, 1, D].

        Without a cache every sequence starts at position 0 (or lies at `positions_BT`) and attends causally,
        or through `attention`. With one, the T tokens are appended to every row at its own length; a row
        whose `advance_B` is False is computed but keeps its length, so that the next call overwrites it. With
        `causal` False the T tokens see each other both ways.
        """
        if cache is None:
            hidden_BTD = self.model(ids_BT, attention=attention, positions_BT=positions_BT)
            return only(hidden_BTD, last_B)
        if attention is not None or positions_BT is not None:
            raise ValueError(
                "attention= and positions_BT= are for a whole sequence; a cache has its own of both"
            )
        if len(ids_BT) != cache.num_rows:
            raise ValueError(f"ids has {len(ids_BT)} rows, the cache {cache.num_rows}; expected one for each")
        step = cache.begin(ids_BT.shape[1], causal=causal)
        hidden_BTD = self.model(ids_BT, cache=cache, step=step)
        cache.finish(step, advance_B=advance_B)
        return only(hidden_BTD, last_B)

    def logits(self, hidden: torch.Tensor, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """[..., D] -> [..., stop - start]: the scores of ids start to stop only."""
        return F.linear(hidden, self.lm_head.weight[start:stop])

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """All of them, in order, as `init_weight` says."""
        for name, parameter in self.named_parameters():
            init_weight(name, parameter, config=self.config, generator=generator)


@torch.no_grad()
def init_weight(
    name: str, weight: torch.Tensor, *, config: TransformerConfig, generator: torch.Generator | None = None
) -> None:
    """In place: norms 1; else Normal(0, initializer_range), and what projects into the residual stream /
    sqrt(2 L) (GPT-2, 2.3).
    """
    if weight.ndim == 1:
        weight.fill_(1.0)
    else:
        into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        std = config.initializer_range / ((2 * config.num_layers) ** 0.5 if into_residual else 1.0)
        weight.normal_(0.0, std, generator=generator)


class Linear(nn.Linear):
    """Without the initialisation on the meta device, which would import PyTorch's compiler: seven seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Embedding(nn.Embedding):
    """Without the initialisation on the meta device, as `Linear`."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Decoder(nn.Module):
    """Embedding, layers, final norm: everything but the head."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        ids_BT: torch.Tensor,
        *,
        cache: StaticCache | None = None,
        step: CacheStep | None = None,
        attention: AttentionFunction | None = None,
        positions_BT: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if step is not None:
            positions_BT = step.positions_RT
        elif positions_BT is None:
            positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        angles = rotary_angles(positions_BT, self.config)[:, None]
        rotary = (angles.cos(), angles.sin())  # [1 or B, 1, T, d] fp32
        x_BTD = _dropout(self.embed_tokens(ids_BT), self.config, training=self.training)
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotary, cache=cache, step=step, attention=attention)
        return self.norm(x_BTD)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        *,
        cache: StaticCache | None,
        step: CacheStep | None,
        attention: AttentionFunction | None,
    ) -> torch.Tensor:
        attended_BTD = self.self_attn(
            self.input_layernorm(x_BTD), rotary, cache=cache, step=step, attention=attention
        )
        x_BTD = x_BTD + _dropout(attended_BTD, self.config, training=self.training)
        fed_BTD = self.mlp(self.post_attention_layernorm(x_BTD))
        return x_BTD + _dropout(fed_BTD, self.config, training=self.training)


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys."""

    def __init__(self, config: TransformerConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.index = index
        query_size, key_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x_BTD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        *,
        cache: StaticCache | None,
        step: CacheStep | None,
        attention: AttentionFunction | None,
    ) -> torch.Tensor:
        v_BGTd = self._heads(self.v_proj(x_BTD))
        q_BHTd = rotate(self.q_norm(self._heads(self.q_proj(x_BTD))), rotary).to(v_BGTd.dtype)
        k_BGTd = rotate(self.k_norm(self._heads(self.k_proj(x_BTD))), rotary).to(v_BGTd.dtype)
        if cache is not None:
            assert step is not None
            cache.write(self.index, torch.cat((k_BGTd, v_BGTd), dim=1), step=step)
            out_BHTd = cached_attention(q_BHTd, cache, layer=self.index, step=step)
        elif attention is not None:
            out_BHTd = attention(q_BHTd, k_BGTd, v_BGTd)
        else:
            dropout = self.config.attention_dropout if self.training else 0.0
            out_BHTd = causal_attention(q_BHTd, k_BGTd, v_BGTd, dropout=dropout)
        return self.o_proj(out_BHTd.transpose(1, 2).flatten(2))

    def _heads(self, x_BTX: torch.Tensor) -> torch.Tensor:
        return x_BTX.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the mean of squares is taken in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Under autocast 16-bit heads meet fp32 weights, for which there is no fused kernel.
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, self.eps)


def rotary_angles(positions: torch.Tensor, config: TransformerConfig) -> torch.Tensor:
    """Angles [..., d] in fp32 for integer positions [...], both halves of d alike.

    Computed where they are needed, a few small operations a forward: `.bfloat16()` would round a buffer.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions[..., None].float() * (1.0 / config.rope_theta**exponents)
    return torch.cat((angles, angles), dim=-1)


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary positions in the rotate-half layout (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), in fp32."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _dropout(x: torch.Tensor, config: TransformerConfig, *, training: bool) -> torch.Tensor:
    return F.dropout(x, config.attention_dropout) if training and config.attention_dropout else x
