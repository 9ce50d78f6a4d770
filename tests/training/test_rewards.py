"""Rewards by hand: scales, weights, what does not apply, what is left out, and the networks' plumbing."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from emuworld.training.rewards import Answer, Blend, Scale, preservation

CPU = torch.device("cpu")


def _flat(level: int, side: int = 8) -> np.ndarray:
    return np.full((side, side, 3), level, np.uint8)


def _brightness(answers: Sequence[Answer]) -> list[float]:
    return [float(answer.pictures[0].mean()) if answer.pictures else math.nan for answer in answers]


def test_a_scale_goes_from_one_to_ten_either_way() -> None:
    np.testing.assert_allclose(
        Scale(name="x", low=2.0, high=4.0).scaled([1, 2, 3, 4, 9, math.nan]), [1, 1, 5.5, 10, 10, math.nan]
    )
    np.testing.assert_allclose(Scale(name="x", low=4.0, high=2.0).scaled([5, 3, 0]), [1, 5.5, 10])
    with pytest.raises(ValueError, match="weight must be above 0"):
        Scale(name="x", weight=0.0)


def test_the_blend_is_the_weighted_mean_of_what_applies() -> None:
    scales = (
        Scale(name="bright", weight=3.0, low=0.0, high=100.0),
        Scale(name="preservation", weight=1.0, low=0.0, high=1.0),
    )
    blend = Blend(scales, handed_down={"bright": lambda scale, device: _brightness}, device=CPU)
    half = _flat(50)
    half[:4] = 200
    scores = blend(
        [
            Answer(mode="t2i", prompt="", pictures=(_flat(100),)),
            Answer(mode="x2i", prompt="", references=(_flat(60),), pictures=(half,)),
            Answer(mode="t2i", prompt=""),
        ]
    )
    np.testing.assert_allclose(scores.terms["preservation"], [math.nan, 5.5, math.nan])
    np.testing.assert_allclose(scores.total, [10.0, (3 * 10.0 + 5.5) / 4, 1.0])
    assert preservation([Answer(mode="x2i", prompt="", references=(_flat(9, 4),), pictures=(_flat(9),))]) == [
        1.0
    ]


def test_what_cannot_be_loaded_is_left_out_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    scales = (
        Scale(name="alignment", model=str(tmp_path)),
        Scale(name="aesthetics"),
        Scale(name="bright", high=255.0),
    )
    blend = Blend(scales, handed_down={"bright": lambda scale, device: _brightness}, device=CPU)
    assert set(blend.left_out) == {"alignment", "aesthetics"}
    said = capsys.readouterr().out
    assert "reward alignment is left out" in said and "reward aesthetics is left out" in said
    assert set(blend([Answer(mode="t2i", prompt="", pictures=(_flat(255),))]).terms) == {"bright"}
    with pytest.raises(ValueError, match="no reward term is left"):
        Blend(scales[:2], handed_down={}, device=CPU)
    with pytest.raises(
        ValueError, match="no reward term is called 'beauty'; there are aesthetics, alignment"
    ):
        Blend([Scale(name="beauty")], handed_down={}, device=CPU)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of random weights in the layout of the published ones."""
    folder = tmp_path_factory.mktemp("clip")
    pieces = ["a", "b", "r", "e", "d", "a</w>", "d</w>", "e</w>"]
    words = {word: i for i, word in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": len(words), "max_position_embeddings": 12, "eos_token_id": 9},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer = transformers.CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12
    )
    images = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    transformers.CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def test_networks_judge_what_they_are_shown(clip: Path, tmp_path: Path) -> None:
    """Against transformers' own calls: alignment, aesthetics with a given head, identity."""
    save_file({"weight": torch.ones(1, 8), "bias": torch.tensor([5.0])}, tmp_path / "head.safetensors")
    names = ("alignment", "aesthetics", "identity")
    scales = [
        Scale(name=name, model=str(clip), head=str(tmp_path / "head.safetensors"), low=-10.0, high=10.0)
        for name in names
    ]
    blend = Blend(scales, handed_down={}, device=CPU)
    assert not blend.left_out
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 256, (20, 20, 3)).astype(np.uint8) for _ in range(2))
    terms = blend(
        [
            Answer(mode="x2i", prompt="a red bed", references=(one,), pictures=(other,)),
            Answer(mode="x2i", prompt="red", references=(one,), pictures=(one, other)),
            Answer(mode="t2i", prompt="a", pictures=(one,)),
        ]
    ).terms
    raw = {name: (values - 1.0) / 9.0 * 20.0 - 10.0 for name, values in terms.items()}
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    processor = transformers.CLIPProcessor.from_pretrained(clip)
    inputs = processor(text=["a red bed"], images=[one, other], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs)
    vectors = out.image_embeds / out.image_embeds.norm(dim=-1, keepdim=True)
    words = out.text_embeds / out.text_embeds.norm(dim=-1, keepdim=True)
    np.testing.assert_allclose(raw["alignment"][0], float(vectors[1] @ words[0]), atol=1e-4)
    np.testing.assert_allclose(raw["aesthetics"][2], float(vectors[0].sum()) + 5.0, atol=1e-4)
    np.testing.assert_allclose(raw["identity"][:2], [float(vectors[0] @ vectors[1])] * 2, atol=1e-4)
    assert math.isnan(raw["identity"][2])


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of random weights in the layout of the published ones: pictures alone."""
    folder = tmp_path_factory.mktemp("dino")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.Dinov2Model(config).save_pretrained(folder)
    transformers.BitImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    ).save_pretrained(folder)
    return folder


def test_identity_takes_a_network_of_pictures_alone(dino: Path) -> None:
    """Against transformers' own call; alignment, which reads words, says that it cannot."""
    scales = [Scale(name=name, model=str(dino), low=-1.0, high=1.0) for name in ("identity", "alignment")]
    blend = Blend(scales, handed_down={}, device=CPU)
    assert "reads no words" in blend.left_out["alignment"]
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 256, (32, 32, 3)).astype(np.uint8) for _ in range(2))
    scores = blend([Answer(mode="x2i", prompt="", references=(one,), pictures=(one, other))])
    model = transformers.Dinov2Model.from_pretrained(dino).eval()
    pixels = transformers.AutoImageProcessor.from_pretrained(dino)(images=[one, other], return_tensors="pt")
    with torch.no_grad():
        vectors = torch.nn.functional.normalize(model(**pixels).pooler_output, dim=-1)
    cosine = float(vectors[0] @ vectors[1])
    assert cosine < 0.999
    np.testing.assert_allclose((scores.terms["identity"] - 1.0) / 9.0 * 2.0 - 1.0, [cosine], atol=1e-5)
