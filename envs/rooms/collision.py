"""Plan-view collision of a round walker with rooms: exact, without physics steps.

Everything that stands in a room is a rounded rectangle in plan (centre, half extents, yaw, corner radius): a
disc is one with no extents, a wall one with no radius. A walker of radius R that moves along a straight line
meets an obstacle where the line enters the same rectangle with R added to its corner radius; that is two
slab tests and four circles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BODY_RADIUS_M = 0.25
# A walker that touches keeps this distance, so that its next move does not start inside the obstacle.
SKIN_M = 1e-3


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """A rounded rectangle in plan: half extents along its own axes, yaw, a radius added all round."""

    x_m: float
    y_m: float
    half_x_m: float = 0.0
    half_y_m: float = 0.0
    yaw_rad: float = 0.0
    radius_m: float = 0.0

    def outline(self) -> NDArray[np.float64]:
        """Sixteen points on its rim, [16, 2] metres."""
        angle = np.arange(16) * (math.pi / 8)
        unit = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        corner = (
            unit / np.abs(unit).max(axis=1, keepdims=True) * (self.half_x_m, self.half_y_m)
            + unit * self.radius_m
        )
        cos, sin = math.cos(self.yaw_rad), math.sin(self.yaw_rad)
        return corner @ np.array([[cos, sin], [-sin, cos]]) + (self.x_m, self.y_m)


class Obstacles:
    """Footprints as arrays: distances from points and the way free along a line. Immutable."""

    def __init__(self, footprints: Sequence[Footprint]) -> None:
        rows = [
            (f.x_m, f.y_m, f.half_x_m, f.half_y_m, math.cos(f.yaw_rad), math.sin(f.yaw_rad), f.radius_m)
            for f in footprints
        ]
        table = np.array(rows, dtype=np.float64).reshape(-1, 7)
        self.footprints = tuple(footprints)
        self._centre, self._half, self._radius = table[:, 0:2], table[:, 2:4], table[:, 6]
        self._cos, self._sin = table[:, 4], table[:, 5]

    def _local(self, vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Vectors [..., N, 2] in the frame of each of the N obstacles."""
        x, y = vectors[..., 0], vectors[..., 1]
        return np.stack([x * self._cos + y * self._sin, y * self._cos - x * self._sin], axis=-1)

    def distance(self, points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Signed distance from points [P, 2] to the nearest obstacle, [P] metres; inf where there is none."""
        points = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        if not self.footprints:
            return np.full(len(points), np.inf)
        excess = np.abs(self._local(points[:, None, :] - self._centre)) - self._half
        outside = np.sqrt((np.maximum(excess, 0.0) ** 2).sum(-1))
        return (outside + np.minimum(excess.max(-1), 0.0) - self._radius).min(-1)

    def clears(self, footprint: Footprint, gap_m: float) -> bool:
        """Whether a footprint keeps `gap_m` from every obstacle (tested on rim points both ways)."""
        rim = np.concatenate([footprint.outline(), [[footprint.x_m, footprint.y_m]]])
        if self.distance(rim).min() < gap_m:
            return False
        rims = [other.outline() for other in self.footprints if max(other.half_x_m, other.half_y_m) < 3.0]
        return not rims or float(Obstacles([footprint]).distance(np.concatenate(rims)).min()) >= gap_m

    def free_way(
        self, start: tuple[float, float], heading_rad: float, way_m: float, radius_m: float = BODY_RADIUS_M
    ) -> float:
        """How far a disc of `radius_m` gets from `start` along a heading before it touches, at most `way_m`.

        A disc that already touches may move away from what it touches.
        """
        if not self.footprints:
            return way_m
        count = len(self.footprints)
        origin = self._local(np.asarray(start, dtype=np.float64) - self._centre)
        direction = self._local(np.broadcast_to([math.cos(heading_rad), math.sin(heading_rad)], (count, 2)))
        radius = self._radius + radius_m
        wide = self._half + np.stack([radius, np.zeros(count)], axis=1)
        deep = self._half + np.stack([np.zeros(count), radius], axis=1)
        entries = [_enter_box(origin, direction, wide), _enter_box(origin, direction, deep)]
        for sign in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            entries.append(_enter_circle(origin - self._half * sign, direction, radius))
        first = min(float(entry.min()) for entry in entries)
        return way_m if first - SKIN_M >= way_m else max(0.0, first - SKIN_M)


def _enter_box(
    origin: NDArray[np.float64], direction: NDArray[np.float64], half: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Where rays enter boxes about zero, [N] metres; inf where they miss, leave or are past."""
    with np.errstate(divide="ignore", invalid="ignore"):
        one, two = (-half - origin) / direction, (half - origin) / direction
    near = np.nan_to_num(np.minimum(one, two), nan=-np.inf, posinf=np.inf, neginf=-np.inf).max(1)
    far = np.nan_to_num(np.maximum(one, two), nan=np.inf, posinf=np.inf, neginf=-np.inf).min(1)
    return np.where((near < far) & (near >= 0.0), near, np.inf)


def _enter_circle(
    origin: NDArray[np.float64], direction: NDArray[np.float64], radius: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Where rays enter circles about zero, [N] metres; inf where they miss or are past."""
    along = -(origin * direction).sum(1)
    inside = radius**2 - (origin**2).sum(1) + along**2
    entry = along - np.sqrt(np.maximum(inside, 0.0))
    return np.where((inside > 0.0) & (entry >= 0.0), entry, np.inf)
