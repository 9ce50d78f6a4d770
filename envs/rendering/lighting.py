"""The light of MuJoCo's classic renderer for the ray renderer: OpenGL's fixed pipeline plus shadow maps.

OpenGL draws one pass with the emission and all lights that cast no shadow, then one pass a casting light,
each clamped to 0..1, and adds them (`mjr_render`; lighting equation: OpenGL 2.1 specification, section
2.14.1, with local viewer). So light is computed here as a stack of passes, and a shadow removes a whole pass,
its ambient part too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from emuworld.envs.rendering.camera import Camera, aim, clip_distances
from emuworld.envs.rendering.meshes import Floats
from emuworld.envs.rendering.shadows import ShadowCaster
from emuworld.envs.rendering.surfaces import Material

MAX_LIGHTS = 8  # OpenGL's fixed pipeline has no more
AMBIENT_WITHOUT_LIGHTS = 0.3  # mjr_render, initLights
WIDEST_SHADOW_DEG = 160.0  # mjr_render


@dataclass(frozen=True, kw_only=True)
class Light:
    position: NDArray[np.float64]  # [3] metres
    direction: NDArray[np.float64]  # [3] unit
    is_directional: bool
    attenuation: tuple[float, float, float]
    cutoff_rad: float
    exponent: float
    ambient: Floats  # [3]
    diffuse: Floats  # [3]
    specular: Floats  # [3]
    shadow: ShadowCaster | None  # None: casts none

    def add(self, out: Floats, points: Floats, normals: Floats, views: Floats, material: Material) -> None:
        """Add this light's colour at points [n, 3] to out [n, 3]; normals and views (to the eye) are unit."""
        if self.is_directional:
            towards = np.broadcast_to(-self.direction.astype(np.float32), points.shape)
            strength = None
        else:
            towards, strength = self._spot(points)
        facing = _dot(normals, towards)
        lit = facing > 0
        half = towards + views
        _normalise(half)
        glance = np.where(lit, np.maximum(_dot(normals, half), 0.0), 0.0)
        shine = material.specular * np.where(glance > 0, glance**material.shininess, 0.0)
        colour = material.rgb * (self.ambient + np.maximum(facing, 0.0)[:, None] * self.diffuse)
        colour += shine[:, None] * self.specular
        out += colour if strength is None else colour * strength[:, None]

    def _spot(self, points: Floats) -> tuple[Floats, Floats]:
        """Unit vectors towards a positional light, and its strength after distance and cone."""
        towards = self.position.astype(np.float32) - points
        distance = _normalise(towards)
        constant, linear, quadratic = self.attenuation
        strength = 1.0 / np.maximum(constant + distance * (linear + quadratic * distance), 1e-9)
        if self.cutoff_rad < math.pi:  # OpenGL: a cutoff of 180 degrees is no cone at all
            along = -(towards @ self.direction.astype(np.float32))
            inside = along >= math.cos(self.cutoff_rad)
            cone = np.maximum(along, 0.0) ** np.float32(self.exponent) if self.exponent else 1.0
            strength = np.where(inside, strength * cone, 0.0)
        return towards, strength.astype(np.float32)


def _dot(a: Floats, b: Floats) -> Floats:
    return np.einsum("ij,ij->i", a, b)


def _normalise(vectors: Floats) -> Floats:
    """Scale rows to length 1 in place; gives their lengths before."""
    length = np.sqrt(_dot(vectors, vectors))
    vectors /= np.maximum(length, np.float32(1e-9))[:, None]
    return length


class Lighting:
    """All lights of one frame, as a stack of passes."""

    def __init__(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, scene: mujoco.MjvScene
    ) -> None:
        aim(scene, model, camera)  # the headlight follows the scene's camera
        mujoco.mjv_makeLights(model, data, scene)
        lights = [_light(scene.lights[i], model) for i in range(min(scene.nlight, MAX_LIGHTS))]
        supported = [light for light in lights if light is not None]
        self.everywhere = [light for light in supported if light.shadow is None]
        self.casting = [light for light in supported if light.shadow is not None]
        self._eye = camera.position.astype(np.float32)
        self.ambient = 0.0 if scene.nlight else AMBIENT_WITHOUT_LIGHTS

    @property
    def num_passes(self) -> int:
        return 1 + len(self.casting)

    def passes(self, points: Floats, normals: Floats, material: Material) -> Floats:
        """Colour before texture of points [n, 3] with unit normals [n, 3]: [n, num_passes, 3] in 0..1.

        Pass 0 is never shadowed; pass 1 + i belongs to `casting[i]`.
        """
        views = self._eye - points
        _normalise(views)
        out = np.zeros((self.num_passes, len(points), 3), np.float32)
        out[0] = material.rgb * (material.emission + self.ambient)[:, None]
        for light in self.everywhere:
            light.add(out[0], points, normals, views, material)
        for index, light in enumerate(self.casting):
            light.add(out[1 + index], points, normals, views, material)
        return np.minimum(out, 1.0).transpose(1, 0, 2)


def _light(source: mujoco.MjvLight, model: mujoco.MjModel) -> Light | None:
    """Our light for MuJoCo's, or None for the kinds that the classic renderer does not draw either."""
    is_directional = source.type == int(mujoco.mjtLightType.mjLIGHT_DIRECTIONAL)
    if not is_directional and source.type != int(mujoco.mjtLightType.mjLIGHT_SPOT):
        return None
    constant, linear, quadratic = (float(value) for value in source.attenuation)
    position, direction = source.pos.astype(np.float64), source.dir.astype(np.float64)
    shadow = None
    if source.castshadow:
        opening_deg = min(2.0 * source.cutoff * model.vis.map.shadowscale, WIDEST_SHADOW_DEG)
        shadow = ShadowCaster(
            position=position,
            direction=direction,
            is_directional=is_directional,
            half_width=float(model.stat.extent * model.vis.map.shadowclip)
            if is_directional
            else math.tan(math.radians(opening_deg / 2)),
            depth=clip_distances(model),
        )
    return Light(
        position=position,
        direction=direction,
        is_directional=is_directional,
        attenuation=(constant, linear, quadratic),
        cutoff_rad=math.radians(float(source.cutoff)),
        exponent=float(source.exponent),
        ambient=source.ambient.copy(),
        diffuse=source.diffuse.copy(),
        specular=source.specular.copy(),
        shadow=shadow,
    )
