"""Checkpoints with matrices in 8 bits: round trip, size, what transformers makes of them, and damage."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_transformer import built

from emuworld.model import checkpoint, int8
from emuworld.model.exact import exact

MATRIX = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "model", built(), dtype=torch.bfloat16, eight_bits=True)
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tied: bool, tmp_path: Path) -> None:
    model = built(tie_word_embeddings=tied)
    checkpoint.save(tmp_path, model, dtype=torch.bfloat16, eight_bits=True)
    again = checkpoint.load(tmp_path)
    assert again.config == model.config and again.dtype == torch.float32
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    theirs = again.state_dict()
    for name, weight in model.state_dict().items():
        if int8.is_stored(name, tuple(weight.shape)):
            half_a_step = weight.abs().amax(1, keepdim=True) / int8.LARGEST / 2
            assert ((theirs[name] - weight).abs() <= half_a_step * 1.001).all(), name
        else:
            assert torch.equal(theirs[name], weight.bfloat16().float()), name
    # written again from what was read, nothing changes any more
    checkpoint.save(tmp_path / "again", again, dtype=torch.bfloat16, eight_bits=True)
    first, second = (load_file(path / checkpoint.WEIGHTS_FILE) for path in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-6, atol=0)


def test_a_matrix_takes_a_byte_a_weight(folder: Path) -> None:
    stored = load_file(folder / checkpoint.WEIGHTS_FILE)
    assert stored[MATRIX].dtype == torch.int8 and stored[MATRIX].abs().max() == int8.LARGEST
    assert stored[MATRIX + int8.SCALE].shape == (len(stored[MATRIX]), 1)
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert checkpoint.has_eight_bits(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


@torch.no_grad()
def test_the_form_for_the_cpu_loses_nothing(folder: Path) -> None:
    """Its own 8 bits are those that are stored."""
    form = exact(checkpoint.load(folder))
    down = form.layers[1].down
    values_NK = torch.stack([down(row[None])[0] for row in torch.eye(down.num_inputs)], dim=1)
    stored = load_file(folder / checkpoint.WEIGHTS_FILE)
    torch.testing.assert_close(
        values_NK, int8.floats(stored[MATRIX], stored[MATRIX + int8.SCALE]), rtol=1e-5, atol=0
    )


@torch.no_grad()
def test_transformers_opens_it(folder: Path) -> None:
    pytest.importorskip(
        "compressed_tensors", reason="transformers needs compressed-tensors for 8-bit weights"
    )
    from transformers import AutoModelForCausalLM

    model = checkpoint.load(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(reference).__name__ == "Qwen3ForCausalLM"
    ids_BT = torch.randint(0, 120, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.logits(model(ids_BT)), reference(ids_BT).logits, atol=1e-4, rtol=0)


def test_zeros_stay_zeros() -> None:
    values_NK, scale_N1 = int8.quantised(torch.zeros(3, 4))
    assert not values_NK.any() and (scale_N1 > 0).all()
    assert not int8.floats(values_NK, scale_N1).any()


def test_other_layouts_have_no_8_bits(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one file of a Qwen3 folder"):
        checkpoint.save(tmp_path, built(), eight_bits=True, max_shard_bytes=10_000)
    with pytest.raises(ValueError, match="one file of a Qwen3 folder"):
        checkpoint.save(tmp_path, built(), eight_bits=True, published=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["no scales", "too few scales"])
def test_damaged_scales_are_named(damage: str, folder: Path) -> None:
    stored = load_file(folder / checkpoint.WEIGHTS_FILE)
    scales = stored.pop(MATRIX + int8.SCALE)
    if damage == "too few scales":
        stored[MATRIX + int8.SCALE] = scales[:-1].contiguous()
    save_file(stored, folder / checkpoint.WEIGHTS_FILE)
    expected = "nor I8 with scales" if damage == "no scales" else r"weight_scale is \[63, 1\]"
    with pytest.raises(ValueError, match=expected):
        checkpoint.load(folder)
