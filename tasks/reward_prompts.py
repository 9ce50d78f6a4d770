"""Command `data prompts`: what GRPO asks, with the truth its rewards compare: lines of JSON and PNG files.

t2i: captions of true views with one or two objects. x2i: edits that MuJoCo carries out. explore: walks from a
true first view. Training and held-out prompts come from the splits of the suites, so what is asked in
training is never asked in an evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emuworld.envs.render import make_renderer
from emuworld.envs.rooms.edit_episodes import edit_stories
from emuworld.tasks.metrics import Frame
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.truth import Request, make_prompt, make_start

FILE_NAME = "prompts.jsonl"
_SEED_STRIDE = 1_000_003  # rooms of different kinds are different rooms


@dataclass(frozen=True, kw_only=True)
class RewardPrompts:
    """Prompts with their truth, for the stage `grpo`."""

    out: str = "outputs/data/reward-prompts"
    split: str = "train"  # train | validation | test
    num_t2i: int = 64  # captions
    num_x2i: int = 64  # edits of one picture
    num_explore: int = 64  # walks
    num_steps: int = 1  # commands of a walk
    size_px: int = 256
    first_seed: int = 0
    renderer: str = "auto"  # auto | gl | rays | cuda

    def __post_init__(self) -> None:
        if min(self.num_t2i, self.num_x2i, self.num_explore) < 0 or self.num_steps < 1 or self.first_seed < 0:
            raise ValueError(f"numbers must be 0 or more and num_steps 1 or more, got {self}")


def run(config: RewardPrompts, *, on_progress: OnProgress = quiet) -> None:
    """Write OUT/prompts.jsonl and the pictures that it names; the file comes last, and whole."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    kinds = (
        ("t2i", config.num_t2i, _captions),
        ("x2i", config.num_x2i, _edits),
        ("explore", config.num_explore, _walks),
    )
    for kind, count, made in kinds:
        for done, line in enumerate(made(config, out, count), start=1):
            lines.append(line)
            on_progress(kind, done, count)
    part = out / f"{FILE_NAME}.part"
    part.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    part.replace(out / FILE_NAME)


def _captions(config: RewardPrompts, out: Path, count: int) -> Iterator[dict[str, Any]]:
    for index in range(count):
        truth = make_prompt(_request(config, index, kind=0))
        yield {"mode": "t2i", "prompt": truth.prompt, "truth": {"objects": truth.pairs}}


def _edits(config: RewardPrompts, out: Path, count: int) -> Iterator[dict[str, Any]]:
    renderer, done, seed = make_renderer(config.renderer), 0, config.first_seed + _SEED_STRIDE
    while done < count:
        for story in edit_stories(
            config.split, seed, num_edits=2, renderer=renderer, size=config.size_px, format="PNG"
        ):
            if done < count and len(story.reference_images) == 1:
                segment = story.segments[0]
                before = _save(story.reference_images[0].to_array(), out / f"x2i-{done:05d}-before.png")
                after = _save(segment.images[0].to_array(), out / f"x2i-{done:05d}-after.png")
                yield {
                    "mode": "x2i",
                    "prompt": segment.text,
                    "images": [before],
                    "truth": {"pictures": [after]},
                }
                done += 1
        seed += 1


def _walks(config: RewardPrompts, out: Path, count: int) -> Iterator[dict[str, Any]]:
    for index in range(count):
        truth = make_start(_request(config, index, kind=2))
        names = [
            _save(frame, out / f"explore-{index:05d}-{step}.png") for step, frame in enumerate(truth.frames)
        ]
        yield {
            "mode": "explore",
            "prompt": truth.prompt,
            "images": names[:1],
            "commands": list(truth.commands),
            "truth": {"pictures": names[1:]},
        }


def _request(config: RewardPrompts, index: int, *, kind: int) -> Request:
    return Request(
        index=index,
        seed=config.first_seed + kind * _SEED_STRIDE + index,
        split=config.split,
        size_px=config.size_px,
        renderer=config.renderer,
        num_steps=config.num_steps,
        num_branches=1,  # a walk's case is not made without
    )


def _save(frame: Frame | np.ndarray, path: Path) -> str:
    Image.fromarray(frame).save(path)
    return path.name
