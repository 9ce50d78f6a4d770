"""A transformer on disk: `config.json` and safetensors, in one file or in shards with an index.

The same tensors under the same names with two configurations: a Hugging Face Qwen3ForCausalLM, which
transformers, vLLM and PEFT open, and the Emu3.5 release's own (model_type "Emu3"). `load` reads both and
`save` writes both. Matrices may be stored in 8 bits (`emuworld.model.int8`). Only safetensors are read:
opening a folder runs no code of its author.
"""

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from emuworld.files import written
from emuworld.model import int8
from emuworld.model.transformer import Transformer, TransformerConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD_FILE = "model-{number:05d}-of-{total:05d}.safetensors"
_HEAD_KEY = "lm_head.weight"
_NAMED = 5  # so many keys are named in an error before it says how many more there are
_MAX_JSON_BYTES = 16 << 20  # the index of 34 B parameters takes 60 kB
_TYPES = ("BF16", "F16", "F32", "F64")
_INT8 = "I8"

OnBytes = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """What the header of a file says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    kind: str  # as safetensors writes it, "BF16"


def save(
    folder: str | os.PathLike[str],
    model: Transformer,
    *,
    dtype: torch.dtype | None = None,
    published: bool = False,
    max_shard_bytes: int | None = None,
    eight_bits: bool = False,
    settings: Mapping[str, Any] | None = None,
    on_bytes: OnBytes | None = None,
) -> None:
    """Write configuration and weights into `folder` (made if needed), in `dtype` or as the model is.

    Each file is written beside its place and renamed: a killed writer leaves the old files or the new ones.
    A model that `load` mapped from its files is copied shard by shard, without ever being held as a whole.

    Args:
        published: the configuration of the Emu3.5 release instead of Qwen3's.
        max_shard_bytes: cut the weights into files of at most so many bytes (a tensor is never cut) and
            write an index; None: one file.
        eight_bits: the layers' matrices as int8 with scales, the rest in `dtype`; into one file.
        settings: further entries of `config.json`.
    """
    if eight_bits and (published or max_shard_bytes is not None):
        raise ValueError("weights in 8 bits go into one file of a Qwen3 folder: leave the other layouts out")
    folder = Path(folder)
    dtype = model.dtype if dtype is None else dtype
    base = model.config.to_published_json() if published else model.config.to_json()
    # transformers reads `dtype`, and before its version 5 `torch_dtype`, as the release has it
    config = {
        **base,
        "torch_dtype" if published else "dtype": str(dtype).removeprefix("torch."),
        **({int8.CONFIG_KEY: int8.quantization_config()} if eight_bits else {}),
        **(settings or {}),
    }
    tensors = _expected(model)
    shards = _cut(tensors, dtype=dtype, max_bytes=max_shard_bytes)
    total = sum(tensor.numel() for tensor in tensors.values()) * dtype.itemsize
    texts = {CONFIG_FILE: config}
    if max_shard_bytes is not None:
        weight_map = {name: file for file, names in shards.items() for name in names}
        texts[INDEX_FILE] = {"metadata": {"total_size": total}, "weight_map": weight_map}
    done = 0
    with contextlib.ExitStack() as stack:  # all are written, then all are renamed, what names the others last
        beside = {name: stack.enter_context(written(folder / name)) for name in reversed((*shards, *texts))}
        for file, names in shards.items():
            part = {name: tensors[name].detach().cpu() for name in names}
            if eight_bits:
                part = int8.compressed(part, dtype=dtype)
            else:
                part = {name: tensor.to(dtype).contiguous() for name, tensor in part.items()}
            save_file(part, beside[file], metadata={"format": "pt"})
            done += sum(tensor.nbytes for tensor in part.values())
            del part
            if on_bytes:
                on_bytes(done, total)
        for file, values in texts.items():
            beside[file].write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    for old in {WEIGHTS_FILE, INDEX_FILE, *(path.name for path in folder.glob("model-*-of-*.safetensors"))}:
        if old not in beside:  # of an earlier save in other pieces
            (folder / old).unlink(missing_ok=True)


def load(
    folder: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    on_bytes: OnBytes | None = None,
) -> Transformer:
    """The transformer in `folder`, in evaluation mode, in `dtype` or as stored (8-bit weights: in fp32).

    All headers are compared with the configuration before any weight is read. Then tensor by tensor goes
    straight to the device, so that memory never holds more than the model and one file. On the CPU, as
    stored, tensors are mapped from their files and take memory only while they are used.

    Raises ValueError that names the file and what is wrong with it: absent, damaged, or with missing,
    unexpected, doubled or mis-shaped tensors.
    """
    folder = Path(folder)
    config = load_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    expected = _expected(model)
    stored = _headers(folder, tied=config.tie_word_embeddings)
    scales = _take_scales(stored)
    _check(folder, stored, expected, scales)
    if scales and dtype is None:
        dtype = torch.float32
    total = sum(tensor.numel() for tensor in expected.values())
    done = 0
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted({one.file for one in stored.values()}):
        names = [name for name, one in stored.items() if one.file == file]
        try:
            with safe_open(file, framework="pt", device=str(device)) as opened:
                for name in names:
                    tensor = opened.get_tensor(name)
                    if name in scales:
                        tensor = int8.floats(tensor, opened.get_tensor(name + int8.SCALE))
                    tensors[name] = tensor.to(dtype=dtype)
                    done += tensors[name].numel()
                    if on_bytes:
                        itemsize = tensors[name].itemsize
                        on_bytes(done * itemsize, total * itemsize)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def load_config(folder: str | os.PathLike[str]) -> TransformerConfig:
    """The configuration alone. Raises ValueError when the file is absent, no JSON, or lacks something."""
    return TransformerConfig.from_json(read_json(Path(folder) / CONFIG_FILE))


def has_eight_bits(folder: str | os.PathLike[str]) -> bool:
    """Whether matrices in the folder are stored in 8 bits (`emuworld.model.int8`)."""
    return int8.CONFIG_KEY in read_json(Path(folder) / CONFIG_FILE)


def num_parameters(config: TransformerConfig) -> int:
    """Of the whole transformer; a tied head counts once."""
    with torch.device("meta"):
        return sum(tensor.numel() for tensor in _expected(Transformer(config)).values())


def weight_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of a folder that hold weights. ValueError for an index that names others, or nothing."""
    folder = Path(folder)
    if not (folder / INDEX_FILE).exists():
        return [folder / WEIGHTS_FILE]
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX_FILE}: expected a 'weight_map' from tensor names to file names")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ValueError(
                f"{folder / INDEX_FILE}: names {name[:200]!r}, which is not a file of this folder"
            )
    return [folder / name for name in names]


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError where it is absent, too large, or none."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected a folder written by emuworld or transformers")
    if file.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{file}: {file.stat().st_size} bytes of JSON, expected at most {_MAX_JSON_BYTES}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(values).__name__}")
    return values


def _expected(model: Transformer) -> dict[str, torch.Tensor]:
    tensors = model.state_dict()
    if model.config.tie_word_embeddings:
        del tensors[_HEAD_KEY]
    return tensors


def _cut(
    tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype, max_bytes: int | None
) -> dict[str, list[str]]:
    """File name -> names of its tensors, in order; at least one tensor a file."""
    if max_bytes is None:
        return {WEIGHTS_FILE: list(tensors)}
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * dtype.itemsize
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    total = len(shards)
    return {_SHARD_FILE.format(number=i, total=total): names for i, names in enumerate(shards, start=1)}


def _headers(folder: Path, *, tied: bool) -> dict[str, _Stored]:
    """Every tensor of the folder by name; nothing but headers is read."""
    stored: dict[str, _Stored] = {}
    for file in weight_files(folder):
        if not file.is_file():
            raise ValueError(f"{file}: no such file; expected safetensors weights beside {CONFIG_FILE}")
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if name in stored:
                        raise ValueError(f"{file}: {name} is also in {stored[name].file.name}")
                    piece = opened.get_slice(name)
                    stored[name] = _Stored(file=file, shape=tuple(piece.get_shape()), kind=piece.get_dtype())
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from error
    if tied:
        stored.pop(_HEAD_KEY, None)  # some writers store the tied head a second time
    return stored


def _take_scales(stored: dict[str, _Stored]) -> dict[str, _Stored]:
    """Those of 8-bit matrices, by the matrix's name; they are taken out of `stored`."""
    names = [name for name, one in stored.items() if one.kind == _INT8 and name + int8.SCALE in stored]
    return {name: stored.pop(name + int8.SCALE) for name in names}


def _damaged(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{file}: damaged or cut short ({error}); expected safetensors, copy or download it again"
    )


def _check(
    folder: Path,
    stored: Mapping[str, _Stored],
    expected: Mapping[str, torch.Tensor],
    scales: Mapping[str, _Stored],
) -> None:
    common = [name for name in expected if name in stored]
    shapes = [
        f"{name} is {list(stored[name].shape)}, expected {list(expected[name].shape)}"
        for name in common
        if stored[name].shape != expected[name].shape
    ]
    shapes += [
        f"{name}{int8.SCALE} is {list(scale.shape)} in {scale.file.name}, expected "
        f"{[stored[name].shape[0], 1]} in {stored[name].file.name}"
        for name, scale in scales.items()
        if scale.shape != (stored[name].shape[0], 1) or scale.file != stored[name].file
    ]
    kinds = [
        f"{name} is {stored[name].kind}"
        for name in common
        if stored[name].kind not in _TYPES and name not in scales
    ]
    faults = [
        _listed("missing tensors: ", sorted(expected.keys() - stored.keys())),
        _listed("unexpected tensors: ", sorted(stored.keys() - expected.keys())),
        _listed("mis-shaped tensors: ", shapes),
        _listed(f"tensors that are none of {', '.join(_TYPES)}, nor {_INT8} with scales: ", kinds),
    ]
    found = "; ".join(fault for fault in faults if fault)
    if found:
        raise ValueError(f"{folder}: the weights do not fit {CONFIG_FILE}: {found}")


def _listed(title: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return title + ", ".join(item[:300] for item in items[:_NAMED]) + more
