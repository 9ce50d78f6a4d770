"""A transformer on disk: `config.json` and `model.safetensors`, a Hugging Face Qwen3ForCausalLM folder.

transformers, vLLM and PEFT open what `save` writes; `load` also reads sharded folders
(`model.safetensors.index.json`). Only safetensors are read: opening a folder runs no code of its author.
"""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from emuworld.model.transformer import Transformer, TransformerConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_HEAD_KEY = "lm_head.weight"
_NAMED = 5  # so many keys are named in an error before it says how many more there are


def save(folder: str | os.PathLike[str], model: Transformer, *, dtype: torch.dtype | None = None) -> None:
    """Write both files into `folder` (made if needed), in `dtype` or as the model is.

    Each is written beside its place and renamed: a killed writer leaves the old file or the new one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = model.dtype if dtype is None else dtype
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in _expected(model).items()
    }
    config = {**model.config.to_json(), "dtype": str(dtype).removeprefix("torch.")}
    weights_beside = folder / f".{WEIGHTS_FILE}.{os.getpid()}"
    config_beside = folder / f".{CONFIG_FILE}.{os.getpid()}"
    try:
        save_file(tensors, weights_beside, metadata={"format": "pt"})
        config_beside.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights_beside.replace(folder / WEIGHTS_FILE)
        config_beside.replace(folder / CONFIG_FILE)
    finally:
        weights_beside.unlink(missing_ok=True)
        config_beside.unlink(missing_ok=True)


def load(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """The transformer in `folder`, in evaluation mode, in `dtype` or as stored.

    Raises ValueError that names the file and what is wrong with it: absent, damaged, or with missing,
    unexpected or mis-shaped tensors.
    """
    folder = Path(folder)
    config = load_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    stored: dict[str, torch.Tensor] = {}
    for file in _weight_files(folder):
        stored.update(_read(file, device=device, dtype=dtype))
    expected = _expected(model)
    if config.tie_word_embeddings:
        stored.pop(_HEAD_KEY, None)  # some writers store the tied head a second time
    _check(folder, stored, expected)
    model.load_state_dict(stored, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def load_config(folder: str | os.PathLike[str]) -> TransformerConfig:
    """The configuration alone. Raises ValueError when the file is absent, no JSON, or lacks something."""
    return TransformerConfig.from_json(_read_json(Path(folder) / CONFIG_FILE))


def _expected(model: Transformer) -> dict[str, torch.Tensor]:
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors[_HEAD_KEY]
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / INDEX_FILE).exists():
        return [folder / WEIGHTS_FILE]
    weight_map = _read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX_FILE}: expected a 'weight_map' from tensor names to file names")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX_FILE}: names {name!r}, which is not a file of this folder")
    return [folder / name for name in names]


def _read(file: Path, *, device: torch.device | str, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected safetensors weights beside {CONFIG_FILE}")
    try:
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            return {name: tensors.get_tensor(name).to(dtype=dtype) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: damaged or cut short ({error}); copy or download it again") from error


def _read_json(file: Path) -> dict[str, object]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected a folder written by emuworld or transformers")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def _check(folder: Path, stored: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    shapes = [
        f"{name} is {list(stored[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in stored and stored[name].shape != tensor.shape
    ]
    faults = [
        _listed("missing tensors: ", sorted(expected.keys() - stored.keys())),
        _listed("unexpected tensors: ", sorted(stored.keys() - expected.keys())),
        _listed("mis-shaped tensors: ", shapes),
    ]
    found = "; ".join(fault for fault in faults if fault)
    if found:
        raise ValueError(f"{folder}: the weights do not fit {CONFIG_FILE}: {found}")


def _listed(title: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return title + ", ".join(items[:_NAMED]) + more
