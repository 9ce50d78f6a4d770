"""The transformer's CPU form: what it gives for a token depends on the token and those before it alone.

A float product rounds differently for one row and for eight. Here every product is one of integers, whose
sums are exact in any order: weights are int8 with a scale for each output, activations are 15 bits and a sign
with a scale for each token. Everything else is computed token by token, attention over exactly the keys that
the token sees. So neither the rows beside a row nor the way in which its tokens are cut into calls changes a
bit. The layers are machine code (`exact_kernel`); this module lays out the weights and shares out the work.

Shapes: B rows of the cache, T new tokens of each, M = B * T, D hidden size, K inputs, N outputs, P positions,
d head_dim, L layers, F fields of a layer, X whatever is needed most; weights in the order of `ExactLinear`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache as memoise
from types import ModuleType

import numpy as np
import torch
from torch.nn import functional as F

from emuworld.model import int8
from emuworld.model.cache import CacheStep, StaticCache
from emuworld.model.config import TransformerConfig
from emuworld.model.huge_pages import HugePages
from emuworld.model.threads import crew_of
from emuworld.model.transformer import Transformer, rotary_angles

_QUANTISED_AT_ONCE = 16 << 20  # elements: 64 MiB of fp32
_WORTH_A_HELPER = 1 << 20  # products of a layer or a matrix, some 50 us


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
            self.layers: list[ExactLayer] = []
            pages = HugePages()  # in the order in which a token needs them
            for index in range(model.config.num_layers):
                self.layers.append(ExactLayer(weights, f"model.layers.{index}.", model.config, pages))
                if on_layer:
                    on_layer(index + 1, model.config.num_layers)
            self.norm = _norm_weight(weights["model.norm.weight"])
            self.head = ExactLinear(weights["lm_head.weight"], pages=pages)
            self._rotary_2Pd = _signed_rotary_tables(0, model.config)
        self._layers_LF = np.zeros((len(self.layers) + 1, _kernel().FIELDS), np.int64)
        self._layers_LF[:-1, :-1] = [layer.addresses for layer in self.layers]
        self._layers_LF[-1, 0] = _address(self.norm)
        sizes = np.array([model.config.hidden_size, model.config.head_dim])
        self._eps = (sizes * model.config.rms_norm_eps).astype(np.float32).view(np.int32).tolist()

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
        if cache.capacity > self._rotary_2Pd.shape[1]:
            self._rotary_2Pd = _signed_rotary_tables(cache.capacity, self.config)
        x_MD = F.embedding(ids_BT.flatten(), self.embedding_VD).float()  # kept in the checkpoint's type
        hidden_MD = self._run(x_MD, cache=cache, step=step)
        cache.finish(step, advance_B=advance_B, ids_RT=ids_BT.numpy() if causal else None)
        return hidden_MD.view(num_rows, num_tokens, -1)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """[..., D] -> [..., stop - start]: the scores of ids start to stop only."""
        scores_MN = self.head.part(hidden.reshape(-1, hidden.shape[-1]), start=start, stop=stop)
        return scores_MN.view(*hidden.shape[:-1], -1)

    def _run(self, x_MD: torch.Tensor, *, cache: StaticCache, step: CacheStep) -> torch.Tensor:
        """All layers over the embedded tokens; keys and values go into the cache. Hidden states [M, D].

        Threads share every part of a layer, so that each weight is read by one of them; the results are the
        same for any number.
        """
        assert cache.dtype == torch.float32 and cache.device.type == "cpu"
        config, layer, num_tokens = self.config, self.layers[0], len(x_MD)
        layers_LF = self._layers_LF.copy()
        layers_LF[:-1, -1] = cache.memory.addresses_L
        y_MX = torch.zeros(num_tokens, layer.down.num_outputs)
        wide_MX = torch.empty(num_tokens, layer.most_outputs)
        integers_MX = torch.zeros(num_tokens, layer.most_inputs, dtype=torch.int16)
        places_M3, table_LF = torch.from_numpy(_places(cache, step)), torch.from_numpy(layers_LF)
        heads = (config.num_heads, config.num_kv_heads, config.head_dim)
        rows = (len(cache.memory.kv_RKCd[0]), cache.capacity)
        _do(
            (
                x_MD,
                y_MX,
                wide_MX,
                integers_MX,
                torch.empty(num_tokens),
                places_M3,
                self._rotary_2Pd,
                table_LF,
            ),
            parts=(0, len(self.layers) * _kernel().NUM_PARTS + 1),
            sizes=(config.hidden_size, *heads, config.intermediate_size, *rows),
            eps=self._eps,
            most_threads=1 + num_tokens * layer.num_weights // _WORTH_A_HELPER,
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
        return [_address(tensor) for tensor in (*attention, *mlp)]


class ExactLinear:
    """x @ W.T for int8 weights with one scale for each output; several weights are laid side by side.

    Weights lie in the order in which the kernel reads them: blocks of outputs (as many as a vector has
    lanes), in a block pairs of inputs, of a pair the outputs. The last block is filled up with zeros, and so
    are the inputs, to a multiple of twice the lanes.
    """

    def __init__(self, *weights_NK: torch.Tensor, pages: HugePages | None = None) -> None:
        self._lanes: int = _kernel().LANES
        num_inputs, width = weights_NK[0].shape[1], 2 * self._lanes
        self._num_rows = sum(map(len, weights_NK))
        self.num_outputs = _round_up(self._num_rows, self._lanes)
        self.num_inputs = _round_up(num_inputs, width)
        self.scale_N = torch.zeros(self.num_outputs)
        weight_NK = torch.zeros(self.num_outputs, self.num_inputs, dtype=torch.int8)
        start = 0
        for rows_NK in (rows for weight in weights_NK for rows in weight.split(_rows_at_once(num_inputs))):
            stop = start + len(rows_NK)
            weight_NK[start:stop, :num_inputs], scale_N1 = int8.quantised(rows_NK)
            self.scale_N[start:stop] = scale_N1[:, 0]
            start = stop
        blocks = weight_NK.view(-1, self._lanes, self.num_inputs // 2, 2)
        memory = (HugePages() if pages is None else pages).take(weight_NK.numel())
        self.weights = memory.view(blocks.transpose(1, 2).shape).copy_(blocks.transpose(1, 2))

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights, self.scale_N

    def __call__(self, x_MK: torch.Tensor) -> torch.Tensor:
        """[M, K] fp32 -> [M, N] fp32."""
        return self.part(x_MK, start=0, stop=None)

    def part(self, x_MK: torch.Tensor, *, start: int, stop: int | None) -> torch.Tensor:
        """The outputs start to stop only."""
        start, stop, _ = slice(start, stop).indices(self._num_rows)
        first, last = start // self._lanes, -(-stop // self._lanes)
        x_MK, num_tokens, width = x_MK.contiguous(), len(x_MK), (last - first) * self._lanes
        block_bytes = self._lanes * self.num_inputs
        fields = np.zeros((1, _kernel().FIELDS), np.int64)
        fields[0, 4] = _address(self.weights) + first * block_bytes
        fields[0, 5] = _address(self.scale_N) + 4 * first * self._lanes
        layers_LF = torch.from_numpy(fields)
        out_MN, unit_M = torch.empty(num_tokens, width), torch.empty(num_tokens)
        integers_MX = torch.zeros(num_tokens, self.num_inputs, dtype=torch.int16)
        _do(
            (x_MK, out_MN, x_MK, integers_MX, unit_M, layers_LF, layers_LF, layers_LF),
            parts=_kernel().PRODUCT,
            sizes=(width, 1, 1, x_MK.shape[1], 0, 0, 0),
            most_threads=1 + num_tokens * width * self.num_inputs // _WORTH_A_HELPER,
        )
        return out_MN[:, start - first * self._lanes : stop - first * self._lanes].contiguous()


def _do(
    arrays: Sequence[torch.Tensor],
    *,
    parts: tuple[int, int],
    sizes: Sequence[int],
    eps: Sequence[int] = (0, 0),
    most_threads: int,
) -> None:
    """What `exact_kernel.run` does; `arrays` in the order of its JOB, which holds their addresses."""
    _, y_MX, wide_MX, integers_MX, unit_M, _, rotary_2Pd, _ = arrays
    widths = [array.shape[1] for array in (y_MX, wide_MX, integers_MX, rotary_2Pd)]
    addresses = [array.data_ptr() for array in arrays]
    num_threads = min(torch.get_num_threads(), most_threads)
    job = (0, num_threads, len(unit_M), *addresses, *widths, *parts, *sizes, *eps)
    crew_of(_kernel().run).do(np.array(job))


@memoise
def _kernel() -> ModuleType:
    """Imported when it is first needed: it takes a second, and some more where nothing is compiled yet."""
    from emuworld.model import exact_kernel

    return exact_kernel


def _places(cache: StaticCache, step: CacheStep) -> np.ndarray:
    """Of each new token its row of the memory, its position and how many keys it sees, int64 [M, 3]."""
    places_BT3 = np.empty((len(step.starts), step.num_tokens, 3), np.int64)
    places_BT3[..., 0] = cache.indices[:, None]
    places_BT3[..., 1] = step.starts[:, None] + np.arange(step.num_tokens)
    places_BT3[..., 2] = places_BT3[..., 1] + 1 if step.causal else step.starts[:, None] + step.num_tokens
    return places_BT3.reshape(-1, 3)


def _address(tensor: torch.Tensor) -> int:
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    assert tensor.dtype in (torch.float32, torch.int8)
    return tensor.data_ptr()


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _norm_weight(weight: torch.Tensor) -> torch.Tensor:
    """With the mean in it: x / sqrt(sum / D + eps) = sqrt(D) x / sqrt(sum + D eps)."""
    return (weight.float() * weight.shape[-1] ** 0.5).contiguous()


def _rows_at_once(num_inputs: int) -> int:
    return max(1, _QUANTISED_AT_ONCE // num_inputs)


def _signed_rotary_tables(num_positions: int, config: TransformerConfig) -> torch.Tensor:
    """cos and sin, [2, P, d], the first half of sin negated: x cos + swap_halves(x) sin is the rotation.

    Rounded from fp64, so that an entry does not depend on the size of the table.
    """
    angles_Pd = rotary_angles(torch.arange(num_positions), config).double()
    cos_Pd, sin_Pd = angles_Pd.cos().float(), angles_Pd.sin().float()
    sin_Pd[:, : config.head_dim // 2].neg_()
    return torch.stack((cos_Pd, sin_Pd))
