"""What stands between the convolutions of `vision_half`, in plain PyTorch: works anywhere.

`emuworld.tokens.vision_kernels` has the same four functions as Triton kernels.

Shapes: B pictures, C channels, H x W positions or pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm_swish(
    x_BCHW: Tensor, norm: nn.GroupNorm, *, bias_C: Tensor | None = None, swish: bool = True
) -> Tensor:
    """y sigmoid(y) for y = norm(x + bias), or y."""
    wide_BCHW = x_BCHW.float() if bias_C is None else x_BCHW.float() + bias_C[:, None, None]
    y_BCHW = F.group_norm(wide_BCHW, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return (F.silu(y_BCHW) if swish else y_BCHW).to(x_BCHW.dtype)


def add(x_BCHW: Tensor, y_BCHW: Tensor, bias_C: Tensor) -> Tensor:
    """x + y + bias, which takes the place of x."""
    return x_BCHW.copy_(x_BCHW.float() + y_BCHW.float() + bias_C[:, None, None])


def doubled(x_BCHW: Tensor) -> Tensor:
    """Every value twice along both sides."""
    return F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest")


def shown(x_BCHW: Tensor, bias_C: Tensor, *, patch_px: int) -> Tensor:
    """Of each position a patch of three colours, in [-1, 1] after the bias was added -> pictures uint8
    [B, H, W, 3]."""
    return to_images(F.pixel_shuffle(x_BCHW.float() + bias_C[:, None, None], patch_px))


def to_images(pixels: Tensor) -> Tensor:
    """float [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]; truncates, as the published decoder does."""
    return ((pixels.float() + 1.0) * 127.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
