"""How the release generates, for comparison only: what `emuworld bench what=published-34b` measures against.

Written from the fact sheet (sections 1.4, 5.1 and 5.3): eager, the guided and the unguided pass one after the
other with batch 1, keys and values that grow by concatenation, fp32 logits and log-softmax of the whole
vocabulary for both, then mask, temperature, top-k and a draw that the host waits for. It computes with the
weights of one of our transformers and shares nothing else with it.

Shapes: T tokens, S keys, D hidden_size, H query heads, G key-value heads, d head_dim, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from emuworld.model.transformer import Layer, Linear, RMSNorm, Transformer

ATTENTIONS = ("sdpa", "eager")


@dataclass(kw_only=True)
class Branch:
    """What one of the two passes has read: keys and values [1, G, S, d] of each layer."""

    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.keys[0].shape[2] if self.keys else 0


class PublishedWay:
    """Draws visual tokens one by one.

    Args:
        model: whose weights are used.
        attention: "sdpa", PyTorch's fused attention, which stands in for the release's FlashAttention; or
            "eager", the release's other one: repeated heads, two products, softmax in fp32.
    """

    def __init__(self, model: Transformer, *, attention: str = "sdpa") -> None:
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        self._model = model
        self._eager = attention == "eager"
        self._repeats = model.config.num_heads // model.config.num_kv_heads

    @torch.inference_mode()
    def logits(self, ids_1T: torch.Tensor, branch: Branch) -> torch.Tensor:
        """Append the tokens to the branch; fp32 scores [1, V] behind the last one."""
        decoder = self._model.model
        start = branch.length
        positions_1T = torch.arange(start, start + ids_1T.shape[1], device=ids_1T.device)[None]
        x_1TD = decoder.embed_tokens(ids_1T)
        cos, sin = self._rotary(positions_1T, x_1TD.dtype)
        for index, layer in enumerate(decoder.layers):
            assert isinstance(layer, Layer)
            x_1TD = x_1TD + self._attention(
                _normed(x_1TD, layer.input_layernorm), index, layer, branch, cos, sin
            )
            mlp, h_1TD = layer.mlp, _normed(x_1TD, layer.post_attention_layernorm)
            x_1TD = x_1TD + mlp.down_proj(F.silu(mlp.gate_proj(h_1TD)) * mlp.up_proj(h_1TD))
        return self._model.lm_head(_normed(x_1TD, decoder.norm)[:, -1]).float()

    @torch.inference_mode()
    def draw(
        self, guided: Branch, unguided: Branch, token: int, *, visual: slice, guidance: float, top_k: int
    ) -> int:
        """Read `token` in both branches and draw the next visual token."""
        ids_11 = torch.tensor([[token]], device=self._model.device)
        c_1V = torch.log_softmax(self.logits(ids_11, guided), dim=-1)
        u_1V = torch.log_softmax(self.logits(ids_11, unguided), dim=-1)
        scores_1V = u_1V + guidance * (c_1V - u_1V)
        banned_1V = torch.ones_like(scores_1V, dtype=torch.bool)
        banned_1V[:, visual] = False
        scores_1V = scores_1V.masked_fill(banned_1V, float("-inf"))
        kept = scores_1V.topk(min(top_k, visual.stop - visual.start)).values[:, -1:]
        p_1V = torch.softmax(scores_1V.masked_fill(scores_1V < kept, float("-inf")), dim=-1)
        return int(torch.multinomial(p_1V, 1).item())

    def _attention(
        self,
        x_1TD: torch.Tensor,
        index: int,
        layer: Layer,
        branch: Branch,
        cos: torch.Tensor,
        sin: torch.Tensor,
    ) -> torch.Tensor:
        own = layer.self_attn
        q_1HTd = _rotated(_normed(self._heads(own.q_proj, x_1TD), own.q_norm), cos, sin)
        k_1GSd = _rotated(_normed(self._heads(own.k_proj, x_1TD), own.k_norm), cos, sin)
        v_1GSd = self._heads(own.v_proj, x_1TD)
        if len(branch.keys) > index:
            k_1GSd = torch.cat((branch.keys[index], k_1GSd), dim=2)
            v_1GSd = torch.cat((branch.values[index], v_1GSd), dim=2)
            branch.keys[index], branch.values[index] = k_1GSd, v_1GSd
        else:
            branch.keys.append(k_1GSd)
            branch.values.append(v_1GSd)
        if self._eager:
            out_1HTd = self._eager_attention(q_1HTd, k_1GSd, v_1GSd)
        else:
            causal = q_1HTd.shape[2] > 1  # only ever at the start, where T = S
            out_1HTd = F.scaled_dot_product_attention(
                q_1HTd, k_1GSd, v_1GSd, is_causal=causal, enable_gqa=True
            )
        return own.o_proj(out_1HTd.transpose(1, 2).flatten(2))

    def _eager_attention(
        self, q_1HTd: torch.Tensor, k_1GSd: torch.Tensor, v_1GSd: torch.Tensor
    ) -> torch.Tensor:
        k_1HSd, v_1HSd = (
            kv_1GSd[:, :, None].expand(-1, -1, self._repeats, -1, -1).flatten(1, 2)
            for kv_1GSd in (k_1GSd, v_1GSd)
        )
        scores_1HTS = q_1HTd @ k_1HSd.transpose(2, 3) * self._model.config.head_dim**-0.5
        num_tokens, num_keys = scores_1HTS.shape[2:]
        if num_tokens > 1:
            hidden_TS = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=q_1HTd.device)
            scores_1HTS = scores_1HTS.masked_fill(hidden_TS.triu(num_keys - num_tokens + 1), float("-inf"))
        return torch.softmax(scores_1HTS, dim=-1, dtype=torch.float32).to(q_1HTd.dtype) @ v_1HSd

    def _heads(self, projection: Linear, x_1TD: torch.Tensor) -> torch.Tensor:
        return projection(x_1TD).unflatten(-1, (-1, self._model.config.head_dim)).transpose(1, 2)

    def _rotary(self, positions_1T: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [1, 1, T, d], in the type of the model, as the release has them."""
        head_dim = self._model.config.head_dim
        exponents = torch.arange(0, head_dim, 2, device=positions_1T.device).float() / head_dim
        angles = positions_1T[..., None].float() / self._model.config.rope_theta**exponents
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def _normed(x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
    """RMS norm as the release computes it: one small operation after the other, in fp32."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + norm.eps)
    return norm.weight * x32.to(x.dtype)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
