"""What stands between a light and the points that it could light.

Shadow rays are the dearest part of a frame, and in a room most points have nothing near their way to the
lamp. So the shapes that can cast at all are entered into a coarse map seen from the light, and only points
behind an entry get a ray. The map is conservative: what it lets pass is lit in truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mujoco
import numpy as np
from numpy.typing import NDArray

from emuworld.envs.rendering.first_hits import CORNERS, NEAR_M, VISIBLE_GROUPS, cut
from emuworld.envs.rendering.meshes import Floats
from emuworld.envs.rendering.surfaces import BOX, MESH, half_sizes, visible_geoms

BIAS_M = 2e-3  # hits closer to a point than this are the point itself
FAR_AWAY = 1e4  # a directional light's rays start this many extents away: parallel to 1e-4 rad
CELLS = 128  # of the coarse map, a side
_NOBODY, _SEVERAL = -1, -2


def _cross(
    a: Sequence[float] | NDArray[np.float64], b: Sequence[float] | NDArray[np.float64]
) -> NDArray[np.float64]:
    """np.cross of two vectors, in a tenth of its time."""
    return np.array([a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]])


@dataclass(frozen=True, kw_only=True)
class ShadowCaster:
    """The geometry of a light that casts shadows, and the extent of the shadow map OpenGL would use."""

    position: NDArray[np.float64]  # [3] metres
    direction: NDArray[np.float64]  # [3] unit
    is_directional: bool
    half_width: float  # of the shadow map; directional: metres; spot: tangent of half its opening
    depth: tuple[float, float]  # metres along the direction that the shadow map covers
    axes: NDArray[np.float64] = field(init=False)  # [3, 3] right, up and forward as columns

    def __post_init__(self) -> None:
        # As mjr_render places its shadow camera (mjr_orthoVec).
        up = _cross(self.direction, (-1.0, 0.0, 0.0))
        if up @ up <= 0.01:
            up = _cross(self.direction, (0.0, 1.0, 0.0))
        up = up / np.sqrt(up @ up)
        axes = np.stack([_cross(self.direction, up), up, self.direction], axis=1)
        object.__setattr__(self, "axes", axes)

    def reaches(
        self,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        points: NDArray[np.float64],
        *,
        geoms: NDArray[np.int32],
        may_shade_itself: bool,
    ) -> NDArray[np.bool_]:
        """True where nothing stands between the light and points [n, 3], or where its shadow map ends.

        geoms [n] are the geoms that the points lie on. `may_shade_itself` False says that all points face the
        light, so that no convex geom can shade its own.
        """
        place = self._place(points)
        blocked = self._in_map(place)  # may be; the rest is lit (mjr_render: the map's border is)
        index = np.flatnonzero(blocked)
        if len(index):
            suspects = _CoarseMap(self, model, data, points[index], place[index])
            blocked[index] = suspects.behind(geoms[index], exempt_owner=not may_shade_itself)
            index = np.flatnonzero(blocked)
        if len(index):
            blocked[index] = self._hit(model, data, points[index])
        return ~blocked

    def view(self, corners: NDArray[np.float64]) -> NDArray[np.float64]:
        """Corners [n, 3] of a shape as seen from the light (like `_place`), without what lies behind it."""
        place = (corners - self.position) @ self.axes
        if not self.is_directional:
            place = cut(place, NEAR_M)
            place[:, :2] /= place[:, 2:]
        return place

    def _place(self, points: NDArray[np.float64]) -> Floats:
        """Points [n, 3] as seen from the light: right, up, and depth; a spot's first two are per depth."""
        place = (points - self.position) @ self.axes
        if not self.is_directional:
            place[:, :2] /= np.maximum(place[:, 2:], NEAR_M)
        return place.astype(np.float32)

    def _in_map(self, place: Floats) -> NDArray[np.bool_]:
        x, y, depth = place.T
        near, far = self.depth
        half = self.half_width
        return (np.abs(x) < half) & (np.abs(y) < half) & (depth < far) & (depth > near)

    def _hit(
        self, model: mujoco.MjModel, data: mujoco.MjData, points: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        """True where a ray from the light meets something before points [n, 3]."""
        origin = self.position
        if self.is_directional:
            origin = self.position - self.direction * (FAR_AWAY * model.stat.extent)
        rays = points - origin
        count = len(rays)
        geom_ids, fraction = np.empty(count, np.int32), np.empty(count)
        mujoco.mj_multiRay(
            model,
            data,
            origin,
            rays.ravel(),
            VISIBLE_GROUPS,
            True,
            -1,
            geom_ids,
            fraction,
            None,
            count,
            mujoco.mjMAXVAL,
        )
        length = np.sqrt(np.einsum("ij,ij->i", rays, rays))
        return (fraction >= 0) & ((1.0 - fraction) * length > BIAS_M)


class _CoarseMap:
    """The nearest depth, seen from the light, at which something could cast, and whose it is; per cell."""

    def __init__(
        self,
        light: ShadowCaster,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        points: NDArray[np.float64],
        place: Floats,
    ) -> None:
        self._depth = place[:, 2]
        x, y = place[:, 0], place[:, 1]
        low, high = np.array([x.min(), y.min()]), np.array([x.max(), y.max()])
        per_unit = CELLS / np.maximum(high - low, 1e-6)
        row, column = (
            (axis - start) * scale for axis, start, scale in zip((x, y), low, per_unit, strict=True)
        )
        self._cell = np.minimum(row.astype(np.int64), CELLS - 1) * CELLS
        self._cell += np.minimum(column.astype(np.int64), CELLS - 1)
        self._nearest = np.full((CELLS, CELLS), np.inf, np.float32)
        self._owner = np.full((CELLS, CELLS), _NOBODY, np.int32)
        casters = _possible_casters(light, model, data, points)
        for geom, corners in zip(casters.tolist(), _corners(model, data, casters), strict=True):
            seen = light.view(corners)
            if len(seen):
                first = np.floor((seen[:, :2].min(axis=0) - low) * per_unit) - 1
                last = np.floor((seen[:, :2].max(axis=0) - low) * per_unit) + 2
                self._enter(geom, seen[:, 2].min(), first, last, is_convex=model.geom_type[geom] != MESH)

    def _enter(
        self,
        geom: int,
        depth: float,
        first: NDArray[np.float64],
        last: NDArray[np.float64],
        *,
        is_convex: bool,
    ) -> None:
        top, left = np.clip(first, 0, CELLS).astype(int)
        bottom, right = np.clip(last, 0, CELLS).astype(int)
        nearest, owner = self._nearest[top:bottom, left:right], self._owner[top:bottom, left:right]
        np.minimum(nearest, np.float32(depth - BIAS_M), out=nearest)
        owner[...] = np.where(owner == _NOBODY, geom if is_convex else _SEVERAL, _SEVERAL)

    def behind(self, geoms: NDArray[np.int32], *, exempt_owner: bool) -> NDArray[np.bool_]:
        """True for points that have a possible caster between themselves and the light."""
        behind = self._depth > self._nearest.ravel()[self._cell]
        if exempt_owner:
            behind &= self._owner.ravel()[self._cell] != geoms
        return behind


def _corners(model: mujoco.MjModel, data: mujoco.MjData, geoms: NDArray[np.int64]) -> NDArray[np.float64]:
    """Corners [geoms, 8, 3] of bounding boxes in the world; of a plane so far away that they bound all."""
    middle, half = model.geom_aabb[geoms].reshape(-1, 2, 1, 3).transpose(1, 0, 2, 3)
    half = np.where(model.geom_rbound[geoms, None, None] == 0, 1e3 * model.stat.extent, half)
    axes = data.geom_xmat[geoms].reshape(-1, 3, 3)
    return np.einsum("gij,gnj->gni", axes, middle + CORNERS * half) + data.geom_xpos[geoms, None]


def _possible_casters(
    light: ShadowCaster, model: mujoco.MjModel, data: mujoco.MjData, points: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Geoms without those boxes that have the light and all points outside of one of their faces."""
    low = np.array([points[:, k].min() for k in range(3)])
    high = np.array([points[:, k].max() for k in range(3)])
    scene = np.where(CORNERS > 0, high, low)
    source = light.position - light.direction * (
        model.stat.extent * FAR_AWAY if light.is_directional else 0.0
    )
    scene = np.concatenate([scene, source[None]])
    local = np.einsum("gij,gni->gnj", data.geom_xmat.reshape(-1, 3, 3), scene - data.geom_xpos[:, None])
    size = half_sizes(model) - 1e-4
    outside = (local.min(axis=1) >= size) | (local.max(axis=1) <= -size)
    walls = (model.geom_type == BOX) & outside.any(axis=1)
    return np.flatnonzero(visible_geoms(model) & ~walls)
