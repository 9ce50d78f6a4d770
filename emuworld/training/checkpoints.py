"""Checkpoint folders that a stage begins from and writes: tokenizers and manifest go along as they are."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from emuworld import checkpoint_folder, published
from emuworld import manifest as manifests
from emuworld.files import written
from emuworld.manifest import Manifest
from emuworld.model import checkpoint
from emuworld.model.transformer import Transformer
from emuworld.tokens import vision_published
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vision import VisionTokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint without its transformer: where that lies, and everything beside it."""

    weights: Path
    vision: VisionTokenizer
    tokenizer: TextTokenizer
    manifest: Manifest
    published: bool


def open_source(model: str, *, device: torch.device) -> Source:
    """What a stage begins from: the built-in model, a checkpoint folder, or a published folder or hub id."""
    if model in checkpoint_folder.BUILTIN or (Path(model) / manifests.FILE_NAME).is_file():
        folder = checkpoint_folder.find(model)
        manifest = Manifest.load(folder)
        return Source(
            weights=folder,
            vision=VisionTokenizer.load(folder, device=device),
            tokenizer=TextTokenizer.builtin(folder / "text.tiktoken", vocabulary=manifest.vocabulary),
            manifest=manifest,
            published=False,
        )
    source = published.find(model)
    return Source(
        weights=source.model,
        vision=vision_published.load(source.vision, device=device),
        tokenizer=TextTokenizer.published(source.text),
        manifest=manifests.published(source.name),
        published=True,
    )


def save_checkpoint(out: Path, model: Transformer, *, source: Source) -> None:
    """A folder that `emuworld.load` opens: these weights, everything else as the source has it. What draws
    pictures at once does not go along: it belongs to the source's weights.
    """
    if source.published:
        checkpoint.save(
            out, model, dtype=torch.bfloat16, published=True, max_shard_bytes=published.SHARD_BYTES
        )
        (out / "text").mkdir(exist_ok=True)
        vision_published.save(out / "vision", source.vision)
        source.tokenizer.save_published(out / "text")
        return
    checkpoint.save(out, model, dtype=torch.bfloat16)
    for name in checkpoint_folder.FILES:
        if name not in (checkpoint.CONFIG_FILE, checkpoint.WEIGHTS_FILE, manifests.FILE_NAME):
            copy_file(source.weights / name, out / name)
    sampling = {mode: dataclasses.replace(one, passes=0) for mode, one in source.manifest.sampling.items()}
    dataclasses.replace(source.manifest, dida=None, sampling=sampling, gpu_sampling={}).save(out)


def copy_file(source: Path, target: Path) -> None:
    """A copy that is there whole or not at all."""
    with written(target) as beside:
        shutil.copyfile(source, beside)
