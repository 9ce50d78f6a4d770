"""Checkpoint folders: round trip, what transformers makes of them, and every way they can be wrong."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_transformer import built

from emuworld.model import checkpoint
from emuworld.model.config import TransformerConfig, sized
from emuworld.model.transformer import Transformer
from emuworld.tokens.vocabulary import EMU35


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


# ---- shards and the published layout --------------------------------------------------------------


def test_shards_round_and_replace_what_was_there(tmp_path: Path) -> None:
    model = built(tie_word_embeddings=False)
    seen: list[tuple[int, int]] = []
    checkpoint.save(tmp_path, model, max_shard_bytes=100_000, on_bytes=lambda *step: seen.append(step))
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(shard.stat().st_size < 102_000 for shard in shards)
    index = json.loads((tmp_path / checkpoint.INDEX_FILE).read_text())
    num_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert index["metadata"]["total_size"] == num_bytes and seen[-1] == (num_bytes, num_bytes)
    assert index["weight_map"].keys() == model.state_dict().keys()
    again = checkpoint.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    checkpoint.save(tmp_path, again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    checkpoint.save(tmp_path, again, max_shard_bytes=1 << 30)
    names = ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@torch.no_grad()
def test_logits_of_the_published_layout_are_those_of_transformers(tmp_path: Path) -> None:
    """4 layers, the full vocabulary, fp32: published shards, opened, written as Qwen3, opened by both."""
    from transformers import AutoModelForCausalLM

    config = sized(
        "tiny",
        vocab_size=EMU35.size,
        num_layers=4,
        tie_word_embeddings=False,
        rms_norm_eps=1e-3,  # large, and a short rotary base: a default in their place would show
        rope_theta=5000.0,
        max_position_embeddings=777,
        initializer_range=0.3,
    )
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.normal_(1.0, 0.3, generator=generator)
    checkpoint.save(tmp_path / "emu", model, published=True, max_shard_bytes=50_000_000)
    published = checkpoint.load(tmp_path / "emu")
    assert published.config == config and published.dtype == torch.float32
    checkpoint.save(tmp_path / "qwen3", published, max_shard_bytes=50_000_000)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "qwen3")
    assert type(reference).__name__ == "Qwen3ForCausalLM" and reference.config.max_position_embeddings == 777
    ids_BT = torch.randint(0, EMU35.size, (2, 24), generator=generator)
    logits_BTV = reference(ids_BT).logits
    assert logits_BTV.std() > 0.5
    assert (published.logits(published(ids_BT)) - logits_BTV).abs().max() <= 1e-4


def test_the_published_configuration() -> None:
    config = sized("emu3.5", vocab_size=EMU35.size, rms_norm_eps=1e-5, attention_dropout=0.1)
    assert checkpoint.num_parameters(config) == 34_103_460_864
    written = config.to_published_json()
    assert written["model_type"] == "Emu3" and written["architectures"] == ["Emu3ForCausalLM"]
    assert (written["boi_token_id"], written["eol_token_id"], written["pad_token_id"]) == (
        151852,
        151846,
        151643,
    )
    assert TransformerConfig.from_json(written) == config
    # Absent keys have the defaults of the release's class, not Qwen3's; a dead key changes nothing.
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    short = {name: written[name] for name in (*names, "model_type")} | {"qkv_bias": True}
    absent = TransformerConfig.from_json(short)
    assert (absent.rms_norm_eps, absent.head_dim, absent.num_kv_heads) == (1e-5, 128, 8)
    assert (absent.max_position_embeddings, absent.attention_dropout) == (9216, 0.1)
    assert not absent.tie_word_embeddings
    with pytest.raises(ValueError, match="120 ids has no place in the published layout"):
        sized("tiny", vocab_size=120).to_published_json()


def test_loading_takes_one_copy_and_one_shard(tmp_path: Path) -> None:
    """240 MB of fp32 in shards of 50 MB, opened in bf16: 120 MB and a shard, the mapped pages counted too.
    Opened as stored, next to nothing."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    config = sized(
        "tiny", vocab_size=500, hidden_size=1024, intermediate_size=4096, num_layers=4, head_dim=64
    )
    checkpoint.save(tmp_path, Transformer(config), max_shard_bytes=50_000_000)
    shards = [path.stat().st_size for path in tmp_path.glob("model-*.safetensors")]
    assert sum(shards) > 220_000_000 and max(shards) < 51_000_000
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from emuworld.model import checkpoint\n"
        "def status(name):\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024\n"
        "own = status('RssAnon')\n"
        "mapped = checkpoint.load(sys.argv[1])\n"
        "own = status('RssAnon') - own\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"
        "before = status('VmRSS')\n"
        "model = checkpoint.load(sys.argv[1], dtype=torch.bfloat16)\n"
        "print(own, status('VmHWM') - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=True
    )
    mapped, converted = map(int, done.stdout.split())
    assert mapped < 20_000_000, "as stored, weights stay in their files until they are used"
    assert converted < sum(shards) / 2 + max(shards) + 25_000_000


# ---- hostile and broken folders -------------------------------------------------------------------


class Payload:
    """Unpickled, it would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.trace,))


def shard(folder: Path) -> Path:
    """The second of the shards that the folder is cut into."""
    return sorted(folder.glob("model-*.safetensors"))[1]


def index(folder: Path, value: object) -> None:
    (folder / checkpoint.INDEX_FILE).write_text(json.dumps(value))


def settings(folder: Path, **changes: object) -> None:
    values = json.loads((folder / checkpoint.CONFIG_FILE).read_text())
    (folder / checkpoint.CONFIG_FILE).write_text(json.dumps({**values, **changes}))


def header(folder: Path, values: object, *, size: int | None = None) -> None:
    """A file of a header only, which says `size` of its own length."""
    text = json.dumps(values).encode()
    shard(folder).write_bytes((size or len(text)).to_bytes(8, "little") + text)


def doubled(folder: Path) -> None:
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    save_file({**load_file(second), **load_file(first)}, second)


def quantised(folder: Path) -> None:
    tensors = {name: tensor.to(torch.int8) for name, tensor in load_file(shard(folder)).items()}
    save_file(tensors, shard(folder))


HOSTILE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing shard": (lambda f: shard(f).unlink(), r"model-00002.*: no such file"),
    "a truncated shard": (
        lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-100]),
        r"model-00002.*: damaged or cut short",
    ),
    "a shard that is a folder": (
        lambda f: (name := shard(f)).unlink() or name.mkdir(),
        r"model-00002.*: no such file",
    ),
    "a pickle for tensors": (
        lambda f: shard(f).write_bytes(pickle.dumps(Payload(f / "trace"))),
        r"model-00002.*: damaged or cut short",
    ),
    "a torch file for tensors": (
        lambda f: torch.save(Payload(f / "trace"), shard(f)),
        r"model-00002.*: damaged or cut short",
    ),
    "a header without end": (lambda f: header(f, {}, size=1 << 62), "damaged or cut short"),
    "a header that is none": (lambda f: header(f, ["a"]), "damaged or cut short"),
    "offsets outside the file": (
        lambda f: header(f, {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
        "damaged or cut short",
    ),
    "a shape of 2 ** 63": (
        lambda f: header(f, {"a": {"dtype": "F32", "shape": [1 << 62, 2], "data_offsets": [0, 0]}}),
        "damaged or cut short",
    ),
    "a tensor twice": (doubled, r"model-00002.*: .* is also in model-00001"),
    "whole numbers for weights": (
        quantised,
        r"tensors that are none of BF16, F16, F32, F64, nor I8 with scales: .* is I8",
    ),
    "an index of another folder's files": (
        lambda f: index(f, {"weight_map": {"a": "../model.safetensors"}}),
        "not a file of this folder",
    ),
    "an index with an absolute name": (
        lambda f: index(f, {"weight_map": {"a": "/etc/passwd"}}),
        "not a file of this folder",
    ),
    "an index of the folder above": (lambda f: index(f, {"weight_map": {"a": ".."}}), "no such file"),
    "an index of no files": (lambda f: index(f, {"weight_map": {}}), "expected a 'weight_map'"),
    "an index of a list": (lambda f: index(f, ["a"]), "expected a JSON object"),
    "an index of numbers": (lambda f: index(f, {"weight_map": {"a": 3}}), "no such file"),
    "an index that nests deeply": (
        lambda f: (f / checkpoint.INDEX_FILE).write_text("[" * 200_000),
        "not valid JSON",
    ),
    "an index of 20 MB": (
        lambda f: (f / checkpoint.INDEX_FILE).write_text(" " * 20_000_000),
        "20000000 bytes of JSON",
    ),
    "a pickle beside no tensors": (
        lambda f: (
            [path.unlink() for path in f.glob("model*")]
            and torch.save(Payload(f / "trace"), f / "pytorch_model.bin")
        ),
        r"model\.safetensors: no such file",
    ),
    "a billion layers": (lambda f: settings(f, num_hidden_layers=10**9), r"must be an integer in 1\.\.1024"),
    "a vocabulary of 10 ** 30": (lambda f: settings(f, vocab_size=10**30), "vocab_size must be an integer"),
    "no heads": (lambda f: settings(f, num_attention_heads=0), "num_attention_heads must be an integer"),
    "sizes in words": (
        lambda f: settings(f, hidden_size="large"),
        "hidden_size must be an integer, got|in 1",
    ),
    "an endless epsilon": (lambda f: settings(f, rms_norm_eps=float("inf")), "rms_norm_eps must be a number"),
    "rotary settings in words": (lambda f: settings(f, rope_scaling="yarn"), "rope_scaling 'yarn'"),
    "another architecture": (lambda f: settings(f, model_type="llama"), "model_type is 'llama'"),
    "another head size": (lambda f: settings(f, head_dim=32), r"q_norm\.weight is \[16\], expected \[32\]"),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    checkpoint.save(folder, built(tie_word_embeddings=False), max_shard_bytes=100_000)
    return folder


@pytest.mark.parametrize("kind", HOSTILE)
def test_broken_and_hostile_folders(kind: str, sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    damage, said = HOSTILE[kind]
    damage(folder)
    with pytest.raises(ValueError, match=said) as caught:
        checkpoint.load(folder)
    assert len(str(caught.value)) < 1500
    assert not (folder / "trace").exists(), "code of the file was run"
