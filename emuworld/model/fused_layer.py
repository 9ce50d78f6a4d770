"""The weights of the CUDA form: those that read the same input in one tensor, on the device, in 16 bits or 8.

Shapes: D hidden_size, I intermediate_size, d head_dim, P positions, X all heads of queries, keys and values.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from emuworld.model.config import TransformerConfig
from emuworld.model.fp8 import quantise
from emuworld.model.fp8_numbers import FORMAT, Fp8Weight, Weight
from emuworld.model.operations import Norms, Rotary
from emuworld.model.transformer import Layer, Linear, rotary_angles


@dataclass(frozen=True, kw_only=True, eq=False)
class FusedLayer:
    """One layer's weights, those with a common input in one tensor."""

    attention_norm_D: torch.Tensor
    qkv_XD: Weight
    norms: Norms
    out_DX: Weight
    mlp_norm_D: torch.Tensor
    gate_up_XD: Weight
    down_DI: Weight

    @classmethod
    def take(cls, layer: Layer, *, join: Callable[..., Weight], device: torch.device) -> "FusedLayer":
        """The layer's weights; `join` makes one matrix of those that read the same."""
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            attention_norm_D=placed(layer.input_layernorm.weight, device),
            qkv_XD=join(attention.q_proj, attention.k_proj, attention.v_proj),
            norms=Norms(
                placed(attention.q_norm.weight, device),
                placed(attention.k_norm.weight, device),
                attention.q_norm.eps,
            ),
            out_DX=join(attention.o_proj),
            mlp_norm_D=placed(layer.post_attention_layernorm.weight, device),
            gate_up_XD=join(mlp.gate_proj, mlp.up_proj),
            down_DI=join(mlp.down_proj),
        )

    @property
    def num_weights(self) -> int:
        """Of its matrices."""
        return sum(math.prod(w.shape) for w in (self.qkv_XD, self.out_DX, self.gate_up_XD, self.down_DI))


def placed(weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """As it is where it is there already; brought to a GPU it becomes bf16."""
    weight = weight.detach()
    return weight if weight.device == device else weight.to(device, torch.bfloat16)


def join_in_8_bits(*projections: Linear, device: torch.device) -> Fp8Weight:
    """One weight for all; the projections are left without."""
    parts = []
    for projection in projections:
        parts.append(quantise(projection.weight.detach().to(device)))
        projection.weight = nn.Parameter(projection.weight.new_empty(0), requires_grad=False)
    values = torch.cat([part.values_NK.view(torch.uint8) for part in parts]).view(FORMAT)
    return Fp8Weight(values, torch.cat([part.scales_N for part in parts]))


def join_as_they_are(*projections: Linear) -> torch.Tensor:
    """One weight for all; each projection's own becomes a view of it."""
    if len(projections) == 1:
        return projections[0].weight.detach()
    joined = torch.cat([projection.weight.detach() for projection in projections])
    stop = 0
    for projection in projections:
        start, stop = stop, stop + len(projection.weight)
        projection.weight = nn.Parameter(joined[start:stop], requires_grad=False)
    if joined.is_cuda:
        torch.cuda.empty_cache()  # what was joined is never asked for again in these sizes
    return joined


def rotary_tables(config: TransformerConfig, *, device: torch.device) -> Rotary:
    """For every position of the context; 32 MiB for 32,768 positions and heads of 128."""
    angles_Pd = rotary_angles(torch.arange(config.max_position_embeddings, device=device), config)
    angles_Ph = angles_Pd[:, : config.head_dim // 2]
    return Rotary(angles_Ph.cos().contiguous(), angles_Ph.sin().contiguous())
