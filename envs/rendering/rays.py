"""MuJoCo frames without OpenGL: a ray renderer over `mj_multiRay` that draws what the classic renderer draws.

Needs nothing but the mujoco wheel. It follows `mjr_render` closely enough that frames of both can be mixed
(figures in `tests/envs/test_render.py`): the light of the fixed pipeline, per vertex on boxes as OpenGL
computes it; 2D and cube textures with mipmaps; shadows; skybox; edges smoothed like 4-fold multisampling.

Not drawn: reflections (the OpenGL renderer has them switched off), transparency (a geom is opaque or, with
alpha 0, invisible), fog, haze, skins and flexes. Meshes of more than `meshes.MAX_FACES` faces are shaded
flat.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import mujoco
import numpy as np
from numpy.typing import NDArray

from emuworld.envs.rendering.camera import Camera, check_size
from emuworld.envs.rendering.first_hits import FirstHits, trace, trace_grid
from emuworld.envs.rendering.lighting import Lighting
from emuworld.envs.rendering.meshes import Floats, MeshCache
from emuworld.envs.rendering.surfaces import (
    BOX,
    MESH,
    Patch,
    cube_positions,
    half_sizes,
    materials,
    plane_coordinates,
)
from emuworld.envs.rendering.textures import Texture, TextureCache

# Offsets right and down of four samples from a pixel's upper left corner, where Mesa's multisampling has
# them.
SAMPLE_OFFSETS = ((0.375, 0.875), (0.875, 0.625), (0.125, 0.375), (0.625, 0.125))
RGB_ROLE = int(mujoco.mjtTextureRole.mjTEXROLE_RGB)
SKYBOX = int(mujoco.mjtTexture.mjTEXTURE_SKYBOX)
model_textures, _meshes = TextureCache(), MeshCache()
PARTS = 1024  # surface numbers a geom


class RayRenderer:
    """Draws with rays. Deterministic; no state between frames but cached textures and ray directions."""

    def __init__(self, *, antialias: bool = True) -> None:
        self._antialias = antialias
        self._directions: tuple[tuple[int, int, float], Floats] | None = None
        self._scene = mujoco.MjvScene(mujoco.MjModel.from_xml_string("<mujoco/>"), 1)

    def render(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, *, height: int, width: int
    ) -> NDArray[np.uint8]:
        directions = self._pixel_directions(camera, height, width)
        frame = _Frame(model, data, camera, self._scene, pixel=2 * math.tan(camera.fovy_rad / 2) / height)
        hits = trace_grid(model, data, camera, directions, height=height, width=width, normals=True)
        colours, surfaces = frame.shade(directions, hits)
        if self._antialias:
            edges = _edges(surfaces.reshape(height, width))
            if len(edges):
                offsets = np.array(SAMPLE_OFFSETS, np.float32) - np.float32(0.5)
                samples = directions[edges][:, None].repeat(len(offsets), axis=1)
                samples[..., 0] += offsets[:, 0] * frame.pixel
                samples[..., 1] -= offsets[:, 1] * frame.pixel
                samples = samples.reshape(-1, 3)
                fine, _ = frame.shade(samples, trace(model, data, camera, samples, normals=True))
                colours[edges] = fine.reshape(len(edges), len(offsets), 3).mean(axis=1)
        return (colours * 255.0 + 0.5).astype(np.uint8).reshape(height, width, 3)

    def depth(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, *, height: int, width: int
    ) -> NDArray[np.float32]:
        hits = self._hits(model, data, camera, height, width)
        return np.where(hits.geom_ids >= 0, hits.depths, np.inf).astype(np.float32).reshape(height, width)

    def segmentation(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, *, height: int, width: int
    ) -> NDArray[np.int32]:
        return self._hits(model, data, camera, height, width).geom_ids.reshape(height, width)

    def close(self) -> None:
        """Nothing to do: there is no resource outside of Python."""

    def _hits(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, height: int, width: int
    ) -> FirstHits:
        directions = self._pixel_directions(camera, height, width)
        return trace_grid(model, data, camera, directions, height=height, width=width)

    def _pixel_directions(self, camera: Camera, height: int, width: int) -> Floats:
        """Rays through pixel centres, [height * width, 3] in camera axes, 1 long along the optical axis."""
        check_size(height, width)
        key = (height, width, camera.fovy_rad)
        if self._directions is None or self._directions[0] != key:
            pixel = 2 * math.tan(camera.fovy_rad / 2) / height
            x = (np.arange(width) + 0.5 - width / 2) * pixel
            y = (height / 2 - np.arange(height) - 0.5) * pixel
            rays = np.stack([*np.meshgrid(x, y), np.full((height, width), -1.0)], axis=-1)
            self._directions = (key, rays.reshape(-1, 3).astype(np.float32))
        return self._directions[1]


def _edges(surfaces: NDArray[np.int32]) -> NDArray[np.int64]:
    """Flat indices of pixels of which a neighbour shows another surface."""
    edge = np.zeros(surfaces.shape, bool)
    across = surfaces[:, 1:] != surfaces[:, :-1]
    down = surfaces[1:] != surfaces[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return np.flatnonzero(edge)


class _Frame:
    """One model in one state seen by one camera: everything that rays of this frame share."""

    def __init__(
        self,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        camera: Camera,
        scene: mujoco.MjvScene,
        *,
        pixel: float,
    ) -> None:
        self.model, self.data, self.camera = model, data, camera
        self.pixel = np.float32(pixel)  # side of a pixel at depth 1
        self.lighting = Lighting(model, data, camera, scene)
        self.material = materials(model)
        self.types = model.geom_type.tolist()
        self.size = half_sizes(model)
        self.axes = data.geom_xmat.reshape(-1, 3, 3)
        # Local coordinates of a geom are depth * (camera ray @ to_local) + eye.
        self.to_local = (camera.rotation.T @ self.axes).astype(np.float32)
        self.eye = np.einsum("gij,gi->gj", self.axes, camera.position - data.geom_xpos).astype(np.float32)
        self.grid = _grid(int(model.vis.quality.numquads))
        self._face_light: dict[tuple[int, int], Floats] = {}

    def shade(self, directions: Floats, found: FirstHits) -> tuple[Floats, NDArray[np.int32]]:
        """Colours [n, 3] in 0..1 and surface numbers [n] (a geom's parts differ) of rays [n, 3]."""
        geom_ids, depths, normals = found.geom_ids, found.depths, found.normals
        assert normals is not None
        narrow = np.int16 if self.model.ngeom < 2**15 else np.int32  # which numpy sorts by radix
        order = np.argsort(geom_ids.astype(narrow), kind="stable")
        hits = _Hits(self, directions[order], depths[order], lambda rays: normals[order[rays]])
        hits.draw(geom_ids[order])
        colours, surfaces = np.empty((len(order), 3), np.float32), np.empty(len(order), np.int32)
        colours[order], surfaces[order] = hits.colours(), hits.surfaces
        return colours, surfaces

    def texture_of(self, geom: int) -> Texture | None:
        model = self.model
        material = int(model.geom_matid[geom])
        if material < 0:
            return None
        index = int(np.reshape(model.mat_texid, (model.nmat, -1))[material, RGB_ROLE])
        return None if index < 0 else model_textures.get(model, index)

    def face_light(self, geom: int, face: int) -> Floats:
        """Light at the vertices of a box's face, [vertices, passes * 3]: where OpenGL computes it."""
        key = (geom, face)
        if key not in self._face_light:
            axes = self.axes[geom].astype(np.float32)
            vertices, normal = self.grid[face]
            world = (vertices * self.size[geom]) @ axes.T + self.data.geom_xpos[geom].astype(np.float32)
            normals = np.broadcast_to(axes @ normal, world.shape)
            light = self.lighting.passes(world, normals, self.material.take(np.array([geom])))
            self._face_light[key] = light.reshape(len(world), -1)
        return self._face_light[key]


class _Hits:
    """Rays sorted by the geom they hit, and what was found out about them so far."""

    def __init__(
        self,
        frame: _Frame,
        directions: Floats,
        depths: NDArray[np.float64],
        normals: Callable[[NDArray[np.int64] | slice], NDArray[np.float64]],
    ) -> None:
        count = len(directions)
        self.frame, self.directions, self.depths, self.normals = frame, directions, depths, normals
        self.surfaces = np.full(count, -1, np.int32)
        self.passes = np.zeros((count, frame.lighting.num_passes, 3), np.float32)
        self.texture: Floats = np.ones((count, 3), np.float32)
        self.num_sky = 0
        self._curved: list[tuple[int, slice, Floats]] = []  # geom, its rays, normals in world axes

    def draw(self, geom_ids: NDArray[np.int32]) -> None:
        ids, starts = np.unique(geom_ids, return_index=True)
        for geom, start, end in zip(
            ids.tolist(), starts.tolist(), [*starts[1:].tolist(), len(geom_ids)], strict=True
        ):
            if geom < 0:
                self.num_sky = end
                self._sky(slice(start, end))
            else:
                self._geom(geom, slice(start, end))
        self._light_curved()

    def _sky(self, rays: slice) -> None:
        """Background: the first skybox, else black."""
        model = self.frame.model
        skyboxes = np.flatnonzero(model.tex_type == SKYBOX)
        if not len(skyboxes):
            return
        # mjr_render turns the cube by 90 degrees around x: its x, y, z are x, z, -y of the world.
        turn = self.frame.camera.rotation[[0, 2, 1]] * np.array([[1.0], [1.0], [-1.0]])
        step = (self.frame.pixel * turn).astype(np.float32)
        directions = self.directions[rays] @ turn.T.astype(np.float32)
        texture = model_textures.get(model, int(skyboxes[0]))
        self.passes[rays, 0] = texture.in_direction(directions, step[:, 0], -step[:, 1])

    def _geom(self, geom: int, rays: slice) -> None:
        frame = self.frame
        kind = frame.types[geom]
        slopes = self.directions[rays] @ frame.to_local[geom]
        local = slopes * self.depths[rays, None].astype(np.float32) + frame.eye[geom]
        mesh = _meshes.get(frame.model, geom) if kind == MESH else None
        patch = Patch.of_points(kind, frame.size[geom], local, mesh)
        self.surfaces[rays] = geom * PARTS + patch.parts
        if kind == BOX:
            self._light_box(geom, rays, patch)
        else:
            smooth = patch.smooth_normals()
            normals = self.normals(rays) if smooth is None else smooth @ frame.axes[geom].T
            self._curved.append((geom, rays, normals.astype(np.float32)))
        texture = frame.texture_of(geom)
        if texture is not None:
            changes = self._changes(geom, rays, slopes, patch)
            self.texture[rays] = self._painted(texture, geom, patch, changes)

    def _light_box(self, geom: int, rays: slice, patch: Patch) -> None:
        """OpenGL's light: per vertex of each face's grid, and blended between vertices."""
        cells = int(self.frame.model.vis.quality.numquads)
        for face in np.flatnonzero(np.bincount(patch.parts)).tolist():
            mine = np.flatnonzero(patch.parts == face)
            light = self.frame.face_light(geom, face)
            i, x = _cell(patch.unit[mine, (face // 2 + 1) % 3], cells)
            j, y = _cell(patch.unit[mine, (face // 2 + 2) % 3], cells)
            corner = i * (cells + 1) + j
            low, high = (
                light.take(corner, axis=0, mode="clip"),
                light.take(corner + cells + 1, axis=0, mode="clip"),
            )
            low += y * (light.take(corner + 1, axis=0, mode="clip") - low)
            high += y * (light.take(corner + cells + 2, axis=0, mode="clip") - high)
            high -= low
            high *= x
            low += high
            self.passes[rays.start + mine] = low.reshape(len(mine), -1, 3)

    def _painted(self, texture: Texture, geom: int, patch: Patch, changes: tuple[Floats, Floats]) -> Floats:
        """Texture colours [n, 3] of a patch."""
        model = self.frame.model
        material = int(model.geom_matid[geom])
        uniform = bool(model.mat_texuniform[material])
        right, down = changes
        if texture.is_cube:
            scale = patch.size if uniform else np.ones(3, np.float32)
            if patch.kind == MESH:
                right, down = right * patch.size, down * patch.size
            return texture.in_direction(cube_positions(patch) * scale, right * scale, down * scale)
        repeat = model.mat_texrepeat[material].astype(np.float32)
        if uniform:
            repeat = repeat * patch.size[:2]
        place, (right, down) = plane_coordinates(patch, changes, repeat)
        return texture.at_plane(place, right, down)

    def _changes(self, geom: int, rays: slice, slopes: Floats, patch: Patch) -> tuple[Floats, Floats]:
        """How unit coordinates change to the next pixel right and down, on the plane that touches there."""
        frame = self.frame
        depths = self.depths[rays].astype(np.float32)
        steps = frame.to_local[geom] * frame.pixel
        if patch.kind == BOX:
            axis = patch.parts >> 1
            along = slopes[np.arange(len(slopes)), axis]
            across = [step[axis] for step in steps[:2]]
        else:
            normals = (self.normals(rays) @ frame.axes[geom]).astype(np.float32)
            along = np.einsum("ij,ij->i", slopes, normals)
            across = [normals @ step for step in steps[:2]]
        depth_over_along = depths / np.where(np.abs(along) < 1e-6, np.float32(1e-6), along)
        right, up = (
            (depths[:, None] * step - slopes * (slope * depth_over_along)[:, None]) / frame.size[geom]
            for step, slope in zip(steps[:2], across, strict=True)
        )
        return right, -up

    def _light_curved(self) -> None:
        if not self._curved:
            return
        rays = np.concatenate([np.arange(part.start, part.stop) for _, part, _ in self._curved])
        geoms = np.concatenate([np.full(part.stop - part.start, geom) for geom, part, _ in self._curved])
        normals = np.concatenate([normals for _, _, normals in self._curved])
        points = self._points(rays).astype(np.float32)
        self.passes[rays] = self.frame.lighting.passes(points, normals, self.frame.material.take(geoms))

    def _points(self, rays: NDArray[np.int64] | slice) -> NDArray[np.float64]:
        camera = self.frame.camera
        return (self.directions[rays] * self.depths[rays, None]) @ camera.rotation.T + camera.position

    def colours(self) -> Floats:
        frame, hit = self.frame, slice(self.num_sky, len(self.depths))
        out = self.passes[:, 0]
        for index, light in enumerate(frame.lighting.casting):
            colour = self.passes[hit, 1 + index]
            lit = hit.start + np.flatnonzero(colour[:, 0] + colour[:, 1] + colour[:, 2])
            if len(lit) and light.shadow is not None:
                clear = light.shadow.reaches(
                    frame.model,
                    frame.data,
                    self._points(lit),
                    geoms=self.surfaces[lit] // PARTS,
                    may_shade_itself=bool(light.ambient.any()),
                )
                shown = lit[clear]
                out[shown] += self.passes[shown, 1 + index]
        out = out * self.texture
        return np.minimum(out, np.float32(1.0), out=out)


@functools.cache
def _grid(cells: int) -> list[tuple[Floats, Floats]]:
    """Vertices [(cells + 1) ** 2, 3] and normal of each face of a unit box, in the order of `part`."""
    ticks = np.linspace(-1.0, 1.0, cells + 1, dtype=np.float32)
    faces = []
    for axis in range(3):
        for side in (-1, 1):
            vertices = np.empty((cells + 1, cells + 1, 3), np.float32)
            vertices[..., axis] = side
            vertices[..., (axis + 1) % 3], vertices[..., (axis + 2) % 3] = ticks[:, None], ticks[None]
            normal = np.zeros(3, np.float32)
            normal[axis] = side
            faces.append((vertices.reshape(-1, 3), normal))
    return faces


def _cell(position: Floats, cells: int) -> tuple[NDArray[np.int64], Floats]:
    """Grid cell and place in it, 0..1, of positions in -1..1."""
    scaled = (position + np.float32(1.0)) * np.float32(cells / 2)
    cell = np.clip(scaled.astype(np.int64), 0, cells - 1)
    return cell, (scaled - cell).astype(np.float32)[:, None]
