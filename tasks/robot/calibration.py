"""How a generated picture differs from a true one as a whole: gain, offset and shift, and undoing them.

A keyframe that a model draws may be brighter, tinted or a few pixels off everywhere; that says nothing about
where an object is. `calibrate` measures it on what stands still, `undo` takes it away, and the three numbers
are the background drift that the report shows (`Calibration.photometric`, `.shift_px`, `.residual`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]  # [H, W, 3]
Mask = NDArray[np.bool_]  # [H, W], True = counts

MAX_SHIFT_PX = 6
_SATURATED = 250  # of 255: such pixels say only that a value was at least this
_EDGE_SHARE = 0.15  # of the pixels, those with the strongest gradients, fix the shift
_GRADIENT_LIMIT = 40.0  # larger differences count as this much: moved things must not pull
_RESIDUAL_LIMIT = 30.0  # where a pixel is off by more after the fit, something else is drawn there
_LEAST_SHIFT_PX = 0.25  # less is not told from none
_MIN_SHIFT_GAIN = 0.02  # a shift must lower the cost by this share of it, else there is none


@dataclass(frozen=True, kw_only=True, eq=False)
class Calibration:
    """picture(x + shift) = gain * reference(x) + offset, by channel, and what is left after that.

    Attributes:
        gain, offset: [3], offset in levels of 255.
        shift_px: (down, right) that the picture lies off the reference.
        residual: mean absolute difference on what stands still, levels of 255, after undoing both.
    """

    gain: NDArray[np.float64]
    offset: NDArray[np.float64]
    shift_px: tuple[float, float]
    residual: float

    @property
    def photometric(self) -> float:
        """Mean change of a middle grey, levels of 255."""
        return float(np.abs(self.gain * 128.0 + self.offset - 128.0).mean())

    @property
    def camera_px(self) -> float:
        """Length of the shift."""
        return float(np.hypot(*self.shift_px))


def calibrate(picture: Frame, reference: Frame, *, still: Mask | None = None) -> Calibration:
    """Measure gain, offset and shift of `picture` against `reference` of the same size.

    Args:
        still: True where both show the same thing; None: everywhere, moved things are taken for outliers.
    """
    if picture.shape != reference.shape:
        raise ValueError(
            f"the picture is {picture.shape}, the reference {reference.shape}; resize one to the other first"
        )
    still = np.ones(reference.shape[:2], dtype=bool) if still is None else still
    gain, offset = _fit(picture, reference, still)
    levelled = (picture - offset) / gain
    shift = _shift(levelled.mean(axis=2), reference.astype(np.float64).mean(axis=2), still)
    moved = shifted(picture, shift)
    if shift != (0.0, 0.0):
        gain, offset = _fit(moved, reference, still)
    left = np.abs((moved - offset) / gain - reference).mean(axis=2)
    residual = float(left[still].mean()) if still.any() else 0.0
    return Calibration(gain=gain, offset=offset, shift_px=shift, residual=residual)


def undo(picture: Frame, calibration: Calibration) -> Frame:
    """The picture as the reference's camera and light would have shown it, uint8 [H, W, 3]."""
    moved = shifted(picture, calibration.shift_px)
    levels = (moved - calibration.offset) / calibration.gain
    return np.clip(np.round(levels), 0, 255).astype(np.uint8)


def shifted(picture: NDArray[np.uint8], shift_px: tuple[float, float]) -> NDArray[np.float64]:
    """picture(x + shift) by linear interpolation; borders repeat. [H, W, ...] float64."""
    result = picture.astype(np.float64)
    for axis, amount in enumerate(shift_px):
        if amount == 0.0:
            continue
        at = np.clip(np.arange(result.shape[axis]) + amount, 0, result.shape[axis] - 1)
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, result.shape[axis] - 1)
        part = (at - low).reshape([-1 if one == axis else 1 for one in range(result.ndim)])
        result = result.take(low, axis) * (1 - part) + result.take(high, axis) * part
    return result


def _fit(
    picture: NDArray[np.uint8] | NDArray[np.float64], reference: Frame, still: Mask
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gain and offset by channel, fitted again without what the fit before cannot explain."""
    fits = [_fit_channel(picture[..., c], reference[..., c], still) for c in range(3)]
    return np.array([gain for gain, _ in fits]), np.array([offset for _, offset in fits])


def _fit_channel(
    values: NDArray[np.uint8] | NDArray[np.float64], reference: NDArray[np.uint8], still: Mask
) -> tuple[float, float]:
    use = still & (values < _SATURATED) & (values > 2) & (reference < _SATURATED)
    y, x = values[use].astype(np.float64), reference[use].astype(np.float64)
    if len(x) < 64:
        return 1.0, 0.0
    gain, offset = float(np.median(y)) / max(float(np.median(x)), 1.0), 0.0
    limit = 3 * _RESIDUAL_LIMIT
    for _ in range(6):
        near = np.abs(y - gain * x - offset) < max(limit, _RESIDUAL_LIMIT)
        a, b = x[near], y[near]
        if len(a) < 64:
            break
        mean_a, mean_b = a.mean(), b.mean()
        from_mean = a - mean_a
        variance = (from_mean * from_mean).mean()
        if variance < 2.0**2:
            break
        covariance = (from_mean * (b - mean_b)).mean()
        gain = float(np.clip(covariance / variance, 0.3, 3.0))
        offset = float(mean_b - gain * mean_a)
        limit *= 0.6
    return gain, offset


def _shift(picture: NDArray[np.float64], reference: NDArray[np.float64], still: Mask) -> tuple[float, float]:
    """(down, right) in pixels, to a fraction; (0, 0) where no shift explains the edges clearly better."""
    margin = MAX_SHIFT_PX + 1
    of_picture, of_reference = _gradients(picture), _gradients(reference)
    inner = (slice(margin, -margin), slice(margin, -margin))
    strength = np.where(still[inner], np.abs(of_reference).sum(axis=0)[inner], 0.0)
    if strength.size == 0 or strength.max() <= 0.0:
        return 0.0, 0.0
    edges = strength >= max(np.quantile(strength, 1 - _EDGE_SHARE), 1e-6)
    rows, columns = (index + margin for index in np.nonzero(edges))
    wanted = of_reference[:, rows, columns]
    width = picture.shape[1]
    edge_pixels, of_pixels = rows * width + columns, of_picture.reshape(2, -1)

    def cost(down: int, right: int) -> float:
        off = np.abs(of_pixels.take(edge_pixels + (down * width + right), axis=1) - wanted)
        return float(np.minimum(off, _GRADIENT_LIMIT).mean())

    span = range(-MAX_SHIFT_PX, MAX_SHIFT_PX + 1)
    costs = np.array([[cost(down, right) for right in span] for down in span])
    row, column = np.unravel_index(int(costs.argmin()), costs.shape)
    if costs[row, column] > costs[MAX_SHIFT_PX, MAX_SHIFT_PX] * (1 - _MIN_SHIFT_GAIN):
        return 0.0, 0.0
    down = float(row - MAX_SHIFT_PX + _vertex(costs[:, column], int(row)))
    right = float(column - MAX_SHIFT_PX + _vertex(costs[row], int(column)))
    return (down, right) if np.hypot(down, right) >= _LEAST_SHIFT_PX else (0.0, 0.0)


def _vertex(costs: NDArray[np.float64], at: int) -> float:
    """Where a V with equal slopes through the lowest cost and its neighbours has its tip, -0.5 to 0.5."""
    if not 0 < at < len(costs) - 1:
        return 0.0
    before, here, after = costs[at - 1 : at + 2].tolist()
    steepest = float(max(before, after) - here)
    return float(before - after) / (2 * steepest) if steepest > 0 else 0.0


def _gradients(image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Central differences down and right, [2, H, W]."""
    return np.stack(np.gradient(image))
