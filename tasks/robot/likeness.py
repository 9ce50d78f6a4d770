"""How much each pixel of a picture looks like a known object: the colours that it shows against what would be
seen without it.

Everything is computed on planes of single precision: differences of levels and their squares are whole
numbers that it holds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from emuworld.tasks.robot.calibration import Frame

Planes = NDArray[np.float32]  # [3, H, W], levels of 255

_ALIKE = (
    60.0**2
)  # squared distance of colours, summed over channels, at which a pixel is no longer the object
_FADED = 0.8  # a pixel that has only gone towards the object's colour counts so much of one that has it
_WHOLE_SHARE, _ASIDE = 0.7, 0.15  # of the way; squared distance from the straight way, in squared ways
_STEPS = 2.0**20  # of likeness from 0 to 1


def object_likeness(
    picture: Frame, *, colours: NDArray[np.float64], backgrounds: Sequence[Frame]
) -> NDArray[np.float64]:
    """For each pixel: 1 = looks like the object, -1 = like the scene without it, in between = like neither.

    [H, W]. Where object and background look alike it is about 0: such a pixel says nothing. Rounded to a
    millionth, so that sums are exact: they do not depend on their order, and equal silhouettes score equally.

    Args:
        colours: [K, 3] levels of 255 that the object shows.
        backgrounds: the scene without it, uint8 [H, W, 3]; more than one where the arm may be here or there.
    """
    seen, empties = _planes(picture), [_planes(one) for one in backgrounds]
    shown = colours.astype(np.float32)[:, :, None, None]  # [K, 3, 1, 1]
    to_object = np.minimum.reduce([_squares(seen - colour) for colour in shown])
    to_background = np.minimum.reduce([_least_near(seen, empty) for empty in empties])
    towards = np.minimum.reduce([_towards(seen, empty, shown) for empty in empties])
    alike = np.maximum(np.exp(to_object / -_ALIKE), _FADED * towards)
    empty = np.exp(to_background / -_ALIKE)
    likeness = np.where(np.maximum(alike, empty) > 0.05, alike - empty, np.float32(-0.2))
    return np.asarray(np.round(likeness.astype(np.float64) * _STEPS) / _STEPS)


def _towards(seen: Planes, background: Planes, colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """How far each pixel has gone from the background's colour straight towards the object's, [H, W] 0 to 1.

    A generated picture fades and mixes colours: a red cube in a green bin may be brown.
    """
    change, by_colour = seen - background, []
    for colour in colours:
        way = colour - background
        length = np.maximum(_squares(way), np.float32(1.0))
        share = (change * way).sum(axis=0) / length
        aside = _squares(change - share * way) / length
        part = np.clip(share / np.float32(_WHOLE_SHARE), 0.0, 1.0) * np.exp(aside / -_ASIDE)
        by_colour.append(np.where(length > _ALIKE, part, np.float32(0.0)))
    return np.asarray(np.maximum.reduce(by_colour))


def _least_near(seen: Planes, background: Planes) -> NDArray[np.float32]:
    """Squared distance of each pixel to the nearest of the background's 3 x 3 around it, [H, W]."""
    height, width = seen.shape[1:]
    padded = np.pad(background, ((0, 0), (1, 1), (1, 1)), mode="edge")
    return np.minimum.reduce(
        [
            _squares(seen - padded[:, row : row + height, column : column + width])
            for row in range(3)
            for column in range(3)
        ]
    )


def _planes(picture: Frame) -> Planes:
    return np.ascontiguousarray(np.moveaxis(picture, 2, 0), dtype=np.float32)


def _squares(planes: Planes) -> NDArray[np.float32]:
    """Summed over channels, [H, W]."""
    return np.asarray((planes * planes).sum(axis=0))
