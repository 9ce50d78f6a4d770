"""A low-rank adapter on disk, in PEFT's layout: `adapter_config.json` and `adapter_model.safetensors`.

What training here writes, PEFT and vLLM open beside the model's folder; what PEFT wrote as plain LoRA on the
matrices inside the layers is merged here. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emuworld.files import written
from emuworld.model.adapter import Adapter
from emuworld.model.checkpoint import CONFIG_FILE as CHECKPOINT_FILE
from emuworld.model.checkpoint import read_json
from emuworld.model.transformer import Transformer

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE)
_KEY = re.compile(r"base_model\.model\.model\.layers\.(.+)\.lora_([AB])\.weight")
# What PEFT may add to a LoRA that would change what is computed here.
_PLAIN = {"use_dora": False, "use_rslora": False, "fan_in_fan_out": False, "bias": "none"}
_ENDS = {"A": ".down", "B": ".up"}


def save(folder: str | os.PathLike[str], adapter: Adapter, *, rank: int, base: str) -> None:
    """Write an adapter for the model that is called `base`; each file is written beside and renamed."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in adapter.named().items():
        matrix, _, end = name.rpartition(".")
        key = f"base_model.model.model.layers.{matrix}.lora_{'A' if end == 'down' else 'B'}.weight"
        tensors[key] = tensor.detach().to("cpu", torch.float32).contiguous()
    modules = sorted({name.split(".")[-2] for name in adapter.named()})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,  # the product is added as it is
        "lora_dropout": 0.0,
        "target_modules": modules,
        "inference_mode": True,
        **_PLAIN,
    }
    with written(folder / WEIGHTS_FILE) as weights, written(folder / CONFIG_FILE) as settings:
        save_file(tensors, weights, metadata={"format": "pt"})
        settings.write_text(json.dumps(config, indent=2) + "\n")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return all((folder / name).is_file() for name in FILES) and not (folder / CHECKPOINT_FILE).is_file()


def base(folder: Path) -> str:
    """What the adapter of a folder calls its model; "" where it does not say."""
    name = read_json(folder / CONFIG_FILE).get("base_model_name_or_path")
    return name if isinstance(name, str) else ""


@torch.no_grad()
def merge(folder: str | os.PathLike[str], model: Transformer) -> None:
    """Add the adapter of a folder to a model's weights. ValueError where it is damaged, not plain LoRA, or of
    another model; the model is as before then.
    """
    folder = Path(folder)
    scale = _scale(read_json(folder / CONFIG_FILE), file=folder / CONFIG_FILE)
    tensors = _read(folder / WEIGHTS_FILE)
    matrices = {
        name: module for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear)
    }
    added: dict[str, Tensor] = {}
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        down, up = tensors.get(f"{name}.down"), tensors.get(f"{name}.up")
        fits = down is not None and up is not None and name in matrices and down.ndim == up.ndim == 2
        if not fits or down is None or up is None or up.shape[1] != down.shape[0]:
            raise _foreign(folder, name)
        if (up.shape[0], down.shape[1]) != matrices[name].weight.shape:
            raise _foreign(folder, name)
        added[name] = scale * (up.float() @ down.float())
    for name, product in added.items():
        weight = matrices[name].weight
        merged = weight.float() + product.to(weight.device)
        matrices[name].weight = nn.Parameter(merged.to(weight.dtype), requires_grad=False)


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors by matrix, as `0.self_attn.q_proj.down` and `.up`."""
    try:
        stored = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: damaged or not there ({error}); expected an adapter") from error
    tensors = {}
    for key, tensor in stored.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{file}: {key[:200]!r} is no LoRA matrix inside a layer; such adapters only")
        tensors[match[1] + _ENDS[match[2]]] = tensor
    if not tensors:
        raise ValueError(f"{file}: holds no tensors")
    return tensors


def _scale(config: Mapping[str, Any], *, file: Path) -> float:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    other = {k: config[k] for k, v in _PLAIN.items() if config.get(k, v) != v}
    if (
        config.get("peft_type") != "LORA"
        or other
        or config.get("rank_pattern")
        or config.get("alpha_pattern")
    ):
        raise ValueError(f"{file}: not a plain LoRA ({other or config.get('peft_type')}); merge it with PEFT")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise ValueError(f"{file}: r and lora_alpha must be numbers, got {rank!r} and {alpha!r}")
    return float(alpha) / rank  # type: ignore[arg-type]  # a number, by the line above


def _foreign(folder: Path, name: str) -> ValueError:
    return ValueError(f"{folder}: {name} does not fit the model; the adapter belongs to another one")
