"""The transformer's CPU form: what it gives for a token depends on the token and those before it alone.

A float product rounds differently for one row and for eight. Here every product is one of integers, whose
sums are exact in any order: weights are int8 with a scale for each output, activations are 15 bits and a sign
with a scale for each token. Everything else is computed token by token, attention over exactly the keys that
the token sees. So neither the rows beside a row nor the way in which its tokens are cut into calls changes a
bit. The layers are machine code (`exact_kernel`); this module lays out the weights and shares out the work.

Shapes: B rows of the cache, T new tokens of each, M = B * T, D hidden size, K inputs, N outputs, P positions,
d head_dim, L layers, F fields of a layer, X whatever is needed most, W worlds, N steps, V scores; weights in
the order of `ExactLinear`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from emuworld.model import exact_linear
from emuworld.model.cache import CacheStep, StaticCache
from emuworld.model.config import TransformerConfig
from emuworld.model.exact_linear import ExactLinear, address_of, do_parts, kernel
from emuworld.model.huge_pages import HugePages
from emuworld.model.operations import only
from emuworld.model.transformer import Transformer, rotary_angles
from emuworld.shares import one_thread


class Chooser(Protocol):
    """Machine code that draws the next ids from scores; see `ExactTransformer.draw_ahead`."""

    @property
    def function(self) -> int:
        """Address of a C function (argument, world, step), int64 each, which any thread may call."""

    def argument(self, scores_BV: np.ndarray, ids_WN: np.ndarray) -> int:
        """Its first argument. From the scores that are there when it is called, it puts the id that `world`
        draws at `step` into ids_WN[world, step + 1]. The argument is good while the chooser is there."""


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """What a run reads: ids [W, N], a step a column, and of each token in x the row of ids that has its id.

    With a chooser the run goes on with what that draws from the scores of `num_scores` ids from `start` on.
    """

    ids_WN: np.ndarray
    sources_M: np.ndarray
    num_steps: int = 1
    start: int = 0
    num_scores: int = 0
    chooser: Chooser | None = None


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
            self.embedding_VD = _readable(model.model.embed_tokens.weight.detach())
            self.layers: list[ExactLayer] = []
            pages = HugePages()  # in the order in which a token needs them
            for index in range(model.config.num_layers):
                self.layers.append(ExactLayer(weights, f"model.layers.{index}.", model.config, pages))
                if on_layer:
                    on_layer(index + 1, model.config.num_layers)
            self.norm = _norm_weight(weights["model.norm.weight"])
            self.head = ExactLinear(weights["lm_head.weight"], pages=pages)
            self._rotary_2Pd = _signed_rotary_tables(0, model.config)
        self._layers_LF = np.zeros((len(self.layers) + 1, kernel().FIELDS), np.int64)
        self._layers_LF[:-1, :-1] = [layer.addresses for layer in self.layers]
        self._layers_LF[-1, 0] = address_of(self.norm)
        sizes = np.array([model.config.hidden_size, model.config.head_dim])
        self._eps = (sizes * model.config.rms_norm_eps).astype(np.float32).view(np.int32).tolist()

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The type of keys and values in the cache; hidden states are fp32."""
        return torch.float16

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.dtype

    def __call__(
        self,
        ids_BT: torch.Tensor,
        *,
        cache: StaticCache | None = None,
        advance_B: Sequence[bool] | np.ndarray | None = None,
        causal: bool = True,
        last_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.forward(ids_BT, cache=cache, advance_B=advance_B, causal=causal, last_B=last_B)

    @torch.inference_mode()
    def forward(
        self,
        ids_BT: torch.Tensor,
        *,
        cache: StaticCache | None = None,
        advance_B: Sequence[bool] | np.ndarray | None = None,
        causal: bool = True,
        last_B: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states [B, T, D] after the final norm, or [B, 1, D]; see `Transformer.forward`."""
        num_rows, num_tokens = ids_BT.shape
        if cache is None:
            cache = StaticCache(self.config, num_rows=num_rows, capacity=num_tokens, dtype=self.dtype)
        if num_rows != cache.num_rows:
            raise ValueError(f"ids has {num_rows} rows, the cache {cache.num_rows}; expected one for each")
        step = cache.begin(num_tokens, causal=causal)
        ids_M1 = np.ascontiguousarray(ids_BT.numpy().reshape(-1, 1), dtype=np.int64)
        self._check(ids_M1)
        steps = _Steps(ids_WN=ids_M1, sources_M=np.arange(len(ids_M1)))
        hidden_MD = self._run(steps, places_M3=_places(cache, step, num_tokens), cache=cache)
        cache.finish(step, advance_B=advance_B, ids_RT=ids_BT.numpy() if causal else None)
        return only(hidden_MD.view(num_rows, num_tokens, -1), last_B)

    @torch.inference_mode()
    def draw_ahead(
        self,
        ids_WN: np.ndarray,
        sources_B: np.ndarray,
        *,
        cache: StaticCache,
        start: int,
        stop: int,
        chooser: Chooser,
    ) -> torch.Tensor:
        """Append a token to every row, draw the next ones from the scores of ids start to stop, and so on, in
        one call. Hidden states [B, D] behind the last token that was appended.

        Args:
            ids_WN: C-contiguous int64. The first column is given; the others are what the chooser draws. All
                but the last column are appended.
            sources_B: which row of ids each row of the cache reads, int64.
        """
        assert ids_WN.flags.c_contiguous and ids_WN.dtype == np.int64
        self._check(ids_WN[:, 0])
        num_steps = ids_WN.shape[1] - 1
        step = cache.begin(num_steps)
        steps = _Steps(
            ids_WN=ids_WN,
            sources_M=sources_B,
            num_steps=num_steps,
            start=start,
            num_scores=stop - start,
            chooser=chooser,
        )
        hidden_BD = self._run(steps, places_M3=_places(cache, step, 1), cache=cache)
        cache.finish(step, ids_RT=ids_WN[sources_B, :-1])
        return hidden_BD

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """[..., D] -> [..., stop - start]: the scores of ids start to stop only."""
        scores_MN = self.head.part(hidden.reshape(-1, hidden.shape[-1]), start=start, stop=stop)
        return scores_MN.view(*hidden.shape[:-1], -1)

    def _check(self, ids: np.ndarray) -> None:
        """The kernel looks up whatever it is given."""
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self.embedding_VD):
            raise ValueError(
                f"ids must lie in 0..{len(self.embedding_VD) - 1}, got {ids.min()} to {ids.max()}"
            )

    def _run(self, steps: _Steps, *, places_M3: np.ndarray, cache: StaticCache) -> torch.Tensor:
        """All layers over the tokens of each step; keys and values go into the cache. Hidden states [M, D] of
        the last step.

        Threads share every part of a layer, so that each weight is read by one of them; the results are the
        same for any number.
        """
        assert cache.dtype == self.dtype and cache.device.type == "cpu"
        config, layer, num_tokens = self.config, self.layers[0], len(places_M3)
        if cache.capacity > (num_positions := self._rotary_2Pd.shape[1]):
            self._rotary_2Pd = _signed_rotary_tables(max(cache.capacity, 2 * num_positions), config)
        layers_LF = self._layers_LF.copy()
        layers_LF[:-1, -1] = cache.memory.addresses_L
        num_parts = len(self.layers) * kernel().NUM_PARTS + 1
        *layers_LF[-1, 1:3], width, offset = self.head.span(steps.start, steps.start + steps.num_scores)
        wide_MX, choice = torch.empty(num_tokens, max(width, layer.most_outputs)), (0, 0, 0)
        if steps.chooser is not None:
            num_parts += 2
            scores_MV = wide_MX.numpy()[:, offset : offset + steps.num_scores]
            argument = steps.chooser.argument(scores_MV, steps.ids_WN)
            choice = (len(steps.ids_WN), steps.chooser.function, argument)
        y_MX = torch.empty(num_tokens, layer.down.num_outputs)
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        rows = (len(cache.memory.kv_RKCd[0]), cache.capacity)
        do_parts(
            (
                torch.empty(num_tokens, config.hidden_size),
                y_MX,
                wide_MX,
                torch.zeros(num_tokens, layer.most_inputs, dtype=torch.int16),
                torch.empty(num_tokens),
                torch.from_numpy(np.column_stack((places_M3, steps.sources_M))),
                self._rotary_2Pd,
                torch.from_numpy(layers_LF),
                torch.from_numpy(steps.ids_WN),
                self.embedding_VD,
            ),
            num_layers=len(self.layers),
            parts=(0, num_parts),
            sizes=(config.hidden_size, *heads, config.intermediate_size, *rows, width),
            eps=self._eps,
            most_threads=1 + num_tokens * layer.num_weights // exact_linear.WORTH_A_HELPER,
            num_steps=steps.num_steps,
            choice=choice,
        )
        return y_MX[:, : config.hidden_size]


class ExactLayer:
    """The weights of one layer, those of query, key and value side by side, and those of gate and up."""

    def __init__(
        self, weights: Mapping[str, torch.Tensor], prefix: str, config: TransformerConfig, pages: HugePages
    ) -> None:
        def named(*names: str) -> list[torch.Tensor]:
            return [weights[f"{prefix}{name}.weight"] for name in names]

        query_norm_d, key_norm_d = named("self_attn.q_norm", "self_attn.k_norm")
        heads = [query_norm_d] * config.num_heads + [key_norm_d] * config.num_kv_heads
        self.attention_norm = _norm_weight(*named("input_layernorm"))
        self.qkv = ExactLinear(
            *named("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), pages=pages
        )
        self.head_norm = _norm_weight(torch.stack(heads))
        self.out = ExactLinear(*named("self_attn.o_proj"), pages=pages)
        self.mlp_norm = _norm_weight(*named("post_attention_layernorm"))
        self.gate_up = ExactLinear(*named("mlp.gate_proj", "mlp.up_proj"), pages=pages)
        self.down = ExactLinear(*named("mlp.down_proj"), pages=pages)
        products = (self.qkv, self.out, self.gate_up, self.down)
        self.most_inputs = max(product.num_inputs for product in products)
        self.most_outputs = max(product.num_outputs for product in products)
        self.num_weights = sum(product.weights.numel() for product in products)

    @property
    def addresses(self) -> list[int]:
        """The first of `exact_kernel.FIELDS`."""
        attention = (self.attention_norm, *self.qkv.tensors, self.head_norm, *self.out.tensors)
        mlp = (self.mlp_norm, *self.gate_up.tensors, *self.down.tensors)
        return [address_of(tensor) for tensor in (*attention, *mlp)]


def _places(cache: StaticCache, step: CacheStep, num_tokens: int) -> np.ndarray:
    """Of each token, `num_tokens` a row, its row of the memory, its position and how many keys it sees, int64
    [M, 3]."""
    places_BT3 = np.empty((len(step.starts), num_tokens, 3), np.int64)
    places_BT3[..., 0] = cache.indices[:, None]
    places_BT3[..., 1] = step.starts[:, None] + np.arange(num_tokens)
    places_BT3[..., 2] = places_BT3[..., 1] + 1 if step.causal else step.starts[:, None] + num_tokens
    return places_BT3.reshape(-1, 3)


def _readable(embedding_VD: torch.Tensor) -> torch.Tensor:
    """As the kernel reads it: bfloat16 stays, everything else becomes fp32."""
    dtype = torch.bfloat16 if embedding_VD.dtype == torch.bfloat16 else torch.float32
    return embedding_VD.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


def _norm_weight(weight: torch.Tensor) -> torch.Tensor:
    """With the mean in it: x / sqrt(sum / D + eps) = sqrt(D) x / sqrt(sum + D eps)."""
    return (weight.float() * weight.shape[-1] ** 0.5).contiguous()


def _signed_rotary_tables(num_positions: int, config: TransformerConfig) -> torch.Tensor:
    """cos and sin, [2, P, d], the first half of sin negated: x cos + swap_halves(x) sin is the rotation.

    Rounded from fp64, so that an entry does not depend on the size of the table.
    """
    with one_thread(torch.device("cpu")):
        angles_Pd = rotary_angles(torch.arange(num_positions), config).double()
        cos_Pd, sin_Pd = angles_Pd.cos().float(), angles_Pd.sin().float()
        sin_Pd[:, : config.head_dim // 2].neg_()
        return torch.stack((cos_Pd, sin_Pd))
