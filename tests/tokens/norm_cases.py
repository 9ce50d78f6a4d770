"""The Triton kernels of the vision tokenizer against plain PyTorch (`compare`, under TRITON_INTERPRET=1), or
compiled for a GPU that need not be there (`compile`); run by test_vision_network.py in a process of its own.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from triton_cases import compiled

from emuworld.tokens import vision_kernels, vision_operations

LARGEST_ERROR = {torch.float32: 2e-6, torch.float16: 1e-3}  # of the largest value


@torch.no_grad()
def compare() -> None:
    """Layers of the built-in and the published sizes and some that fill no block; means far from zero."""
    torch.manual_seed(0)
    vision_kernels._MEASURED = 2048  # several blocks of few positions
    vision_kernels._APPLIED = {4: 4096, 2: 4096}
    for dtype in LARGEST_ERROR:
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
            bias = torch.randn(channels)
            for bias_C, swish in ((None, True), (bias, True), (bias, False)):
                y = F.group_norm(
                    x.double() if bias_C is None else x.double() + bias_C[:, None, None].double(),
                    groups,
                    norm.weight.double(),
                    norm.bias.double(),
                    norm.eps,
                )
                found = vision_kernels.norm_swish(x, norm, bias_C=bias_C, swish=swish)
                assert found.stride() == x.stride()
                agrees(found, F.silu(y) if swish else y, times=1 + away)
                ours = vision_operations.norm_swish(x, norm, bias_C=bias_C, swish=swish)
                agrees(ours, F.silu(y) if swish else y, times=1 + away**2)  # it joins no moments
            y, expected = torch.randn_like(x), x.double() + bias[:, None, None].double()
            agrees(vision_operations.add(x.clone(), y, bias), expected + y.double())
            agrees(vision_kernels.add(x.clone(), y, bias), expected + y.double())
            assert torch.equal(vision_kernels.doubled(x), vision_operations.doubled(x))
        compare_shown(dtype)


def compare_shown(dtype: torch.dtype) -> None:
    """To the last value, also outside of the range."""
    for pictures, patch_px, height, width in ((2, 4, 5, 7), (1, 2, 33, 40), (3, 1, 9, 16)):
        x = torch.randn(pictures, 3 * patch_px**2, height, width)
        x = x.to(dtype).to(memory_format=torch.channels_last)
        bias = torch.randn(3 * patch_px**2)
        found = vision_kernels.shown(x, bias, patch_px=patch_px)
        assert torch.equal(found, vision_operations.shown(x, bias, patch_px=patch_px))
        print("the same pixels")


def agrees(found: torch.Tensor, expected: torch.Tensor, *, times: float = 1.0) -> None:
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    assert error < LARGEST_ERROR[found.dtype] * times, (found.shape, found.dtype, error)
    print("agrees")


def compile_all() -> None:
    names = ("num_positions", "num_channels", "group_size", "num_blocks", "height", "width")
    floats = ("moments_ptr", "affine_ptr", "weight_ptr", "bias_ptr", "added_ptr")
    kinds = dict.fromkeys(names, "i32") | dict.fromkeys(floats, "*fp32") | {"eps": "fp32"}
    for kind, applied in (("*fp32", 16_384), ("*fp16", 8192)):
        kinds |= dict.fromkeys(("x_ptr", "y_ptr", "out_ptr"), kind)
        for channels in (128, 256, 1024):
            sizes = {"positions": 8192 // channels, "channels": channels}
            build(vision_kernels._moments, sizes | {"rows": max(1, 512 // channels)}, kinds, num_warps=1)
            sizes["positions"] = 4096 // channels
            build(vision_kernels._add, sizes, kinds, num_warps=4)
            build(vision_kernels._double, sizes, kinds, num_warps=4)
            sizes["positions"] = applied // channels
            build(vision_kernels._apply, sizes | {"swish": True}, kinds, num_warps=8)
        for adds in (True, False):
            sizes = {"adds": adds, "positions": 64, "members": 32, "some": 32}
            build(vision_kernels._affine, sizes, kinds, num_warps=4)
        sizes = {"patch": 4, "block": 2048}
        build(vision_kernels._show, sizes, kinds | {"out_ptr": "*u8"}, num_warps=4)


def build(kernel: Any, constants: dict[str, object], kinds: dict[str, str], *, num_warps: int) -> None:
    compiled(kernel, constants, kinds=kinds, whole=("num_positions", "num_channels"), num_warps=num_warps)


if __name__ == "__main__":
    {"compare": compare, "compile": compile_all}[sys.argv[1]]()
