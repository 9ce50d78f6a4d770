"""Shapes of MuJoCo's geoms as the classic renderer draws them: material, size, parts, texture coordinates.

Everything is in a geom's own axes. "Unit" coordinates are local ones over the half sizes: -1..1 on a box.
Texture coordinates are those of the renderer's display lists (`makeBuiltin` in MuJoCo's render_context.c).
"""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from emuworld.envs.rendering.meshes import Floats, MeshFaces

PLANE, SPHERE, CAPSULE, ELLIPSOID, CYLINDER, BOX, MESH = (
    int(getattr(mujoco.mjtGeom, f"mjGEOM_{name}"))
    for name in ("PLANE", "SPHERE", "CAPSULE", "ELLIPSOID", "CYLINDER", "BOX", "MESH")
)
_ROUND = (SPHERE, CAPSULE, ELLIPSOID, CYLINDER)
_DEFAULT_RGBA = np.array([0.5, 0.5, 0.5, 1.0], np.float32)  # a geom with this colour takes its material's
# The two axes of a box face by its normal's axis: u runs along the first, v against the second.
_FACE_AXES = np.array([[1, 2], [0, 2], [0, 1]])
# Before 3.12 MuJoCo projected 2D textures of primitives on the local x, y plane.
PROJECTS = tuple(int(part) for part in mujoco.__version__.split(".")[:2]) < (3, 12)


@dataclass(frozen=True, kw_only=True)
class Material:
    """Surface properties of n points or geoms; a single row serves any number of points."""

    rgb: Floats  # [n, 3]
    emission: Floats  # [n]
    specular: Floats  # [n]
    shininess: Floats  # [n] OpenGL's exponent, 0..128

    def take(self, index: NDArray[np.int64]) -> Material:
        return Material(
            rgb=self.rgb[index],
            emission=self.emission[index],
            specular=self.specular[index],
            shininess=self.shininess[index],
        )


def materials(model: mujoco.MjModel) -> Material:
    """Every geom's surface. As in MuJoCo's scene, a geom's own colour wins where it is not the default."""
    rgba = model.geom_rgba.astype(np.float32)
    emission = np.zeros(model.ngeom, np.float32)
    specular = np.full(model.ngeom, 0.5, np.float32)
    shininess = np.full(model.ngeom, 0.5, np.float32)
    index = np.flatnonzero(model.geom_matid >= 0)
    if len(index):
        material = model.geom_matid[index]
        default = (rgba[index] == _DEFAULT_RGBA).all(axis=1)
        rgba[index[default]] = model.mat_rgba[material[default]]
        emission[index] = model.mat_emission[material]
        specular[index] = model.mat_specular[material]
        shininess[index] = model.mat_shininess[material]
    rgb = np.ascontiguousarray(rgba[:, :3])
    return Material(rgb=rgb, emission=emission, specular=specular, shininess=shininess * np.float32(128))


def visible_geoms(model: mujoco.MjModel) -> NDArray[np.bool_]:
    """True for geoms that are drawn: in groups 0 to 2 and not wholly transparent."""
    alpha = model.geom_rgba[:, 3].copy()
    plain = (model.geom_matid >= 0) & (model.geom_rgba == _DEFAULT_RGBA).all(axis=1)
    alpha[plain] = model.mat_rgba[model.geom_matid[plain], 3]
    return (alpha > 0) & (model.geom_group >= 0) & (model.geom_group < 3)


def half_sizes(model: mujoco.MjModel) -> Floats:
    """Half sizes [geoms, 3] by which MuJoCo's scene scales its unit shapes; of a capsule without its caps."""
    size = model.geom_size.astype(np.float32)
    spheres = model.geom_type == SPHERE
    size[spheres, 1:] = size[spheres, :1]
    for kind in (CAPSULE, CYLINDER):
        mine = model.geom_type == kind
        size[mine, 2], size[mine, 1] = size[mine, 1], size[mine, 0]
    return np.maximum(size, np.float32(1e-9))


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Points on one geom, in its axes."""

    kind: int  # mujoco.mjtGeom
    size: Floats  # [3]
    unit: Floats  # [n, 3]
    parts: NDArray[
        np.int64
    ]  # [n] box: face, 2 * axis + (is the positive side); cylinder and capsule: end; mesh: face
    mesh: MeshFaces | None = None
    weights: Floats | None = None  # [n, 2] place in the mesh's face

    @classmethod
    def of_points(cls, kind: int, size: Floats, local: Floats, mesh: MeshFaces | None) -> Patch:
        if mesh is not None:
            parts, weights = mesh.find(local)
            return cls(kind=kind, size=size, unit=local / size, parts=parts, mesh=mesh, weights=weights)
        unit = local / size
        return cls(kind=kind, size=size, unit=unit, parts=_parts(kind, unit))

    def smooth_normals(self) -> Floats | None:
        """Blended normals of a mesh; None for shapes that have their true normals."""
        return (
            None if self.mesh is None or self.weights is None else self.mesh.normals(self.parts, self.weights)
        )


def _parts(kind: int, unit: Floats) -> NDArray[np.int64]:
    if kind == BOX:
        axis = np.argmax(np.abs(unit), axis=1)
        return 2 * axis + (unit[np.arange(len(unit)), axis] > 0)
    x, y, z = unit.T
    if kind == CYLINDER:
        return np.where(z * z > x * x + y * y, np.where(z > 0, 1, 2), 0)
    if kind == CAPSULE:
        return np.where(z > 1, 1, np.where(z < -1, 2, 0))
    return np.zeros(len(unit), np.int64)


def cube_positions(patch: Patch) -> Floats:
    """Where OpenGL takes a cube texture's direction from: unit coordinates, but spheres on capsule ends."""
    unit, size = patch.unit, patch.size
    if patch.kind == MESH:
        return unit * size  # drawn at its size, not scaled
    if patch.kind != CAPSULE or not patch.parts.any():
        return unit
    above = np.abs(unit[:, 2]) - 1.0
    cap = 1.0 + above * (size[2] / size[0])
    out = unit.copy()
    out[:, 2] = np.where(above > 0, np.copysign(cap, unit[:, 2]), unit[:, 2])
    return out


def plane_coordinates(
    patch: Patch, changes: tuple[Floats, Floats], repeat: Floats
) -> tuple[Floats, tuple[Floats, Floats]]:
    """Texture coordinates [n, 2] of a patch whose texture is repeated `repeat` [2] times (one image is 1 by
    1), and their changes to the next pixel right and down, from the same changes of the unit coordinates [n,
    3]."""
    shift = np.float32(0.0)
    if patch.mesh is not None and patch.mesh.texture is not None and patch.weights is not None:
        right, down = (change * patch.size for change in changes)
        place, slopes = patch.mesh.texture_at(patch.parts, patch.weights, (right, down))
    elif patch.kind == BOX and not PROJECTS:
        first, second = _FACE_AXES[patch.parts >> 1].T
        place, slopes = _linear(patch.unit, changes, first, second, offset=0.5)
    elif patch.kind in _ROUND and not PROJECTS:
        place, slopes = _round(patch, changes)
    else:
        place, slopes = _linear(patch.unit, changes, 0, 1, offset=0.0)
        shift = np.float32(-0.5)  # settexture in MuJoCo's render_gl3.c: whatever the repeat
    return place * repeat + shift, (slopes[0] * repeat, slopes[1] * repeat)


def _linear(
    unit: Floats,
    changes: tuple[Floats, Floats],
    first: NDArray[np.int64] | int,
    second: NDArray[np.int64] | int,
    *,
    offset: float,
) -> tuple[Floats, tuple[Floats, Floats]]:
    rows = np.arange(len(unit))

    def pick(array: Floats) -> Floats:
        array = np.broadcast_to(array, unit.shape)
        return np.stack([0.5 * array[rows, first], -0.5 * array[rows, second]], axis=1)

    return pick(unit) + np.float32(offset), (pick(changes[0]), pick(changes[1]))


def _round(patch: Patch, changes: tuple[Floats, Floats]) -> tuple[Floats, tuple[Floats, Floats]]:
    kind, unit, size, parts = patch.kind, patch.unit, patch.size, patch.parts
    x, y, z = unit.T
    radius2 = np.maximum(x * x + y * y, 1e-9)
    u = np.arctan2(y, x) / (2 * np.pi) % 1.0
    per_turn = 1.0 / (2 * np.pi * radius2)
    if kind in (SPHERE, ELLIPSOID):
        height = np.clip(z, -1.0, 1.0)
        v, dv_dz = (
            0.5 - np.arcsin(height) / np.pi,
            -1.0 / (np.pi * np.sqrt(np.maximum(1 - height * height, 1e-6))),
        )
    else:
        v, dv_dz = (1.0 - z) / 2, np.full(len(z), -0.5)
    if kind == CAPSULE and parts.any():
        up = np.clip((np.abs(z) - 1.0) * (size[2] / size[0]), 0.0, 1.0)
        turned = np.arcsin(up) / (np.pi / 2)
        v = np.where(parts == 1, 1.0 - turned, np.where(parts == 2, turned, v))
        steep = size[2] / size[0] / (np.pi / 2 * np.sqrt(np.maximum(1 - up * up, 1e-6)))
        dv_dz = np.where(parts == 0, dv_dz, -steep)
    slopes = [np.stack([(x * c[:, 1] - y * c[:, 0]) * per_turn, c[:, 2] * dv_dz], axis=1) for c in changes]
    uv = np.stack([u, v], axis=1)
    if kind == CYLINDER and parts.any():
        lid = parts > 0
        uv[lid] = 0.5 + 0.5 * unit[lid, :2]
        for slope, change in zip(slopes, changes, strict=True):
            slope[lid] = 0.5 * change[lid, :2]
    return uv.astype(np.float32), (slopes[0].astype(np.float32), slopes[1].astype(np.float32))
