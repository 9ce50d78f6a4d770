"""One transformer's training over several processes, applied from outside: tensor parallel, FSDP2, recomputed
layers.

Weights become DTensors: the state dict keeps its names and the model its mathematics, and gradients and
optimiser states are sharded like the weights. The cut is that of `emuworld.parallel`.

Shapes: B batch, T tokens, D hidden size, V ids of all processes, v those of this one.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

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
from torch.utils.checkpoint import checkpoint

from emuworld.model.transformer import Transformer
from emuworld.parallel import check_divides

# Two small collectives where one would do are no news.
logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)


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
