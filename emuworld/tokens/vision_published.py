"""The vision tokenizer in the release's own files, both ways.

Two layouts, which the release's folder holds side by side (fact sheet, section 3.3): `config.json` (flat
keys, model_type "Emu3p5VisionVQ") with `model.safetensors`, and `config.yaml` (the network's sizes under
`ddconfig`) with `model.ckpt`, a pickle of tensors, plain or under `state_dict`. Where both are there the
first is read.

Nothing that a file asks for is run: the pickle goes through PyTorch's `weights_only` reader, the yaml through
the safe one, and neither may grow far beyond its size on disk. Sizes are bounded before anything is made.
"""

from __future__ import annotations

import json
import os
import reprlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from emuworld.files import write_text, written
from emuworld.tokens.vision import PUBLISHED, VisionConfig, VisionTokenizer

MODEL_TYPE = "Emu3p5VisionVQ"
OWN = ("vision.json", "vision.safetensors")
FLAT = ("config.json", "model.safetensors")
NESTED = ("config.yaml", "model.ckpt")
_THEIR_NAMES = {"width_multipliers": "ch_mult", "num_codes": "n_embed", "width ": "ch "}
_NORM_GROUPS = 32  # of every norm in the release, whatever the width
_MAX_CONFIG_BYTES = 64 << 10
_MAX_DEPTH = 16


def layout(folder: str | os.PathLike[str]) -> tuple[str, str] | None:
    """The names of the two files that hold a vision tokenizer in this folder; None where there are none."""
    folder = Path(folder)
    for names in (OWN, FLAT, NESTED):
        if all((folder / name).is_file() for name in names):
            if names is FLAT and _model_type(folder / FLAT[0]) != MODEL_TYPE:
                continue  # a language model's files have the same names
            return names
    return None


def load(folder: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> VisionTokenizer:
    """The tokenizer of a folder in either published layout or in our own, in fp32, ready for inference.

    Raises:
        ValueError: names the file and what is missing, damaged, unsafe or does not fit.
    """
    folder = Path(folder)
    names = layout(folder)
    if names is None:
        raise ValueError(
            f"{folder} holds no vision tokenizer: expected {' with '.join(FLAT)} (model_type "
            f"{MODEL_TYPE}), {' with '.join(NESTED)}, or {' with '.join(OWN)}"
        )
    if names is OWN:
        return VisionTokenizer.load(folder, device=device)
    config, weights = (_read_flat if names is FLAT else _read_nested)(folder)
    return VisionTokenizer.from_tensors(config, weights, source=folder / names[1]).to(device)


def save(folder: str | os.PathLike[str], tokenizer: VisionTokenizer) -> None:
    """Write both published layouts into `folder`, in fp32, each file beside its place and then renamed.

    Raises:
        ValueError: norms of another number of groups than the release's 32, or positions of several pixels,
            which its files cannot say.
    """
    config = tokenizer.config
    if (config.norm_groups, config.patch_px) != (_NORM_GROUPS, 1):
        raise ValueError(
            f"the published layout has {_NORM_GROUPS} groups in every norm, this tokenizer "
            f"{config.norm_groups}, and positions of 1 pixel, this {config.patch_px}; "
            "it can only be kept in our own layout"
        )
    weights = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in tokenizer.state_dict().items()
    }
    network = {
        "double_z": False,
        "z_channels": config.z_channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": config.width,
        "ch_mult": list(config.width_multipliers),
        "num_res_blocks": config.num_res_blocks,
        "attn_resolutions": [16],
        "dropout": 0.0,
    }
    heads = {"architectures": ["Emu3p5VisionVQModel"], "model_type": MODEL_TYPE, "torch_dtype": "float32"}
    flat = {**heads, **network, "codebook_size": config.num_codes, "embed_dim": config.embed_dim}
    nested = {"embed_dim": config.embed_dim, "n_embed": config.num_codes, "beta": 0.25, "ddconfig": network}
    folder = Path(folder)
    with written(folder / FLAT[1]) as beside:
        save_file(weights, beside, metadata={"format": "pt"})
    write_text(folder / FLAT[0], json.dumps(flat, indent=2) + "\n")
    with written(folder / NESTED[1]) as beside:
        torch.save(weights, beside)
    write_text(folder / NESTED[0], yaml.safe_dump(nested, sort_keys=False))


def _model_type(file: Path) -> object:
    try:
        return _read_json(file).get("model_type")
    except ValueError:
        return None


def _read_flat(folder: Path) -> tuple[VisionConfig, Mapping[str, Tensor]]:
    file, weights = folder / FLAT[0], folder / FLAT[1]
    values = _read_json(file)
    # The release's configuration class has these defaults, so a file may leave them out.
    known = {
        "ch": PUBLISHED.width,
        "ch_mult": list(PUBLISHED.width_multipliers),
        "num_res_blocks": PUBLISHED.num_res_blocks,
        "z_channels": PUBLISHED.z_channels,
        "codebook_size": PUBLISHED.num_codes,
        "embed_dim": PUBLISHED.embed_dim,
    }
    values = {**known, **values}
    config = _config({**values, "n_embed": values["codebook_size"]}, network=values, file=file)
    try:
        return config, load_file(weights)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{weights}: damaged or cut short ({error}); copy or download it again") from error


def _read_nested(folder: Path) -> tuple[VisionConfig, Mapping[str, Tensor]]:
    file = folder / NESTED[0]
    values = _read_yaml(file)
    network = values.get("ddconfig")
    if not isinstance(network, dict):
        raise ValueError(f"{file} has no mapping 'ddconfig'; expected the release's configuration")
    return _config(values, network=network, file=file), _read_pickle(folder / NESTED[1])


def _config(values: Mapping[str, Any], *, network: Mapping[str, Any], file: Path) -> VisionConfig:
    """The sizes, each within bounds. ValueError names a missing or senseless one, and what we do not
    compute."""
    multipliers = network.get("ch_mult")
    try:
        config = VisionConfig(
            patch_px=1,
            width=network.get("ch"),  # type: ignore[arg-type]  # VisionConfig checks what it is given
            width_multipliers=tuple(multipliers) if isinstance(multipliers, list) else (),
            num_res_blocks=network.get("num_res_blocks"),  # type: ignore[arg-type]
            z_channels=network.get("z_channels"),  # type: ignore[arg-type]
            embed_dim=values.get("embed_dim"),  # type: ignore[arg-type]
            num_codes=values.get("n_embed"),  # type: ignore[arg-type]
            norm_groups=_NORM_GROUPS,
        )
    except ValueError as error:
        said = str(error)
        for ours, theirs in _THEIR_NAMES.items():
            said = said.replace(ours, theirs)
        raise ValueError(f"{file}: {said}") from error
    resolution, attended = network.get("resolution", 256), network.get("attn_resolutions", [16])
    levels = [resolution >> i for i in range(5)] if type(resolution) is int else []
    if not isinstance(attended, list) or [level in attended for level in levels] != 4 * [False] + [True]:
        raise ValueError(
            f"{file}: attention must be at the coarsest of five levels only, got attn_resolutions "
            f"{reprlib.repr(attended)} at resolution {reprlib.repr(resolution)}"
        )
    for name, only in (("double_z", False), ("in_channels", 3), ("out_ch", 3)):
        if network.get(name, only) != only:
            raise ValueError(f"{file}: {name} must be {only}, got {reprlib.repr(network[name])}")
    return config


def _read_json(file: Path) -> dict[str, Any]:
    text = _read_text(file)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    return _mapping(values, file)


def _read_yaml(file: Path) -> dict[str, Any]:
    text = _read_text(file)
    try:
        _require_plain_yaml(text, file)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: not plain YAML ({said}); tags that make objects are refused") from error
    return _mapping(values, file)


def _require_plain_yaml(text: str, file: Path) -> None:
    """No aliases, which may stand for a thousand others each, and little nesting, which costs its square."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _MAX_DEPTH:
            raise ValueError(f"{file}: not plain YAML: aliases (*name) or {_MAX_DEPTH} levels; write it out")


def _read_text(file: Path) -> str:
    if file.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(
            f"{file}: {file.stat().st_size} bytes are no configuration (at most {_MAX_CONFIG_BYTES})"
        )
    try:
        return file.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error})") from error


def _mapping(values: object, file: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected named values, got {type(values).__name__}")
    return {str(name): value for name, value in values.items()}


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a `model.ckpt`, mapped from the file; the losses' own weights are left out."""
    _require_plain_archive(file)
    try:
        values = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a broken or hostile pickle can make its reader raise anything
        said = str(error).partition("\n")[0]  # what follows advises to switch the protection off
        raise ValueError(
            f"{file}: not a plain pickle of tensors ({type(error).__name__}: {said[:200]}); nothing in it "
            "was run. Take model.safetensors of the same tokenizer, or download the file again"
        ) from error
    if isinstance(values, dict) and isinstance(values.get("state_dict"), dict):
        values = values["state_dict"]
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{file}: expected tensors by name, got {type(values).__name__}")
    weights = {}
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(
                f"{file}: {reprlib.repr(name)} holds a {type(tensor).__name__}, expected a dense tensor"
            )
        if not name.startswith("loss."):
            weights[name] = tensor.detach()
    return weights


def _require_plain_archive(file: Path) -> None:
    """PyTorch stores tensors as they are; a packed entry could unfold to any size."""
    try:
        with zipfile.ZipFile(file) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(
            f"{file}: damaged, cut short, or not written by torch.save ({error}); download it again"
        ) from error
    if packed:
        raise ValueError(f"{file}: {packed[0]!r} is packed, which torch.save never does; refused")
