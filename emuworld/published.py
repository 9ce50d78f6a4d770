"""Checkpoints in the layouts of the Emu3.5 release: found on disk or on the hub, opened, and written.

A published model is three folders: the language model (sharded safetensors, model_type "Emu3", or the same as
a Qwen3ForCausalLM), the vision tokenizer (`emuworld.tokens.vision_published`) and the text tokenizer
(`emu3.tiktoken` with `emu3_vision_tokens.txt`). None of the release's code is needed, and none that lies in
the folders is run.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import huggingface_hub
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from emuworld import checkpoint_folder, manifest, parallel
from emuworld.checkpoint_folder import DETECTOR_FILE, Parts
from emuworld.model import checkpoint
from emuworld.model.adapter import FILE_NAME as ADAPTER_FILE
from emuworld.model.adapter import adapter_base, load_adapter, write_adapter
from emuworld.model.averaging import averaged
from emuworld.model.config import TransformerConfig
from emuworld.tokens import vision_published
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vision import VisionTokenizer
from emuworld.tokens.vocabulary import EMU35

VISION_ID = "BAAI/Emu3.5-VisionTokenizer"  # taken where a model comes from the hub without one
TEXT_FILES = ("emu3.tiktoken", "emu3_vision_tokens.txt")
SHARD_BYTES = 5_000_000_000  # as transformers cuts
Layout = Literal["published", "qwen3"]
OnProgress = Callable[[int, int], None]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DOWNLOADED = ("*.json", "*.safetensors", "config.yaml", *TEXT_FILES)  # no code, and pickles only at need
_LONG_BYTES = 1 << 30  # loads above it show a bar
_SPARE_BYTES = 2 << 30  # beside the weights: caches, one picture


@dataclass(frozen=True, kw_only=True)
class Source:
    """Folders of one published checkpoint, each looked into and known to hold its part."""

    model: Path
    vision: Path
    text: Path

    @property
    def name(self) -> str:
        """What the model is called: its folder, or its repository where the folder is the hub's cache."""
        in_cache = self.model.parent.name == "snapshots"
        return self.model.parent.parent.name if in_cache else self.model.name

    @property
    def files(self) -> list[tuple[str, Path]]:
        """Every file that is read, and the name that it goes by in a fingerprint."""
        weights = checkpoint.weight_files(self.model)
        vision = vision_published.layout(self.vision) or ()
        return [
            *((f"model/{path.name}", path) for path in (self.model / checkpoint.CONFIG_FILE, *weights)),
            *((f"vision/{name}", self.vision / name) for name in vision),
            *((f"text/{name}", self.text / name) for name in TEXT_FILES),
        ]


def find(
    model: str | os.PathLike[str],
    *,
    vision: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
) -> Source:
    """The folders of a checkpoint; hub ids ("BAAI/Emu3.5") are downloaded, or found in the hub's cache.

    Where `vision` or `text` is not given it is looked for inside the model's folder, in the folders in it,
    and in the folders beside it, in this order.

    Raises:
        ValueError: a folder is missing, does not hold its part, or several could be meant.
    """
    model_folder = _folder(model, what="model")
    config = checkpoint.load_config(model_folder)
    if config.vocab_size < EMU35.size:
        raise ValueError(
            f"{model_folder} has a vocabulary of {config.vocab_size} ids, the Emu3.5 release "
            f"{EMU35.size}; if it is a checkpoint of our training, {manifest.FILE_NAME} is missing in it"
        )
    for file in checkpoint.weight_files(model_folder):
        if not file.is_file():
            raise ValueError(f"{file}: no such file; the download of {model_folder} is not complete")
    if vision is not None:
        vision_folder = _given(vision, what="vision", holds=_holds_vision)
    else:
        found = _look(model_folder, what="vision", holds=_holds_vision)
        if found is None and not Path(model).is_dir():
            found = _download(VISION_ID)
        vision_folder = _required(found, model_folder, what="vision")
    if text is not None:
        text_folder = _given(text, what="text", holds=_holds_text)
    else:
        inside = vision_folder if _holds_text(vision_folder) else None
        found = _look(model_folder, what="text", holds=_holds_text) or inside
        text_folder = _required(found, model_folder, what="text")
    return Source(model=model_folder, vision=vision_folder, text=text_folder)


def open_parts(
    source: Source, *, device: torch.device, weights: str = "bf16", adapter: Path | None = None
) -> Parts:
    """Read what `find` gave. The small parts come first, so that what does not fit is said before the long
    load; that shows a bar on a terminal.

    Raises:
        ValueError: a file is damaged or does not fit the others, or the device has too little memory.
    """
    config = checkpoint.load_config(source.model)
    values = manifest.published(source.name)
    tokenizer = TextTokenizer.published(source.text)
    vision = vision_published.load(source.vision, device=device)
    if vision.num_codes != EMU35.num_visual_tokens:
        raise ValueError(
            f"{source.vision} has {vision.num_codes} codes, the release's ids are for "
            f"{EMU35.num_visual_tokens}; give the vision tokenizer that belongs to the model as vision=..."
        )
    num_bytes = _require_memory(config, device=device, weights=weights)
    with _bar(f"loading {source.name}", shown=num_bytes > _LONG_BYTES) as on_progress:
        transformer = checkpoint_folder.open_transformer(
            source.model, device=device, weights=weights, adapter=adapter, on_progress=on_progress
        )
    return Parts(
        folder=source.model,
        transformer=transformer,
        vision=vision,
        tokenizer=tokenizer,
        manifest=values,
        fingerprint=checkpoint_folder.fingerprint(
            values.vocabulary, [*source.files, *checkpoint_folder.adapter_files(adapter)]
        ),
    )


def export(
    source: Source,
    out: str | os.PathLike[str],
    *,
    layout: Layout = "published",
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    on_progress: OnProgress | None = None,
) -> None:
    """Write a checkpoint into the new folder `out`, the tokenizers into `vision` and `text` in it, where
    `emuworld.load(out)` finds them.

    Weights are copied shard by shard from the mapped files: memory holds one shard, not the model.

    Args:
        layout: "published", the release's (`config.json` of type Emu3, index and shards), or "qwen3", which
            transformers and vLLM open as a Qwen3ForCausalLM.
        dtype: of the weights; None: as they are.
        on_progress: called with bytes done and bytes in all.

    Raises:
        ValueError: `out` holds a checkpoint already, or the source is damaged.
    """
    out = _new_folder(out)
    model = checkpoint.load(source.model)
    ids = {f"{name}_token_id": EMU35.controls[name] for name in ("bos", "eos", "pad")}
    vision_published.save(out / "vision", vision_published.load(source.vision))
    (out / "text").mkdir(exist_ok=True)
    TextTokenizer.published(source.text).save_published(out / "text")
    checkpoint.save(
        out,
        model,
        dtype=dtype,
        published=layout == "published",
        max_shard_bytes=max_shard_bytes,
        settings=ids if layout == "qwen3" else None,
        on_bytes=on_progress,
    )


def export_own(
    folder: Path,
    out: str | os.PathLike[str],
    *,
    others: Sequence[Path] = (),
    keep_adapter: bool = False,
    dtype: torch.dtype | None = None,
    eight_bits: bool = False,
    on_progress: OnProgress | None = None,
) -> None:
    """Write a checkpoint of our own training (`checkpoint_folder.find`) again: a Qwen3ForCausalLM in one
    file, its other files beside it. It has no published form: its ids are not the release's.

    Args:
        others: checkpoints whose weights the written ones are the mean of, with the first's; an adapter of
            the first's weights is left out then, unless `keep_adapter`: it may still do for the mean.
        dtype: of the weights; None: as they are, and bf16 where they were stored in 8 bits.
        eight_bits: the layers' matrices as int8 (`emuworld.model.int8`).

    Raises:
        ValueError: the folder holds a checkpoint, or others do not go with the first.
    """
    model = checkpoint.load(folder)
    if others:
        _check_tokens_alike(folder, *others)
        model = averaged([model, *map(checkpoint.load, others)])
    out = _new_folder(out)
    if dtype is None:
        dtype = torch.bfloat16 if checkpoint.has_eight_bits(folder) else model.dtype
    for name in checkpoint_folder.present_files(folder):
        if name not in (checkpoint.CONFIG_FILE, checkpoint.WEIGHTS_FILE, ADAPTER_FILE):
            shutil.copyfile(folder / name, out / name)
    if (folder / DETECTOR_FILE).is_file():
        shutil.copyfile(folder / DETECTOR_FILE, out / DETECTOR_FILE)
    checkpoint.save(out, model, dtype=dtype, eight_bits=eight_bits, on_bytes=on_progress)
    if (folder / ADAPTER_FILE).is_file() and others and not keep_adapter:  # it belongs to the first's weights
        replace(manifest.Manifest.load(out), dida=None).save(out)
    elif (folder / ADAPTER_FILE).is_file():  # it says which weights it belongs to
        fits = adapter_base(folder) == checkpoint_folder.weights_name(folder)
        base = checkpoint_folder.weights_name(out) if fits else adapter_base(folder)
        write_adapter(out, load_adapter(folder, model), base=base)


def _check_tokens_alike(folder: Path, *others: Path) -> None:
    """ValueError where checkpoints of our own training do not mean the same by their ids."""
    first, *rest = (
        (manifest.Manifest.load(one).vocabulary, VisionTokenizer.load(one).code_fingerprint())
        for one in (folder, *others)
    )
    for other, tokens in zip(others, rest, strict=True):
        if tokens != first:
            raise ValueError(
                f"{folder} and {other} have different tokenizers, so the mean of their weights would say "
                "nothing: average checkpoints that began from the same trained weights"
            )


def _new_folder(out: str | os.PathLike[str]) -> Path:
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give the name of a folder to write")
    if out.is_dir() and [*out.glob("*.safetensors"), *out.glob(checkpoint.CONFIG_FILE)]:
        raise ValueError(f"{out} holds a checkpoint already; give another folder, or remove it first")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _holds_vision(folder: Path) -> bool:
    return vision_published.layout(folder) is not None


def _holds_text(folder: Path) -> bool:
    return all((folder / name).is_file() for name in TEXT_FILES)


_EXPECTED = {
    "vision": "a vision tokenizer (config.json with model.safetensors, or config.yaml with model.ckpt)",
    "text": f"a text tokenizer ({' with '.join(TEXT_FILES)})",
}


def _folder(name: str | os.PathLike[str], *, what: str) -> Path:
    """A folder on disk, or the hub's cached copy of a repository."""
    if Path(name).is_dir():
        return Path(name).absolute()
    if _HUB_ID.fullmatch(str(name)) and not Path(name).parent.is_dir():
        return _download(str(name))
    raise ValueError(f"{what} {str(name)!r} is no folder; give one, or a hub id as 'BAAI/Emu3.5'")


def _given(name: str | os.PathLike[str], *, what: str, holds: Callable[[Path], bool]) -> Path:
    folder = _folder(name, what=what)
    if not holds(folder):
        raise ValueError(f"{folder} does not hold {_EXPECTED[what]}")
    return folder


def _look(model: Path, *, what: str, holds: Callable[[Path], bool]) -> Path | None:
    """The one folder in or around the model's that holds this part; ValueError where several do."""
    for group in ([model], _folders(model), _folders(model.parent)):
        found = [folder for folder in group if holds(folder)]
        if len(found) > 1:
            names = ", ".join(str(folder) for folder in found[:5])
            raise ValueError(f"several folders hold {_EXPECTED[what]}: {names}; say which with {what}=...")
        if found:
            return found[0]
    return None


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir() and os.access(path, os.X_OK))
    except OSError:
        return []


def _required(found: Path | None, model: Path, *, what: str) -> Path:
    if found is None:
        raise ValueError(
            f"{what} was not given, and neither {model} nor a folder in it or beside it holds "
            f"{_EXPECTED[what]}; give the folder as {what}=..."
        )
    return found


def _download(name: str) -> Path:
    """The files of a hub repository that may be opened; the pickle only where there is nothing else."""
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_DOWNLOADED)))
        if not list(folder.glob("*.safetensors")):
            more = [*_DOWNLOADED, vision_published.NESTED[1]]
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=more))
    except (OSError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{name!r} is no folder here and could not be taken from the hub ({type(error).__name__}: "
            f"{said}); check the name and the network, or give the folder of a download"
        ) from error
    return folder


def _require_memory(config: TransformerConfig, *, device: torch.device, weights: str) -> int:
    """Bytes that the weights will take; ValueError where the device has less."""
    embedding = config.vocab_size * config.hidden_size
    num_parameters = checkpoint.num_parameters(config)
    group = parallel.tensor_group()
    if group is not None:  # the embedding is whole in every process
        num_parameters = embedding + (num_parameters - embedding) // group.size()
    if device.type == "cpu":  # int8, but for the embedding, which is kept as it is stored
        needed = num_parameters + embedding
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        needed = num_parameters + 2 * embedding if weights == "fp8" else 2 * num_parameters
        there = torch.cuda.mem_get_info(device)[0]
    if needed + _SPARE_BYTES > there:
        raise ValueError(
            f"a model of {num_parameters / 1e9:.1f} billion parameters takes {needed / 1e9:.0f} GB and some "
            f"on {device}, which has {there / 1e9:.0f} GB; take another device, or free memory on this one"
        )
    return num_parameters


@contextmanager
def _bar(label: str, *, shown: bool) -> Iterator[OnProgress]:
    """A bar on standard error, where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(label)
        yield lambda done, total: bar.update(task, completed=done, total=total)
