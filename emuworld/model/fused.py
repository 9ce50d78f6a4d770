"""The transformer's CUDA form: what a decoding step costs is reading the weights once, and little else.

Projections that read the same input are one product (query-key-value, gate-up), what lies between products
runs as a few Triton kernels, and a step of few tokens a row is replayed as a CUDA graph. Guided and unguided
rows are rows of one call. Weights are not copied: the `Transformer` it is made of becomes a set of views of
the fused ones and computes as before; with 8-bit weights (`emuworld.model.fp8`) its layers lose their
matrices.

It runs on the CPU too, in plain PyTorch and without graphs, which is how it is tested; for inference there,
`emuworld.model.exact` is the form that keeps its promises.

Shapes: R rows, T tokens, M = R T, D hidden_size, H query heads, G key-value heads, d head_dim, P positions.
"""

import contextlib
import copy
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn import functional as F

from emuworld.model import int8_cache, operations
from emuworld.model.attention import cached_attention
from emuworld.model.cache import CacheStep, Memory, StaticCache
from emuworld.model.fp8 import MOST_WIDE_ROWS, linear, linear_of_rounded, quantise_head, scores
from emuworld.model.fp8_numbers import Fp8Weight, Rounded, TwoParts, Weight
from emuworld.model.fused_layer import FusedLayer, join_as_they_are, join_in_8_bits, placed, rotary_tables
from emuworld.model.graphs import StepGraphs
from emuworld.model.operations import Place
from emuworld.model.transformer import Layer, Transformer

if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    from emuworld.model import few_rows, fp8_activations, fp8_kernels, fp8_norms, kernels, launches
else:
    few_rows = fp8_activations = fp8_kernels = fp8_norms = None  # type: ignore[assignment]
    kernels = launches = None  # type: ignore[assignment]

# Of a key-value head; above it a step is prefill, with PyTorch's own attention where all rows are equally
# long. A window of 16 of the 34 B.
_MOST_QUERIES = 128
# Of all rows together, up to which a pass over pictures is launches more than arithmetic: seven of 256 px.
_MOST_RECORDED_TOKENS = 2048
# Multiplications of any other pass that a GPU does in less than twice the time that its launches take the
# host: the built-in model's of 256 worlds.
_MOST_RECORDED_PRODUCTS = 4e12
WEIGHTS = ("bf16", "fp8")
CACHES = ("bf16", "int8")
_KEY_STEP = 512  # without the kernels, attention reads the cache up to a multiple of this: one graph for each
Reduce = Callable[[torch.Tensor], torch.Tensor]
Activations = torch.Tensor | TwoParts | Rounded
"""[M, K]."""
Attend = Callable[[torch.Tensor, int], torch.Tensor]
"""Queries [M, H, d] and the layer's index -> [M, H d]."""


def fused(model: "Transformer | FusedTransformer") -> "FusedTransformer":
    """The CUDA form of a transformer, with the same `forward` and `logits`; takes over its weights."""
    return model if isinstance(model, FusedTransformer) else FusedTransformer(model)


class FusedTransformer:
    """Same interface as `Transformer`, inference only.

    Args:
        model: its weights are fused in place, layer by layer: one layer's are there twice for a moment.
        weights: "bf16", as they are; "fp8", the layers' matrices in 8 bits.
        head: of the head the same. Default: as `weights`; "bf16" for one that is not used.
        device: where 8-bit weights go, layer by layer, so that a model larger than the device in 16 bits can
            be on the host (its other weights become bf16 on CUDA). Default: the model's.
        use_kernels: Triton kernels, else plain PyTorch. Default: on CUDA where Triton is installed.
        use_graphs: replay steps of few tokens as CUDA graphs. Default: on CUDA.
        reduce: sums what a layer's two last products give over the processes that share the layer, where
            several do; may work in place. A step's graph records it, so it must have worked once before, and
            all processes must make the same calls: they record and replay together.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        weights: str = "bf16",
        head: str | None = None,
        device: torch.device | None = None,
        use_kernels: bool | None = None,
        use_graphs: bool | None = None,
        on_layer: Callable[[int, int], None] | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        head = head or weights
        for name, kind in (("weights", weights), ("head", head)):
            if kind not in WEIGHTS:
                raise ValueError(f"{name} must be {' or '.join(map(repr, WEIGHTS))}, got {kind!r}")
        self.config = model.config
        self.weights = weights
        self.cache = "bf16"
        self._reduce = reduce
        self._own_products = self._programmatic_launches = True
        device = model.device if device is None or weights == "bf16" else device
        with torch.no_grad():
            decoder = model.model
            self.embedding_VD = placed(decoder.embed_tokens.weight, device)
            tied = model.lm_head.weight is decoder.embed_tokens.weight
            head_VD = self.embedding_VD if tied else placed(model.lm_head.weight, device)
            self.head_VD: Weight = head_VD if head == "bf16" else quantise_head(head_VD)
            self.norm_D = placed(decoder.norm.weight, device)
            join = join_as_they_are if weights == "bf16" else partial(join_in_8_bits, device=device)
            self.layers: list[FusedLayer] = []
            for layer in decoder.layers:
                assert isinstance(layer, Layer)
                self.layers.append(FusedLayer.take(layer, join=join, device=device))
                if on_layer:
                    on_layer(len(self.layers), model.config.num_layers)
            self.rotary = rotary_tables(model.config, device=device)
        self._num_weights = sum(layer.num_weights for layer in self.layers)
        self._choose(use_kernels=use_kernels, use_graphs=use_graphs)

    def variant(
        self,
        *,
        cache: str | None = None,
        use_kernels: bool | None = None,
        use_graphs: bool | None = None,
        reduce: Reduce | None = None,
        own_products: bool = True,
        programmatic_launches: bool = True,
    ) -> "FusedTransformer":
        """The same weights, computed otherwise; defaults as for a new one, `cache` and `reduce` as here.

        `cache` is what keys and values are kept in: "bf16", as hidden states are, or "int8" (`int8_cache`).
        With `own_products` products of few rows are kernels of ours, where there are kernels: in 16 bits
        where they are known to be faster than the library's (`few_rows.pays`), in 8 bits by activations in
        8-bit parts (`fp8_kernels.linear_in_parts`, `linear_of_parts`). With `programmatic_launches` kernels
        may come before what they follow has ended, where the GPU can (`launches`); results are the same.
        """
        other = copy.copy(self)
        other._own_products = own_products
        other._programmatic_launches = programmatic_launches
        other._reduce = reduce or self._reduce
        other.cache = cache or self.cache
        other._choose(use_kernels=use_kernels, use_graphs=use_graphs)
        return other

    def _choose(self, *, use_kernels: bool | None, use_graphs: bool | None) -> None:
        on_cuda, head_dim = self.device.type == "cuda", self.config.head_dim
        can = on_cuda and kernels is not None and kernels.supports(head_dim=head_dim)
        if use_kernels and not can:
            raise ValueError(
                f"the kernels need CUDA, Triton and heads of 16 to 256, a power of two, got {head_dim} on "
                f"{self.device}; leave use_kernels out"
            )
        self.operations: ModuleType = kernels if can and use_kernels is not False else operations
        if self.uses_kernels and self.cache == "int8" and head_dim < 32:
            raise ValueError(f"cache='int8' needs heads of 32 or more, got {head_dim}; leave cache out")
        self.use_graphs = on_cuda if use_graphs is None else use_graphs
        self._graphs: WeakKeyDictionary[Memory, StepGraphs] = WeakKeyDictionary()

    @property
    def device(self) -> torch.device:
        return self.embedding_VD.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of hidden states."""
        return self.embedding_VD.dtype

    @property
    def cache_dtype(self) -> torch.dtype:
        """The type that caches are to be made of; it computes with any."""
        return {"bf16": self.dtype, "int8": int8_cache.FORMAT}[self.cache]

    @property
    def uses_kernels(self) -> bool:
        return self.operations is not operations

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
            cache = StaticCache(
                self.config, num_rows=num_rows, capacity=num_tokens, device=self.device, dtype=self.dtype
            )
        if num_rows != cache.num_rows:
            raise ValueError(f"ids has {num_rows} rows, the cache {cache.num_rows}; expected one for each")
        step = cache.begin(num_tokens, causal=causal)
        # One small copy, from memory that the driver has read when it returns: nothing waits for the device.
        spots_2R = torch.from_numpy(np.stack((cache.indices, step.starts)).astype(np.int32))
        with torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext():
            queries = num_tokens * (self.config.num_heads // self.config.num_kv_heads)
            few = ids_BT.numel() <= _MOST_RECORDED_TOKENS
            short = queries <= _MOST_QUERIES if causal else self.uses_kernels and few
            # Rows that hold something need a mask, with which PyTorch's attention takes twice as long.
            masked = causal and num_rows > 1 and bool(step.starts[0])
            if short or (self.uses_kernels and (masked or not step.uniform)):
                with self._launching():
                    wide = not (short and few)
                    hidden_BTD = self._step(ids_BT, spots_2R, cache, step, last_B, wide=wide)
            else:
                hidden_BTD = self._prefill(ids_BT, spots_2R, cache, step, last_B)
        cache.finish(step, advance_B=advance_B)
        return operations.only(hidden_BTD, last_B) if hidden_BTD.shape[1] > 1 else hidden_BTD

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """[..., D] -> [..., stop - start]: the scores of ids start to stop only."""
        with self._launching():
            if isinstance(self.head_VD, Fp8Weight):
                stop = self.config.vocab_size if stop is None else stop
                return scores(hidden, self.head_VD, start=start, stop=stop, product=self.product)
            head_VD = self.head_VD[start:stop]
            return self.product(hidden, head_VD) if hidden.ndim == 2 else F.linear(hidden, head_VD)

    def _step(
        self,
        ids_RT: torch.Tensor,
        spots_2R: torch.Tensor,
        cache: StaticCache,
        step: CacheStep,
        last_R: torch.Tensor | None,
        *,
        wide: bool,
    ) -> torch.Tensor:
        """Rows of any lengths, with attention that reads them on the device; as a graph, unless it is `wide`
        and more arithmetic than launches."""
        layers_RKCd, causal = cache.memory.kv_RKCd, step.causal
        bucket = 0 if self.uses_kernels else min(-(-step.longest // _KEY_STEP) * _KEY_STEP, cache.capacity)

        def compute(
            ids_RT: torch.Tensor, spots_2R: torch.Tensor, last_R: torch.Tensor | None = None
        ) -> torch.Tensor:
            place = Place(spots_2R[0], spots_2R[1], bucket)
            return self._layers(
                ids_RT,
                place,
                layers_RKCd,
                attend=lambda q_MHd, layer: self.operations.attend(
                    q_MHd, layers_RKCd[layer], place=place, causal=causal
                ),
                last_R=last_R,
            )

        inputs = (ids_RT, spots_2R) if last_R is None else (ids_RT, spots_2R, last_R)
        light = not wide or ids_RT.numel() * self._num_weights <= _MOST_RECORDED_PRODUCTS
        if not (light and self.use_graphs):
            return compute(*map(self._moved, inputs))
        graphs = self._graphs.get(cache.memory)
        if graphs is None:
            graphs = self._graphs[cache.memory] = StepGraphs(self.device)
        key = (*ids_RT.shape, bucket, int(causal), len(inputs))
        return graphs.run(key, compute, *inputs, wide=wide)

    def _prefill(
        self,
        ids_RT: torch.Tensor,
        spots_2R: torch.Tensor,
        cache: StaticCache,
        step: CacheStep,
        last_R: torch.Tensor | None,
    ) -> torch.Tensor:
        def attend(q_MHd: torch.Tensor, layer: int) -> torch.Tensor:
            q_RHTd = q_MHd.unflatten(0, ids_RT.shape).transpose(1, 2)
            out_RHTd = cached_attention(q_RHTd, cache, layer=layer, step=step)
            return out_RHTd.transpose(1, 2).reshape(len(q_MHd), -1)

        rows_R, starts_R = self._moved(spots_2R)
        place = Place(rows_R, starts_R, step.longest)
        ids_RT = self._moved(ids_RT)
        return self._layers(ids_RT, place, cache.memory.kv_RKCd, attend=attend, last_R=last_R)

    def _layers(
        self,
        ids_RT: torch.Tensor,
        place: Place,
        layers_RKCd: Sequence[torch.Tensor],
        *,
        attend: Attend,
        last_R: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden states [R, T, D], or [R, 1, D] of these; writes keys and values where `place` says."""
        ops = self.operations
        x_MD = F.embedding(ids_RT.flatten(), self.embedding_VD)
        delta_MD: torch.Tensor | None = None
        for index, layer in enumerate(self.layers):
            h_MD = self._normed(x_MD, delta_MD, layer.attention_norm_D, before=layer.qkv_XD)
            q_MHd = ops.write_heads(
                self.product(h_MD, layer.qkv_XD),
                layers_RKCd[index],
                place=place,
                norms=layer.norms,
                rotary=self.rotary,
            )
            if last_R is not None and index == len(self.layers) - 1:  # nothing reads its other tokens
                x_MD, q_MHd = (
                    operations.only(t.unflatten(0, ids_RT.shape), last_R).flatten(0, 1) for t in (x_MD, q_MHd)
                )
                ends = Place(place.rows_R, (place.starts_R + last_R).int(), place.num_keys)
                attended_MX = ops.attend(q_MHd, layers_RKCd[index], place=ends)
            else:
                attended_MX = attend(q_MHd, index)
            delta_MD = self._summed(self.product(attended_MX, layer.out_DX))
            h_MD = self._normed(x_MD, delta_MD, layer.mlp_norm_D, before=layer.gate_up_XD)
            h_MI = self._gated_product(h_MD, layer.gate_up_XD, before=layer.down_DI)
            delta_MD = self._summed(self.product(h_MI, layer.down_DI))
        eps = self.config.rms_norm_eps
        return ops.add_rms_norm(x_MD, delta_MD, self.norm_D, eps=eps).unflatten(0, (len(ids_RT), -1))

    def product(self, x_MK: Activations, weight: Weight) -> torch.Tensor:
        """x @ weight.T, as a step takes it."""
        if isinstance(x_MK, Rounded):
            assert isinstance(weight, Fp8Weight)
            return linear_of_rounded(x_MK, weight, dtype=self.dtype)
        own = self._own_product(x_MK, weight)
        if own is not None:
            return own()
        assert isinstance(x_MK, torch.Tensor), "nothing but our kernel takes parts"
        return linear(x_MK, weight)

    def _normed(
        self, x_MD: torch.Tensor, delta_MD: torch.Tensor | None, weight_D: torch.Tensor, *, before: Weight
    ) -> Activations:
        """`operations.add_rms_norm` as the product with `before` takes it."""
        eps, few = self.config.rms_norm_eps, self._takes_own and len(x_MD) <= few_rows.MOST_ROWS
        if self._rounds(len(x_MD), before):
            return fp8_activations.add_rms_norm(x_MD, delta_MD, weight_D, eps=eps)
        if few and isinstance(before, Fp8Weight):
            return fp8_norms.add_rms_norm_in_parts(x_MD, delta_MD, weight_D, eps=eps)
        return self.operations.add_rms_norm(x_MD, delta_MD, weight_D, eps=eps)

    def _rounds(self, num_rows: int, weight: Weight) -> bool:
        """Whether so many activations are brought to 8 bits where they are made."""
        is_taken = self.uses_kernels and isinstance(weight, Fp8Weight) and num_rows > MOST_WIDE_ROWS
        return is_taken and fp8_activations.supports(size=weight.shape[1])

    def _gated_product(self, x_MK: Activations, weight: Weight, *, before: Weight) -> Activations:
        """silu(gate) * up of x @ weight.T, in one launch where our kernel can, as `before` takes it."""
        own = self._own_product(x_MK, weight)
        if own is not None and self._gates(x_MK, weight):
            return own(gated=True)
        gate_up_MX = self.product(x_MK, weight)
        if self._rounds(len(gate_up_MX), before):
            return fp8_activations.swiglu(gate_up_MX)
        return self.operations.swiglu(gate_up_MX)

    def _gates(self, x_MK: Activations, weight: Weight) -> bool:
        if isinstance(weight, Fp8Weight):
            return few_rows.gates(weight.values_NK)
        assert isinstance(x_MK, torch.Tensor)
        return few_rows.gates(weight, num_rows=len(x_MK))

    def _own_product(self, x_MK: Activations, weight: Weight) -> Callable[..., torch.Tensor] | None:
        """Our kernel with its arguments, where a step takes it."""
        if isinstance(x_MK, TwoParts):
            assert isinstance(weight, Fp8Weight)
            return partial(fp8_kernels.linear_of_parts, x_MK, *weight, dtype=self.dtype)
        if not self._takes_own or isinstance(x_MK, Rounded):
            return None
        if isinstance(weight, Fp8Weight):
            is_taken = len(x_MK) <= few_rows.MOST_ROWS
            return partial(fp8_kernels.linear_in_parts, x_MK, *weight) if is_taken else None
        return partial(few_rows.linear, x_MK, weight) if few_rows.pays(weight, num_rows=len(x_MK)) else None

    @property
    def _takes_own(self) -> bool:
        """Whether products of few rows are kernels of ours."""
        return self._own_products and self.uses_kernels

    def _launching(self) -> contextlib.AbstractContextManager[None]:
        """How the kernels of a step follow each other."""
        is_early = self._programmatic_launches and self.uses_kernels and launches.supports(self.device)
        return launches.programmatic() if is_early else contextlib.nullcontext()

    def _summed(self, delta_MD: torch.Tensor) -> torch.Tensor:
        return delta_MD if self._reduce is None else self._reduce(delta_MD)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.device, non_blocking=True)
