"""Which geom each ray meets first: `mj_multiRay`, and on a pixel grid a faster way with the same answer.

`mj_multiRay` tests every ray against most big geoms around the camera, and those of a room are boxes. A box's
face is a plane, whose depth over a pixel grid is a quotient of two sums of a row and a column term: a few
array operations a face. So boxes are drawn into a depth buffer, and rays are left for the pixels where
another shape may be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from emuworld.envs.rendering.camera import Camera
from emuworld.envs.rendering.surfaces import BOX, Floats, half_sizes, visible_geoms

VISIBLE_GROUPS = np.array([1, 1, 1, 0, 0, 0], np.uint8)  # MuJoCo's default, as in the OpenGL renderer
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float64)
NEAR_M = (
    1e-3  # shapes are cut this far in front of a camera or light to find where they may be seen from there
)
BOX_SLACK = np.float32(1e-5)  # a face reaches this much too far (relative), so that flush boxes leave no gap


def cut(corners: NDArray[np.float64], near: float) -> NDArray[np.float64]:
    """Points whose convex hull is that of corners [n, 3] without what has a third coordinate below `near`."""
    kept = corners[:, 2] > near
    if kept.all() or not kept.any():
        return corners[kept]
    front, behind = corners[kept][:, None], corners[~kept][None]
    along = (near - front[..., 2:]) / (behind[..., 2:] - front[..., 2:])
    return np.concatenate([corners[kept], (front + along * (behind - front)).reshape(-1, 3)])


@dataclass(frozen=True, kw_only=True)
class FirstHits:
    """What n rays meet. `normals` are known where a geom is no box, and only if they were asked for."""

    geom_ids: NDArray[np.int32]  # [n] -1 where nothing is
    depths: NDArray[np.float64]  # [n] metres along the optical axis
    normals: NDArray[np.float64] | None  # [n, 3] unit, out of the geom


def trace(
    model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, directions: Floats, *, normals: bool = False
) -> FirstHits:
    """First hits of rays [n, 3] in camera axes, of length 1 along the optical axis."""
    count = len(directions)
    geom_ids, depths = np.empty(count, np.int32), np.empty(count)
    out = np.empty(3 * count) if normals else None
    rays = (directions.astype(np.float64) @ camera.rotation.T).ravel()
    mujoco.mj_multiRay(
        model,
        data,
        camera.position,
        rays,
        VISIBLE_GROUPS,
        True,
        -1,
        geom_ids,
        depths,
        out,
        count,
        mujoco.mjMAXVAL,
    )
    return FirstHits(geom_ids=geom_ids, depths=depths, normals=None if out is None else out.reshape(-1, 3))


def trace_grid(
    model: mujoco.MjModel,
    data: mujoco.MjData,
    camera: Camera,
    directions: Floats,
    *,
    height: int,
    width: int,
    normals: bool = False,
) -> FirstHits:
    """First hits of the rays through the pixels of a frame, [height * width, 3], row by row."""
    grid = _Grid(model, data, camera, directions, height=height, width=width)
    grid.draw_boxes()
    index = np.flatnonzero(grid.others())
    geom_ids, depths = grid.geom_ids.ravel(), grid.depths.ravel().astype(np.float64)
    all_normals = np.zeros((height * width, 3)) if normals else None
    if len(index):
        some = trace(model, data, camera, directions[index], normals=normals)
        geom_ids[index], depths[index] = some.geom_ids, some.depths
        if all_normals is not None and some.normals is not None:
            all_normals[index] = some.normals
    return FirstHits(geom_ids=geom_ids, depths=depths, normals=all_normals)


class _Grid:
    """A depth buffer with geom ids."""

    def __init__(
        self,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        camera: Camera,
        directions: Floats,
        *,
        height: int,
        width: int,
    ) -> None:
        self.height, self.width = height, width
        self.depths = np.full((height, width), np.inf, np.float32)
        self.geom_ids = np.full((height, width), -1, np.int32)
        rays = directions.reshape(height, width, 3)
        self._x, self._y = rays[0, :, 0], rays[:, 0, 1]
        self._focal_px = 0.5 * height / math.tan(camera.fovy_rad / 2)
        shown = visible_geoms(model)
        self._boxes = np.flatnonzero(shown & (model.geom_type == BOX))
        self._others = np.flatnonzero(shown & (model.geom_type != BOX))
        self._unbounded = model.geom_rbound == 0  # planes
        axes = data.geom_xmat.reshape(-1, 3, 3)
        self._centre = (data.geom_xpos - camera.position) @ camera.rotation  # in camera axes
        self._axes = camera.rotation.T @ axes  # a geom's axes as columns, in camera axes
        self._eye = -np.einsum("gij,gi->gj", self._axes, self._centre)  # the camera in the geom's axes
        self._size = half_sizes(model).astype(np.float64)
        self._aabb = model.geom_aabb.reshape(-1, 2, 3)

    def draw_boxes(self) -> None:
        """Every face that is turned to the camera."""
        local = CORNERS * self._size[self._boxes, None]
        corners = np.einsum("gij,gcj->gci", self._axes[self._boxes], local) + self._centre[self._boxes, None]
        # A face's corners are those of the box with one coordinate on its side.
        for geom, points in zip(self._boxes.tolist(), corners, strict=True):
            for axis in range(3):
                side = 1.0 if self._eye[geom, axis] > 0 else -1.0
                if abs(self._eye[geom, axis]) > self._size[geom, axis]:
                    rows, columns = self._rectangle(points[CORNERS[:, axis] == side])
                    if rows.start < rows.stop and columns.start < columns.stop:
                        self._draw_face(geom, axis, side, rows, columns)

    def others(self) -> NDArray[np.bool_]:
        """True, [height, width], where a shape that is no box may be seen."""
        mask = np.zeros((self.height, self.width), bool)
        for geom in self._others.tolist():
            middle, half = self._aabb[geom]
            corners = (middle + CORNERS * half) @ self._axes[geom].T + self._centre[geom]
            mask[(slice(None), slice(None)) if self._unbounded[geom] else self._rectangle(corners)] = True
        return mask

    def _rectangle(self, corners: NDArray[np.float64]) -> tuple[slice, slice]:
        """Rows and columns that hold the projection of corners [n, 3] in camera axes."""
        corners = cut(corners * np.array([1.0, 1.0, -1.0]), NEAR_M)
        if not len(corners):
            return slice(0, 0), slice(0, 0)
        depth = corners[:, 2]
        x = self.width / 2 + self._focal_px * corners[:, 0] / depth
        y = self.height / 2 - self._focal_px * corners[:, 1] / depth
        # Pixel i has its centre at i + 0.5; one pixel more on each side costs little and forgives rounding.
        top, bottom = max(0, math.floor(y.min()) - 1), min(self.height, math.ceil(y.max()) + 1)
        left, right = max(0, math.floor(x.min()) - 1), min(self.width, math.ceil(x.max()) + 1)
        return slice(top, max(top, bottom)), slice(left, max(left, right))

    def _draw_face(self, geom: int, axis: int, side: float, rows: slice, columns: slice) -> None:
        size, eye = self._size[geom], self._eye[geom]
        # A ray's slope along a local axis: its camera coordinates (x, y, -1) on that axis.
        slopes = self._axes[geom].astype(np.float32)
        x, y = self._x[columns], self._y[rows, None]
        across = [x * slopes[0, k] + (y * slopes[1, k] - slopes[2, k]) for k in range(3)]
        with np.errstate(divide="ignore", invalid="ignore"):
            depth = np.float32(side * size[axis] - eye[axis]) / across[axis]
            inside = depth < self.depths[rows, columns]
            inside &= depth > 0
            for k in ((axis + 1) % 3, (axis + 2) % 3):
                place = across[k]
                place *= depth
                place += np.float32(eye[k])
                np.abs(place, out=place)
                inside &= place <= np.float32(size[k]) * (1 + BOX_SLACK)
        np.copyto(self.depths[rows, columns], depth, where=inside)
        np.copyto(self.geom_ids[rows, columns], np.int32(geom), where=inside)
