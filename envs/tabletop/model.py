"""From a table plan to a MuJoCo model: the robot, loose objects, fixed furniture, one lamp.

Every table-top has the textures, materials and meshes of `palette.add_assets`, as rooms have, so that a
renderer keeps one graphics context for all. Robot geoms are named "robot/...", a loose object's body, free
joint and geom "object/NAME", a moving part's joint "joint/NAME" and a button's lamp "lamp/NAME".
"""

from __future__ import annotations

import math

import mujoco
import numpy as np

from emuworld.envs.palette import OBJECT_COLOURS, RGB, add_assets
from emuworld.envs.tabletop import layout as sizes
from emuworld.envs.tabletop.arm_body import TIMESTEP_S, add_robot, primitives
from emuworld.envs.tabletop.franka import franka_cover
from emuworld.envs.tabletop.layout import FurniturePlan, Look, ObjectPlan, TablePlan

BOX, SPHERE, CYLINDER, CAPSULE = (
    getattr(mujoco.mjtGeom, f"mjGEOM_{name}") for name in ("BOX", "SPHERE", "CYLINDER", "CAPSULE")
)
_GEOM_TYPES = {"cube": BOX, "ball": SPHERE, "cylinder": CYLINDER}
TABLE_HALF_M, TABLE_X_M, TABLE_THICK_M, TABLE_HEIGHT_M = (0.48, 0.62), 0.30, 0.03, 0.72
LAMP_OFF, LAMP_ON = (0.10, 0.16, 0.11, 1.0), (0.25, 1.0, 0.35, 1.0)
DENSITY = 350.0  # of wood: 76 g a cube of 6 cm
_DARK_WOOD: RGB = (0.45, 0.30, 0.19)
_INK: RGB = (0.06, 0.06, 0.07)
_PAPER: RGB = (0.96, 0.96, 0.95)
_METAL: RGB = (0.75, 0.76, 0.78)


class _Builder:
    """Adds geoms to bodies and remembers what each body belongs to."""

    def __init__(self, spec: mujoco.MjSpec) -> None:
        self.spec = spec
        self.owner: dict[str, str] = {}  # geom name -> identity

    def add(
        self,
        body: mujoco.MjsBody,
        identity: str,
        kind: int,
        position: tuple[float, ...],
        size: tuple[float, ...],
        rgb: RGB,
        *,
        material: str = "matte",
        name: str = "",
        touches: bool = True,
    ) -> mujoco.MjsGeom:
        name = name or f"{identity}/{len(self.owner)}"
        size = (*size, 0.0, 0.0)[:3]
        geom = body.add_geom(
            name=name, type=kind, pos=position, size=size, rgba=(*rgb, 1.0), material=material
        )
        geom.friction = (0.9, 0.005, 0.0001)
        if not touches:
            geom.contype = geom.conaffinity = 0
        self.owner[name] = identity
        return geom


def compile_table(plan: TablePlan) -> tuple[mujoco.MjModel, tuple[str, ...]]:
    """The model of a plan, and for each geom what it belongs to ("robot", "table", "red cube", ...)."""
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    _set_options(spec)
    add_assets(spec)
    builder = _Builder(spec)
    _add_room(builder, plan.look)
    for piece in plan.furniture:
        _ADD[piece.kind](builder, piece)
    for item in plan.objects:
        _add_object(builder, item)
    add_robot(spec, cover=franka_cover(spec) if plan.arm == "franka" else primitives)
    _add_lamp(spec, plan.look)
    spec.nuserdata = max(1, len(plan.furniture))  # a latch for every button
    model = spec.compile()
    owners = tuple(builder.owner.get(model.geom(index).name, "robot") for index in range(model.ngeom))
    return model, owners


def _set_options(spec: mujoco.MjSpec) -> None:
    option = spec.option
    option.timestep = TIMESTEP_S
    option.integrator = mujoco.mjtIntegrator.mjINT_IMPLICITFAST
    option.cone, option.impratio = mujoco.mjtCone.mjCONE_ELLIPTIC, 10.0
    option.noslip_iterations = 5  # without it untouched objects creep by 0.1 mm a skill
    # The same in every scene, so that near and far planes and shadow maps are too.
    spec.stat.extent, spec.stat.center = 2.0, (0.4, 0.0, 0.1)
    spec.visual.map.znear, spec.visual.map.zfar = 0.02, 4.0
    spec.visual.quality.shadowsize, spec.visual.quality.numquads = 1024, 8
    spec.visual.global_.offwidth = spec.visual.global_.offheight = 640


def _add_room(builder: _Builder, look: Look) -> None:
    world, floor = builder.spec.worldbody, -TABLE_HEIGHT_M
    half_x, half_y = TABLE_HALF_M
    top = (TABLE_X_M, 0.0, -TABLE_THICK_M / 2)
    builder.add(
        world, "table", BOX, top, (half_x, half_y, TABLE_THICK_M / 2), look.table_rgb, material=look.table,
        name="table/top",
    )  # fmt: skip
    leg = (floor - TABLE_THICK_M) / 2
    for x in (-1, 1):
        for y in (-1, 1):
            position = (TABLE_X_M + x * (half_x - 0.04), y * (half_y - 0.04), leg)
            size = (0.025, 0.025, (TABLE_HEIGHT_M - TABLE_THICK_M) / 2)
            builder.add(world, "table", BOX, position, size, look.table_rgb, touches=False)
    builder.add(
        world, "floor", BOX, (0.4, 0.0, floor - 0.05), (2.4, 2.4, 0.05), look.floor_rgb, material=look.floor
    )
    wall = builder.add(
        world, "wall", BOX, (-0.95, 0.0, floor + 1.4), (1.4, 2.4, 0.05), look.wall_rgb, material=look.wall,
        touches=False,
    )  # fmt: skip
    wall.quat = (math.sqrt(0.5), 0.0, math.sqrt(0.5), 0.0)  # its textured side faces the camera


def _add_lamp(spec: mujoco.MjSpec, look: Look) -> None:
    spec.worldbody.add_light(
        pos=look.lamp,
        dir=(0.0, 0.0, -1.0),
        diffuse=look.lamp_rgb,
        specular=(0.2, 0.2, 0.2),
        ambient=(0.0, 0.0, 0.0),
        cutoff=80.0,
        exponent=0.0,
        castshadow=True,
    )
    head = spec.visual.headlight
    head.ambient, head.diffuse, head.specular = (look.ambient,) * 3, (look.headlight,) * 3, (0.0, 0.0, 0.0)


def _add_object(builder: _Builder, item: ObjectPlan) -> None:
    name = f"object/{item.name}"
    body = builder.spec.worldbody.add_body(name=name, pos=item.position, quat=_yaw_quat(item.yaw_rad))
    body.add_freejoint(name=name)
    size = (item.size_m[0],) * 3 if item.kind == "cube" else item.size_m
    geom = builder.add(
        body, item.name, _GEOM_TYPES[item.kind], (0.0, 0.0, 0.0), size, OBJECT_COLOURS[item.colour],
        material="gloss", name=name,
    )  # fmt: skip
    geom.density = DENSITY
    if item.kind == "ball":
        # Rolling friction: a ball that is let go comes to rest within a centimetre.
        geom.condim, geom.friction = 6, (0.9, 0.01, 0.002)
    elif item.kind == "cylinder":
        geom.condim, geom.friction = 6, (0.9, 0.005, 0.001)


def _add_plate(builder: _Builder, piece: FurniturePlan) -> None:
    world, (x, y), half = builder.spec.worldbody, piece.position, sizes.PLATE_HEIGHT_M / 2
    radius = sizes.PLATE_RADIUS_M
    builder.add(
        world, piece.name, CYLINDER, (x, y, half - 5e-4), (radius, half - 5e-4), piece.rgb, material="gloss"
    )
    inner = tuple(0.75 * value + 0.25 for value in piece.rgb)
    builder.add(world, piece.name, CYLINDER, (x, y, half), (0.74 * radius, half), inner)  # type: ignore[arg-type]


def _add_mark(builder: _Builder, piece: FurniturePlan) -> None:
    """A painted bullseye; a millimetre high, so that no renderer takes it for the table."""
    x, y = piece.position
    for ring, (share, rgb) in enumerate(((1.0, _INK), (0.74, _PAPER), (0.3, _INK))):
        half = 2e-4 * (ring + 2)
        builder.add(
            builder.spec.worldbody, piece.name, CYLINDER, (x, y, half), (share * sizes.MARK_RADIUS_M, half),
            rgb, touches=False,
        )  # fmt: skip


def _add_bin(builder: _Builder, piece: FurniturePlan) -> None:
    body = _fixed(builder, piece)
    inner, wall, height, floor = (
        sizes.BIN_INNER_M, sizes.BIN_WALL_M, sizes.BIN_HEIGHT_M, sizes.BIN_FLOOR_M,
    )  # fmt: skip
    outer = inner + 2 * wall
    dim = tuple(0.8 * value for value in piece.rgb)
    builder.add(body, piece.name, BOX, (0, 0, floor / 2), (outer, outer, floor / 2), dim)  # type: ignore[arg-type]
    for sign in (-1, 1):
        middle, up = sign * (inner + wall), height / 2
        builder.add(body, piece.name, BOX, (middle, 0, up), (wall, outer, up), piece.rgb)
        builder.add(body, piece.name, BOX, (0, middle, up), (outer, wall, up), piece.rgb)


def _add_drawer(builder: _Builder, piece: FurniturePlan) -> None:
    cabinet = _fixed(builder, piece)
    depth, width, height = sizes.CABINET_DEPTH_M, sizes.CABINET_WIDTH_M, sizes.CABINET_HEIGHT_M
    wall = 0.003
    shell = (
        (0, 0, height - wall, depth, width, wall),
        (-depth + wall, 0, height / 2, wall, width, height / 2),
    )
    for x, y, z, *size in shell:
        builder.add(cabinet, "cabinet", BOX, (x, y, z), tuple(size), _DARK_WOOD)
    for sign in (-1, 1):
        builder.add(
            cabinet,
            "cabinet",
            BOX,
            (0, sign * (width - wall), height / 2),
            (depth, wall, height / 2),
            _DARK_WOOD,
        )
    tray = cabinet.add_body(name=f"body/{piece.name}", pos=(0, 0, 0))
    joint = tray.add_joint(name=f"joint/{piece.name}", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=(1, 0, 0))
    joint.range, joint.limited = (0.0, sizes.DRAWER_TRAVEL_M), True
    joint.frictionloss, joint.armature = 0.8, 0.05
    joint.damping[0] = 4.0
    # Joint and stops guide the tray; its contacts with the cabinet would only cost time.
    builder.spec.add_exclude(bodyname1=cabinet.name, bodyname2=tray.name)
    half, back, up = width - 0.012, -depth + 0.012, 0.03
    rgb = piece.rgb
    floor_middle = (back + depth) / 2
    builder.add(tray, piece.name, BOX, (floor_middle, 0, 0.008), ((depth - back) / 2, half, 0.003), rgb)
    builder.add(tray, piece.name, BOX, (back + 0.003, 0, up + 0.005), (0.003, half, up - 0.005), rgb)
    for sign in (-1, 1):
        builder.add(
            tray, piece.name, BOX, (floor_middle, sign * (half - 0.003), up + 0.005),
            ((depth - back) / 2, 0.003, up - 0.005), rgb,
        )  # fmt: skip
    front = depth + 0.005
    builder.add(
        tray, piece.name, BOX, (front, 0, height / 2 + 0.001), (0.005, width, height / 2 - 0.004), rgb
    )
    _add_handle(builder, tray, piece.name, front + 0.005)
    for geom in tray.geoms:
        geom.density = 250.0


def _add_handle(builder: _Builder, tray: mujoco.MjsBody, name: str, front: float) -> None:
    """A bar before the drawer's front for a gripper that comes from above."""
    bar, up, half = front + sizes.HANDLE_OUT_M, sizes.HANDLE_UP_M, 0.036
    geom = builder.add(
        tray, name, CAPSULE, (0, 0, 0), (0.007,), _METAL, material="gloss", name=f"handle/{name}"
    )
    geom.fromto = (bar, -half, up, bar, half, up)
    for sign in (-1, 1):
        post = builder.add(tray, name, CAPSULE, (0, 0, 0), (0.006,), _METAL, material="gloss")
        post.fromto = (front, sign * half, up, bar, sign * half, up)


def _add_button(builder: _Builder, piece: FurniturePlan) -> None:
    base = _fixed(builder, piece)
    half, top, travel = sizes.BUTTON_HALF_M, sizes.BUTTON_TOP_M, sizes.BUTTON_TRAVEL_M
    rim = top - 0.018
    builder.add(base, piece.name, BOX, (0, 0, rim / 2), (half, half, rim / 2), (0.30, 0.31, 0.34))
    builder.add(
        base, piece.name, BOX, (half + 0.002, 0, rim / 2), (0.003, 0.75 * half, 0.35 * rim), LAMP_OFF[:3],
        material="glow", name=f"lamp/{piece.name}", touches=False,
    )  # fmt: skip
    cap = base.add_body(name=f"body/{piece.name}", pos=(-0.008, 0, 0))
    joint = cap.add_joint(name=f"joint/{piece.name}", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=(0, 0, -1))
    joint.range, joint.limited = (0.0, travel), True
    joint.stiffness[0], joint.damping[0], joint.armature = 250.0, 4.0, 0.02
    joint.springref = -0.004  # pushes up against its stop at rest
    geom = builder.add(
        cap, piece.name, CYLINDER, (0, 0, top - 0.012), (0.027, 0.012), piece.rgb, material="gloss",
        name=f"cap/{piece.name}",
    )  # fmt: skip
    geom.density = 300.0
    # The cap dips into the base: it is the joint that stops it.
    builder.spec.add_exclude(bodyname1=base.name, bodyname2=cap.name)


def _fixed(builder: _Builder, piece: FurniturePlan) -> mujoco.MjsBody:
    x, y = piece.position
    return builder.spec.worldbody.add_body(
        name=f"furniture/{piece.name}", pos=(x, y, 0.0), quat=_yaw_quat(piece.yaw_rad)
    )


_ADD = {"plate": _add_plate, "bin": _add_bin, "drawer": _add_drawer, "button": _add_button, "mark": _add_mark}


def _yaw_quat(yaw_rad: float) -> tuple[float, float, float, float]:
    quat = np.array([math.cos(yaw_rad / 2), 0.0, 0.0, math.sin(yaw_rad / 2)])
    return tuple(float(value) for value in quat)  # type: ignore[return-value]
