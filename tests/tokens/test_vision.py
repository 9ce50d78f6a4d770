"""The vision tokenizer against a second implementation of the published mathematics, tiny and at full size.

The second one reads a state dict by its published names, one plain formula after the other: group norms,
swish, attention and nearest-neighbour upsampling are written out, all scores against the codebook are there
at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from emuworld.tokens import vision
from emuworld.tokens.vision import PUBLISHED, VisionConfig, VisionTokenizer

TINY = VisionConfig(
    patch_px=1,
    width=32,
    width_multipliers=(1, 1, 2, 2, 4),
    num_res_blocks=2,
    z_channels=16,
    embed_dim=12,
    num_codes=700,
    norm_groups=32,
)
FULL_BYTES = 8 << 30  # 1.8 GB of weights, and the layers of a small picture several times


def random_weights(config: VisionConfig, *, seed: int) -> dict[str, Tensor]:
    """Every tensor of a tokenizer; large ones repeat a block of a million numbers, which is quicker made."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in VisionTokenizer(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        size = shape.numel()
        block = torch.randn(min(size, 1_000_003), generator=generator)  # no power of two: rows differ
        values = block.repeat(-(-size // len(block)))[:size].view(shape)
        if len(shape) == 4:
            values *= shape[1:].numel() ** -0.5
        elif name.endswith("weight") and len(shape) == 1:
            values = 1 + 0.1 * values
        elif len(shape) == 1:
            values *= 0.1
        weights[name] = values
    return weights


class Reference:
    """Pictures to codes and back, by the fact sheet's section 3."""

    def __init__(self, weights: Mapping[str, Tensor], *, num_res_blocks: int) -> None:
        self.weights = weights
        self.num_res_blocks = num_res_blocks

    def encode(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1
        h = self.conv("encoder.conv_in", x)
        for level in range(5):
            for i in range(self.num_res_blocks):
                h = self.resnet(f"encoder.down.{level}.block.{i}", h)
                if level == 4:
                    h = self.attention(f"encoder.down.4.attn.{i}", h)
            if level < 4:
                padded = torch.zeros(*h.shape[:2], h.shape[2] + 1, h.shape[3] + 1)
                padded[:, :, :-1, :-1] = h
                h = self.conv(f"encoder.down.{level}.downsample.conv", padded, stride=2, padding=0)
        h = self.middle("encoder", h)
        h = self.conv("encoder.conv_out", self.swish(self.norm("encoder.norm_out", h)))
        z = self.conv("quant_conv", h, padding=0)
        scores = torch.einsum("bdhw,nd->bnhw", z, self.weights["quantize.embedding.weight"])
        return scores.argmax(dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        z = self.weights["quantize.embedding.weight"][codes].permute(0, 3, 1, 2).contiguous()
        h = self.conv("decoder.conv_in", self.conv("post_quant_conv", z, padding=0))
        h = self.middle("decoder", h)
        for level in (4, 3, 2, 1, 0):
            for i in range(self.num_res_blocks + 1):
                h = self.resnet(f"decoder.up.{level}.block.{i}", h)
                if level == 4:
                    h = self.attention(f"decoder.up.4.attn.{i}", h)
            if level > 0:
                h = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                h = self.conv(f"decoder.up.{level}.upsample.conv", h)
        y = self.conv("decoder.conv_out", self.swish(self.norm("decoder.norm_out", h)))
        return ((y + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def conv(self, name: str, x: Tensor, *, stride: int = 1, padding: int = 1) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.conv2d(x, weight, bias, stride=stride, padding=padding)

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = x.reshape(len(x), 32, -1)
        mean = groups.mean(dim=2, keepdim=True)
        variance = (groups - mean).square().mean(dim=2, keepdim=True)
        flat = ((groups - mean) / (variance + 1e-6).sqrt()).view(x.shape)
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return flat * weight[:, None, None] + bias[:, None, None]

    def swish(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def resnet(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", self.swish(self.norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", self.swish(self.norm(f"{name}.norm2", h)))
        if f"{name}.nin_shortcut.weight" in self.weights:
            x = self.conv(f"{name}.nin_shortcut", x, padding=0)
        return x + h

    def attention(self, name: str, x: Tensor) -> Tensor:
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h, padding=0).flatten(2) for part in "qkv")
        scores = torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5
        mixed = torch.einsum("bij,bcj->bci", scores.softmax(dim=2), v).view(x.shape)
        return x + self.conv(f"{name}.proj_out", mixed, padding=0)

    def middle(self, half: str, h: Tensor) -> Tensor:
        h = self.resnet(f"{half}.mid.block_1", h)
        return self.resnet(f"{half}.mid.block_2", self.attention(f"{half}.mid.attn_1", h))


def pictures(*shape: int, seed: int) -> Tensor:
    """Noise on a gradient, so that both plain areas and edges are there."""
    noise = torch.randint(0, 80, (*shape, 3), generator=torch.Generator().manual_seed(seed))
    return (noise + torch.linspace(0, 170, shape[-1])[:, None]).to(torch.uint8)


@torch.no_grad()
def check_against_reference(config: VisionConfig, images: Tensor, *, seed: int) -> None:
    weights = random_weights(config, seed=seed)
    ours = VisionTokenizer.from_tensors(config, weights, source="test")
    reference = Reference(weights, num_res_blocks=config.num_res_blocks)
    codes = reference.encode(images)
    assert torch.equal(ours.encode(images), codes)
    assert len(codes.unique()) > codes.numel() ** 0.5, "the picture should ask for many codes"
    pixels, expected = ours.decode(codes), reference.decode(codes)
    assert pixels.shape == images.shape and expected.float().std() > 20
    assert (pixels.int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("shape", [(1, 128, 128), (3, 144, 208), (1, 512, 16), (2, 16, 48)])
def test_tiny_equals_the_second_implementation(shape: tuple[int, int, int]) -> None:
    check_against_reference(TINY, pictures(*shape, seed=1), seed=2)


def test_full_size_has_the_published_parameters() -> None:
    with torch.device("meta"):
        weights = VisionTokenizer(PUBLISHED).state_dict()
    assert sum(tensor.numel() for tensor in weights.values()) == 455_336_963
    assert weights["quantize.embedding.weight"].shape == (131_072, 256)
    assert [name for name in weights if "nin_shortcut.weight" in name] == [
        "encoder.down.2.block.0.nin_shortcut.weight",
        "encoder.down.4.block.0.nin_shortcut.weight",
        "decoder.up.1.block.0.nin_shortcut.weight",
        "decoder.up.3.block.0.nin_shortcut.weight",
    ]


def test_full_size_equals_the_second_implementation() -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < FULL_BYTES:
        pytest.skip(f"the full size needs {FULL_BYTES >> 30} GiB of free memory, here are {free >> 30}")
    check_against_reference(PUBLISHED, pictures(1, 32, 32, seed=3), seed=4)


def test_the_score_is_the_raw_dot_product() -> None:
    """A long code wins over the one that is nearest or points the same way."""
    quantiser = vision.IndexQuantiser(3, 2)
    with torch.no_grad():
        quantiser.embedding.weight.copy_(torch.tensor([[1.0, 0.0], [3.0, 3.0], [-1.0, 0.0]]))
    assert quantiser.codes(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)).item() == 1


def test_chunks_of_scores_give_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    quantiser = vision.IndexQuantiser(500, 8)
    z = torch.randn(2, 8, 7, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.einsum("bdhw,nd->bnhw", z, quantiser.embedding.weight).argmax(dim=1)
    for size in (1, 500 * 9, 500 * 70, 1 << 26):
        monkeypatch.setattr(vision, "_SCORES_A_CHUNK", size)
        assert torch.equal(quantiser.codes(z), expected)


def test_no_chunk_of_scores_is_large() -> None:
    assert vision._SCORES_A_CHUNK * 4 <= 256 << 20


@pytest.mark.parametrize("height, width", [(128, 2048), (2048, 128), (1040, 784)])
def test_any_size(height: int, width: int) -> None:
    config = VisionConfig(
        patch_px=1, width=4, width_multipliers=(1,) * 5, embed_dim=4, num_codes=30, norm_groups=2
    )
    tokenizer = VisionTokenizer.from_tensors(config, random_weights(config, seed=0), source="test")
    codes = tokenizer.encode(pictures(1, height, width, seed=0))
    assert codes.shape == (1, height // 16, width // 16) and len(codes.unique()) > 1
    assert tokenizer.decode(codes).shape == (1, height, width, 3)


def test_what_cannot_be_encoded_or_decoded_is_said() -> None:
    tokenizer = VisionTokenizer.from_tensors(TINY, random_weights(TINY, seed=0), source="test")
    for wrong in (torch.zeros(1, 3, 32, 32), torch.zeros(32, 32, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="expected uint8 pictures"):
            tokenizer.encode(wrong)
    with pytest.raises(ValueError, match="multiples of 16, got 32x40"):
        tokenizer.encode(torch.zeros(1, 32, 40, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"0\.\.699, got 0\.\.700"):
        tokenizer.decode(torch.tensor([[[0, 700]]]))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"width": 0}, "width must be an integer"),
        ({"num_codes": 10**12}, "num_codes must be an integer in 1..1048576"),
        ({"num_res_blocks": 10**6}, "num_res_blocks must be an integer in 1..64"),
        ({"width_multipliers": (1, 1)}, "one value for each level"),
        ({"patch_px": 1}, "one value for each level"),
        ({"width": 20}, "multiples of norm_groups"),
        ({"embed_dim": "8"}, "embed_dim must be an integer"),
        ({"width": True}, "width must be an integer"),
    ],
)
def test_senseless_sizes_are_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        VisionConfig(**change)  # type: ignore[arg-type]
