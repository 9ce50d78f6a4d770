"""Rewards that the worlds know: what a simulator shows, and what the suites' judge finds in a picture.

The training stage `grpo` takes them by name; `emuworld.cli` hands them down. What a term needs stands in the
prompt's line under `truth`, as `emuworld data prompts` writes it; a term does not apply to a line without it.

`objects`: of the objects asked for (`truth.objects`: pairs of colour and shape) the share that the detector
finds, less half a share for each that it finds besides; at most 1. The judge errs: its own errors are in
docs/evaluation.md, and a suite that shares the judge shares what fools it.
`likeness`: PSNR in dB between the drawn pictures and the simulator's own (`truth.pictures`: PNG files), the
mean over the steps. For walks, edits and robot tasks, whose next picture is a fact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emuworld.checkpoint_folder import BUILTIN
from emuworld.tasks.detector import Detector
from emuworld.tasks.metrics import Frame, psnr

DETECTOR_FILE = "detector.safetensors"


class Answered(Protocol):
    """What a term reads of an answer (`emuworld.training.rewards.Answer`)."""

    @property
    def pictures(self) -> tuple[Frame, ...]: ...

    @property
    def truth(self) -> Mapping[str, Any]: ...


def objects(answers: Sequence[Answered]) -> list[float]:
    """See the module. NaN for answers whose line names no objects, or without a picture."""
    return [_found_share(answer) for answer in answers]


def likeness(answers: Sequence[Answered]) -> list[float]:
    """See the module. NaN where the line names no pictures; 0 dB for a picture that was not drawn."""
    return [_likeness(answer) for answer in answers]


def terms() -> dict[str, Any]:
    """All terms by name."""
    return {"objects": objects, "likeness": likeness}


def _found_share(answer: Answered) -> float:
    asked = {(str(colour), str(shape)) for colour, shape in answer.truth.get("objects", ())}
    if not asked or not answer.pictures:
        return math.nan
    found = {one.pair for one in _judge().detect([answer.pictures[-1]])[0]}
    return (len(asked & found) - 0.5 * len(found - asked)) / len(asked)


def _likeness(answer: Answered) -> float:
    names = answer.truth.get("pictures", ())
    if not names:
        return math.nan
    values = []
    for number, name in enumerate(names):
        if number >= len(answer.pictures):
            values.append(0.0)
            continue
        drawn = answer.pictures[number]
        true = _picture(str(Path(answer.truth.get("folder", "."), name)), drawn.shape[1], drawn.shape[0])
        values.append(psnr(drawn, true))
    return float(np.mean(values))


@functools.lru_cache(maxsize=1)
def _judge() -> Detector:
    """The judge of the built-in model: a policy must not bring its own."""
    return Detector.load(BUILTIN["small"] / DETECTOR_FILE)


@functools.lru_cache(maxsize=4096)
def _picture(path: str, width: int, height: int) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((width, height)))
