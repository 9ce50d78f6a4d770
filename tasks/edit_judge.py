"""Is an edit done, and is the rest kept? Pixels where the simulator knows them, else the detector.

Where the answer is known to the pixel (something is gone, a background or the light has changed, the camera
has moved) a picture is compared with the true one after the edit and the true one before. Where it is free
(a new object may stand anywhere) the detector looks for it. The rest is compared block by block with the
true picture, relative to what the vision tokenizer alone makes of it. Thresholds were set on 160 edits of the
validation split (2026-11-22); `image_edits` measures how often this judge errs, case by case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emuworld.tasks.detector import Sighting
from emuworld.tasks.edit_truth import EditTruth, Place
from emuworld.tasks.metrics import BLOCK_PX, Frame, Mask, block_means, squared_error

FREE = ("add", "combine", "replace", "move")  # kinds whose object may come out at another place or size
# Error of the changed region, relative to leaving it as it was: a tokenizer alone leaves up to 0.3 of small
# objects; another object at the same place has 0.36 and more.
_AS_TRUE, _AS_TRUE_FREE, _SAME_VIEW = 0.30, 0.33, 0.40
_THERE = 0.50  # of the cells of what must be there: it is the smaller part where a plate becomes a cube
# Mean colour of the changed region: distance to the true one, relative to the distance of the old one.
_COLOUR = {"background": 0.30, "light": 0.45, "recolour": 0.35}
_COLOUR_GREY = 16.0  # a background's, in grey levels: shades of one name differ by 10
_NEAR = 0.10  # of the picture's side, from where a thing should be
_SIDES = {"on the left": (0.0, 0.45), "in the middle": (0.30, 0.70), "on the right": (0.55, 1.0)}
# Blocks of the rest: root mean square error in grey levels beyond 1.5 times the tokenizer's own.
_BAD_BLOCK, _POOR_BLOCK, _MAX_POOR = 34.0, 22.0, 2
_VIEW_SHIFTS_PX = (-6, -3, 0, 3, 6)  # an imagined camera need not stand to the pixel
_SHAPES = {"cube": "box"}  # a table-top's word for what the detector calls so


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge says of one picture."""

    done: bool
    kept: bool

    @property
    def success(self) -> bool:
        return self.done and self.kept


def judge(truth: EditTruth, frame: Frame, *, seen: Sequence[Sighting], rebuilt: Frame) -> Verdict:
    """Judge an answer [H, W, 3] to an edit. `seen`: what the detector finds in it; `rebuilt`: the true answer
    through the vision tokenizer, which says what detail cannot be asked for.
    """
    return Verdict(done=_is_done(truth, frame, seen), kept=_is_kept(truth, frame, seen, rebuilt))


def _is_done(truth: EditTruth, frame: Frame, seen: Sequence[Sighting]) -> bool:
    error = _relative_error(truth, frame, truth.changed)
    kind = truth.group
    if kind == "remove":
        return error <= _AS_TRUE
    if kind == "viewpoint":
        return error <= _SAME_VIEW
    if kind in ("light", "background"):
        apart, grey = _colour_error(truth, frame)
        return apart <= _COLOUR[kind] and (kind == "light" or grey <= _COLOUR_GREY)
    found = _sighted(truth.target if kind == "move" else truth.result, seen)
    if kind == "recolour":
        return _colour_error(truth, frame)[0] <= _COLOUR[kind] or _any_near(found, truth.place_after)
    if kind in ("add", "combine"):
        side = next((limits for words, limits in _SIDES.items() if words in truth.instruction), (0.0, 1.0))
        return error <= _AS_TRUE_FREE or any(side[0] <= one.column <= side[1] for one in found)
    as_true = error <= _AS_TRUE_FREE and _relative_error(truth, frame, truth.occupied) <= _THERE
    as_true = as_true or _any_near(found, truth.place_after)
    if kind == "move":
        return as_true and _relative_error(truth, frame, truth.vacated) <= _SAME_VIEW
    return as_true and not _any_near(_sighted(truth.target, seen), truth.place_before)


def _relative_error(truth: EditTruth, frame: Frame, where: Mask) -> float:
    """Squared error against the picture after the edit, relative to that of the picture before; 0 where there
    is nothing to compare.
    """
    if not where.any():
        return 0.0
    whole = squared_error(truth.before, truth.after)[where].mean()
    return float(squared_error(frame, truth.after)[where].mean() / max(whole, 1.0))


def _colour_error(truth: EditTruth, frame: Frame) -> tuple[float, float]:
    """Distance of the changed region's mean colour to the true one: relative to that of the picture before,
    and in grey levels.
    """
    mean, before, after = (
        one[truth.changed].mean(0, dtype=np.float64) for one in (frame, truth.before, truth.after)
    )
    apart = float(np.linalg.norm(mean - after))
    return apart / max(float(np.linalg.norm(before - after)), 1.0), apart / math.sqrt(3.0)


def _sighted(name: str, seen: Sequence[Sighting]) -> list[Sighting]:
    """What the detector found of a name, "red cube"; nothing for what is no colour and shape."""
    colour, _, shape = name.rpartition(" ")
    return [one for one in seen if one.pair == (colour, _SHAPES.get(shape, shape))]


def _any_near(found: Sequence[Sighting], place: Place | None) -> bool:
    return place is not None and any(
        max(abs(one.column - place.column), abs(one.row - place.row)) <= _NEAR for one in found
    )


def _is_kept(truth: EditTruth, frame: Frame, seen: Sequence[Sighting], rebuilt: Frame) -> bool:
    shifts = _VIEW_SHIFTS_PX if truth.group == "viewpoint" else (0,)
    rest = _rest(truth, seen)
    error = _block_errors(_matched(truth, frame), truth.after, rest, shifts=shifts)
    own = _block_errors(_matched(truth, rebuilt), truth.after, rest, shifts=(0,))
    beyond = np.sqrt(np.maximum(error - 1.5 * own, 0.0))
    return bool(beyond.max(initial=0.0) <= _BAD_BLOCK and (beyond > _POOR_BLOCK).sum() <= _MAX_POOR)


def _rest(truth: EditTruth, seen: Sequence[Sighting]) -> Mask:
    """Pixels that must be as in the true answer. Where the edit changes background or light these are all;
    where it moves the camera those that the given picture shows (what comes into view nobody can know); else
    all but those about the object, where it should be and where the answer has it.
    """
    if truth.is_everywhere:
        return truth.given
    about = _widened(truth.changed, 4)
    if truth.group in FREE:
        for one in _sighted(truth.target if truth.kind == "move" else truth.result, seen):
            side = len(about) // len(one.cells)
            cells = one.cells.repeat(side, axis=0).repeat(side, axis=1)
            about[_widened(cells, BLOCK_PX // 2)] = True
    return ~about


def _matched(truth: EditTruth, frame: Frame) -> NDArray[np.float64]:
    """The picture with the colours of the true one where only structure counts: everywhere for light, on the
    changed surface for backgrounds. Each channel is stretched and shifted by least squares.
    """
    matched = frame.astype(np.float64)
    if truth.group not in ("light", "background"):
        return matched
    where = np.ones_like(truth.changed) if truth.group == "light" else truth.changed
    for channel in range(3):
        x, y = frame[..., channel][where].astype(np.float64), truth.after[..., channel][where]
        slope = np.cov(x, y)[0, 1] / max(float(x.var()), 1.0)
        matched[..., channel][where] = y.mean() + slope * (x - x.mean())
    return matched


def _block_errors(
    frame: NDArray[np.float64], true: Frame, rest: Mask, *, shifts: Sequence[int]
) -> NDArray[np.float64]:
    """Mean squared error of each block that is at least half of the rest, the smallest over all shifts."""
    weight = block_means(rest.astype(np.float64))
    chosen = weight >= 0.5
    errors = [
        block_means(squared_error(np.roll(frame, (dy, dx), axis=(0, 1)), true) * rest)[chosen]
        for dy in shifts
        for dx in shifts
    ]
    least: NDArray[np.float64] = np.min(errors, axis=0) / weight[chosen]
    return least


def _widened(mask: Mask, by_px: int) -> Mask:
    """The mask and all pixels at most so far from it, along rows and columns."""
    wide: Mask = np.pad(mask, by_px)
    for axis in (0, 1):
        windows = np.lib.stride_tricks.sliding_window_view(wide, 2 * by_px + 1, axis=axis)
        wide = np.asarray(windows.any(axis=-1))
    return wide
