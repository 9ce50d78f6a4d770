"""The vision tokenizer in the release's files: both layouts round, and files that are broken or mean harm."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from emuworld.tokens import vision_published
from emuworld.tokens.vision import VisionConfig, VisionTokenizer

CONFIG = VisionConfig(
    patch_px=1, width=32, width_multipliers=(1,) * 5, z_channels=8, embed_dim=4, num_codes=50, norm_groups=32
)


@pytest.fixture(scope="module")
def tokenizer() -> VisionTokenizer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTokenizer(CONFIG).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def both(tokenizer: VisionTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the release's: both layouts side by side."""
    folder = tmp_path_factory.mktemp("vision")
    vision_published.save(folder, tokenizer)
    return folder


@pytest.fixture
def flat(both: Path, tmp_path: Path) -> Path:
    for name in vision_published.FLAT:
        shutil.copyfile(both / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def nested(both: Path, tmp_path: Path) -> Path:
    for name in vision_published.NESTED:
        shutil.copyfile(both / name, tmp_path / name)
    return tmp_path


def equal(one: VisionTokenizer, other: VisionTokenizer) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_both_layouts_round(tokenizer: VisionTokenizer, flat: Path, nested: Path, both: Path) -> None:
    assert sorted(path.name for path in both.iterdir()) == sorted(
        (*vision_published.FLAT, *vision_published.NESTED)
    )
    assert flat == nested  # one folder: pytest gives a test one tmp_path
    for unread in ([], vision_published.FLAT, vision_published.NESTED):
        folder = flat / f"without {len(unread)}{''.join(unread)}"
        shutil.copytree(both, folder, ignore=shutil.ignore_patterns(*unread))
        again = vision_published.load(folder)
        assert again.config == CONFIG and equal(again, tokenizer)
        assert not any(parameter.requires_grad for parameter in again.parameters())


def test_our_own_layout_opens_too(tokenizer: VisionTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path, dtype=torch.float32)
    assert equal(vision_published.load(tmp_path), tokenizer)


def test_the_configurations_are_the_releases(both: Path) -> None:
    nested = yaml.safe_load((both / "config.yaml").read_text())
    assert (nested["n_embed"], nested["embed_dim"]) == (50, 4)
    assert nested["ddconfig"] == {
        "double_z": False,
        "z_channels": 8,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 1, 1, 1],
        "num_res_blocks": 1,
        "attn_resolutions": [16],
        "dropout": 0.0,
    }
    flat = json.loads((both / "config.json").read_text())
    assert flat["model_type"] == "Emu3p5VisionVQ" and flat["codebook_size"] == 50
    assert {**nested["ddconfig"], "embed_dim": 4}.items() <= flat.items()


def test_a_training_checkpoint_opens(tokenizer: VisionTokenizer, nested: Path) -> None:
    """Under `state_dict`, with the weights of the losses in it, as trainers leave it."""
    weights = {**tokenizer.state_dict(), "loss.discriminator.weight": torch.zeros(3)}
    torch.save({"state_dict": weights, "epoch": 3, "optimizer_states": [{"lr": 0.1}]}, nested / "model.ckpt")
    assert equal(vision_published.load(nested), tokenizer)


def test_what_the_release_cannot_say_is_not_written(tmp_path: Path) -> None:
    tokenizer = VisionTokenizer(VisionConfig(width=8, norm_groups=4, num_codes=9))
    with pytest.raises(ValueError, match="32 groups in every norm, this tokenizer 4"):
        vision_published.save(tmp_path, tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_language_model_is_no_vision_tokenizer(flat: Path) -> None:
    (flat / "config.json").write_text(json.dumps({"model_type": "Emu3"}))
    with pytest.raises(ValueError, match="holds no vision tokenizer"):
        vision_published.load(flat)


def test_a_config_may_leave_the_classes_defaults_out(flat: Path) -> None:
    (flat / "config.json").write_text(json.dumps({"model_type": "Emu3p5VisionVQ"}))
    with pytest.raises(ValueError, match=r"no decoder\.up\.0\.block\.2\.conv1\.bias"):  # 4 blocks, not 1
        vision_published.load(flat)


# ---- hostile and broken files ---------------------------------------------------------------------


class Payload:
    """Unpickled by the plain reader, it would leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.trace,))


def edit_yaml(folder: Path, change: Callable[[dict], object]) -> None:
    values = yaml.safe_load((folder / "config.yaml").read_text())
    change(values)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))


def edit_ckpt(folder: Path, change: Callable[[dict], object]) -> None:
    values = torch.load(folder / "model.ckpt", weights_only=True)
    change(values)
    torch.save(values, folder / "model.ckpt")


def pack(folder: Path) -> None:
    """The same archive, compressed."""
    with zipfile.ZipFile(folder / "model.ckpt") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "model.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def cut(path: Path, kept: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])


NESTED = {
    "code in the pickle": (
        lambda f: torch.save({"state_dict": Payload(f / "trace")}, f / "model.ckpt"),
        "not a plain pickle of tensors .* nothing in it was run",
    ),
    "code beside the tensors": (
        lambda f: edit_ckpt(f, lambda values: values.update(hook=Payload(f / "trace"))),
        "not a plain pickle of tensors",
    ),
    "a bare pickle": (
        lambda f: (f / "model.ckpt").write_bytes(pickle.dumps(Payload(f / "trace"))),
        "not written by torch.save",
    ),
    "a truncated pickle": (lambda f: cut(f / "model.ckpt", 0.6), "damaged, cut short"),
    "an empty pickle": (lambda f: (f / "model.ckpt").write_bytes(b""), "damaged, cut short"),
    "a packed archive": (pack, "is packed"),
    "an archive of something else": (
        lambda f: zipfile.ZipFile(f / "model.ckpt", "w").close(),
        "not a plain pickle of tensors",
    ),
    "a list": (
        lambda f: torch.save([torch.zeros(3)], f / "model.ckpt"),
        "expected tensors by name, got list",
    ),
    "text among the tensors": (
        lambda f: edit_ckpt(f, lambda values: values.update({"quant_conv.bias": "zero"})),
        "'quant_conv.bias' holds a str",
    ),
    "a sparse tensor": (
        lambda f: edit_ckpt(f, lambda values: values.update({"quant_conv.bias": torch.zeros(4).to_sparse()})),
        "(holds a Tensor, expected a dense tensor|not a plain pickle)",
    ),
    "whole numbers": (
        lambda f: edit_ckpt(
            f, lambda values: values.update({"quant_conv.bias": torch.zeros(4, dtype=torch.int64)})
        ),
        "quant_conv.bias holds torch.int64",
    ),
    "a tensor of a huge shape": (
        lambda f: edit_ckpt(
            f, lambda values: values.update({"quant_conv.bias": torch.zeros(1).expand(10**12)})
        ),
        r"quant_conv.bias \[1000000000000\], expected \[4\]",
    ),
    "renamed keys": (
        lambda f: edit_ckpt(
            f, lambda values: values.update({"quantise.weight": values.pop("quantize.embedding.weight")})
        ),
        "no quantize.embedding.weight; unexpected quantise.weight",
    ),
    "python tags in the yaml": (
        lambda f: (f / "config.yaml").write_text(
            f"ddconfig: !!python/object/apply:pathlib.Path.touch [{f / 'trace'}]\n"
        ),
        "not plain YAML",
    ),
    "a new tag in the yaml": (
        lambda f: (f / "config.yaml").write_text(
            f"n_embed: !!python/object/new:os.system ['touch {f / 'trace'}']\n"
        ),
        "not plain YAML",
    ),
    "aliases that unfold": (
        lambda f: (f / "config.yaml").write_text(
            "a0: &a0 [1,1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1},*a{i - 1}]\n" for i in range(1, 40))
        ),
        "not plain YAML: aliases",
    ),
    "broken yaml": (lambda f: (f / "config.yaml").write_text("a: [1"), "not plain YAML"),
    "yaml that nests deeply": (lambda f: (f / "config.yaml").write_text("[" * 20_000), "not plain YAML"),
    "yaml of a megabyte": (
        lambda f: (f / "config.yaml").write_text("#" * (1 << 20)),
        "bytes are no configuration",
    ),
    "binary for yaml": (lambda f: (f / "config.yaml").write_bytes(b"\xff\xfe\x00"), "not UTF-8 text"),
    "yaml without the network": (
        lambda f: edit_yaml(f, lambda values: values.pop("ddconfig")),
        "no mapping 'ddconfig'",
    ),
    "a million blocks": (
        lambda f: edit_yaml(f, lambda values: values["ddconfig"].update(num_res_blocks=10**6)),
        r"num_res_blocks must be an integer in 1\.\.64, got 1000000",
    ),
    "a trillion codes": (
        lambda f: edit_yaml(f, lambda values: values.update(n_embed=10**12)),
        "n_embed must be an integer",
    ),
    "levels without end": (
        lambda f: edit_yaml(f, lambda values: values["ddconfig"].update(ch_mult=[1] * 99)),
        "ch_mult needs one value for each level",
    ),
    "attention elsewhere": (
        lambda f: edit_yaml(f, lambda values: values["ddconfig"].update(attn_resolutions=[32])),
        "attention must be at the coarsest",
    ),
    "two halves of z": (
        lambda f: edit_yaml(f, lambda values: values["ddconfig"].update(double_z=True)),
        "double_z must be False",
    ),
}


@pytest.mark.parametrize("kind", NESTED)
def test_broken_and_hostile_nested_files(kind: str, nested: Path) -> None:
    damage, said = NESTED[kind]
    damage(nested)
    with pytest.raises(ValueError, match=said) as caught:
        vision_published.load(nested)
    assert str(nested) in str(caught.value), "the file is named"
    assert len(str(caught.value)) < 1500 and "weights_only=False" not in str(caught.value)
    assert not (nested / "trace").exists(), "code of the file was run"


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    for key, tensor in changes.items():
        tensors.pop(key.replace("__", "."), None)
        if tensor is not None:
            tensors[key.replace("__", ".")] = tensor
    save_file(tensors, folder / "model.safetensors")


FLAT = {
    "a pickle for tensors": (
        lambda f: (f / "model.safetensors").write_bytes(pickle.dumps(Payload(f / "trace"))),
        "damaged or cut short",
    ),
    "a truncated file": (lambda f: cut(f / "model.safetensors", 0.9), "damaged or cut short"),
    "a huge header": (
        lambda f: (f / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}"),
        "damaged or cut short",
    ),
    "a missing tensor": (lambda f: edit_weights(f, quant_conv__weight=None), "no quant_conv.weight"),
    "a wrong shape": (
        lambda f: edit_weights(f, quant_conv__bias=torch.zeros(7)),
        r"quant_conv.bias \[7\], expected \[4\]",
    ),
    "a fractional size": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('"ch": 32', '"ch": 32.5')
        ),
        "ch must be an integer",
    ),
}


@pytest.mark.parametrize("kind", FLAT)
def test_broken_and_hostile_flat_files(kind: str, flat: Path) -> None:
    damage, said = FLAT[kind]
    damage(flat)
    with pytest.raises(ValueError, match=said) as caught:
        vision_published.load(flat)
    assert str(flat) in str(caught.value)
    assert not (flat / "trace").exists()


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "does not describe a tokenizer"),
        ("[]", "got 'list'"),
        ('{"width": 3}', "expected the keys"),
        ("[" * 10_000, "does not describe a tokenizer"),
    ],
)
def test_broken_files_of_our_own(tokenizer: VisionTokenizer, text: str, said: str, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / "vision.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        VisionTokenizer.load(tmp_path)
