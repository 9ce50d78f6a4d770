"""What stands between the convolutions of pictures whose channels lie last, as Triton kernels.

PyTorch's group norm on CUDA knows layers whose channels lie first alone, and the library's convolutions are
fast on those where they lie last: without these kernels every norm costs two copies into the other order. It
is read twice and written once. The bias of a convolution that came before may be left to whatever reads its
outputs: a norm takes it in where it makes two numbers for each channel, at no cost.

Import it only where Triton is installed. All arithmetic between a load and a store is fp32. A picture's
result depends on no other picture.

Shapes: B pictures, P positions, C channels, G groups of them, N blocks of positions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

# Elements of a program. Of `_moments` also at once: it is one warp, and so joins its sums within registers.
_MEASURED, _MEASURED_AT_ONCE = 8192, 512
_APPLIED = {4: 16_384, 2: 8192}  # by the bytes of an element
_APPLY_WARPS = 8
_ADDED, _DOUBLED, _SHOWN = 4096, 4096, 2048
_BLOCKS_AT_ONCE = 32  # whose moments are joined
_MOST_CHANNELS = 4096


def supports(x_BCHW: Tensor) -> bool:
    """Whether `norm_swish` takes such a layer."""
    is_last = x_BCHW.is_contiguous(memory_format=torch.channels_last)
    return x_BCHW.is_cuda and is_last and 0 < x_BCHW.shape[1] <= _MOST_CHANNELS


def norm_swish(
    x_BCHW: Tensor, norm: nn.GroupNorm, *, bias_C: Tensor | None = None, swish: bool = True
) -> Tensor:
    """y sigmoid(y) for y = norm(x + bias), or y; channels last, of x's type. Moments are taken about a mean
    and joined (Welford, 1962; Chan et al., 1979)."""
    num_pictures, num_channels, height, width = x_BCHW.shape
    num_positions, num_groups = height * width, norm.num_groups
    channels = triton.next_power_of_2(num_channels)
    positions = max(1, _MEASURED // channels)
    blocks = triton.cdiv(num_positions, positions)
    moments = x_BCHW.new_empty((num_pictures, 2, blocks, num_channels), dtype=torch.float32)
    affine = x_BCHW.new_empty((num_pictures, 2, num_channels), dtype=torch.float32)
    out_BCHW = torch.empty_like(x_BCHW)
    sizes = (num_positions, num_channels)
    with torch.cuda.device_of(x_BCHW):
        _moments[(blocks, num_pictures)](
            x_BCHW,
            moments,
            *sizes,
            positions=positions,
            channels=channels,
            rows=max(1, _MEASURED_AT_ONCE // channels),
            num_warps=1,
        )
        _affine[(num_pictures, num_groups)](
            moments,
            norm.weight,
            norm.bias,
            norm.bias if bias_C is None else bias_C,
            affine,
            norm.eps,
            *sizes,
            num_channels // num_groups,
            blocks,
            adds=bias_C is not None,
            positions=positions,
            members=triton.next_power_of_2(num_channels // num_groups),
            some=_BLOCKS_AT_ONCE,
            num_warps=4,
        )
        positions = max(1, _APPLIED[x_BCHW.element_size()] // channels)
        _apply[(triton.cdiv(num_positions, positions), num_pictures)](
            x_BCHW,
            affine,
            out_BCHW,
            *sizes,
            swish=swish,
            positions=positions,
            channels=channels,
            num_warps=_APPLY_WARPS,
        )
    return out_BCHW


def add(x_BCHW: Tensor, y_BCHW: Tensor, bias_C: Tensor) -> Tensor:
    """x + y + bias, which takes the place of x; channels last."""
    num_channels = x_BCHW.shape[1]
    channels = triton.next_power_of_2(num_channels)
    num_positions, positions = x_BCHW.numel() // num_channels, max(1, _ADDED // channels)
    sizes = {"positions": positions, "channels": channels, "num_warps": 4}
    with torch.cuda.device_of(x_BCHW):
        _add[(triton.cdiv(num_positions, positions),)](
            x_BCHW, y_BCHW, bias_C, num_positions, num_channels, **sizes
        )
    return x_BCHW


def doubled(x_BCHW: Tensor) -> Tensor:
    """Every value twice along both sides; channels last."""
    num_pictures, num_channels, height, width = x_BCHW.shape
    out_BCHW = torch.empty(
        (num_pictures, num_channels, 2 * height, 2 * width),
        dtype=x_BCHW.dtype,
        device=x_BCHW.device,
        memory_format=torch.channels_last,
    )
    channels = triton.next_power_of_2(num_channels)
    num_positions, positions = num_pictures * height * width, max(1, _DOUBLED // channels)
    sizes = {"positions": positions, "channels": channels, "num_warps": 4}
    with torch.cuda.device_of(x_BCHW):
        _double[(triton.cdiv(num_positions, positions),)](
            x_BCHW, out_BCHW, num_positions, num_channels, width, **sizes
        )
    return out_BCHW


def shown(x_BCHW: Tensor, bias_C: Tensor, *, patch_px: int) -> Tensor:
    """Channels last, of which each position has a patch of three colours, in [-1, 1] after the bias was added
    -> pictures uint8 [B, H, W, 3], as `vision.to_images` makes them."""
    num_pictures, num_channels, height, width = x_BCHW.shape
    assert num_channels == 3 * patch_px**2
    out_BHW3 = x_BCHW.new_empty((num_pictures, height * patch_px, width * patch_px, 3), dtype=torch.uint8)
    with torch.cuda.device_of(x_BCHW):
        _show[(triton.cdiv(x_BCHW[0].numel(), _SHOWN), num_pictures)](
            x_BCHW, bias_C, out_BHW3, height, width, patch=patch_px, block=_SHOWN, num_warps=4
        )
    return out_BHW3


@triton.jit
def _moments(
    x_ptr: tl.tensor,
    moments_ptr: tl.tensor,
    num_positions: tl.tensor,
    num_channels: tl.tensor,
    positions: tl.constexpr,
    channels: tl.constexpr,
    rows: tl.constexpr,
) -> None:
    """One program a block of a picture's positions, some rows of them at a time: each channel's mean, and the
    sum of squares about it.
    """
    block, picture = tl.program_id(0), tl.program_id(1)
    row, channel = tl.arange(0, rows), tl.arange(0, channels)
    own = (channel < num_channels)[None, :]
    turns: tl.constexpr = positions // rows
    mean = tl.zeros((rows, channels), tl.float32)
    squares = tl.zeros((rows, channels), tl.float32)
    for turn in range(turns):
        position = block * positions + turn * rows + row
        real = (position < num_positions)[:, None] & own
        at = (picture.to(tl.int64) * num_positions + position)[:, None] * num_channels + channel[None, :]
        x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
        apart = tl.where(real, x - mean, 0.0)
        mean += apart * (1.0 / (turn + 1.0))
        squares += apart * (x - mean)
    left = tl.maximum(num_positions - block * positions - row + rows - 1, 0)
    count = tl.minimum(left // rows, turns).to(tl.float32)[:, None]  # of each row
    joined = tl.sum(mean * count, axis=0) / tl.sum(tl.sum(count, axis=1), axis=0)
    apart = mean - joined[None, :]
    squares = tl.sum(squares + apart * apart * count, axis=0)
    num_blocks = tl.num_programs(0)
    to_at = (picture.to(tl.int64) * 2 * num_blocks + block) * num_channels + channel
    tl.store(moments_ptr + to_at, joined, mask=channel < num_channels)
    tl.store(moments_ptr + to_at + num_blocks * num_channels, squares, mask=channel < num_channels)


@triton.jit(do_not_specialize=["num_positions"])  # 1 would be no number of the GPU's
def _affine(
    moments_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    added_ptr: tl.tensor,
    affine_ptr: tl.tensor,
    eps: tl.tensor,
    num_positions: tl.tensor,
    num_channels: tl.tensor,
    group_size: tl.tensor,
    num_blocks: tl.tensor,
    adds: tl.constexpr,
    positions: tl.constexpr,
    members: tl.constexpr,
    some: tl.constexpr,
) -> None:
    """One program a group of a picture's channels: what each is multiplied by, and what is added. Where this
    `adds`, the numbers lack something of their channel yet.
    """
    picture, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    member = tl.arange(0, members)
    channel = group * group_size + member
    first_ptr = moments_ptr + picture * 2 * num_blocks * num_channels
    size = num_positions.to(tl.float32) * group_size
    own = member < group_size
    added = tl.load(added_ptr + channel, mask=own & adds, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((some, members), tl.float32)
    for start in range(0, num_blocks, some):
        block = start + tl.arange(0, some)
        real = (block < num_blocks)[:, None] & (member < group_size)[None, :]
        count = tl.minimum(num_positions - block * positions, positions).to(tl.float32)[:, None]
        at = block[:, None] * num_channels + channel[None, :]
        total += tl.where(real, (tl.load(first_ptr + at, mask=real, other=0.0) + added) * count, 0.0)
    mean = tl.sum(tl.sum(total, axis=1), axis=0) / size
    total = tl.zeros((some, members), tl.float32)
    for start in range(0, num_blocks, some):
        block = start + tl.arange(0, some)
        real = (block < num_blocks)[:, None] & (member < group_size)[None, :]
        count = tl.minimum(num_positions - block * positions, positions).to(tl.float32)[:, None]
        at = block[:, None] * num_channels + channel[None, :]
        apart = tl.load(first_ptr + at, mask=real, other=0.0) + added - mean
        squares = tl.load(first_ptr + num_blocks * num_channels + at, mask=real, other=0.0)
        total += tl.where(real, squares + apart * apart * count, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(tl.sum(total, axis=1), axis=0) / size + eps)
    scale = tl.load(weight_ptr + channel, mask=own, other=0.0).to(tl.float32) * inverse
    shift = tl.load(bias_ptr + channel, mask=own, other=0.0).to(tl.float32) - mean * scale
    shift += tl.sum(added, axis=0) * scale
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
    swish: tl.constexpr,
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
    if swish:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _add(
    x_ptr: tl.tensor,
    y_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    num_positions: tl.tensor,
    num_channels: tl.tensor,
    positions: tl.constexpr,
    channels: tl.constexpr,
) -> None:
    """One program a block of positions of all pictures."""
    position = tl.program_id(0).to(tl.int64) * positions + tl.arange(0, positions)
    channel = tl.arange(0, channels)
    real = (position < num_positions)[:, None] & (channel < num_channels)[None, :]
    at = position[:, None] * num_channels + channel[None, :]
    bias = tl.load(bias_ptr + channel, mask=channel < num_channels, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + at, mask=real, other=0.0).to(tl.float32)
    tl.store(x_ptr + at, (x + y + bias[None, :]).to(x_ptr.dtype.element_ty), mask=real)


@triton.jit
def _double(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_positions: tl.tensor,
    num_channels: tl.tensor,
    width: tl.tensor,
    positions: tl.constexpr,
    channels: tl.constexpr,
) -> None:
    """One program a block of positions of all pictures, whose rows of positions lie behind each other."""
    position = tl.program_id(0).to(tl.int64) * positions + tl.arange(0, positions)
    channel = tl.arange(0, channels)
    real = (position < num_positions)[:, None] & (channel < num_channels)[None, :]
    x = tl.load(x_ptr + position[:, None] * num_channels + channel[None, :], mask=real, other=0.0)
    first = position // width * 4 * width + position % width * 2
    at = first[:, None] * num_channels + channel[None, :]
    for row in tl.static_range(2):
        for column in tl.static_range(2):
            tl.store(out_ptr + at + (row * 2 * width + column) * num_channels, x, mask=real)


@triton.jit
def _show(
    x_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    out_ptr: tl.tensor,
    height: tl.tensor,
    width: tl.tensor,
    patch: tl.constexpr,
    block: tl.constexpr,
) -> None:
    """One program a block of the values of a picture."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    num_channels: tl.constexpr = 3 * patch * patch
    size = height * width * num_channels
    colour, pixel = at % 3, at // 3
    row, column = pixel // (width * patch), pixel % (width * patch)
    channel = (colour * patch + row % patch) * patch + column % patch
    from_at = (row // patch * width + column // patch) * num_channels + channel
    picture = tl.program_id(1).to(tl.int64) * size
    x = tl.load(x_ptr + picture + from_at, mask=at < size, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + channel).to(tl.float32)
    grey = tl.minimum(tl.maximum((x + 1.0) * 127.5, 0.0), 255.0)
    tl.store(out_ptr + picture + at, grey.to(tl.uint8), mask=at < size)
