"""Checkpoint folders: round trip, what transformers makes of them, and every way they can be wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emuworld.model import checkpoint
from emuworld.model.config import TransformerConfig, sized
from emuworld.model.transformer import Transformer


def built(**changes: object) -> Transformer:
    model = Transformer(sized("tiny", vocab_size=120, **changes)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "model", built())
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [True, False])
def test_round_trip(tied: bool, tmp_path: Path) -> None:
    model = built(tie_word_embeddings=tied)
    checkpoint.save(tmp_path, model)
    again = checkpoint.load(tmp_path)
    assert again.config == model.config and not again.training
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    for (name, old), (other, new) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(old, new)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_types_of_the_file_and_of_the_model(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, built(), dtype=torch.bfloat16)
    assert checkpoint.load(tmp_path).dtype == torch.bfloat16
    assert checkpoint.load(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_opens_what_we_save(tied: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = built(tie_word_embeddings=tied)
    checkpoint.save(tmp_path, model)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reference).__name__ == "Qwen3ForCausalLM"
    ids_BT = torch.randint(0, 120, (2, 40), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(model.logits(model(ids_BT)), reference(ids_BT).logits, atol=1e-4, rtol=0)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert (tmp_path / "theirs" / checkpoint.INDEX_FILE).exists()
    back = checkpoint.load(tmp_path / "theirs")
    assert back.config == model.config
    assert torch.equal(back.logits(back(ids_BT)), model.logits(model(ids_BT)))


def test_loading_and_a_cpu_step_import_nothing_slow(folder: Path) -> None:
    """transformers costs two to three seconds, PyTorch's compiler up to seven: neither is on this path."""
    script = (
        "import sys, torch\n"
        "from emuworld.model import checkpoint\n"
        "from emuworld.model.exact import exact\n"
        "model = exact(checkpoint.load(sys.argv[1]))\n"
        "model.logits(model(torch.zeros(1, 3, dtype=torch.int64)))\n"
        "print(*{'transformers', 'sympy', 'torch._dynamo'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_saving_over_a_folder_keeps_its_other_files(folder: Path) -> None:
    (folder / "vision.json").write_text("{}")
    model = built()
    with torch.no_grad():
        model.model.norm.weight.fill_(2.0)
    checkpoint.save(folder, model)
    assert (folder / "vision.json").read_text() == "{}"
    assert checkpoint.load(folder).model.norm.weight[0] == 2.0


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Store these tensors (None: leave it out) beside the others; `__` stands for a dot."""
    tensors = load_file(folder / checkpoint.WEIGHTS_FILE)
    for key, tensor in changes.items():
        tensors.pop(key.replace("__", "."), None)
        if tensor is not None:
            tensors[key.replace("__", ".")] = tensor
    save_file(tensors, folder / checkpoint.WEIGHTS_FILE)


def test_keys_that_do_not_fit_are_named(folder: Path) -> None:
    rewrite(folder, model__norm__weight=None, model__extra=torch.zeros(3))
    rewrite(folder, model__embed_tokens__weight=torch.zeros(7, 64))
    with pytest.raises(ValueError) as caught:
        checkpoint.load(folder)
    message = str(caught.value)
    assert "missing tensors: model.norm.weight" in message
    assert "unexpected tensors: model.extra" in message
    assert "model.embed_tokens.weight is [7, 64], expected [120, 64]" in message


def test_a_tied_head_stored_twice_is_no_fault(folder: Path) -> None:
    rewrite(folder, lm_head__weight=torch.zeros(120, 64))
    model = checkpoint.load(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.any()


@pytest.mark.parametrize("kept", [0, 5, 600, -1])
def test_a_truncated_file_is_named(folder: Path, kept: int) -> None:
    weights = folder / checkpoint.WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged or cut short"):
        checkpoint.load(folder)


def test_absent_and_broken_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        checkpoint.load(tmp_path / "nowhere")
    (folder / checkpoint.WEIGHTS_FILE).unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: no such file"):
        checkpoint.load(folder)
    for text, complaint in (
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "no vocab_size"),
    ):
        (folder / checkpoint.CONFIG_FILE).write_text(text)
        with pytest.raises(ValueError, match=complaint):
            checkpoint.load(folder)


def test_an_index_stays_in_its_folder(folder: Path) -> None:
    (folder / checkpoint.INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ValueError, match="not a file of this folder"):
        checkpoint.load(folder)


def test_a_configuration_reads_back_and_refuses_what_is_not_computed() -> None:
    config = sized("small", vocab_size=1000, rope_theta=5e5, attention_dropout=0.1)
    assert TransformerConfig.from_json(config.to_json()) == config
    newer = {**config.to_json(), "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    del newer["rope_theta"]
    assert TransformerConfig.from_json(newer) == config
    for change in (
        {"rope_scaling": {"type": "linear", "factor": 2}},
        {"attention_bias": True},
        {"hidden_act": "gelu"},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            TransformerConfig.from_json({**config.to_json(), **change})
    with pytest.raises(ValueError, match="multiple of num_kv_heads"):
        sized("small", vocab_size=10, num_kv_heads=3)
    with pytest.raises(ValueError, match="unknown transformer size"):
        sized("huge", vocab_size=10)
