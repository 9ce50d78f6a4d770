"""Rewards that the worlds know: what a simulator shows, and what the suites' judge finds in a picture.

The training stage `grpo` takes them by name; `emuworld.cli` hands them down. What a term needs stands in the
prompt's line under `truth`, as `emuworld data prompts` writes it; a term does not apply to a line without it.

`objects`: of the objects asked for (`truth.objects`: pairs of colour and shape) the share that the detector
finds; half a share for one whose colour it finds on another shape; less three quarters for each time that one
is there again, and a tenth for each other object. Without the first a policy learns to draw what was
asked for many times over, and without the floor of 0, what an empty room is worth, to draw nothing: both have
happened (docs/log.md). The judge errs: its own errors are in docs/evaluation.md, and a suite that
shares the judge shares what fools it.
The judge is the built-in model's, whatever learns: a policy must not bring its own. `model=` names the file
of another one.
`likeness`: PSNR in dB between the drawn pictures and the simulator's own (`truth.pictures`: PNG files), the
mean over the steps. For walks, edits and robot tasks, whose next picture is a fact.
`edit`: how far an edit is done, times how far the rest is kept (`truth.before` and `truth.pictures`, the
simulator's pictures before and after). Done: 1 less the squared error where the two differ, relative to
leaving it as it was, from what a tokenizer alone costs. Kept: blocks of a visual token where they do not
differ, and all of them where the edit changes the looks of everything (`truth.everywhere`: of background,
light or viewpoint); each that is off by more than the tokenizer's own error takes
something off. A copy of the picture is
worth 0, for nothing is done; a picture drawn anew a tenth at most.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from emuworld.checkpoint_folder import BUILTIN, DETECTOR_FILE
from emuworld.tasks.detector import Detector, Pair
from emuworld.tasks.metrics import Frame, block_means, differ, psnr, squared_error

_NEAR, _AGAIN, _OTHER = 0.5, 0.75, 0.1  # shares of an object: given, taken and taken
_DONE, _UNDONE = 0.3, 0.9  # error relative to leaving it: a tokenizer leaves up to 0.3 of small objects
_OFF_GREY = 22.0  # root mean square error of a block beyond 1.5 times the tokenizer's own: the suite's judge
_BLOCKS_OFF = 8.0  # so many bring what is kept to 1 / e
_ANEW = 0.1  # what an edit is worth of which nothing else is kept


class Answered(Protocol):
    """What a term reads of an answer (`emuworld.training.rewards.Answer`)."""

    @property
    def references(self) -> tuple[Frame, ...]: ...

    @property
    def pictures(self) -> tuple[Frame, ...]: ...

    @property
    def truth(self) -> Mapping[str, Any]: ...


class Setting(Protocol):
    """What a term reads of its settings (`emuworld.training.rewards.Scale`)."""

    @property
    def model(self) -> str: ...


class Objects:
    """See the module. NaN for answers whose line names no objects, or without a picture."""

    def __init__(self, detector: Detector) -> None:
        self._detector = detector

    @classmethod
    def open(cls, setting: Setting, device: torch.device) -> Objects:
        file = Path(setting.model) if setting.model else BUILTIN["small"] / DETECTOR_FILE
        return cls(Detector.load(file, device=device))

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        asked = [
            {(str(colour), str(shape)) for colour, shape in answer.truth.get("objects", ())}
            for answer in answers
        ]
        judged = [at for at, answer in enumerate(answers) if asked[at] and answer.pictures]
        shares = [math.nan] * len(answers)
        shapes = {answers[at].pictures[-1].shape for at in judged}
        for shape in sorted(shapes):  # the detector takes pictures of one size together
            alike = [at for at in judged if answers[at].pictures[-1].shape == shape]
            found = self._detector.sightings(np.stack([answers[at].pictures[-1] for at in alike]))
            for at, sightings in zip(alike, found, strict=True):
                shares[at] = share_found(asked[at], [one.pair for one in sightings])
        return shares


def share_found(asked: set[Pair], seen: Sequence[Pair]) -> float:
    """What a picture is worth in which these objects were seen, 0 to 1; see the module."""
    others = [pair for pair in seen if pair not in asked]
    found = asked & set(seen)
    again = len(seen) - len(others) - len(found)
    colours = {colour for colour, _ in others}
    near = sum(colour in colours for colour, _ in asked - found)
    worth = len(found) + _NEAR * near - _AGAIN * again - _OTHER * (len(others) - near)
    return max(0.0, worth / len(asked))


def likeness(answers: Sequence[Answered]) -> list[float]:
    """See the module. NaN where the line names no pictures; 0 dB for a picture that was not drawn."""
    return [_likeness(answer) for answer in answers]


def edit(answers: Sequence[Answered]) -> list[float]:
    """See the module. NaN where the line does not name a picture before; 0 where none was drawn."""
    return [_edited(answer) for answer in answers]


def terms() -> dict[str, Callable[[Any, torch.device], Callable[[Sequence[Any]], list[float]]]]:
    """What opens each term, by its name."""
    return {
        "objects": Objects.open,
        "likeness": lambda setting, device: likeness,
        "edit": lambda setting, device: edit,
    }


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


def _edited(answer: Answered) -> float:
    truth = answer.truth
    if not truth.get("before") or not truth.get("pictures"):
        return math.nan
    if not answer.pictures:
        return 0.0
    drawn = answer.pictures[-1]
    size = (drawn.shape[1], drawn.shape[0])
    folder = Path(truth.get("folder", "."))
    before, after = (_picture(str(folder / name), *size) for name in (truth["before"], truth["pictures"][-1]))
    differs, error = differ(before, after), squared_error(drawn, after)
    left = squared_error(before, after)[differs]
    relative = error[differs].mean() / max(float(left.mean()), 1.0) if differs.any() else 0.0
    done = float(np.clip((_UNDONE - relative) / (_UNDONE - _DONE), 0.0, 1.0))
    rebuilt = answer.references[-1] if answer.references else before
    own = squared_error(rebuilt, before) if rebuilt.shape == before.shape else np.zeros_like(error)
    rest = (block_means(differs.astype(np.float64)) == 0.0) | bool(truth.get("everywhere", False))
    off = np.sqrt(np.maximum(block_means(error) - 1.5 * block_means(own), 0.0))[rest] > _OFF_GREY
    kept = math.exp(-float(off.sum()) / _BLOCKS_OFF)
    return done * (_ANEW + (1.0 - _ANEW) * kept)


@functools.lru_cache(maxsize=4096)
def _picture(path: str, width: int, height: int) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((width, height)))
