"""The transformer's CPU form, whose results for a row do not depend on the rows computed beside it.

A float product rounds differently for one row and for eight. Here every product is one of integers, whose
sums are exact in any order: weights are int8 with a scale for each output channel, activations are two 8-bit
halves with a scale for each row (x = s * (128 * high + low), 15 bits), and both halves are rows of one
`torch._int_mm`, which reads a quarter of the bytes of fp32 weights. Everything else is done row by row:
attention over exactly the row's own keys, norms as reductions of one row, elementwise operations that round
alike wherever an element lies.

Shapes: M = B * T rows, K inputs, N outputs, D hidden_size, H query heads, G key-value heads, d head_dim.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache as memoise

import numpy as np
import torch
from torch.nn import functional as F

from emuworld.model.attention import cached_attention
from emuworld.model.cache import CacheStep, StaticCache
from emuworld.model.config import TransformerConfig
from emuworld.model.transformer import Transformer, rotary_angles

_LOW_RANGE = 128  # a power of two, so that multiplying by it never rounds
_INVERSE_LOW_RANGE = torch.tensor(1 / _LOW_RANGE)
_ACTIVATION_MAX = torch.tensor(127.0 * _LOW_RANGE)
_TINY = torch.tensor(1e-30)  # keeps the scale of a row of zeros finite
_WEIGHT_MAX = 127.0
_QUANTISED_AT_ONCE = 16 << 20  # elements: 64 MiB of fp32
_SERIAL_ELEMENTS = 32_768  # PyTorch's grain: elementwise operations on fewer elements run on one thread


def exact(
    model: "Transformer | ExactTransformer", *, on_layer: Callable[[int, int], None] | None = None
) -> "ExactTransformer":
    """The CPU form of a trained transformer, with the same `forward` and `logits`.

    `on_layer` is called with layers done and layers in all: a large model takes minutes.
    """
    return model if isinstance(model, ExactTransformer) else ExactTransformer(model, on_layer=on_layer)


class ExactTransformer:
    """Same interface as `Transformer`, inference on the CPU only; the model it is made of stays as it is.

    A few rows at a time are held in fp32: of weights that are mapped from files, memory gets the int8 form
    and the embedding as it is.
    """

    def __init__(self, model: Transformer, *, on_layer: Callable[[int, int], None] | None = None) -> None:
        with torch.inference_mode():
            weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
            self.config = model.config
            self.embedding_VD = model.model.embed_tokens.weight.detach().to("cpu", copy=True)
            self.norm = ExactNorm(weights["model.norm.weight"], eps=model.config.rms_norm_eps)
            self.layers: list[ExactLayer] = []
            for index in range(model.config.num_layers):
                self.layers.append(ExactLayer(weights, f"model.layers.{index}.", model.config))
                if on_layer:
                    on_layer(index + 1, model.config.num_layers)
            self.head = ExactLinear(weights["lm_head.weight"])
            self._cos_Pd, self._sin_Pd = _signed_rotary_tables(0, model.config)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type of hidden states and of the cache."""
        return torch.float32

    def __call__(
        self,
        ids_BT: torch.Tensor,
        *,
        cache: StaticCache | None = None,
        advance_B: Sequence[bool] | np.ndarray | None = None,
        causal: bool = True,
    ) -> torch.Tensor:
        return self.forward(ids_BT, cache=cache, advance_B=advance_B, causal=causal)

    @torch.inference_mode()
    def forward(
        self,
        ids_BT: torch.Tensor,
        *,
        cache: StaticCache | None = None,
        advance_B: Sequence[bool] | np.ndarray | None = None,
        causal: bool = True,
    ) -> torch.Tensor:
        """Hidden states [B, T, D] after the final norm; see `Transformer.forward`."""
        num_rows, num_tokens = ids_BT.shape
        if cache is None:
            cache = StaticCache(self.config, num_rows=num_rows, capacity=num_tokens)
        if num_rows != cache.num_rows:
            raise ValueError(f"ids has {num_rows} rows, the cache {cache.num_rows}; expected one for each")
        step = cache.begin(num_tokens, causal=causal)
        self._reserve_positions(cache.capacity)
        positions_M = step.positions_RT.flatten()
        rotary = (self._cos_Pd[positions_M][:, None], self._sin_Pd[positions_M][:, None])
        x_MD = F.embedding(ids_BT.flatten(), self.embedding_VD).float()  # kept in the checkpoint's type
        for index, layer in enumerate(self.layers):
            layer(x_MD, rotary, cache=cache, step=step, index=index)
        cache.finish(step, advance_B=advance_B)
        return self.norm(x_MD).view(num_rows, num_tokens, -1)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """[..., D] -> [..., stop - start]: the scores of ids start to stop only."""
        scores_MN = self.head.part(hidden.reshape(-1, hidden.shape[-1]), start=start, stop=stop)
        return scores_MN.view(*hidden.shape[:-1], -1)

    def _reserve_positions(self, num_positions: int) -> None:
        if num_positions > len(self._cos_Pd):
            self._cos_Pd, self._sin_Pd = _signed_rotary_tables(num_positions, self.config)


class ExactLayer:
    """One layer with fused query-key-value and gate-up products; adds to the residual stream in place."""

    def __init__(self, weights: Mapping[str, torch.Tensor], prefix: str, config: TransformerConfig) -> None:
        def named(*names: str) -> list[torch.Tensor]:
            return [weights[f"{prefix}{name}.weight"] for name in names]

        self.config = config
        self.attention_norm = ExactNorm(*named("input_layernorm"), eps=config.rms_norm_eps)
        self.mlp_norm = ExactNorm(*named("post_attention_layernorm"), eps=config.rms_norm_eps)
        self.qkv = ExactLinear(*named("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
        self.out = ExactLinear(*named("self_attn.o_proj"))
        self.gate_up = ExactLinear(*named("mlp.gate_proj", "mlp.up_proj"))
        self.down = ExactLinear(*named("mlp.down_proj"))
        query_norm_d, key_norm_d = named("self_attn.q_norm", "self_attn.k_norm")
        heads = [query_norm_d] * config.num_heads + [key_norm_d] * config.num_kv_heads
        self.query_key_norm = ExactNorm(torch.stack(heads), eps=config.rms_norm_eps)

    def __call__(
        self,
        x_MD: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        *,
        cache: StaticCache,
        step: CacheStep,
        index: int,
    ) -> None:
        qkv_MX = self.qkv(self.attention_norm(x_MD))
        x_MD.add_(self.out(self._attend(qkv_MX, rotary, cache=cache, step=step, index=index)))
        x_MD.add_(self.down(_swiglu(self.gate_up(self.mlp_norm(x_MD)))))

    def _attend(
        self,
        qkv_MX: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        *,
        cache: StaticCache,
        step: CacheStep,
        index: int,
    ) -> torch.Tensor:
        """[M, (H + 2 G) d] -> [M, H d]."""
        num_heads, num_groups = self.config.num_heads, self.config.num_kv_heads
        head_dim = self.config.head_dim
        heads_MHd = qkv_MX.view(-1, num_heads + 2 * num_groups, head_dim)
        cos_M1d, sin_M1d = rotary
        turned = heads_MHd[:, : num_heads + num_groups]  # queries and keys
        normed_Mhd = self.query_key_norm(turned)
        swapped_Mhd = normed_Mhd.roll(head_dim // 2, -1)
        torch.add(normed_Mhd.mul_(cos_M1d), swapped_Mhd.mul_(sin_M1d), out=turned)
        rows_RTHd = heads_MHd.view(cache.num_rows, step.num_tokens, -1, head_dim)
        rows_RHTd = rows_RTHd.transpose(1, 2)
        cache.write(index, rows_RHTd[:, num_heads:], step=step)
        attended_RHTd = cached_attention(rows_RHTd[:, :num_heads], cache, layer=index, step=step)
        return attended_RHTd.transpose(1, 2).reshape(len(qkv_MX), -1)


class ExactNorm:
    """RMS norm over the last dimension in fewer operations than `F.rms_norm` has inside."""

    def __init__(self, weight: torch.Tensor, *, eps: float) -> None:
        size = weight.shape[-1]
        self.weight = weight.float() * size**0.5  # x / sqrt(sum / D + eps) = sqrt(D) x / sqrt(sum + D eps)
        self.eps = torch.tensor(size * eps)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return norm.square_().add_(self.eps).rsqrt_().mul(x).mul_(self.weight)


class ExactLinear:
    """x @ W.T for int8 weights with one scale for each output; several weights are laid side by side."""

    def __init__(self, *weights_NK: torch.Tensor) -> None:
        num_inputs, num_outputs = weights_NK[0].shape[1], sum(map(len, weights_NK))
        self.weight_KN = torch.empty(num_inputs, num_outputs, dtype=torch.int8)
        self.scale_N = torch.empty(num_outputs)
        start = 0
        for rows_NK in (rows for weight in weights_NK for rows in weight.split(_rows_at_once(num_inputs))):
            stop = start + len(rows_NK)
            quantised_NK, self.scale_N[start:stop] = _quantise_weight(rows_NK.float())
            self.weight_KN[:, start:stop] = quantised_NK.t()
            start = stop

    def __call__(self, x_MK: torch.Tensor) -> torch.Tensor:
        """[M, K] fp32 -> [M, N] fp32."""
        halves, inverse_M1 = _halves(x_MK)
        return _scaled(integer_product(halves, self.weight_KN), self.scale_N, inverse_M1)

    def part(self, x_MK: torch.Tensor, *, start: int, stop: int | None) -> torch.Tensor:
        """The outputs start to stop only."""
        halves, inverse_M1 = _halves(x_MK)
        sums = integer_product(halves, self.weight_KN[:, start:stop])
        return _scaled(sums, self.scale_N[start:stop], inverse_M1)


def _halves(x_MK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [2 M, K], the high halves above the low ones, and the inverse scale [M, 1] of every row.

    Constants are tensors here: a Python number costs another microsecond an operation, four times a layer.
    """
    inverse_M1 = _ACTIVATION_MAX / x_MK.abs().amax(-1, keepdim=True).add_(_TINY)
    scaled_MK = x_MK * inverse_M1
    high_MK = (scaled_MK * _INVERSE_LOW_RANGE).round_()
    low_MK = scaled_MK.sub_(high_MK, alpha=_LOW_RANGE).round_()
    return torch.cat((high_MK, low_MK)).to(torch.int8), inverse_M1


def _scaled(sums: torch.Tensor, scale_N: torch.Tensor, inverse_M1: torch.Tensor) -> torch.Tensor:
    """[2 M, N] integer sums of both halves -> [M, N] fp32."""
    high_MN, low_MN = sums.float().chunk(2)
    return low_MN.add_(high_MN, alpha=_LOW_RANGE).mul_(scale_N).div_(inverse_M1)


def integer_product(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """int8 @ int8 -> exact sums, int32 or float64."""
    if _int_mm_is_exact():
        return torch._int_mm(a_MK, b_KN)
    return a_MK.double() @ b_KN.double()  # exact as well, as every sum is below 2 ** 53


@memoise
def _int_mm_is_exact() -> bool:
    """Whether `torch._int_mm` sums in 32 bits here: kernels for x86 without VNNI may saturate at 16."""
    a_MK = torch.full((2, 512), 127, dtype=torch.int8)
    a_MK[1] = -128
    b_KN = torch.full((512, 32), 127, dtype=torch.int8)
    b_KN[:, ::2] = -127
    return torch.equal(torch._int_mm(a_MK, b_KN).double(), a_MK.double() @ b_KN.double())


def _swiglu(gate_up_MX: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up.

    `silu` rounds differently in a vector lane and in the remainder of a loop. Over a strided view every row
    is a loop of its own, as long as one thread does it: so in blocks of rows below PyTorch's grain.
    """
    gate_MI, up_MI = gate_up_MX.chunk(2, dim=-1)
    block = max(1, (_SERIAL_ELEMENTS - 1) // gate_MI.shape[1])
    if len(gate_MI) <= block:
        return F.silu(gate_MI).mul_(up_MI)
    return torch.cat([F.silu(rows) for rows in gate_MI.split(block)]).mul_(up_MI)


def _rows_at_once(num_inputs: int) -> int:
    return max(1, _QUANTISED_AT_ONCE // num_inputs)


def _quantise_weight(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [N, K], scale [N]: symmetric, nearest."""
    scale_N1 = weight_NK.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / _WEIGHT_MAX
    return (weight_NK / scale_N1).round_().to(torch.int8), scale_N1[:, 0]


def _signed_rotary_tables(num_positions: int, config: TransformerConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos [P, d] and sin [P, d], the first half of sin negated: x cos + swap_halves(x) sin is the rotation.

    Rounded from fp64, so that an entry does not depend on the size of the table (see `_swiglu`).
    """
    angles_Pd = rotary_angles(torch.arange(num_positions), config).double()
    cos_Pd, sin_Pd = angles_Pd.cos().float(), angles_Pd.sin().float()
    sin_Pd[:, : config.head_dim // 2].neg_()
    return cos_Pd, sin_Pd
