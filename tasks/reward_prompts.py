"""Command `data prompts`: what GRPO asks, with the truth its rewards compare: lines of JSON and PNG files.

t2i: captions of true views with one or two objects. x2i: edits that MuJoCo carries out, of rooms and of
table-tops and all kinds in turn, as the suite asks them. explore: walks from a true first view. Training and
held-out prompts come from the splits of the suites, so what is asked in training is never asked in an
evaluation.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emuworld.files import write_text
from emuworld.tasks.edit_truth import make_edit
from emuworld.tasks.metrics import Frame
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.truth import Request, make_prompt, make_start, render_pool

FILE_NAME = "prompts.jsonl"
_SEED_STRIDE = 1_000_003  # rooms of different kinds are different rooms


@dataclass(frozen=True, kw_only=True)
class RewardPrompts:
    """Prompts with their truth, for the stage `grpo`."""

    out: str = "outputs/data/reward-prompts"  # folder of prompts.jsonl and the pictures that it names
    split: str = "train"  # train | validation | test
    num_t2i: int = 64  # captions
    num_x2i: int = 64  # edits
    num_explore: int = 64  # walks
    num_steps: int = 1  # commands of a walk
    size_px: int = 256
    first_seed: int = 0
    renderer: str = "auto"  # auto | gl | rays | cuda
    workers: int = 0  # processes that render; 0: one a core, at most 16

    def __post_init__(self) -> None:
        if (
            min(self.num_t2i, self.num_x2i, self.num_explore) < 0
            or self.num_steps < 1
            or min(self.first_seed, self.workers) < 0
        ):
            raise ValueError(f"numbers must be 0 or more and num_steps 1 or more, got {self}")
        if not (self.num_t2i or self.num_x2i or self.num_explore):
            raise ValueError("nothing is asked: set num_t2i, num_x2i or num_explore above 0")


def run(config: RewardPrompts, *, on_progress: OnProgress = quiet) -> None:
    """Write OUT/prompts.jsonl and the pictures that it names; the file comes last, and whole. The number of
    workers changes nothing."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    kinds = (
        ("t2i", config.num_t2i, _captions),
        ("x2i", config.num_x2i, _edits),
        ("explore", config.num_explore, _walks),
    )
    with _ordered(config.workers or min(16, cpu_count() or 1)) as ordered:
        for kind, count, made in kinds:
            for done, line in enumerate(made(config, out, count, ordered), start=1):
                lines.append(line)
                on_progress(kind, done, count)
    write_text(out / FILE_NAME, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


_Ordered = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
"""A function and its arguments, which may have no end -> what it gives, in their order."""


@contextmanager
def _ordered(workers: int) -> Iterator[_Ordered]:
    """Worked out by so many processes, a few ahead; by this one where it is alone."""
    if workers == 1:
        yield map
        return
    with render_pool(workers) as pool:

        def ordered(function: Callable[[Any], Any], arguments: Iterable[Any]) -> Iterator[Any]:
            asked, given = deque[Future[Any]](), iter(arguments)
            while True:
                for argument in islice(given, 2 * workers - len(asked)):
                    asked.append(pool.submit(function, argument))
                if not asked:
                    return
                yield asked.popleft().result()

        yield ordered


def _captions(config: RewardPrompts, out: Path, count: int, ordered: _Ordered) -> Iterator[dict[str, Any]]:
    for truth in ordered(make_prompt, [_request(config, index, kind=0) for index in range(count)]):
        yield {"mode": "t2i", "prompt": truth.prompt, "truth": {"objects": truth.pairs}}


def _edits(config: RewardPrompts, out: Path, count: int, ordered: _Ordered) -> Iterator[dict[str, Any]]:
    for truth in ordered(make_edit, [_request(config, index, kind=1) for index in range(count)]):
        stem = f"x2i-{truth.index:05d}"
        given = [_save(one, out / f"{stem}-given-{at}.png") for at, one in enumerate(truth.references)]
        after = _save(truth.after, out / f"{stem}-after.png")
        yield {
            "mode": "x2i",
            "prompt": truth.instruction,
            "images": given,
            "truth": {"before": given[-1], "pictures": [after], "everywhere": truth.is_everywhere},
        }


def _walks(config: RewardPrompts, out: Path, count: int, ordered: _Ordered) -> Iterator[dict[str, Any]]:
    walks = ordered(make_start, [_request(config, index, kind=2) for index in range(count)])
    for index, truth in enumerate(walks):
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
