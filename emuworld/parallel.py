"""Several processes for one transformer, applied from outside: tensor parallel, FSDP2, recomputed layers.

For training, `tensor_parallel` and `fully_sharded` turn the weights of a `Transformer` into DTensors; its
state dict keeps its names and its mathematics, and gradients and optimiser states are sharded like the
weights. For inference, `split` gives each process a narrower transformer of plain tensors, whose products are
summed over the processes: no DTensor stands between a decoding step and its kernels.

Layout (Shoeybi et al., Megatron-LM, arXiv 1909.08053): the projections into heads and into the feed-forward
are cut by outputs, those back into the residual stream by inputs, embedding and head by ids. Ids need not
divide: the last process has fewer rows.

Shapes: B batch, T tokens, D hidden size, V ids of all processes, v those of this one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from emuworld.model.cache import StaticCache
from emuworld.model.config import TransformerConfig
from emuworld.model.fused import FusedTransformer
from emuworld.model.transformer import Transformer

# Two small collectives where one would do are no news.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
_BY_OUTPUTS = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up"))
_BY_INPUTS = tuple(f"{name}_proj.weight" for name in ("o", "down"))


class _Alike(ParallelStyle):
    """A norm whose weight is the same everywhere: the input of every process is whole, or its own heads.

    Args:
        heads: dimension of the input that holds the heads, where each process has its own; the gradients of
            the weight are then summed over the processes.
    """

    def __init__(self, *, heads: int | None = None) -> None:
        self._layout = Replicate() if heads is None else Shard(heads)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def inputs(_module: nn.Module, given: Any, mesh: DeviceMesh) -> tuple[Tensor, ...]:
            return (DTensor.from_local(given[0], mesh, [self._layout], run_check=False),)

        def outputs(_module: nn.Module, given: Any, _mesh: DeviceMesh) -> Tensor:
            return given.to_local()

        # The stubs want hooks that return nothing; what these return is what the module gets and gives.
        return distribute_module(module, device_mesh, None, inputs, outputs)  # type: ignore[arg-type]


def tensor_parallel(model: Transformer, mesh: DeviceMesh) -> None:
    """Cut a transformer's weights among the processes of a one-dimensional mesh, in place, for training.

    All processes must hold equal weights. Every process then takes the same ids, gets the same hidden states
    [B, T, D], and the logits [..., v] of its own ids (`vocabulary_part`); `vocabulary_losses` compares them.
    """
    check_divides(model.config, mesh.size())
    layer = {
        "input_layernorm": _Alike(),
        "post_attention_layernorm": _Alike(),
        "self_attn.q_norm": _Alike(heads=1),
        "self_attn.k_norm": _Alike(heads=1),
        "self_attn.o_proj": RowwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    layer |= {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    layer |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan: dict[str, ParallelStyle] = {f"model.layers.*.{name}": style for name, style in layer.items()}
    plan["model.norm"] = _Alike()
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["lm_head"] = ColwiseParallel()
    parallelize_module(model, mesh, plan)
    model.tie_weights()


def fully_sharded(
    root: nn.Module, model: Transformer, mesh: DeviceMesh, *, param_dtype: torch.dtype | None = None
) -> None:
    """FSDP2 over a one-dimensional mesh: each process keeps its part of every weight in fp32, and gathers a
    layer when it is due, in `param_dtype` (None: as it is). Gradients are averaged in fp32.

    `root` is the module whose forward gives the loss: everything of the transformer must be used inside it.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=torch.float32 if param_dtype else None,
        cast_forward_inputs=False,
    )
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, mp_policy=policy)


def checkpoint_layers(model: Transformer) -> None:
    """Keep only each layer's input for the backward pass and compute the layer again there."""
    for layer in model.model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def whole_tensors(module: nn.Module, *, keep: bool, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state dict gathered on the CPU, tensor by tensor; every process must call it. Empty unless `keep`,
    which only the process that writes sets.
    """
    gathered = {}
    for name, tensor in module.state_dict().items():
        part = tensor if dtype is None else tensor.to(dtype)
        whole = part.full_tensor() if isinstance(part, DTensor) else part
        if keep:
            gathered[name] = whole.detach().cpu()
    return gathered


def vocabulary_part(num_ids: int, *, rank: int, world: int) -> tuple[int, int]:
    """First and last + 1 of the ids whose rows of the head a process holds, as DTensor cuts them."""
    rows = -(-num_ids // world)
    return min(num_ids, rank * rows), min(num_ids, (rank + 1) * rows)


def vocabulary_losses(logits: Tensor, targets: Tensor, *, mesh: DeviceMesh, num_ids: int) -> Tensor:
    """Cross-entropy in nats [N] of targets [N] under logits [N, v] that are cut by ids over the mesh."""
    start, _ = vocabulary_part(num_ids, rank=mesh.get_local_rank(), world=mesh.size())
    return _VocabularyLosses.apply(logits, targets, start, mesh.get_group())


class _VocabularyLosses(torch.autograd.Function):
    """Three small reductions instead of gathering the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits_Nv: Tensor, targets_N: Tensor, start: int, group: dist.ProcessGroup
    ) -> Tensor:
        scores_Nv = logits_Nv.float()
        highest_N = scores_Nv.amax(dim=-1)
        dist.all_reduce(highest_N, op=dist.ReduceOp.MAX, group=group)
        exponents_Nv = (scores_Nv - highest_N[:, None]).exp_()
        local_N = targets_N - start
        mine_N = (local_N >= 0) & (local_N < scores_Nv.shape[1])
        local_N = local_N.clamp(0, scores_Nv.shape[1] - 1)
        scored_N = (scores_Nv.gather(1, local_N[:, None])[:, 0] - highest_N) * mine_N
        sums_2N = torch.stack((exponents_Nv.sum(dim=-1), scored_N))
        dist.all_reduce(sums_2N, group=group)
        exponents_Nv /= sums_2N[0][:, None]
        ctx.save_for_backward(exponents_Nv, local_N, mine_N)
        ctx.dtype = logits_Nv.dtype
        return sums_2N[0].log() - sums_2N[1]

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        probabilities_Nv, local_N, mine_N = ctx.saved_tensors
        gradient_Nv = probabilities_Nv.clone()
        gradient_Nv.scatter_add_(1, local_N[:, None], -mine_N[:, None].to(gradient_Nv.dtype))
        return (gradient_Nv * grad_N[:, None]).to(ctx.dtype), None, None, None


_joined: list[dist.ProcessGroup] = []


def join() -> None:
    """Enter the group of the processes that torchrun started; models that are opened from now on are cut
    among them (`tensor_group`). Alone nothing changes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _joined:
        return
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Who follows waits for as long as the leader's user thinks.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timedelta(days=7))
    assert dist.group.WORLD is not None
    _joined.append(dist.group.WORLD)


def leave() -> None:
    """Wait for the others and leave the group: a process that just ends may take the others' last message
    along, or be ended by its own threads. Models that were opened in the group are of no use any more.
    """
    if _joined:
        dist.barrier(_joined.pop())
        dist.destroy_process_group()


def tensor_group() -> dist.ProcessGroup | None:
    """The processes that cut every model among themselves, where `join` was called in several."""
    return _joined[0] if _joined else None


class SplitTransformer:
    """One process's part of a transformer for inference; the interface of `Transformer`, with a cache.

    Every process must make the same calls with the same ids. Hidden states agree between processes to
    rounding; logits are equal to the bit, because each id's score comes from the one process that has its
    row, so that equal random numbers draw equal tokens everywhere. The embedding is whole in every process.

    Args:
        model: stays as it is; where it is mapped from its files, only this part of them is read.
        group: the processes among which it is cut.
        device, dtype: of this part.
    """

    def __init__(
        self, model: Transformer, *, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._group = group
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        check_divides(model.config, world)
        self._part = vocabulary_part(model.config.vocab_size, rank=rank, world=world)
        narrow = _narrow(model, rank=rank, world=world, device=device, dtype=dtype)
        self._fused = FusedTransformer(narrow, reduce=self._sum)
        self._head_vD = model.lm_head.weight.detach()[slice(*self._part)].to(device, dtype, copy=True)

    @property
    def config(self) -> TransformerConfig:
        """Of this part: its heads are those that a cache holds here."""
        return self._fused.config

    @property
    def device(self) -> torch.device:
        return self._fused.device

    @property
    def dtype(self) -> torch.dtype:
        return self._fused.dtype

    def __call__(
        self,
        ids_BT: Tensor,
        *,
        cache: StaticCache | None = None,
        advance_B: Sequence[bool] | np.ndarray | None = None,
        causal: bool = True,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm; see `Transformer.forward`."""
        return self._fused(ids_BT, cache=cache, advance_B=advance_B, causal=causal)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        """[..., D] -> [..., stop - start]: the scores of ids start to stop only."""
        stop = self.config.vocab_size if stop is None else stop
        first, last = max(start, self._part[0]), min(stop, self._part[1])
        scores = hidden.new_zeros((*hidden.shape[:-1], stop - start))
        if first < last:
            rows = slice(first - self._part[0], last - self._part[0])
            scores[..., first - start : last - start] = F.linear(hidden, self._head_vD[rows])
        return self._sum(scores)

    def _sum(self, parts: Tensor) -> Tensor:
        dist.all_reduce(parts, group=self._group)
        return parts


def _narrow(
    model: Transformer, *, rank: int, world: int, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """The transformer of one process's heads and feed-forward columns. Its head is not to be used."""
    config = replace(
        model.config,
        num_heads=model.config.num_heads // world,
        num_kv_heads=model.config.num_kv_heads // world,
        intermediate_size=model.config.intermediate_size // world,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        narrow = Transformer(config)
    parts = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if name.endswith(_BY_OUTPUTS):
            tensor = tensor.chunk(world, dim=0)[rank]
        elif name.endswith(_BY_INPUTS):
            tensor = tensor.chunk(world, dim=1)[rank]
        parts[name] = tensor.detach().to(device, dtype, copy=True).contiguous()
    narrow.load_state_dict(parts, strict=False, assign=True)
    narrow.tie_weights()
    return narrow.eval()


def check_divides(config: TransformerConfig, world: int) -> None:
    """ValueError where the heads or the feed-forward cannot be cut into `world` equal parts."""
    sizes = {
        "key-value heads": config.num_kv_heads,
        "heads": config.num_heads,
        "feed-forward columns": config.intermediate_size,
    }
    for name, size in sizes.items():
        if size % world:
            raise ValueError(
                f"a transformer of {size} {name} cannot be cut among {world} processes; use a number that "
                f"divides {config.num_kv_heads}"
            )
