"""Published checkpoints as a whole: found, opened, imagined with, written again; and folders that do not fit.

The language model and the vision tokenizer are tiny, with the release's vocabulary, codebook and files; the
text tokenizer is the release's own.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import emuworld
from emuworld import manifest, published
from emuworld.checkpoint_folder import locate, weights_name
from emuworld.decoding.noise import Noise
from emuworld.decoding.sampling import Truncation
from emuworld.model import checkpoint
from emuworld.model.adapter import Adapter, adapter_base, save_adapter
from emuworld.model.averaging import averaged
from emuworld.model.config import sized
from emuworld.model.transformer import Transformer
from emuworld.state import WorldState
from emuworld.tasks import convert
from emuworld.tokens import vision_published
from emuworld.tokens.vision import VisionConfig, VisionTokenizer
from emuworld.tokens.vocabulary import EMU35

TEXT = Path(__file__).resolve().parents[2] / "shared" / "data"
pytestmark = pytest.mark.skipif(
    not (TEXT / "emu3.tiktoken").is_file(), reason=f"the published tokenizer files are not in {TEXT}"
)


def write_model(folder: Path, *, seed: int = 0) -> None:
    config = sized(
        "tiny",
        vocab_size=EMU35.size,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        max_position_embeddings=3000,
        initializer_range=0.2,
    )
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(seed))
    checkpoint.save(folder, model, dtype=torch.bfloat16, published=True, max_shard_bytes=30_000_000)


def write_vision(folder: Path, *, num_codes: int = EMU35.num_visual_tokens) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = VisionConfig(
            patch_px=1,
            width=32,
            width_multipliers=(1,) * 5,
            z_channels=8,
            embed_dim=8,
            num_codes=num_codes,
            norm_groups=32,
        )
        vision_published.save(folder, VisionTokenizer(config))


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders side by side, as one downloads them."""
    folder = tmp_path_factory.mktemp("release")
    write_model(folder / "Emu3.5-Image")
    write_vision(folder / "Emu3.5-VisionTokenizer")
    (folder / "tokenizer").symlink_to(TEXT)
    return folder


def test_folders_side_by_side_open_and_imagine(release: Path) -> None:
    model = emuworld.load(release / "Emu3.5-Image", device="cpu")
    assert model.max_tokens == 3000 and model.size is None
    assert model.manifest.vocabulary == EMU35 and model.manifest.modes == manifest.MODES
    assert model.default_sampling("t2i").guidance == 5.0
    codes = model.encode([np.zeros((128, 160, 3), np.uint8)])
    state = model.begin(mode="x2i", prompt="make it red", images=codes, seed=1, size=(128, 160))
    state, segment = model.imagine(state, "")
    assert segment.image is not None and segment.image.dtype == np.uint8
    assert emuworld.load(release / "Emu3.5-Image", device="cpu") is model
    assert pickle.loads(pickle.dumps(model)) is model
    read = WorldState.from_bytes(state.to_bytes())
    assert np.array_equal(model.last_image(read), segment.image)


def test_logits_are_those_of_the_weights(release: Path) -> None:
    """The int8 form of the CPU: within the rounding of 8-bit weights."""
    model = emuworld.load(release / "Emu3.5-Image", device="cpu")
    plain = checkpoint.load(release / "Emu3.5-Image", dtype=torch.float32)
    ids_BT = torch.randint(0, EMU35.size, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = plain.logits(plain(ids_BT), start=EMU35.visual_start)
        hidden = model._transformer(ids_BT)
        logits = model._transformer.logits(hidden, start=EMU35.visual_start, stop=None)
    assert (logits - expected).std() < 0.03 * expected.std()


@pytest.mark.parametrize(
    "name, guidance", [("Emu3.5-Image", 5.0), ("my-image-model", 5.0), ("Emu3.5", 2.0), ("tuned", 2.0)]
)
def test_sampling_is_the_releases(name: str, guidance: float) -> None:
    values = manifest.published(name)
    t2i, howto = values.sampling_for("t2i"), values.sampling_for("howto")
    assert t2i.guidance == guidance and values.sampling_for("x2i").guidance == 3.0
    assert (t2i.text, t2i.image) == (Truncation(top_k=1024, top_p=0.9), Truncation(top_k=5120))
    assert howto.text == Truncation(temperature=0.7, top_k=200, top_p=0.8)
    assert howto.image == Truncation(top_k=10_240) and values.sampling_for("vla") == howto
    assert values.sampling_for("explore").text.top_p == 0.5
    assert (values.smallest_side, values.largest_side) == (128, 2048)


def test_the_name_is_the_repository_s_in_the_hubs_cache(tmp_path: Path) -> None:
    cached = tmp_path / "models--BAAI--Emu3.5-Image" / "snapshots" / "0a1b2c"
    assert "Image" in published.Source(model=cached, vision=cached, text=cached).name


# ---- finding the parts ----------------------------------------------------------------------------


def test_parts_are_found_inside_first(release: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(release / "Emu3.5-Image", model)
    with pytest.raises(ValueError, match=r"vision was not given, and neither .* holds a vision tokenizer"):
        published.find(model, text=TEXT)
    with pytest.raises(ValueError, match=r"text was not given, and neither .* holds a text tokenizer"):
        published.find(model, vision=release / "Emu3.5-VisionTokenizer")
    beside, inside = tmp_path / "beside", model / "vision"
    shutil.copytree(release / "Emu3.5-VisionTokenizer", beside)
    assert published.find(model, text=TEXT).vision == beside
    shutil.copytree(beside, tmp_path / "other")
    with pytest.raises(ValueError, match=r"several folders hold a vision tokenizer.*say which with vision="):
        published.find(model, text=TEXT)
    assert published.find(model, vision=beside, text=TEXT).vision == beside
    shutil.copytree(beside, inside)
    found = published.find(model, text=TEXT)
    assert found.vision == inside and found.text == TEXT
    for name in published.TEXT_FILES:
        (model / name).symlink_to(TEXT / name)
    assert published.find(model).text == model


def test_the_hub_gives_no_code_and_the_pickle_only_at_need(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = {"BAAI/Emu3.5": tmp_path / "model", published.VISION_ID: tmp_path / "hub" / "vision"}
    shutil.copytree(release / "Emu3.5-Image", cache["BAAI/Emu3.5"])
    cache[published.VISION_ID].mkdir(parents=True)
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        for file in vision_published.NESTED:  # a repository that has the pickle only
            if name == published.VISION_ID and file in allow_patterns:
                shutil.copyfile(release / "Emu3.5-VisionTokenizer" / file, cache[name] / file)
        return str(cache[name])

    monkeypatch.setattr(published.huggingface_hub, "snapshot_download", download)
    source = published.find("BAAI/Emu3.5", text=TEXT)
    assert source.model == cache["BAAI/Emu3.5"] and source.vision == cache[published.VISION_ID]
    assert [name for name, _ in asked] == ["BAAI/Emu3.5", published.VISION_ID, published.VISION_ID]
    assert not any(pattern.endswith((".py", "*")) for _, patterns in asked for pattern in patterns)
    assert ["model.ckpt" in patterns for _, patterns in asked] == [False, False, True]


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **_: object) -> str:
        raise FileNotFoundError("no network")

    monkeypatch.setattr(published.huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"'BAAI/Emu3\.5' is no folder here.*no network"):
        locate("BAAI/Emu3.5")


# ---- what does not fit ----------------------------------------------------------------------------


def test_parts_that_do_not_fit_are_named(release: Path, tmp_path: Path, tiny_folder: str) -> None:
    model, vision = release / "Emu3.5-Image", release / "Emu3.5-VisionTokenizer"
    write_vision(tmp_path / "few", num_codes=64)
    with pytest.raises(ValueError, match=r"few has 64 codes, the release's ids are for 131072"):
        emuworld.load(model, vision=tmp_path / "few", device="cpu")
    with pytest.raises(ValueError, match="does not hold a vision tokenizer"):
        emuworld.load(model, vision=TEXT)
    with pytest.raises(ValueError, match="does not hold a text tokenizer"):
        emuworld.load(model, text=vision)
    with pytest.raises(ValueError, match="'nowhere' is no folder"):
        emuworld.load(model, vision="nowhere")
    with pytest.raises(ValueError, match="brings its own tokenizers"):
        emuworld.load(tiny_folder, vision=vision)
    shutil.copytree(tiny_folder, tmp_path / "ours")
    (tmp_path / "ours" / manifest.FILE_NAME).unlink()
    with pytest.raises(ValueError, match=r"if it is a checkpoint of our training, emuworld\.json is missing"):
        emuworld.load(tmp_path / "ours")


def test_a_model_that_does_not_fit_into_memory_is_not_begun(release: Path, tmp_path: Path) -> None:
    """Its configuration asks for more than any machine has; the weights are never looked at."""
    folder = tmp_path / "huge"
    shutil.copytree(release / "Emu3.5-Image", folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"hidden_size": 1 << 20, "intermediate_size": 1 << 22, "num_hidden_layers": 500}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"billion parameters takes .* GB and some on cpu, which has"):
        emuworld.load(folder, vision=release / "Emu3.5-VisionTokenizer", text=TEXT, device="cpu")


def test_an_incomplete_download_is_said_at_once(release: Path, tmp_path: Path) -> None:
    shutil.copytree(release / "Emu3.5-Image", tmp_path / "part")
    next((tmp_path / "part").glob("model-00002*")).unlink()
    with pytest.raises(ValueError, match=r"model-00002.*no such file; the download of .* is not complete"):
        locate(tmp_path / "part", vision=release / "Emu3.5-VisionTokenizer", text=TEXT)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"format": 1, "vocabulary": 3}',
        '{"format": 1, "vocabulary": {"pad": "x"}}',
        "[" * 9999,
    ],
)
def test_a_broken_manifest_is_named(tiny_folder: str, text: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "ours")
    (tmp_path / "ours" / manifest.FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match=r"emuworld\.json does not describe a checkpoint"):
        emuworld.load(tmp_path / "ours", device="cpu")


# ---- writing --------------------------------------------------------------------------------------


def test_export_to_both_layouts(release: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    old = release / "Emu3.5-Image"
    again, qwen3 = tmp_path / "Emu3.5-Image", tmp_path / "qwen3-image"
    settings = convert.Convert(model=str(old), out=str(again), to="published", shard_gb=0.03)
    convert.run(settings)
    names = {path.name for path in old.iterdir()}
    assert {path.name for path in again.iterdir()} == names | {"vision", "text"}
    for name in names:
        assert (again / name).read_bytes() == (old / name).read_bytes()
    for name in published.TEXT_FILES:
        assert (again / "text" / name).read_bytes() == (TEXT / name).read_bytes()
    convert.run(convert.Convert(model=str(again), out=str(qwen3), to="qwen3", dtype="float32"))
    reference = AutoModelForCausalLM.from_pretrained(qwen3)
    assert type(reference).__name__ == "Qwen3ForCausalLM" and reference.config.eos_token_id == EMU35.eos
    model = checkpoint.load(old, dtype=torch.float32)
    ids_BT = torch.randint(0, EMU35.size, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model.logits(model(ids_BT)) - reference(ids_BT).logits).abs().max() < 1e-4
    frames = []
    for folder in (again, qwen3):
        opened = emuworld.load(folder, device="cpu")
        state = opened.begin(mode="t2i", prompt="a cat", seed=3, size=(128, 128))
        frames.append(opened.imagine(state, "")[1].image)
    assert np.array_equal(*frames)
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        convert.run(settings)


def test_a_checkpoint_of_ours_has_no_published_form(tiny_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ids of its own"):
        convert.run(convert.Convert(model=tiny_folder, out=str(tmp_path / "a"), to="published"))
    convert.run(convert.Convert(model=tiny_folder, out=str(tmp_path / "a")))
    ours, again = (emuworld.load(folder, device="cpu") for folder in (tiny_folder, tmp_path / "a"))
    assert again.manifest == ours.manifest
    state = again.begin(mode="t2i", prompt="a red ball", seed=3)
    expected = ours.imagine(ours.begin(mode="t2i", prompt="a red ball", seed=3), "")[1].image
    assert np.array_equal(again.imagine(state, "")[1].image, expected)


def test_the_mean_of_two_checkpoints(tiny_folder: str, tmp_path: Path) -> None:
    first, other, mean = tmp_path / "first", tmp_path / "other", tmp_path / "mean"
    shutil.copytree(tiny_folder, first)
    shutil.copytree(tiny_folder, other)
    weights = load_file(first / "model.safetensors")
    moved = {name: tensor + (2.0 if name == "model.norm.weight" else 0.0) for name, tensor in weights.items()}
    save_file(moved, other / "model.safetensors", metadata={"format": "pt"})
    adapter = Adapter(checkpoint.load(first), rank=2, generator=torch.Generator().manual_seed(0))
    dataclasses.replace(manifest.Manifest.load(first), dida=Noise()).save(first)
    save_adapter(first, adapter, base=weights_name(first))
    convert.run(convert.Convert(model=str(first), average=(str(other),), out=str(mean)))
    found = load_file(mean / "model.safetensors")
    for name, tensor in weights.items():
        expected = tensor.float() + (1.0 if name == "model.norm.weight" else 0.0)
        torch.testing.assert_close(found[name].float(), expected, rtol=1e-2, atol=1e-6)
    # What draws pictures at once belongs to the first's weights.
    assert not (mean / "dida.safetensors").exists()
    assert emuworld.load(mean, device="cpu").manifest.dida is None
    settings = convert.Convert(
        model=str(first), average=(str(other),), keep_adapter=True, out=str(tmp_path / "b")
    )
    convert.run(settings)
    assert adapter_base(tmp_path / "b") == weights_name(tmp_path / "b")
    assert emuworld.load(tmp_path / "b", device="cpu").manifest.dida == Noise()


def test_a_mean_that_says_nothing_is_refused(tiny_folder: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    vision = load_file(other / "vision.safetensors")
    changed = {name: tensor.flip(0) for name, tensor in vision.items()}
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, other / "vision.safetensors")
    settings = convert.Convert(model=tiny_folder, average=(str(other),), out=str(tmp_path / "mean"))
    with pytest.raises(ValueError, match="different tokenizers"):
        convert.run(settings)
    assert not (tmp_path / "mean").exists()
    wide = Transformer(sized("tiny", vocab_size=64, num_layers=1))
    with pytest.raises(ValueError, match="models of one shape"):
        averaged([Transformer(sized("tiny", vocab_size=64, num_layers=2)), wide])


def test_the_small_models_path_waits_for_none_of_this(tiny_folder: str) -> None:
    script = (
        "import sys, emuworld\n"
        "model = emuworld.load(sys.argv[1], device='cpu')\n"
        "model.imagine(model.begin(mode='t2i', prompt='a ball'), '')\n"
        "slow = {'transformers', 'sympy', 'torch._dynamo', 'huggingface_hub', 'rich.progress'}\n"
        "print(*slow & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tiny_folder], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
