"""Layers of the vision tokenizer in strips of rows, for pictures whose layers fill a memory.

At 1024 px a layer of the published tokenizer takes 1 GiB, and a residual block written plainly holds four or
five of them. Here a block changes its input in place and holds a strip of rows beside it. A group norm needs
the mean and variance of a whole layer, so what stands between the two convolutions of a block is computed
twice, strip by strip: once for its moments, once to go on (1.5 times the arithmetic of a block). The
mathematics is that of `emuworld.tokens.vision_network`; sums are taken in another order, which moves the last
bits of fp32.

For inference only: nothing here has a gradient.

Shapes: B pictures, C channels, H x W positions, G groups of a norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIMIT_BYTES = 256 << 20  # a layer of one picture up to this size runs whole: 512 px at the published width
STRIP_BYTES = 32 << 20
_FEWEST_ROWS = 4  # a strip keeps the two rows that the next one reads; fewer rows would not hold them


class Block(Protocol):
    """A residual block: norm, swish, convolution (3 x 3), twice."""

    norm1: nn.GroupNorm
    conv1: nn.Conv2d
    norm2: nn.GroupNorm
    conv2: nn.Conv2d


def needed(*shape: int, like: Tensor) -> bool:
    """Whether a layer [B, *shape] is too large to be held several times."""
    num_elements = 1
    for side in shape:
        num_elements *= side
    return not torch.is_grad_enabled() and num_elements * like.element_size() > LIMIT_BYTES


def resnet_block(x_BCHW: Tensor, block: Block, *, shortcut: nn.Conv2d | None) -> Tensor:
    """x + conv2(swish(norm2(conv1(swish(norm1(x)))))). Without a shortcut the sum is written into `x`."""
    height = x_BCHW.shape[2]
    spans = list(_spans(x_BCHW, height))
    first = _affine(block.norm1, (x_BCHW[:, :, start:stop] for start, stop in spans))

    def hidden(source: Tensor, top: int, start: int, stop: int) -> Tensor:
        """Rows start to stop of the first convolution; `source` holds rows of x from `top` on."""
        rows = source[:, :, max(start - 1, 0) - top : min(stop + 1, height) - top]
        return _convolve(block.conv1, _swish(rows, first), top=start == 0, bottom=stop == height)

    second = _affine(block.norm2, (hidden(x_BCHW, 0, start, stop) for start, stop in spans))
    out_BCHW = x_BCHW if shortcut is None else _empty(x_BCHW, shortcut.out_channels, *x_BCHW.shape[2:])
    kept = x_BCHW[:, :, :0]  # the rows above a strip, as they were before the sum went into them
    for start, stop in spans:
        low, high = max(start - 1, 0), min(stop + 1, height)
        source = torch.cat((kept, x_BCHW[:, :, start : min(high + 1, height)]), dim=2)
        rows = _swish(hidden(source, start - kept.shape[2], low, high), second)
        kept = x_BCHW[:, :, stop - 2 : stop].clone()
        added = _convolve(block.conv2, rows, top=start == 0, bottom=stop == height)
        strip = x_BCHW[:, :, start:stop]
        out_BCHW[:, :, start:stop] = added.add_(strip if shortcut is None else shortcut(strip))
    return out_BCHW


def downsample(x_BCHW: Tensor, conv: nn.Conv2d) -> Tensor:
    """One row and column of zeros at the right and bottom, then 3 x 3 with stride 2."""
    height, width = x_BCHW.shape[2] // 2, x_BCHW.shape[3] // 2
    out_BCHW = _empty(x_BCHW, conv.out_channels, height, width)
    for start, stop in _spans(x_BCHW, height):
        rows = x_BCHW[:, :, 2 * start : 2 * stop + 1]
        below = 2 * (stop - start) + 1 - rows.shape[2]
        out_BCHW[:, :, start:stop] = F.conv2d(F.pad(rows, (0, 1, 0, below)), conv.weight, conv.bias, stride=2)
    return out_BCHW


def upsample(x_BCHW: Tensor, conv: nn.Conv2d) -> Tensor:
    """Every value twice along both sides, then 3 x 3."""
    height, width = 2 * x_BCHW.shape[2], 2 * x_BCHW.shape[3]
    out_BCHW = _empty(x_BCHW, conv.out_channels, height, width)
    for start, stop in _spans(out_BCHW, height):
        low, high = max(start - 1, 0), min(stop + 1, height)
        rows = F.interpolate(x_BCHW[:, :, low // 2 : (high + 1) // 2], scale_factor=2.0, mode="nearest")
        rows = rows[:, :, low % 2 : low % 2 + high - low]
        out_BCHW[:, :, start:stop] = _convolve(conv, rows, top=start == 0, bottom=stop == height)
    return out_BCHW


def norm_conv(x_BCHW: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
    """conv(swish(norm(x))), 3 x 3: the end of either half of the network."""
    height = x_BCHW.shape[2]
    spans = list(_spans(x_BCHW, height))
    affine = _affine(norm, (x_BCHW[:, :, start:stop] for start, stop in spans))
    out_BCHW = _empty(x_BCHW, conv.out_channels, *x_BCHW.shape[2:])
    for start, stop in spans:
        rows = _swish(x_BCHW[:, :, max(start - 1, 0) : min(stop + 1, height)], affine)
        out_BCHW[:, :, start:stop] = _convolve(conv, rows, top=start == 0, bottom=stop == height)
    return out_BCHW


class _Affine(NamedTuple):
    """A group norm whose moments are known: x * scale + shift."""

    scale_BC11: Tensor
    shift_BC11: Tensor


def _spans(x_BCHW: Tensor, height: int) -> Iterator[tuple[int, int]]:
    """Rows start to stop of each strip of `height` rows, in order."""
    row_bytes = x_BCHW[:, :, :1].numel() * x_BCHW.element_size()
    rows = max(STRIP_BYTES // row_bytes, _FEWEST_ROWS)
    starts = list(range(0, height, rows))
    if len(starts) > 1 and height - starts[-1] < _FEWEST_ROWS:
        starts.pop()
    yield from zip(starts, [*starts[1:], height], strict=True)


def _affine(norm: nn.GroupNorm, strips_BCHW: Iterator[Tensor]) -> _Affine:
    """The norm over a layer that comes in strips; moments are joined in fp64 (Chan et al., 1979)."""
    count, mean_BG, squares_BG = 0, torch.zeros(()), torch.zeros(())
    for strip in strips_BCHW:
        size = strip[0].numel() // norm.num_groups
        variance, mean = torch.var_mean(strip.unflatten(1, (norm.num_groups, -1)), (2, 3, 4), correction=0)
        if count == 0:
            mean_BG, squares_BG, count = mean.double(), variance.double() * size, size
            continue
        apart, total = mean.double() - mean_BG, count + size
        mean_BG = mean_BG + apart * (size / total)
        squares_BG = squares_BG + variance.double() * size + apart.square() * (count * size / total)
        count = total
    inverse_BG = (squares_BG / count + norm.eps).rsqrt()
    per_group = norm.num_channels // norm.num_groups
    scale_BC = inverse_BG.repeat_interleave(per_group, dim=1) * norm.weight.double()
    shift_BC = norm.bias.double() - mean_BG.repeat_interleave(per_group, dim=1) * scale_BC
    dtype = norm.weight.dtype
    return _Affine(scale_BC[:, :, None, None].to(dtype), shift_BC[:, :, None, None].to(dtype))


def _swish(x_BCHW: Tensor, affine: _Affine) -> Tensor:
    return F.silu(torch.addcmul(affine.shift_BC11, x_BCHW, affine.scale_BC11), inplace=True)


def _convolve(conv: nn.Conv2d, rows_BCHW: Tensor, *, top: bool, bottom: bool) -> Tensor:
    """3 x 3 over rows that bring their neighbours along; zeros stand above and below the picture."""
    if top or bottom:
        rows_BCHW = F.pad(rows_BCHW, (0, 0, int(top), int(bottom)))
    return F.conv2d(rows_BCHW, conv.weight, conv.bias, padding=(0, 1))


def _empty(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Channels last, so that a strip of rows is one piece of memory."""
    return torch.empty(
        (len(like), channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )
