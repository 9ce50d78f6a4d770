"""How well an object at many places at once fits a picture: the matched filter of `keyframe_readout`.

A silhouette is a polygon that stands around the object's points in the picture, so each of its rows is one
run of pixels, and so is each row of the polygon some pixels wider. Places are judged side by side, on one
window a place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emuworld.envs.rendering.camera import Camera
from emuworld.tasks.metrics import project

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_RING_PX = 3  # around a silhouette, nothing should look like the object
_RING_WEIGHT = 0.5
_NUM_DIRECTIONS = 24  # sides of the polygon that stands for a silhouette
_HIDDEN_M = 0.01  # what is nearer to the camera than the object by more hides it
_MIN_VISIBLE = 0.25  # share of a silhouette that must be in view for a place to be judged
_SIDE_BY_SIDE = 32  # places: their windows stay in the processor's cache

_ANGLES = 2 * math.pi * np.arange(_NUM_DIRECTIONS) / _NUM_DIRECTIONS
_DIRECTIONS = np.stack([np.sin(_ANGLES), np.cos(_ANGLES)])  # [2, K] (down, right)
_MARGINS = np.array([0.0, 1.0, _RING_PX])  # of the silhouette, of the gap around it, of the ring around both


@dataclass(frozen=True, kw_only=True, eq=False)
class Silhouettes:
    """An object before a camera.

    Attributes:
        points: [N, 3] metres about its middle, on its surface.
        depth: metres along the optical axis of the scene without it, [H, W].
    """

    points: Floats
    depth: NDArray[np.float32]
    camera: Camera

    def scores(self, likeness: Floats, positions: Floats) -> Floats:
        """Mean likeness inside the silhouette less what looks like the object around it, [P]; -1 where too
        little is in view.

        Args:
            likeness: [H, W].
            positions: [P, 3] metres, of the object's middle.
        """
        parts = [
            self._scores(likeness, positions[start : start + _SIDE_BY_SIDE])
            for start in range(0, len(positions), _SIDE_BY_SIDE)
        ]
        return np.concatenate(parts) if parts else np.empty(0)

    def pixels(self, positions: Floats) -> Floats:
        """World points [..., 3] -> (row, column) [..., 2] in pixels from the picture's upper left corner."""
        height, width = self.depth.shape
        rows, columns, _ = project(positions, self.camera, height=height, width=width)
        return np.stack([rows, columns], axis=-1) + 0.5

    def depths(self, positions: Floats) -> Floats:
        """Metres along the optical axis, [P]."""
        return np.asarray((self.camera.position - positions) @ self.camera.rotation[:, 2])

    def windows(self, positions: Floats) -> NDArray[np.bool_]:
        """Pixels in the windows of these places, [H, W]."""
        low, high = _bounds(self.pixels(positions[:, None] + self.points))
        region = np.zeros(self.depth.shape, dtype=bool)
        for (top, left), (bottom, right) in zip(np.maximum(low, 0), np.maximum(high, 0), strict=True):
            region[top:bottom, left:right] = True
        return region

    def _scores(self, likeness: Floats, positions: Floats) -> Floats:
        height, width = likeness.shape
        points = self.pixels(positions[:, None] + self.points)  # [P, N, 2]
        low, high = _bounds(points)
        num_rows, num_columns = (high - low).max(axis=0)
        rows = low[:, 0, None] + np.arange(num_rows)  # [P, h]
        columns = low[:, 1, None] + np.arange(num_columns)  # [P, w]
        first, last = _runs(points, rows, width=width)  # [3, P, h]
        last = np.where((rows >= 0) & (rows < height), last, first - 1)
        num_inside = np.maximum(last[0] - first[0] + 1, 0).sum(axis=1)

        first, last, across = first[..., None], last[..., None], columns[:, None, :]
        inside = (across >= first[0]) & (across <= last[0])  # [P, h, w]
        ring = (across >= first[2]) & (across <= last[2])
        ring &= (across < first[1]) | (across > last[1])
        at = np.clip(rows, 0, height - 1)[:, :, None] * width + np.clip(across, 0, width - 1)
        visible = self.depth.ravel()[at] > (self.depths(positions) - _HIDDEN_M)[:, None, None]
        part = likeness.ravel()[at]
        seen = inside & visible
        ring &= visible & (part > 0.0)
        gained = np.where(seen, part, 0.0).sum(axis=(1, 2))
        around = np.where(ring, part, 0.0).sum(axis=(1, 2))
        judged = (num_inside > 0) & (seen.sum(axis=(1, 2)) >= _MIN_VISIBLE * num_inside)
        return np.where(judged, (gained - _RING_WEIGHT * around) / np.maximum(num_inside, 1), -1.0)


def _bounds(points: Floats) -> tuple[Ints, Ints]:
    """First row and column of windows around points [P, N, 2] and their rings, and those after the last."""
    low = np.floor(points.min(axis=1)).astype(np.int64) - _RING_PX
    high = np.ceil(points.max(axis=1)).astype(np.int64) + _RING_PX + 1
    return low, high


def _runs(points: Floats, rows: Ints, *, width: int) -> tuple[Ints, Ints]:
    """First and last column of each row [P, h] of the polygons around points [P, N, 2], each `_MARGINS`
    wider, within the picture: [3, P, h]. The last lies before the first where the row has none.
    """
    down, right = _DIRECTIONS[:, :, None, None, None]  # [K, 1, 1, 1]
    extents = (points @ _DIRECTIONS).max(axis=1).T[:, None, :, None] + _MARGINS[:, None, None]  # [K, 3, P, 1]
    bounds = (extents - (rows + 0.5) * down) / right  # [K, 3, P, h]
    rightmost = bounds[_DIRECTIONS[1] > 0.0].min(axis=0)
    leftmost = bounds[_DIRECTIONS[1] < 0.0].max(axis=0)
    first = np.ceil(np.clip(leftmost, 0.0, width) - 0.5).astype(np.int64)
    last = np.floor(np.clip(rightmost, 0.0, width) - 0.5).astype(np.int64)
    return first, last
