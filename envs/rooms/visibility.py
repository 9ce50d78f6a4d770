"""What is in view from a pose, counted by a few hundred rays instead of a second picture.

Each tracked thing is projected to a rectangle of the picture; a lattice of pixels inside it is cast with one
`mj_multiRay` call, and the share of rays that hit the thing first gives its pixel count. Small things are
counted at every pixel, large ones on a coarser lattice. The counts do not depend on the renderer.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import NamedTuple

import mujoco
import numpy as np
from numpy.typing import NDArray

from emuworld.envs.rooms.captions import LANDMARKS, View, VisibleObject
from emuworld.envs.rooms.floorplan import RoomPlan

PICTURE_PX = 256
MIN_OBJECT_PX = 60  # 0.1 % of the picture: fewer pixels do not make an object in view
_OBJECT_LATTICE = 10  # at most this many samples along each side of an object's rectangle
_LANDMARK_LATTICE = 6
_GRID = 12  # samples along each side of the whole picture, for walls, floor and nearness
NEAR_M = 0.8


class _Rectangle(NamedTuple):
    """Part of the picture (pixels, half open) that something may cover, and how much of its whole rectangle
    that is."""

    x0: int
    x1: int
    y0: int
    y1: int
    in_frame: float

    def around(self, other: _Rectangle) -> _Rectangle:
        """The rectangle around both."""
        x0, x1 = min(self.x0, other.x0), max(self.x1, other.x1)
        y0, y1 = min(self.y0, other.y0), max(self.y1, other.y1)
        return _Rectangle(x0, x1, y0, y1, max(self.in_frame, other.in_frame))


class _Count(NamedTuple):
    """About how much of something is seen: pixels, the column of their middle (0..1), share in the frame."""

    pixels: int
    column: float
    in_frame: float


class Lookout:
    """Counts what is in view in one compiled room."""

    def __init__(
        self, model: mujoco.MjModel, data: mujoco.MjData, plan: RoomPlan, identities: tuple[str, ...]
    ) -> None:
        self._model, self._data, self._plan = model, data, plan
        colours = {item.identity: (item.colour, item.shape) for item in plan.objects}
        groups: dict[str, list[int]] = defaultdict(list)
        for geom, identity in enumerate(identities):
            if identity in colours or identity in LANDMARKS:
                groups[identity].append(geom)
        self._names = [name for name in groups if name in colours] + [
            name for name in groups if name not in colours
        ]
        self._pairs = colours
        # Landmarks of one noun (two doors) count together: a caption says "a door" for either.
        self._group_of_geom = np.full(model.ngeom + 1, -1)
        for index, name in enumerate(self._names):
            self._group_of_geom[groups[name]] = index
        self._boxes = [_corners(model, data, geom) for name in self._names for geom in groups[name]]
        self._box_group = np.array([i for i, name in enumerate(self._names) for _ in groups[name]], dtype=int)
        self._corners = np.array(self._boxes).reshape(-1, 8, 3)
        self._positions = {name: data.geom_xpos[groups[name][0]].copy() for name in colours if name in groups}
        self._background = np.array(identities)
        self._grid = _lattice(0, PICTURE_PX, 0, PICTURE_PX, _GRID)

    def _rectangles(
        self, position: NDArray[np.float64], rotation: NDArray[np.float64], focal_px: float
    ) -> dict[int, _Rectangle]:
        """Where each tracked group that may be in view stands in the picture."""
        local = (self._corners - position) @ rotation
        depth = -local[..., 2]
        safe = np.maximum(depth, 0.05)
        x = PICTURE_PX / 2 + focal_px * local[..., 0] / safe
        y = PICTURE_PX / 2 - focal_px * local[..., 1] / safe
        whole = np.stack(
            [np.floor(x.min(1)), np.ceil(x.max(1)), np.floor(y.min(1)), np.ceil(y.max(1))], axis=1
        )
        limits = np.clip(whole, 0, PICTURE_PX).astype(int)
        found: dict[int, _Rectangle] = {}
        for box in np.flatnonzero(
            (depth.max(1) > 0.05) & (limits[:, 0] < limits[:, 1]) & (limits[:, 2] < limits[:, 3])
        ):
            group = int(self._box_group[box])
            x0, x1, y0, y1 = (int(value) for value in limits[box])
            width, height = whole[box, 1] - whole[box, 0], whole[box, 3] - whole[box, 2]
            one = _Rectangle(x0, x1, y0, y1, float((x1 - x0) * (y1 - y0) / (width * height)))
            found[group] = one.around(found[group]) if group in found else one
        return found

    def view(self, position: NDArray[np.float64], rotation: NDArray[np.float64], fovy_rad: float) -> View:
        """What a square picture from this camera shows."""
        focal_px = PICTURE_PX / 2 / math.tan(fovy_rad / 2)
        rectangles = self._rectangles(position, rotation, focal_px)
        lattices = [self._grid]
        for group, box in rectangles.items():
            samples = _OBJECT_LATTICE if self._names[group] in self._pairs else _LANDMARK_LATTICE
            lattices.append(_lattice(box.x0, box.x1, box.y0, box.y1, samples))
        pixels = np.concatenate(lattices)
        hits, ways = self._cast(position, rotation, pixels, focal_px)
        grid = slice(0, len(self._grid))
        counts: dict[int, _Count] = {}
        offset = len(self._grid)
        for (group, box), lattice in zip(rectangles.items(), lattices[1:], strict=True):
            rows = slice(offset, offset + len(lattice))
            offset += len(lattice)
            hit = self._group_of_geom[hits[rows]] == group
            if hit.any():
                counts[group] = _Count(
                    pixels=round(int(hit.sum()) * (box.x1 - box.x0) * (box.y1 - box.y0) / len(lattice)),
                    column=float(pixels[rows][hit, 0].mean()) / PICTURE_PX,
                    in_frame=box.in_frame,
                )
        return self._describe(counts, hits[grid], ways[grid], position)

    def _cast(
        self,
        position: NDArray[np.float64],
        rotation: NDArray[np.float64],
        pixels: NDArray[np.float64],
        focal_px: float,
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """First geom and way along the ray for pixel positions [P, 2]."""
        count = len(pixels)
        local = np.empty((count, 3))
        local[:, 0] = (pixels[:, 0] - PICTURE_PX / 2) / focal_px
        local[:, 1] = (PICTURE_PX / 2 - pixels[:, 1]) / focal_px
        local[:, 2] = -1.0
        local /= np.sqrt((local**2).sum(1, keepdims=True))
        geoms, ways = np.full(count, -1, np.int32), np.zeros(count)
        rays = np.ascontiguousarray(local @ rotation.T).reshape(-1)
        mujoco.mj_multiRay(
            self._model, self._data, position, rays, None, 1, -1, geoms, ways, None, count, mujoco.mjMAXVAL
        )
        return geoms, ways

    def _describe(
        self,
        counts: dict[int, _Count],
        grid_hits: NDArray[np.int32],
        grid_ways: NDArray[np.float64],
        position: NDArray[np.float64],
    ) -> View:
        objects, landmarks = [], []
        for group, count in counts.items():
            name = self._names[group]
            if name not in self._pairs:
                landmarks.append((name, count.pixels / PICTURE_PX**2))
            elif count.pixels >= MIN_OBJECT_PX:
                colour, shape = self._pairs[name]
                way = float(np.linalg.norm(self._positions[name] - position))
                objects.append(
                    VisibleObject(
                        colour=colour,
                        shape=shape,
                        pixels=count.pixels,
                        column=round(count.column, 4),
                        distance_m=round(way, 4),
                        in_frame=round(count.in_frame, 4),
                    )
                )
        objects.sort(key=lambda item: (-item.pixels, item.identity))
        landmarks.sort(key=lambda item: (-item[1], item[0]))
        seen, times = np.unique(self._background[grid_hits[grid_hits >= 0]], return_counts=True)
        shares = {str(name): int(count) / len(grid_hits) for name, count in zip(seen, times, strict=True)}
        walls = sorted(
            ((name.removesuffix(" wall"), share) for name, share in shares.items() if name.endswith(" wall")),
            key=lambda item: (-item[1], item[0]),
        )
        near = float(((grid_hits >= 0) & (grid_ways < NEAR_M)).mean())
        return View(
            objects=tuple(objects),
            walls=tuple(walls),
            floor=(self._plan.floor[0], shares.get("floor", 0.0)),
            landmarks=tuple((name, round(share, 4)) for name, share in landmarks),
            near_share=near,
        )


def _lattice(x0: int, x1: int, y0: int, y1: int, samples: int) -> NDArray[np.float64]:
    """Pixel middles spread evenly over a rectangle, at most `samples` along each side, [P, 2]."""
    nx, ny = min(samples, x1 - x0), min(samples, y1 - y0)
    x = x0 + (np.arange(nx) + 0.5) * ((x1 - x0) / nx)
    y = y0 + (np.arange(ny) + 0.5) * ((y1 - y0) / ny)
    lattice = np.empty((ny, nx, 2))
    lattice[..., 0], lattice[..., 1] = x[None, :], y[:, None]
    return lattice.reshape(-1, 2)


def _corners(model: mujoco.MjModel, data: mujoco.MjData, geom: int) -> NDArray[np.float64]:
    """The eight corners of a geom's bounding box in world coordinates, [8, 3]."""
    centre, half = model.geom_aabb[geom, :3], model.geom_aabb[geom, 3:]
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float64)
    return (centre + signs * half) @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom]
