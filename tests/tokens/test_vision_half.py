"""The decoder in halves: its pixels are those of the decoder, or a trial refuses it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import emuworld
from emuworld.tokens import vision, vision_half
from emuworld.tokens.vision import VisionConfig, VisionTokenizer, to_images
from emuworld.tokens.vision_half import HalfDecoder, tried

CONFIGS = {
    "built-in kind": VisionConfig(width=16, width_multipliers=(1, 2, 2), norm_groups=4, num_codes=300),
    "published kind": VisionConfig(
        patch_px=1, width=8, width_multipliers=(1, 1, 2, 2, 4), num_res_blocks=2, num_codes=40
    ),
    "one level": VisionConfig(patch_px=16, width=16, width_multipliers=(2,), num_codes=300),
}
BUILT_IN = Path(emuworld.__file__).parent / "weights" / "small"


def random_tokenizer(config: VisionConfig) -> VisionTokenizer:
    """Uneven norms and biases that are seen; pixels within their range."""
    torch.manual_seed(0)
    model = VisionTokenizer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.decoder.conv_out.weight.mul_(0.3)
    return model


def vectors_of(model: VisionTokenizer) -> torch.Tensor:
    conv = model.post_quant_conv
    return F.linear(model.quantize.embedding.weight, conv.weight.flatten(1), conv.bias)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("size", [(16, 16), (5, 3), (1, 1)])
def test_every_bias_is_added_and_every_part_is_there(config: VisionConfig, size: tuple[int, int]) -> None:
    """In fp32, which differs from the decoder by the order of its sums alone."""
    model = random_tokenizer(config)
    codes = torch.randint(0, config.num_codes, (2, *size))
    expected = to_images(model.pixels(model.vectors(codes)))
    assert expected.float().std() > 20, "nothing to see"
    found = HalfDecoder(model.decoder, vectors_of(model), dtype=torch.float32).images(codes)
    assert found.shape == expected.shape and found.dtype == torch.uint8
    apart = (found.int() - expected.int()).abs()
    assert int(apart.max()) <= 1 and float(apart.float().mean()) < 1e-3


def test_halves_do_for_small_numbers_only() -> None:
    model = random_tokenizer(CONFIGS["built-in kind"])
    half = tried(model.decoder, vectors_of(model))
    assert isinstance(half, HalfDecoder)
    codes = torch.randint(0, 300, (2, 5, 7))
    apart = (half.images(codes).int() - model.decode(codes).int()).abs()
    assert int(apart.max()) <= 2 and float((apart > 0).float().mean()) < 0.1
    model.decoder.mid.block_1.conv2.bias[3] += 20_000.0
    assert tried(model.decoder, vectors_of(model)) is None, "a fourth of what halves hold, and more"
    model.decoder.mid.block_1.conv2.bias[3] += 100_000.0
    assert tried(model.decoder, vectors_of(model)) is None, "more than halves hold"


def test_other_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_tokenizer(CONFIGS["one level"])
    assert tried(model.decoder, vectors_of(model)) is not None
    monkeypatch.setattr(vision_half, "_MOST_MOVED", 0.0)
    assert tried(model.decoder, vectors_of(model)) is None


def test_weights_that_change_are_tried_again() -> None:
    """And a CPU decodes in fp32 always."""
    model = random_tokenizer(CONFIGS["one level"])
    model.decode(torch.zeros(1, 2, 2, dtype=torch.int64))
    assert not model._has_tried_half
    for change in (lambda: model.float(), lambda: model.load_state_dict(model.state_dict())):
        model._half, model._has_tried_half = tried(model.decoder, vectors_of(model)), True
        change()
        assert model._half is None and not model._has_tried_half


@pytest.mark.gpu
def test_the_built_in_weights_decode_in_halves_on_the_gpu() -> None:
    """Proves that the trial takes them, and that pixels are those of fp32 but for single grey levels."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    model = VisionTokenizer.load(BUILT_IN, device="cuda")
    for size in ((16, 16), (9, 13), (2, 1)):
        codes = torch.randint(0, model.num_codes, (70, *size), generator=torch.Generator().manual_seed(0))
        found = model.decode(codes)
        assert model._half is not None
        for _ in range(3):  # computed, recorded, replayed with other codes in between
            assert torch.equal(model.decode(codes), found)
            model.decode(codes.flip(0))
        with vision._precision(torch.device("cuda"), "ieee"):
            expected = to_images(model.pixels(model.vectors(codes.cuda())))
        apart = (found.int() - expected.int()).abs()
        assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 0.08
