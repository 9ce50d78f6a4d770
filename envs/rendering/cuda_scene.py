"""What the CUDA ray renderer uploads, as the structs of cuda_shapes.cu: one model's assets, one frame.

Plain numpy, so that it runs and is tested without a GPU. Poses are handed over in camera axes relative to the
camera, worked out in float64.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from emuworld.envs.rendering import meshes, shadows
from emuworld.envs.rendering.camera import Camera
from emuworld.envs.rendering.first_hits import BOX_SLACK, NEAR_M
from emuworld.envs.rendering.lighting import MAX_LIGHTS, Light, Lighting
from emuworld.envs.rendering.rays import RGB_ROLE, SAMPLE_OFFSETS, SKYBOX, model_textures
from emuworld.envs.rendering.surfaces import (
    BOX,
    CAPSULE,
    CYLINDER,
    ELLIPSOID,
    MESH,
    PLANE,
    PROJECTS,
    SPHERE,
    half_sizes,
    materials,
    visible_geoms,
)
from emuworld.envs.rendering.textures import Texture

_IS_DRAWN = np.zeros(max(int(kind) for kind in mujoco.mjtGeom.__members__.values()) + 1, bool)  # by mjtGeom
_IS_DRAWN[[PLANE, SPHERE, CAPSULE, ELLIPSOID, CYLINDER, BOX, MESH]] = True
MAX_GEOMS, MAX_LEVELS = 1024, 16

LIGHT = np.dtype(
    [(name, np.int32) for name in ("directional", "has_cone", "shades_itself", "shines")]
    + [(name, np.float32, 3) for name in ("position", "direction", "attenuation")]
    + [(name, np.float32) for name in ("cos_cutoff", "exponent")]
    + [(name, np.float32, 3) for name in ("ambient", "diffuse", "specular")]
    + [(name, np.float32) for name in ("half_width", "near_m", "far_m")]
    + [(name, np.float32, 3) for name in ("right", "up")]
)
FRAME = np.dtype(
    [
        (name, np.int32)
        for name in (
            "height", "width", "num_geoms", "num_everywhere", "num_casting", "cells", "projects", "sky"
        )
    ]
    + [(name, np.float32) for name in ("pixel", "ambient", "bias_m", "slack", "nearest_m")]
    + [("offsets", np.float32, (4, 2)), ("sky_turn", np.float32, (3, 3)), ("lights", LIGHT, MAX_LIGHTS)]
)  # fmt: skip
GEOM = np.dtype(
    [(name, np.int32) for name in ("id", "kind", "texture", "first_face", "num_faces", "has_texcoords")]
    + [("size", np.float32, 3), ("eye", np.float32, 3), ("axes", np.float32, (3, 3))]
    + [("centre", np.float32, 3), ("radius", np.float32), ("rgb", np.float32, 3)]
    + [(name, np.float32) for name in ("emission", "specular", "shininess")]
    + [("repeat", np.float32, 2), ("cube_scale", np.float32, 3)]
)
TEXTURE = np.dtype(
    [
        ("cube", np.int32),
        ("levels", np.int32),
        ("width", np.int32, MAX_LEVELS),
        ("height", np.int32, MAX_LEVELS),
        ("offset", np.int32, (6, MAX_LEVELS)),
    ]
)
FACE = np.dtype(
    [
        ("plane", np.float32, 4),
        ("weights", np.float32, (2, 4)),
        ("normals", np.float32, (3, 3)),
        ("texcoords", np.float32, (3, 2)),
    ]
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Assets:
    """Textures and small meshes of a model. A mesh that is too large has no faces here."""

    textures: NDArray[np.void]  # [textures] TEXTURE
    texels: NDArray[np.float32]  # [texels, 3] of all textures
    faces: NDArray[np.void]  # [faces] FACE, of all meshes
    first_face: NDArray[np.int32]  # [meshes]
    num_faces: NDArray[np.int32]  # [meshes]
    has_texcoords: NDArray[np.int32]  # [meshes]

    @classmethod
    def of_model(cls, model: mujoco.MjModel) -> Assets:
        pyramids = [model_textures.get(model, index) for index in range(model.ntex)]
        sizes = [len(pyramid.texels) for pyramid in pyramids]
        starts = np.cumsum([0, *sizes])
        counts = np.where(model.mesh_facenum <= meshes.MAX_FACES, model.mesh_facenum, 0)
        faces = np.zeros(int(counts.sum()), FACE)
        first = np.cumsum([0, *counts.tolist()])[: model.nmesh].astype(np.int32)
        for mesh in np.flatnonzero(counts).tolist():
            _fill_faces(faces[first[mesh] : first[mesh] + counts[mesh]], model, mesh)
        textures = np.zeros(model.ntex, TEXTURE)
        for out, pyramid, start in zip(textures, pyramids, starts, strict=False):
            _fill_texture(out, pyramid, int(start))
        return cls(
            textures=textures,
            texels=np.concatenate([one.texels for one in pyramids] or [np.zeros((0, 3), np.float32)]),
            faces=faces,
            first_face=first,
            num_faces=counts.astype(np.int32),
            has_texcoords=(model.mesh_texcoordadr >= 0).astype(np.int32),
        )


def _fill_texture(out: np.void, pyramid: Texture, start: int) -> None:
    levels = len(pyramid.widths)
    if levels > MAX_LEVELS:
        raise ValueError(
            f"the cuda renderer takes textures of at most {2 ** (MAX_LEVELS - 1)} texels a side, and got "
            f"{pyramid.widths[0]} by {pyramid.heights[0]}; use a smaller texture or renderer=rays"
        )
    out["cube"], out["levels"] = pyramid.is_cube, levels
    out["width"][:levels], out["height"][:levels] = pyramid.widths, pyramid.heights
    out["offset"][: len(pyramid.offsets), :levels] = pyramid.offsets + start


def _fill_faces(out: NDArray[np.void], model: mujoco.MjModel, mesh: int) -> None:
    source = meshes.MeshFaces.of_model(model, mesh)
    out["plane"] = source.plane.T
    out["weights"] = source.weights.transpose(2, 0, 1)
    out["normals"] = source.corners
    if source.texture is not None:
        out["texcoords"] = source.texture


class AssetCache:
    """Assets by content, so that models built from one asset list, as all rooms are, share one upload."""

    def __init__(self, limit: int = 4) -> None:
        self._limit = limit
        self._of_model: weakref.WeakKeyDictionary[mujoco.MjModel, Assets] = weakref.WeakKeyDictionary()
        self._by_content: dict[tuple[object, ...], Assets] = {}

    def get(self, model: mujoco.MjModel) -> Assets:
        """A model's assets. Textures and meshes must not be edited in place once they were drawn."""
        assets = self._of_model.get(model)
        if assets is None:
            key = _content(model)
            assets = self._by_content.pop(key, None) or Assets.of_model(model)
            self._by_content[key] = assets  # the newest last
            if len(self._by_content) > self._limit:
                del self._by_content[next(iter(self._by_content))]
            self._of_model[model] = assets
        return assets


def _content(model: mujoco.MjModel) -> tuple[object, ...]:
    textures = ["data", "type", "colorspace", "height", "width", "nchannel", "adr"]
    parts = ["vertadr", "vert", "faceadr", "facenum", "face", "normaladr", "normal", "facenormal"]
    parts += ["texcoordadr", "texcoord", "facetexcoord"]
    names = [f"tex_{name}" for name in textures] + [f"mesh_{name}" for name in parts]
    return tuple(getattr(model, name).tobytes() for name in names)


class FramePacker:
    """Writes frames. Holds the MuJoCo scene that works out the lights."""

    def __init__(self) -> None:
        self._scene = mujoco.MjvScene(mujoco.MjModel.from_xml_string("<mujoco/>"), 1)

    def pack(
        self,
        out: NDArray[np.uint8],
        model: mujoco.MjModel,
        data: mujoco.MjData,
        camera: Camera,
        assets: Assets,
        *,
        height: int,
        width: int,
    ) -> int:
        """Write a FRAME and its GEOMs to the start of `out` [FRAME_BYTES]; gives how many bytes they are.

        Raises ValueError for what the cuda renderer cannot draw.
        """
        shown = np.flatnonzero(visible_geoms(model))
        _check_geoms(model, assets, shown)
        size = FRAME.itemsize + len(shown) * GEOM.itemsize
        frame, geoms = out[: FRAME.itemsize].view(FRAME)[0], out[FRAME.itemsize : size].view(GEOM)
        lighting = Lighting(model, data, camera, self._scene)
        _fill_frame(frame, model, camera, lighting, height=height, width=width)
        frame["num_geoms"] = len(shown)
        _fill_geoms(geoms, model, data, camera, assets, shown)
        return size


FRAME_BYTES = FRAME.itemsize + MAX_GEOMS * GEOM.itemsize


def _check_geoms(model: mujoco.MjModel, assets: Assets, shown: NDArray[np.int64]) -> None:
    if len(shown) > MAX_GEOMS:
        raise ValueError(
            f"the cuda renderer draws at most {MAX_GEOMS} geoms and got {len(shown)}; use renderer=rays or gl"
        )
    kinds = model.geom_type[shown]
    strange = shown[~_IS_DRAWN[kinds]]
    if len(strange):
        kind = mujoco.mjtGeom(int(model.geom_type[strange[0]])).name
        raise ValueError(
            f"the cuda renderer cannot draw geom {int(strange[0])}, a {kind}; use renderer=rays or gl"
        )
    large = shown[kinds == MESH]
    large = large[assets.num_faces[model.geom_dataid[large]] == 0] if len(large) else large
    if len(large):
        geom = int(large[0])
        faces = int(model.mesh_facenum[model.geom_dataid[geom]])
        raise ValueError(
            f"the cuda renderer draws meshes of at most {meshes.MAX_FACES} faces; geom {geom} "
            f"({model.geom(geom).name!r}) has {faces}. Use renderer=rays or gl, or the primitive arm"
        )


def _fill_frame(
    out: np.void, model: mujoco.MjModel, camera: Camera, lighting: Lighting, *, height: int, width: int
) -> None:
    out["height"], out["width"] = height, width
    out["num_everywhere"], out["num_casting"] = len(lighting.everywhere), len(lighting.casting)
    out["cells"], out["projects"] = model.vis.quality.numquads, PROJECTS
    out["pixel"] = 2 * math.tan(camera.fovy_rad / 2) / height
    out["ambient"] = lighting.ambient
    out["bias_m"], out["slack"], out["nearest_m"] = shadows.BIAS_M, BOX_SLACK, NEAR_M
    out["offsets"] = SAMPLE_OFFSETS
    skyboxes = np.flatnonzero(model.tex_type == SKYBOX)
    out["sky"] = skyboxes[0] if len(skyboxes) else -1
    # mjr_render turns the cube by 90 degrees around x: its x, y, z are x, z, -y of the world.
    out["sky_turn"] = camera.rotation[[0, 2, 1]] * np.array([[1.0], [1.0], [-1.0]])
    for row, light in zip(out["lights"], (*lighting.everywhere, *lighting.casting), strict=False):
        _fill_light(row, light, camera)


def _fill_light(out: np.void, light: Light, camera: Camera) -> None:
    out["directional"], out["has_cone"] = light.is_directional, light.cutoff_rad < math.pi
    out["shades_itself"], out["shines"] = bool(light.ambient.any()), bool(light.specular.any())
    out["position"] = (light.position - camera.position) @ camera.rotation
    out["direction"] = light.direction @ camera.rotation
    out["attenuation"] = light.attenuation
    out["cos_cutoff"], out["exponent"] = math.cos(light.cutoff_rad), light.exponent
    out["ambient"], out["diffuse"], out["specular"] = light.ambient, light.diffuse, light.specular
    if light.shadow is not None:
        out["half_width"] = light.shadow.half_width
        out["near_m"], out["far_m"] = light.shadow.depth
        right, up, _ = light.shadow.axes.T @ camera.rotation
        out["right"], out["up"] = right, up


def _fill_geoms(
    out: NDArray[np.void],
    model: mujoco.MjModel,
    data: mujoco.MjData,
    camera: Camera,
    assets: Assets,
    shown: NDArray[np.int64],
) -> None:
    kinds = model.geom_type[shown]
    size = half_sizes(model)[shown]
    out["id"], out["kind"], out["size"] = shown, kinds, size
    axes, away = data.geom_xmat[shown].reshape(-1, 3, 3), data.geom_xpos[shown] - camera.position
    out["axes"] = camera.rotation.T @ axes
    out["eye"] = -(away[:, None] @ axes)[:, 0]
    out["centre"] = away @ camera.rotation
    out["radius"] = model.geom_rbound[shown]
    surface = materials(model)
    out["rgb"], out["emission"] = surface.rgb[shown], surface.emission[shown]
    out["specular"], out["shininess"] = surface.specular[shown], surface.shininess[shown]
    out["texture"], out["num_faces"], out["has_texcoords"] = -1, 0, 0
    out["repeat"], out["cube_scale"] = 1.0, 1.0
    if model.nmat:
        _fill_paint(out, model, model.geom_matid[shown], size)
    rows = np.flatnonzero(kinds == MESH)
    if len(rows):
        mesh = model.geom_dataid[shown[rows]]
        for name in ("first_face", "num_faces", "has_texcoords"):
            out[name][rows] = getattr(assets, name)[mesh]


def _fill_paint(
    out: NDArray[np.void], model: mujoco.MjModel, material: NDArray[np.int32], size: NDArray[np.float32]
) -> None:
    texture = np.reshape(model.mat_texid, (model.nmat, -1))[material, RGB_ROLE]
    rows = np.flatnonzero((material >= 0) & (texture >= 0))
    material, size = material[rows], size[rows]
    out["texture"][rows] = texture[rows]
    scale = np.where(model.mat_texuniform[material, None], size, np.float32(1.0))
    out["repeat"][rows] = model.mat_texrepeat[material] * scale[:, :2]
    out["cube_scale"][rows] = scale
