"""The vision tokenizer's network: a VQGAN encoder and decoder, 16 pixels a code along each side.

Layers, sizes and state-dict keys are those of the published tokenizer (Emu3.5, arXiv 2510.26583, section
2.2; fact sheet, section 3). The quantiser between the two halves is in `emuworld.tokens.vision`. Layers too
large to be held several times run in strips (`emuworld.tokens.strips`).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import reprlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emuworld.shares import in_shares, num_spare_threads
from emuworld.tokens import strips

if torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    from emuworld.tokens import vision_kernels
else:
    vision_kernels = None  # type: ignore[assignment]

DOWNSAMPLE = 16
_WORTH_HALVES = 1 << 25  # products of a convolution, a quarter of a millisecond of one core
_MAX_SIZE = 1 << 20  # of anything that a configuration counts: eight times the largest in the release
_MAX_BLOCKS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the tokenizer; the defaults are the built-in model's, `PUBLISHED` those of Emu3.5.

    `width` times `width_multipliers` gives the channels of the levels, from the finest resolution down to one
    sixteenth of the picture's; self-attention works at the lowest level only. `norm_groups` divides all of
    them. The finest level has one position for each `patch_px` by `patch_px` pixels, as channels of their own
    (1, the published form: every pixel). Small networks are several times faster without the finest levels,
    where few channels meet many positions.
    """

    patch_px: int = 4  # pixels of a side that are one position of the finest level; 1: the published form
    width: int = 32  # channels of a level are this times its multiplier
    width_multipliers: tuple[int, ...] = (4, 5, 5)  # from the finest level down; patch_px=1 has five
    num_res_blocks: int = 1  # of a level
    z_channels: int = 64  # that the encoder gives
    embed_dim: int = 32  # of a code
    num_codes: int = 4096  # of 16 by 16 pixels each
    # With one channel a group, as 32 would give here, norms would wipe out plain colours.
    norm_groups: int = 8

    def __post_init__(self) -> None:
        levels = len(self.width_multipliers) if isinstance(self.width_multipliers, tuple) else 0
        if levels not in range(1, 6) or self.patch_px != DOWNSAMPLE >> (levels - 1):
            raise ValueError(
                f"width_multipliers needs one value for each level from patch_px "
                f"{reprlib.repr(self.patch_px)} to {DOWNSAMPLE} pixels a code (1: five, 4: three), got "
                f"{reprlib.repr(self.width_multipliers)}"
            )
        counts = {f"width_multipliers[{i}]": value for i, value in enumerate(self.width_multipliers)}
        counts |= {name: value for name, value in vars(self).items() if name != "width_multipliers"}
        for name, value in counts.items():
            most = _MAX_BLOCKS if name == "num_res_blocks" else _MAX_SIZE
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} must be an integer in 1..{most}, got {reprlib.repr(value)}")
        if any(width % self.norm_groups or width > _MAX_SIZE for width in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of norm_groups, {self.norm_groups}")

    @classmethod
    def from_json(cls, fields: object) -> VisionConfig:
        """Read what `dataclasses.asdict` gave. ValueError for missing, unknown or senseless fields."""
        known = {field.name for field in dataclasses.fields(cls)}
        if isinstance(fields, dict):
            fields = {"patch_px": 1, **fields}  # files from before there was a choice
        if not isinstance(fields, dict) or set(fields) != known:
            got = sorted(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
            raise ValueError(f"expected the keys {sorted(known)}, got {reprlib.repr(got)}")
        multipliers = fields["width_multipliers"]
        return cls(
            **{**fields, "width_multipliers": tuple(multipliers) if isinstance(multipliers, list) else ()}
        )

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.width * multiplier for multiplier in self.width_multipliers)


PUBLISHED = VisionConfig(
    patch_px=1,
    width=256,
    width_multipliers=(1, 1, 2, 2, 4),
    num_res_blocks=4,
    z_channels=256,
    embed_dim=256,
    num_codes=131_072,
    norm_groups=32,
)


class Convolution(nn.Conv2d):
    """With a CPU and no gradient, the outputs of a large one come in two halves: at the same time where there
    is a thread to spare, else in turn, so that the number of threads changes no bit."""

    def forward(self, x: Tensor) -> Tensor:
        num_products = x.numel() // self.in_channels // math.prod(self.stride) * self.weight.numel()
        if x.device.type != "cpu" or torch.is_grad_enabled() or num_products < _WORTH_HALVES:
            return super().forward(x)
        assert self.bias is not None
        weights, biases = self.weight.tensor_split(2), self.bias.tensor_split(2)
        halves: dict[int, Tensor] = {}
        has_help = num_spare_threads() > 0

        @torch.no_grad()
        def compute(half: int) -> None:
            if has_help:
                torch.set_num_threads(1)  # of each thread its own
            halves[half] = F.conv2d(x, weights[half], biases[half], self.stride, self.padding)

        if has_help:
            in_shares(2, compute)
        else:
            compute(0)
            compute(1)
        return torch.cat((halves[0], halves[1]), dim=1)


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _swish(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """swish(norm(x))."""
    if vision_kernels is not None and not torch.is_grad_enabled() and vision_kernels.supports(x):
        return vision_kernels.norm_swish(x, norm)
    return F.silu(norm(x))


def _end(h: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
    if strips.needed(*h.shape[1:], like=h):
        return strips.norm_conv(h, norm, conv)
    return conv(_swish(h, norm))


class ResnetBlock(nn.Module):
    """norm, swish, conv twice, plus the input (through a 1x1 convolution where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1: nn.Conv2d = Convolution(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2: nn.Conv2d = Convolution(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = Convolution(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """May write the result into `x`, where that is large and no gradient is asked for."""
        shortcut = getattr(self, "nin_shortcut", None)
        if strips.needed(*x.shape[1:], like=x):
            return strips.resnet_block(x, self, shortcut=shortcut)
        h = self.conv1(_swish(x, self.norm1))
        h = self.conv2(_swish(h, self.norm2))
        return h + (x if shortcut is None else shortcut(x))


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, its projections 1x1 convolutions."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = Convolution(channels, channels, 1)
        self.k = Convolution(channels, channels, 1)
        self.v = Convolution(channels, channels, 1)
        self.proj_out = Convolution(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (
            p(h).flatten(2).transpose(1, 2).unsqueeze(1) for p in (self.q, self.k, self.v)
        )  # [B, 1, h*w, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.squeeze(1).transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if strips.needed(*x.shape[1:], like=x):
            return strips.downsample(x, self.conv)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Convolution(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if strips.needed(4, *x.shape[1:], like=x):
            return strips.upsample(x, self.conv)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each where asked for, then a change of size."""

    def __init__(
        self, in_channels: int, out_channels: int, num_blocks: int, *, attention: bool, groups: int
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups=groups)
            for i in range(num_blocks)
        )
        self.attn = nn.ModuleList(
            AttnBlock(out_channels, groups=groups) for _ in range(num_blocks if attention else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        for name in ("downsample", "upsample"):  # set from outside: the finest or coarsest level has none
            if name in self._modules:
                x = getattr(self, name)(x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the coarsest resolution."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups=groups)
        self.attn_1 = AttnBlock(channels, groups=groups)
        self.block_2 = ResnetBlock(channels, channels, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """[B, 3, H, W] in [-1, 1] -> [B, z_channels, H/16, W/16]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        widths = config.widths
        last = len(widths) - 1
        self.patch_px = config.patch_px
        self.conv_in = Convolution(3 * config.patch_px**2, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(
                widths[max(i - 1, 0)],
                width,
                config.num_res_blocks,
                attention=i == last,
                groups=config.norm_groups,
            )
            if i < last:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(widths[-1], groups=config.norm_groups)
        self.norm_out = _norm(widths[-1], config.norm_groups)
        self.conv_out = Convolution(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_px))
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        return _end(h, self.norm_out, self.conv_out)


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> [B, 3, 16h, 16w], about [-1, 1]. Levels are stored from fine to coarse and run
    from coarse to fine.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        widths = config.widths
        last = len(widths) - 1
        self.conv_in = Convolution(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups=config.norm_groups)
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            level = Level(
                widths[min(i + 1, last)],
                width,
                config.num_res_blocks + 1,
                attention=i == last,
                groups=config.norm_groups,
            )
            if i > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = _norm(widths[0], config.norm_groups)
        self.patch_px = config.patch_px
        self.conv_out = Convolution(widths[0], 3 * config.patch_px**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid(h)
        for level in reversed(self.up):
            h = level(h)
        return F.pixel_shuffle(_end(h, self.norm_out, self.conv_out), self.patch_px)
