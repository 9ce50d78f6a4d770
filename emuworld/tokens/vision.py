"""IBQ vision tokenizer: pictures <-> grids of code indices, 16 pixels a code along each side.

The published tokenizer's index-backpropagation quantiser between the two halves of its network
(`emuworld.tokens.vision_network`), at any size. It is not the training loop (`emuworld.training.tokenizer`);
the release's own files are read in `emuworld.tokens.vision_published`. Encoding runs in fp32: half precision
changes about one code in twelve. Decoding does too, with products in TF32 on CUDA; there, with Triton, a
tokenizer without the finest levels (not the published kind) decodes in fp16 if a trial shows that it can
(`emuworld.tokens.vision_half`).

Sources: Emu3.5 (arXiv 2510.26583) section 2.2; IBQ (arXiv 2412.02692) for the quantiser and its losses.
Departures: the raw dot products are chunked over positions instead of materialised at once, and entropy terms
take their temperature as an argument.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emuworld.files import write_text, written
from emuworld.staging import moved
from emuworld.tokens import strips, vision_half
from emuworld.tokens.vision_network import (
    DOWNSAMPLE,
    PUBLISHED,
    Decoder,
    Encoder,
    VisionConfig,
    vision_kernels,
)
from emuworld.tokens.vision_operations import to_images

__all__ = [
    "DOWNSAMPLE",
    "PUBLISHED",
    "IndexQuantiser",
    "Quantised",
    "VisionConfig",
    "VisionTokenizer",
    "to_images",
    "to_pixels",
]

# 256 MiB of fp32 scores, the most that one chunk of an encode may take: 512 positions of the published codes.
_SCORES_A_CHUNK = 64 << 20
# Of a layer of all pictures that a GPU makes together: enough for it; each batch is copied beside the next.
_BATCH_BYTES = 128 << 20


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
        positions = max(_SCORES_A_CHUNK // codebook_DK.shape[1], 1)
        chunks = [(chunk @ codebook_DK).argmax(dim=1) for chunk in z_ND.split(positions)]
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
        self._half: vision_half.HalfDecoder | None = None
        self._has_tried_half = False

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
        with _precision(images.device, "ieee"):
            parts = [self.quantize.codes(self.latents(to_pixels(part))) for part in self._split(images, 1)]
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, codes: Tensor, *, known: bool = False) -> Tensor:
        """int64 [B, h, w] -> uint8 [B, 16h, 16w, 3]; ValueError for a code outside the codebook. Codes may be
        on the host: then nothing waits for the GPU; nor where they are `known` to lie in the codebook.
        """
        if not known and codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < self.num_codes):
            raise ValueError(
                f"codes must lie in 0..{self.num_codes - 1}, got {int(codes.min())}..{int(codes.max())}"
            )
        codes = moved(codes, self.quantize.embedding.weight.device)
        parts = self._split(codes, DOWNSAMPLE)
        with _precision(codes.device, "tf32"):
            if codes.is_cuda and len(parts) == 1 and (half := self._half_decoder()):
                return half.images(codes)
            return torch.cat([to_images(self.pixels(self.vectors(part))) for part in parts])

    def _half_decoder(self) -> vision_half.HalfDecoder | None:
        """Made and tried when first asked for, and kept as long as the weights stay what and where they are;
        None where there are no kernels for it, or it would not do.
        """
        if vision_kernels is None or self.config.patch_px == 1 or self.training:
            return None
        if not self._has_tried_half:
            conv = self.post_quant_conv
            codebook_KD = self.quantize.embedding.weight
            vectors_KZ = F.linear(codebook_KD, conv.weight.flatten(1), conv.bias)
            self._half, self._has_tried_half = vision_half.tried(self.decoder, vectors_KZ), True
        return self._half

    def _apply(self, *args: Any, **settings: Any) -> VisionTokenizer:
        self._half, self._has_tried_half = None, False
        return super()._apply(*args, **settings)

    def load_state_dict(self, *args: Any, **settings: Any) -> Any:
        self._half, self._has_tried_half = None, False
        return super().load_state_dict(*args, **settings)

    def code_fingerprint(self) -> str:
        """Of what makes codes of pictures, encoder and codebook: who draws them again may have learnt on."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            if not name.startswith(("decoder.", "post_quant_conv.")):
                digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
        return digest.hexdigest()

    def vectors(self, codes: Tensor) -> Tensor:
        """int64 [B, h, w] -> what the codes stand for, [B, embed_dim, h, w]."""
        return F.embedding(codes, self.quantize.embedding.weight).permute(0, 3, 1, 2).contiguous()

    def pictures_at_once(self, size: tuple[int, ...]) -> int:
        """How many pictures of [h, w] codes are decoded together without their layers filling a memory."""
        positions = size[0] * size[1] * (DOWNSAMPLE // self.config.patch_px) ** 2
        layer_bytes = self.config.widths[0] * positions * self.quantize.embedding.weight.element_size()
        return max(1, _BATCH_BYTES // layer_bytes)

    def _split(self, batch: Tensor, scale: int) -> tuple[Tensor, ...]:
        """One by one where a picture's first layer is large: several would be held at once."""
        height, width = batch.shape[1] * scale, batch.shape[2] * scale
        patch, finest = self.config.patch_px, self.config.widths[0]
        large = strips.needed(finest, height // patch, width // patch, like=self.quantize.embedding.weight)
        return batch.split(1) if large else (batch,)

    def save(self, folder: str | os.PathLike[str], *, dtype: torch.dtype = torch.float16) -> None:
        """Write `vision.json` and `vision.safetensors` into `folder`, each beside and then renamed."""
        folder = Path(folder)
        weights = {name: t.detach().to("cpu", dtype).contiguous() for name, t in self.state_dict().items()}
        with written(folder / "vision.safetensors") as beside:
            save_file(weights, beside)
        write_text(folder / "vision.json", json.dumps(dataclasses.asdict(self.config), indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> VisionTokenizer:
        """Open what `save` wrote, in fp32, ready for inference. ValueError says what is missing or does not
        fit.
        """
        folder = Path(folder)
        for name in ("vision.json", "vision.safetensors"):
            if not (folder / name).is_file():
                raise ValueError(
                    f"{folder} has no {name}; expected a folder that train stage=tokenizer wrote"
                )
        try:
            config = VisionConfig.from_json(json.loads((folder / "vision.json").read_text("utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{folder / 'vision.json'} does not describe a tokenizer: {error}") from error
        try:
            weights = load_file(folder / "vision.safetensors", device=str(device))
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{folder / 'vision.safetensors'} cannot be read ({error}); copy the file again"
            ) from error
        return cls.from_tensors(config, weights, source=folder / "vision.safetensors")

    @classmethod
    def from_tensors(
        cls, config: VisionConfig, weights: Mapping[str, Tensor], *, source: str | os.PathLike[str]
    ) -> VisionTokenizer:
        """A tokenizer of these weights in fp32, ready for inference. ValueError names the file `source` and
        what in it is missing, not expected, of another shape or no floating-point numbers.
        """
        with torch.device("meta"):
            model = cls(config)
        expected = model.state_dict()
        faults = [f"no {name}" for name in sorted(expected.keys() - weights.keys())]
        faults += [f"unexpected {name}" for name in sorted(weights.keys() - expected.keys())]
        for name in sorted(expected.keys() & weights.keys()):
            if weights[name].shape != expected[name].shape:
                faults.append(f"{name} {list(weights[name].shape)}, expected {list(expected[name].shape)}")
            elif not weights[name].is_floating_point():
                faults.append(f"{name} holds {weights[name].dtype}, expected floating-point numbers")
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise ValueError(f"{source} does not fit its configuration: {'; '.join(faults[:5])}{more}")
        model.load_state_dict({name: t.float() for name, t in weights.items()}, assign=True)
        return model.eval().requires_grad_(False)


@contextmanager
def _precision(device: torch.device, name: str) -> Iterator[None]:
    """On CUDA, how products of fp32 are computed: "ieee" for codes, which TF32 would change as 16 bits do;
    "tf32" for pixels, a quarter of the time and 0.1 grey levels apart (256 pictures of 256 px, one H200).
    """
    if device.type != "cuda":
        yield
        return
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = name
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


def to_pixels(images: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
