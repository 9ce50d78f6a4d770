"""Files of prompts: a line of JSON for each question, with its pictures and what rewards want to know.

A line has `mode` and `prompt`, and where they apply `images` (files), `commands` (of an answer's steps),
`steps` (how many, where the model writes the texts) and `truth`. `emuworld data prompts` writes such files.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from emuworld import pictures
from emuworld.tokens.sequence import MODES
from emuworld.training.checkpoints import Source
from emuworld.training.picture_folder import picture
from emuworld.training.rollouts import Prompt


def picture_side(size_px: int, source: Source) -> int:
    """In pixels; 0: the model's own."""
    return size_px or (source.manifest.default_size or (512, 512))[0]


def read_prompts(file: str, source: Source, *, size_px: int) -> list[Prompt]:
    """The lines of a prompt file. ValueError that names the line."""
    path = Path(file)
    if not path.is_file():
        raise ValueError(f'{path}: no such file; write lines as {{"mode": "t2i", "prompt": "a red ball"}}')
    size = (size_px, size_px)
    prompts: list[Prompt] = []
    shown: list[list[np.ndarray]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            mode, text = values["mode"], values["prompt"]
            shown.append([picture(path.parent / name, size=size) for name in values.get("images", [])])
            if mode not in MODES or not isinstance(text, str):
                raise ValueError(f"mode must be one of {', '.join(MODES)} and prompt a text")
            prompts.append(
                Prompt(
                    mode=mode,
                    text=text,
                    commands=tuple(values.get("commands", ())),
                    steps=int(values.get("steps", 1)),
                    truth={**values.get("truth", {}), "folder": str(path.parent)},
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}") from error
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    device = next(source.vision.parameters()).device
    codes = iter(pictures.encode(source.vision, (one for images in shown for one in images), device=device))
    return [
        dataclasses.replace(prompt, codes=tuple(next(codes) for _ in images))
        for prompt, images in zip(prompts, shown, strict=True)
    ]
