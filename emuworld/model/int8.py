"""A checkpoint's matrices in 8-bit integers: half the bytes of 16 bits, in the layout of compressed-tensors.

Every matrix inside the layers is stored as int8 under its own name, with an fp32 scale for each output
channel beside it; embedding, head and norms keep their bits. It is what the CPU's form computes with
(`emuworld.model.exact`), so nothing is lost there; `emuworld.model.checkpoint` makes floats of it for all
others. `transformers` opens such a folder where compressed-tensors is installed.

Shapes: N outputs, K inputs.
"""

from collections.abc import Mapping
from typing import Any

import torch

CONFIG_KEY = "quantization_config"
SCALE = "_scale"  # behind the name of a matrix: its scales
LARGEST = 127
_LAYERS = "model.layers."
_FORMAT = "int-quantized"
_TINY = 1e-30  # keeps the scale of zeros above 0


def quantised(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [N, K] and fp32 scales [N, 1]: symmetric, nearest."""
    weight_NK = weight_NK.float()
    scale_N1 = weight_NK.abs().amax(dim=1, keepdim=True).clamp_min(_TINY) / LARGEST
    return (weight_NK / scale_N1).round_().to(torch.int8), scale_N1


def floats(values_NK: torch.Tensor, scale_N1: torch.Tensor) -> torch.Tensor:
    """fp32 [N, K]."""
    return values_NK.float() * scale_N1.float()


def is_stored(name: str, shape: tuple[int, ...]) -> bool:
    """Whether the tensor of this name is one of those that are stored in 8 bits."""
    return name.startswith(_LAYERS) and len(shape) == 2


def compressed(tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What is stored of these tensors: matrices of the layers with their scales, the others in `dtype`."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if is_stored(name, tuple(tensor.shape)):
            stored[name], stored[name + SCALE] = quantised(tensor)
        else:
            stored[name] = tensor.to(dtype).contiguous()
    return stored


def quantization_config() -> dict[str, Any]:
    """The entry of `config.json` by which readers of compressed-tensors know the layout."""
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": _FORMAT}},
        "ignore": ["lm_head"],
    }
