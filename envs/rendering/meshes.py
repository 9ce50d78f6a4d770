"""Faces of small meshes for the ray renderer: which one was hit, and the normals OpenGL would blend there.

`mj_multiRay` gives a point and the normal of its face; MuJoCo's renderer blends vertex normals over a face
(`mjr_uploadMesh` in its render_context.c). Meshes above `MAX_FACES` are left flat.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

MAX_FACES = 512  # every hit is compared with every face
_SHARP = 0.8  # mjr_uploadMesh: a vertex normal further than this cosine from its face's is not used
_CHUNK = 2048  # hits compared at a time, which bounds memory


@dataclass(frozen=True, kw_only=True)
class MeshFaces:
    """Triangles of one mesh in its geom's axes. A point's weights are those of a face's last two corners."""

    plane: Floats  # [4, faces] unit normal and offset: distance of a point (x, y, z, 1) from each face
    weights: Floats  # [2, 4, faces] from a point (x, y, z, 1) to its two weights
    corners: Floats  # [faces, 3, 3] normals at the three corners
    texture: Floats | None  # [faces, 3, 2] texture coordinates at the three corners

    @classmethod
    def of_model(cls, model: mujoco.MjModel, mesh: int) -> MeshFaces:
        faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
        points = model.mesh_vert[model.mesh_vertadr[mesh] + model.mesh_face[faces]].astype(np.float64)
        corners = model.mesh_normal[model.mesh_normaladr[mesh] + model.mesh_facenormal[faces]].astype(
            np.float64
        )
        first, a, b = points[:, 0], points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]
        cross = np.cross(a, b)
        area2 = np.maximum(np.einsum("fi,fi->f", cross, cross), 1e-30)[:, None]
        normals = cross / np.sqrt(area2)
        texture = None
        if model.mesh_texcoordadr[mesh] >= 0:
            texture = model.mesh_texcoord[
                model.mesh_texcoordadr[mesh] + model.mesh_facetexcoord[faces]
            ].copy()
        else:
            sharp = np.einsum("fci,fi->fc", corners, normals) < _SHARP
            corners = np.where(sharp[..., None], normals[:, None], corners)

        def affine(gradient: NDArray[np.float64]) -> Floats:
            offset = -np.einsum("fi,fi->f", gradient, first)
            return np.concatenate([gradient.T, offset[None]]).astype(np.float32)

        to_weights = [np.cross(b, cross) / area2, np.cross(cross, a) / area2]
        return cls(
            plane=affine(normals),
            weights=np.stack([affine(gradient) for gradient in to_weights]),
            corners=corners.astype(np.float32),
            texture=texture,
        )

    def find(self, points: Floats) -> tuple[NDArray[np.int64], Floats]:
        """Face [n] and weights [n, 2] of points [n, 3] on the surface."""
        found, scale = [], 10.0 / max(float(np.abs(points).max()), 1e-9)
        for start in range(0, len(points), _CHUNK):
            chunk = np.concatenate(
                [points[start : start + _CHUNK], np.ones_like(points[start : start + _CHUNK, :1])], 1
            )
            second, third = chunk @ self.weights[0], chunk @ self.weights[1]
            inside = np.minimum(np.minimum(second, third), 1.0 - second - third)
            found.append(np.argmax(np.minimum(inside, 0.0) - scale * np.abs(chunk @ self.plane), axis=1))
        face = np.concatenate(found)
        weights = np.einsum("ni,kin->nk", points, self.weights[:, :3, face]) + self.weights[:, 3, face].T
        return face, weights

    def normals(self, face: NDArray[np.int64], weights: Floats) -> Floats:
        """Blended unit normals [n, 3]."""
        blended = _blend(self.corners[face], weights)
        return blended / np.linalg.norm(blended, axis=1, keepdims=True)

    def texture_at(
        self, face: NDArray[np.int64], weights: Floats, changes: tuple[Floats, Floats]
    ) -> tuple[Floats, tuple[Floats, Floats]]:
        """The mesh's own texture coordinates [n, 2], and their changes when points change by `changes`."""
        assert self.texture is not None
        corners = self.texture[face]
        across = corners[:, 1:] - corners[:, :1]
        gradient = np.einsum("kin,nkc->nic", self.weights[:, :3, face], across)
        right, down = (np.einsum("ni,nic->nc", change, gradient) for change in changes)
        return _blend(corners, weights), (right, down)


def _blend(corners: Floats, weights: Floats) -> Floats:
    return corners[:, 0] + np.einsum("nk,nkc->nc", weights, corners[:, 1:] - corners[:, :1])


class MeshCache:
    """Faces of the meshes of models that are alive."""

    def __init__(self) -> None:
        self._of_model: weakref.WeakKeyDictionary[mujoco.MjModel, dict[int, MeshFaces]] = (
            weakref.WeakKeyDictionary()
        )

    def get(self, model: mujoco.MjModel, geom: int) -> MeshFaces | None:
        """Faces of a mesh geom's mesh; None where they are too many."""
        mesh = int(model.geom_dataid[geom])
        if mesh < 0 or model.mesh_facenum[mesh] > MAX_FACES:
            return None
        mine = self._of_model.setdefault(model, {})
        if mesh not in mine:
            mine[mesh] = MeshFaces.of_model(model, mesh)
        return mine[mesh]
