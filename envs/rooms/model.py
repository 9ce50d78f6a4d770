"""From a floor plan to a MuJoCo model: static primitives, one light, the same assets in every room."""

from __future__ import annotations

import math

import mujoco
import numpy as np

from emuworld.envs.palette import OBJECT_COLOURS, RGB, add_assets
from emuworld.envs.rooms.floorplan import ObjectPlan, PlacedPiece, RoomPlan, Wall

_GEOM_TYPES = {
    "box": mujoco.mjtGeom.mjGEOM_BOX,
    "ball": mujoco.mjtGeom.mjGEOM_SPHERE,
    "sphere": mujoco.mjtGeom.mjGEOM_SPHERE,
    "cylinder": mujoco.mjtGeom.mjGEOM_CYLINDER,
    "capsule": mujoco.mjtGeom.mjGEOM_CAPSULE,
    "egg": mujoco.mjtGeom.mjGEOM_ELLIPSOID,
    "ellipsoid": mujoco.mjtGeom.mjGEOM_ELLIPSOID,
    "cone": mujoco.mjtGeom.mjGEOM_MESH,
    "pyramid": mujoco.mjtGeom.mjGEOM_MESH,
}
_SLAB_M = 0.05  # half thickness of walls, floor and ceiling
_PANEL_M, _BAND_M, _SKIRTING_M = 0.9, (0.95, 1.35), 0.1
_SHADOW_PX = 1536
# A lamp just under the ceiling that shines on all below it. MuJoCo's shadow map covers the middle of the cone
# (`shadowscale`); it is free of speckles only where the lamp points straight down.
_CUTOFF_DEG = 89.0
_SHADOW_HALF_DEG = 75.0


class _Builder:
    """Adds static geoms to a spec and remembers what each belongs to."""

    def __init__(self, spec: mujoco.MjSpec) -> None:
        self._world = spec.worldbody
        self.identities: list[str] = []

    def add(
        self,
        identity: str,
        kind: str,
        position: tuple[float, float, float],
        size: tuple[float, float, float],
        rgb: RGB,
        *,
        material: str = "matte",
        quat: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0),
        mesh: str | None = None,
        name: str = "",
    ) -> None:
        geom = self._world.add_geom(
            type=_GEOM_TYPES[kind], pos=position, size=size, quat=quat, rgba=(*rgb, 1.0), material=material
        )
        geom.contype = geom.conaffinity = 0
        if mesh is not None:
            geom.meshname = mesh
        if name:
            geom.name = name
        self.identities.append(identity)


def _yaw_quat(yaw_rad: float) -> tuple[float, float, float, float]:
    return (math.cos(yaw_rad / 2), 0.0, 0.0, math.sin(yaw_rad / 2))


def _upright_quat(normal_rad: float) -> tuple[float, float, float, float]:
    """Rotation of a slab whose own y is up and whose own z, the textured side, looks along a heading."""
    quat = np.zeros(4)
    across = (-math.sin(normal_rad), math.cos(normal_rad), 0.0)
    normal = (math.cos(normal_rad), math.sin(normal_rad), 0.0)
    matrix = np.array([across, (0.0, 0.0, 1.0), normal]).T
    mujoco.mju_mat2Quat(quat, np.ascontiguousarray(matrix).reshape(9))
    return float(quat[0]), float(quat[1]), float(quat[2]), float(quat[3])


def _slab(builder: _Builder, wall: Wall, low: float, high: float, rgb: RGB, material: str) -> None:
    """The part of a wall between two heights. Neighbours are flush: a ledge would throw a ragged shadow."""
    inward = wall.inward_rad
    x = (wall.start[0] + wall.end[0]) / 2 - _SLAB_M * math.cos(inward)
    y = (wall.start[1] + wall.end[1]) / 2 - _SLAB_M * math.sin(inward)
    size = (wall.length_m / 2 + 2 * _SLAB_M, (high - low) / 2, _SLAB_M)
    position, quat = (x, y, (low + high) / 2), _upright_quat(inward)
    builder.add(f"{wall.colour} wall", "box", position, size, rgb, material=material, quat=quat)


def _add_walls(builder: _Builder, plan: RoomPlan) -> None:
    height = plan.size_m[2]
    for wall in plan.walls:
        layers = [(0.0, height, wall.rgb, wall.material)]
        if wall.panel is not None:
            layers = [(0.0, _PANEL_M, wall.panel, "matte"), (_PANEL_M, height, wall.rgb, wall.material)]
        elif wall.band is not None:
            low, high = _BAND_M
            layers = [
                (0.0, low, wall.rgb, "matte"),
                (low, high, wall.band, "matte"),
                (high, height, wall.rgb, "matte"),
            ]
        if plan.skirting is not None:
            _, top, rgb, material = layers[0]
            layers[:1] = [(0.0, _SKIRTING_M, plan.skirting, "matte"), (_SKIRTING_M, top, rgb, material)]
        for low, high, rgb, material in layers:
            _slab(builder, wall, low, high, rgb, material)
    if plan.partition is not None:
        slab, name, rgb = plan.partition
        size = (slab.half_x_m, height / 2, slab.half_y_m)
        quat = _upright_quat(slab.yaw_rad - math.pi / 2)
        builder.add(f"{name} wall", "box", (slab.x_m, slab.y_m, height / 2), size, rgb, quat=quat)


def _add_piece(builder: _Builder, spot: PlacedPiece) -> None:
    yaw = spot.yaw_rad - math.pi / 2
    cos, sin = math.cos(yaw), math.sin(yaw)
    for part in spot.piece.parts:
        right, front, up = part.position
        position = (spot.x_m + right * cos - front * sin, spot.y_m + right * sin + front * cos, up)
        builder.add(
            spot.piece.noun,
            part.kind,
            position,
            part.size,
            part.rgb,
            material=part.material,
            quat=_yaw_quat(yaw),
        )


def _add_object(builder: _Builder, item: ObjectPlan) -> None:
    # MuJoCo moves a mesh to its centre of mass, a quarter of the height of a cone or pyramid above its
    # base, and takes `pos` for the mesh's own origin, the middle of the base.
    up = item.base_m if item.mesh is not None else item.base_m + item.height_m / 2
    builder.add(
        item.identity,
        item.shape,
        (item.x_m, item.y_m, up),
        item.size,
        OBJECT_COLOURS[item.colour],
        material="gloss",
        quat=_yaw_quat(item.yaw_rad),
        mesh=item.mesh,
        name=f"object/{item.identity}",
    )


def _add_light(spec: mujoco.MjSpec, plan: RoomPlan) -> None:
    light = plan.light
    spec.worldbody.add_light(
        pos=light.position,
        dir=(0.0, 0.0, -1.0),
        diffuse=light.diffuse,
        specular=(0.25, 0.25, 0.25),
        ambient=(0.0, 0.0, 0.0),
        cutoff=_CUTOFF_DEG,
        exponent=0.0,
        castshadow=True,
    )
    head = spec.visual.headlight
    head.ambient = tuple(light.ambient * channel for channel in light.tint)
    head.diffuse = tuple(light.headlight * channel for channel in light.tint)
    head.specular = (0.0, 0.0, 0.0)


def compile_room(plan: RoomPlan) -> tuple[mujoco.MjModel, tuple[str, ...]]:
    """The model of a plan, and for each geom what it belongs to."""
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    # The same in every room, so that near and far planes and shadow maps are too.
    spec.stat.extent, spec.stat.center = 8.0, (0.0, 0.0, 1.2)
    spec.visual.map.znear, spec.visual.map.zfar = 0.006, 3.0
    spec.visual.map.shadowscale = _SHADOW_HALF_DEG / _CUTOFF_DEG
    spec.visual.quality.shadowsize = _SHADOW_PX
    spec.visual.quality.numquads = (
        8  # light is computed at corners of quads: four a side are too few for a wall
    )
    spec.visual.global_.offwidth = spec.visual.global_.offheight = 640
    add_assets(spec)
    builder = _Builder(spec)
    width, depth, height = plan.size_m
    half = (width / 2 + 2 * _SLAB_M, depth / 2 + 2 * _SLAB_M, _SLAB_M)
    builder.add("floor", "box", (0.0, 0.0, -_SLAB_M), half, plan.floor[2], material=plan.floor[1])
    builder.add("ceiling", "box", (0.0, 0.0, height + _SLAB_M), half, plan.ceiling, material="ceiling")
    _add_walls(builder, plan)
    for spot in (*plan.rugs, *plan.wall_pieces, *plan.furniture):
        _add_piece(builder, spot)
    for item in plan.objects:
        _add_object(builder, item)
    _add_light(spec, plan)
    return spec.compile(), tuple(builder.identities)
