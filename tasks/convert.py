"""Command `convert`: a checkpoint written again, in the layout of the release or as a Qwen3ForCausalLM, in 16
bits or in 8."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from emuworld import published
from emuworld.checkpoint_folder import BUILTIN, find
from emuworld.manifest import FILE_NAME
from emuworld.tasks.progress import OnProgress, quiet


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a checkpoint again: for the release's own code (to=published), for transformers and vLLM
    (to=qwen3), or, of one that training wrote, with matrices in 8 bits (to=int8). `emuworld.load` opens all.
    With average=[FOLDER,…] the mean of several checkpoints' weights is written.
    """

    model: str = "small"  # a published model's folder or hub id, a folder that training wrote, or small
    out: str = "outputs/convert"  # folder for the new checkpoint; must not hold one
    to: Literal["published", "qwen3", "int8"] = "qwen3"  # published | qwen3 | int8
    average: tuple[str, ...] = ()  # other checkpoints of one training: the mean of all is written
    keep_adapter: bool = False  # the model's adapter goes along into a mean; measure whether it still does
    vision: str = ""  # folder or hub id of a published model's vision tokenizer; "" = beside the model
    text: str = ""  # folder of a published model's text tokenizer; "" = beside the model
    dtype: Literal["", "bfloat16", "float16", "float32"] = ""  # of the weights; "" = as they are stored
    shard_gb: float = 5.0  # a published model's weights are cut into files of at most so many gigabytes

    def __post_init__(self) -> None:
        if self.shard_gb <= 0:
            raise ValueError(f"shard_gb must be above 0, got {self.shard_gb}")
        if self.keep_adapter and not self.average:
            raise ValueError(
                "keep_adapter is about a mean (average=[FOLDER,…]); without one an adapter goes along"
            )


def run(config: Convert, *, on_progress: OnProgress = quiet) -> Path:
    """Write the checkpoint; returns its folder."""

    def report(done: int, total: int) -> None:
        on_progress("megabytes", done // 1_000_000, total // 1_000_000)

    dtype = getattr(torch, config.dtype) if config.dtype else None
    shard_bytes = int(config.shard_gb * 1e9)
    if config.model in BUILTIN or (Path(config.model) / FILE_NAME).is_file():
        if config.to == "published":
            raise ValueError(
                f"{config.model} has ids of its own, the published layout has fixed ones; use to=qwen3"
            )
        published.export_own(
            find(config.model),
            config.out,
            others=[find(other) for other in config.average],
            keep_adapter=config.keep_adapter,
            dtype=dtype,
            eight_bits=config.to == "int8",
            on_progress=report,
        )
    else:
        if config.average:
            raise ValueError(f"average is for checkpoints of our own training; {config.model} is none")
        if config.to == "int8":
            raise ValueError(
                f"to=int8 is for checkpoints of our own training, and {config.model} is a published one; on "
                "the CPU it computes in 8 bits anyway, on a GPU open it with weights='fp8'"
            )
        source = published.find(config.model, vision=config.vision or None, text=config.text or None)
        published.export(
            source, config.out, layout=config.to, dtype=dtype, max_shard_bytes=shard_bytes, on_progress=report
        )
    print(f"{config.model} as {config.to} in {config.out}; open it with emuworld.load({config.out!r})")
    return Path(config.out)
