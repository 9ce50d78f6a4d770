"""The Triton kernels of the vision tokenizer against plain PyTorch (`compare`, under TRITON_INTERPRET=1), or
compiled for a GPU that need not be there (`compile`); run by test_vision_network.py in a process of its own.
"""

import sys

import torch
import torch.nn.functional as F
from torch import nn
from triton_cases import compiled

from emuworld.tokens import vision_kernels

LARGEST_ERROR = {torch.float32: 2e-6, torch.float16: 1e-3}  # of the largest value


def compare() -> None:
    """Layers of the built-in and the published sizes and some that fill no block; means far from zero."""
    torch.manual_seed(0)
    vision_kernels._ELEMENTS = 4096  # several blocks of few positions
    for dtype, largest in LARGEST_ERROR.items():
        for pictures, channels, groups, height, width, away in (
            (2, 128, 8, 9, 8, 0.0),
            (1, 160, 8, 7, 11, 50.0),
            (3, 24, 8, 1, 1, 1.0),
            (1, 8, 1, 40, 70, 3.0),
        ):
            norm = nn.GroupNorm(groups, channels, eps=1e-6)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            x = away + torch.randn(pictures, channels, height, width)
            x = x.to(dtype).to(memory_format=torch.channels_last)
            expected = F.silu(norm.double()(x.double()))
            found = vision_kernels.norm_swish(x, norm.float())
            assert found.dtype == dtype and found.stride() == x.stride()
            error = (found.double() - expected).abs().max() / expected.abs().max()
            assert error < largest * (1 + away), (channels, dtype, float(error))
            print("agrees")


def compile_all() -> None:
    kinds = dict.fromkeys(("num_positions", "num_channels", "group_size", "num_blocks"), "i32")
    kinds |= dict.fromkeys(("moments_ptr", "affine_ptr", "weight_ptr", "bias_ptr"), "*fp32")
    kinds |= {"x_ptr": "*fp32", "out_ptr": "*fp32", "eps": "fp32"}
    whole = ("num_positions", "num_channels")
    for positions, channels in ((128, 128), (64, 256), (16, 1024)):
        tile = {"positions": positions, "channels": channels}
        for kernel in (vision_kernels._moments, vision_kernels._apply):
            compiled(kernel, tile, kinds=kinds, whole=whole, num_warps=8)
        sizes = {"positions": positions, "members": 32, "some": 32}
        compiled(vision_kernels._affine, sizes, kinds=kinds, whole=whole, num_warps=4)


if __name__ == "__main__":
    {"compare": compare, "compile": compile_all}[sys.argv[1]]()
