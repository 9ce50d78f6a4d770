"""swish(group norm) of pictures whose channels lie last, as Triton kernels: read twice, written once.

PyTorch's group norm on CUDA knows layers whose channels lie first alone, and the library's convolutions are
fast on those where they lie last: without these kernels every norm costs two copies into the other order.

Import it only where Triton is installed. All arithmetic between a load and a store is fp32. A picture's
result depends on no other picture.

Shapes: B pictures, P positions, C channels, G groups of them, N blocks of positions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

_ELEMENTS = 16_384  # of a program, 64 of each thread
_WARPS = 8
_BLOCKS_AT_ONCE = 32  # whose moments are joined
_MOST_CHANNELS = 4096


def supports(x_BCHW: Tensor) -> bool:
    """Whether `norm_swish` takes such a layer."""
    is_last = x_BCHW.is_contiguous(memory_format=torch.channels_last)
    return x_BCHW.is_cuda and is_last and 0 < x_BCHW.shape[1] <= _MOST_CHANNELS


def norm_swish(x_BCHW: Tensor, norm: nn.GroupNorm) -> Tensor:
    """y sigmoid(y) for y = norm(x); channels last, of x's type. Moments are taken about each block's own mean
    and joined (Chan et al., 1979)."""
    num_pictures, num_channels, height, width = x_BCHW.shape
    num_positions, num_groups = height * width, norm.num_groups
    channels = triton.next_power_of_2(num_channels)
    positions = _ELEMENTS // channels
    blocks = triton.cdiv(num_positions, positions)
    moments = x_BCHW.new_empty((num_pictures, 2, blocks, num_channels), dtype=torch.float32)
    affine = x_BCHW.new_empty((num_pictures, 2, num_channels), dtype=torch.float32)
    out_BCHW = torch.empty_like(x_BCHW)
    sizes = {"positions": positions, "channels": channels, "num_warps": _WARPS}
    with torch.cuda.device_of(x_BCHW):
        _moments[(blocks, num_pictures)](x_BCHW, moments, num_positions, num_channels, **sizes)
        _affine[(num_pictures, num_groups)](
            moments,
            norm.weight,
            norm.bias,
            affine,
            norm.eps,
            num_positions,
            num_channels,
            num_channels // num_groups,
            blocks,
            positions=positions,
            members=triton.next_power_of_2(num_channels // num_groups),
            some=_BLOCKS_AT_ONCE,
            num_warps=4,
        )
        _apply[(blocks, num_pictures)](x_BCHW, affine, out_BCHW, num_positions, num_channels, **sizes)
    return out_BCHW


@triton.jit
def _moments(
    x_ptr: tl.tensor,
    moments_ptr: tl.tensor,
    num_positions: tl.tensor,
    num_channels: tl.tensor,
    positions: tl.constexpr,
    channels: tl.constexpr,
) -> None:
    """One program a block of a picture's positions: each channel's mean, and the sum of squares about it."""
    block, picture = tl.program_id(0), tl.program_id(1)
    position, channel = block * positions + tl.arange(0, positions), tl.arange(0, channels)
    real = (position < num_positions)[:, None] & (channel < num_channels)[None, :]
    at = (picture.to(tl.int64) * num_positions + position)[:, None] * num_channels + channel[None, :]
    x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    count = tl.minimum(num_positions - block * positions, positions).to(tl.float32)
    mean = tl.sum(x, axis=0) / count
    apart = tl.where(real, x - mean[None, :], 0.0)
    squares = tl.sum(apart * apart, axis=0)
    num_blocks = tl.num_programs(0)
    to_at = (picture.to(tl.int64) * 2 * num_blocks + block) * num_channels + channel
    tl.store(moments_ptr + to_at, mean, mask=channel < num_channels)
    tl.store(moments_ptr + to_at + num_blocks * num_channels, squares, mask=channel < num_channels)


@triton.jit
def _affine(
    moments_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    affine_ptr: tl.tensor,
    eps: tl.tensor,
    num_positions: tl.tensor,
    num_channels: tl.tensor,
    group_size: tl.tensor,
    num_blocks: tl.tensor,
    positions: tl.constexpr,
    members: tl.constexpr,
    some: tl.constexpr,
) -> None:
    """One program a group of a picture's channels: what each is multiplied by, and what is added."""
    picture, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    member = tl.arange(0, members)
    channel = group * group_size + member
    first_ptr = moments_ptr + picture * 2 * num_blocks * num_channels
    size = num_positions.to(tl.float32) * group_size
    total = tl.zeros((some, members), tl.float32)
    for start in range(0, num_blocks, some):
        block = start + tl.arange(0, some)
        real = (block < num_blocks)[:, None] & (member < group_size)[None, :]
        count = tl.minimum(num_positions - block * positions, positions).to(tl.float32)[:, None]
        at = block[:, None] * num_channels + channel[None, :]
        total += tl.where(real, tl.load(first_ptr + at, mask=real, other=0.0) * count, 0.0)
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / size
    total = tl.zeros((some, members), tl.float32)
    for start in range(0, num_blocks, some):
        block = start + tl.arange(0, some)
        real = (block < num_blocks)[:, None] & (member < group_size)[None, :]
        count = tl.minimum(num_positions - block * positions, positions).to(tl.float32)[:, None]
        at = block[:, None] * num_channels + channel[None, :]
        apart = tl.load(first_ptr + at, mask=real, other=0.0) - mean
        squares = tl.load(first_ptr + num_blocks * num_channels + at, mask=real, other=0.0)
        total += tl.where(real, squares + apart * apart * count, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(total, axis=1), axis=0) / size + eps)
    own = member < group_size
    scale = tl.load(weight_ptr + channel, mask=own, other=0.0).to(tl.float32) * inverse
    shift = tl.load(bias_ptr + channel, mask=own, other=0.0).to(tl.float32) - mean * scale
    to_ptr = affine_ptr + picture * 2 * num_channels + channel
    tl.store(to_ptr, scale, mask=own)
    tl.store(to_ptr + num_channels, shift, mask=own)


@triton.jit
def _apply(
    x_ptr: tl.tensor,
    affine_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_positions: tl.tensor,
    num_channels: tl.tensor,
    positions: tl.constexpr,
    channels: tl.constexpr,
) -> None:
    """One program a block of a picture's positions."""
    block, picture = tl.program_id(0), tl.program_id(1).to(tl.int64)
    position, channel = block * positions + tl.arange(0, positions), tl.arange(0, channels)
    own = channel < num_channels
    real = (position < num_positions)[:, None] & own[None, :]
    at = (picture * num_positions + position)[:, None] * num_channels + channel[None, :]
    scale = tl.load(affine_ptr + picture * 2 * num_channels + channel, mask=own, other=0.0)
    shift = tl.load(affine_ptr + (picture * 2 + 1) * num_channels + channel, mask=own, other=0.0)
    x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    y = x * scale[None, :] + shift[None, :]
    y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=real)
