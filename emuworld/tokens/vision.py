"""IBQ vision tokenizer: pictures <-> grids of code indices, 16 pixels a code along each side.

The network is the one of the published tokenizer (a VQGAN encoder and decoder around an index-backpropagation
quantiser) at any size, with its state-dict keys. It is not the training loop (`emuworld.training.tokenizer`).
Encoding and decoding run in fp32: half precision changes about one code in twelve.

Sources: Emu3.5 (arXiv 2510.26583) section 2.2; IBQ (arXiv 2412.02692) for the quantiser and its losses.
Departures: the raw dot products are chunked over positions instead of materialised at once, and entropy terms
take their temperature as an argument.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DOWNSAMPLE = 16
# 2,048 x 131,072 fp32 scores are 1 GiB, the most that one chunk of an encode may take.
_POSITIONS_A_CHUNK = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes of the tokenizer; the defaults are the built-in model's, `PUBLISHED` those of Emu3.5.

    `width` times `width_multipliers` gives the channels of the levels, from the finest resolution down to one
    sixteenth of the picture's; self-attention works at the lowest level only. `norm_groups` divides all of
    them. The finest level has one position for each `patch_px` by `patch_px` pixels, as channels of their own
    (1, the published form: every pixel). Small networks are several times faster without the finest levels,
    where few channels meet many positions.
    """

    patch_px: int = 4
    width: int = 32
    width_multipliers: tuple[int, ...] = (4, 5, 6)
    num_res_blocks: int = 1
    z_channels: int = 64
    embed_dim: int = 32
    num_codes: int = 4096
    # With one channel a group, as 32 would give here, norms would wipe out plain colours.
    norm_groups: int = 8

    def __post_init__(self) -> None:
        if self.patch_px << (len(self.width_multipliers) - 1) != DOWNSAMPLE:
            raise ValueError(
                f"patch_px {self.patch_px} and {len(self.width_multipliers)} width_multipliers give "
                f"{self.patch_px}x2^{len(self.width_multipliers) - 1} pixels a code, expected {DOWNSAMPLE}"
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


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """norm, swish, conv twice, plus the input (through a 1x1 convolution where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, its projections 1x1 convolutions."""

    def __init__(self, channels: int, *, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

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
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
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
        self.conv_in = nn.Conv2d(3 * config.patch_px**2, widths[0], 3, padding=1)
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
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(x, self.patch_px))
        for level in self.down:
            h = level(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """[B, z_channels, h, w] -> [B, 3, 16h, 16w], about [-1, 1]. Levels are stored from fine to coarse and run
    from coarse to fine.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        widths = config.widths
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
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
        self.conv_out = nn.Conv2d(widths[0], 3 * config.patch_px**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid(h)
        for level in reversed(self.up):
            h = level(h)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch_px)


@dataclasses.dataclass(frozen=True)
class Quantised:
    """What the quantiser gives in training: vectors with straight-through gradient to every code, indices,
    and the loss terms.
    """

    z_q: Tensor  # [B, D, h, w]
    codes: Tensor  # [B, h, w] int64
    quantisation_loss: Tensor  # scalar
    sample_entropy: Tensor  # scalar, nats; to be made small: each position is sure of its code
    batch_entropy: Tensor  # scalar, nats; to be made large: all codes are used


class IndexQuantiser(nn.Module):
    """Index backpropagation: the one-hot choice passes its gradient to all codes through the softmax of the
    dot products.
    """

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        codebook_KD = torch.empty(num_codes, dim)
        if not codebook_KD.is_meta:  # a draw on the meta device would import PyTorch's compiler: seconds
            nn.init.normal_(codebook_KD)
        self.embedding = nn.Embedding(num_codes, dim, _weight=codebook_KD)

    def codes(self, z_BDhw: Tensor) -> Tensor:
        """argmax over codes of the raw dot product, fp32: [B, h, w] int64."""
        B, D, h, w = z_BDhw.shape
        z_ND = z_BDhw.float().permute(0, 2, 3, 1).reshape(-1, D)
        codebook_DK = self.embedding.weight.float().t()
        chunks = [(chunk @ codebook_DK).argmax(dim=1) for chunk in z_ND.split(_POSITIONS_A_CHUNK)]
        return torch.cat(chunks).view(B, h, w)

    def forward(
        self, z_BDhw: Tensor, *, entropy_temperature: float = 1.0, commitment: float = 0.25
    ) -> Quantised:
        """Training pass.

        Loss as published: mean‖z_q−z‖² + mean‖sg(z_q)−z‖² + β·mean‖z_q−sg(z)‖², where z_q carries
        the soft gradient in the first term and the plain choice in the other two ("double quantisation")."""
        B, D, h, w = z_BDhw.shape
        z_ND = z_BDhw.float().permute(0, 2, 3, 1).reshape(-1, D)
        codebook_KD = self.embedding.weight.float()
        logits_NK = z_ND @ codebook_KD.t()
        soft_NK = logits_NK.softmax(dim=1)
        codes_N = logits_NK.argmax(dim=1)
        hard_ND = F.embedding(codes_N, codebook_KD)
        # (one-hot + soft - sg(soft)) times the codebook without building the one-hot: the value is
        # the chosen code; the gradient
        # reaches that code directly, and all codes through the logits of the softmax.
        soft_ND = soft_NK @ codebook_KD.detach()
        through_ND = hard_ND + soft_ND - soft_ND.detach()
        loss = (
            F.mse_loss(through_ND, z_ND)
            + F.mse_loss(z_ND, hard_ND.detach())
            + commitment * F.mse_loss(hard_ND, z_ND.detach())
        )
        log_p_NK = (logits_NK / entropy_temperature).log_softmax(dim=1)
        p_NK = log_p_NK.exp()
        mean_K = p_NK.mean(dim=0)
        return Quantised(
            z_q=through_ND.view(B, h, w, D).permute(0, 3, 1, 2),
            codes=codes_N.view(B, h, w),
            quantisation_loss=loss,
            sample_entropy=-(p_NK * log_p_NK).sum(dim=1).mean(),
            batch_entropy=-(mean_K * (mean_K + 1e-9).log()).sum(),
        )


class VisionTokenizer(nn.Module):
    """Pictures uint8 [B, H, W, 3] <-> codes int64 [B, H/16, W/16]. H and W are multiples of 16."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = IndexQuantiser(config.num_codes, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @property
    def num_codes(self) -> int:
        return self.config.num_codes

    def latents(self, pixels_B3HW: Tensor) -> Tensor:
        """Pixels in [-1, 1] -> vectors before quantisation, [B, embed_dim, h, w]."""
        return self.quant_conv(self.encoder(pixels_B3HW))

    def pixels(self, z_q_BDhw: Tensor) -> Tensor:
        """Quantised vectors -> pixels, [B, 3, H, W], about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z_q_BDhw))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> int64 [B, H/16, W/16]; ValueError where a side is no multiple of 16."""
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"expected uint8 pictures [B, H, W, 3], got {images.dtype} {list(images.shape)}")
        if images.shape[1] % DOWNSAMPLE or images.shape[2] % DOWNSAMPLE or 0 in images.shape:
            raise ValueError(
                f"picture sides must be multiples of {DOWNSAMPLE}, "
                f"got {images.shape[1]}x{images.shape[2]}; resize them first"
            )
        return self.quantize.codes(self.latents(to_pixels(images)))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """int64 [B, h, w] -> uint8 [B, 16h, 16w, 3]; ValueError for a code outside the codebook."""
        if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.num_codes):
            raise ValueError(
                f"codes must lie in 0..{self.num_codes - 1}, got {int(codes.min())}..{int(codes.max())}"
            )
        z_q = F.embedding(codes, self.quantize.embedding.weight).permute(0, 3, 1, 2)
        return to_images(self.pixels(z_q.contiguous()))

    def save(self, folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float16) -> None:
        """Write `vision.json` and `vision.safetensors` into `folder`, each beside and then renamed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: t.detach().to("cpu", dtype).contiguous() for name, t in self.state_dict().items()}
        part = folder / "vision.safetensors.part"
        save_file(weights, part)
        part.replace(folder / "vision.safetensors")
        part = folder / "vision.json.part"
        part.write_text(json.dumps(dataclasses.asdict(self.config), indent=1) + "\n")
        part.replace(folder / "vision.json")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> VisionTokenizer:
        """Open what `save` wrote, in fp32, ready for inference. ValueError says what is missing or does not
        fit.
        """
        folder = Path(folder)
        for name in ("vision.json", "vision.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} has no {name}; expected a folder that VisionTokenizer.save wrote")
        fields = json.loads((folder / "vision.json").read_text())
        known = {field.name for field in dataclasses.fields(VisionConfig)}
        fields.setdefault("patch_px", 1)  # files from before there was a choice
        if set(fields) != known:
            raise ValueError(f"{folder / 'vision.json'} has keys {sorted(fields)}, expected {sorted(known)}")
        config = VisionConfig(**{**fields, "width_multipliers": tuple(fields["width_multipliers"])})
        try:
            weights = load_file(folder / "vision.safetensors", device=str(device))
        except SafetensorError as error:
            raise ValueError(
                f"{folder / 'vision.safetensors'} cannot be read ({error}); copy the file again"
            ) from error
        with torch.device("meta"):
            model = cls(config)
        expected = {name: t.shape for name, t in model.state_dict().items()}
        wrong = [n for n in expected.keys() | weights.keys() if n not in expected or n not in weights]
        wrong += [n for n in expected.keys() & weights.keys() if expected[n] != weights[n].shape]
        if wrong:
            raise ValueError(
                f"{folder / 'vision.safetensors'} does not fit vision.json at {sorted(wrong)[:5]}"
            )
        model.load_state_dict({name: t.float() for name, t in weights.items()}, assign=True)
        return model.eval().requires_grad_(False)


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_images(pixels: Tensor) -> Tensor:
    """float [B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3]; truncates, as the published decoder does."""
    return ((pixels.float() + 1.0) * 127.5).clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
