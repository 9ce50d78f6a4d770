"""The body of the table-top's arm: seven joints with the Panda's dimensions and a parallel gripper.

`add_robot` builds it into a spec; what its links look like is a `Cover`, by default primitives (nothing to
download, fast to draw). Joint frames and limits are those of the Franka Panda; the gripper is ours: longer
fingers and a wider stroke, so that the hand stays clear of bin walls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mujoco
import numpy as np

Capsule = tuple[tuple[float, ...], tuple[float, ...], float, tuple[float, ...]]  # ends, radius, colour

TIMESTEP_S = 0.002
FINGER_STROKE_M = 0.05  # of each finger: the gripper opens to twice this
GRIP_FORCE_N = 20.0  # of each finger at most
TCP_M = 0.13  # from the hand's frame to the middle between the finger pads
PAD_HALF_HEIGHT_M = 0.014

STIFFNESS = (4500.0, 4500.0, 3500.0, 3500.0, 2000.0, 2000.0, 2000.0)  # N m / rad
DAMPING = tuple(value / 12 for value in STIFFNESS)  # N m s / rad
_TORQUE_NM = (87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0)  # the Panda's
_FINGER_STIFFNESS, _FINGER_DAMPING = 2000.0, 60.0
_WHITE, _GREY, _DARK = (0.90, 0.91, 0.92, 1.0), (0.45, 0.47, 0.50, 1.0), (0.16, 0.17, 0.19, 1.0)
_ROLL = {-1: (1.0, -1.0, 0.0, 0.0), 0: (1.0, 0.0, 0.0, 0.0), 1: (1.0, 1.0, 0.0, 0.0)}  # about x, times 90 deg


@dataclass(frozen=True, kw_only=True)
class _Link:
    """One moving link: its frame in the one before, its joint's limits, its capsules by end points."""

    position: tuple[float, float, float]
    quarter_turns: int  # about x
    limits: tuple[float, float]
    capsules: tuple[Capsule, ...]


_LINKS = (
    _Link(
        position=(0.0, 0.0, 0.333),
        quarter_turns=0,
        limits=(-2.8973, 2.8973),
        capsules=(((0, 0, -0.19), (0, 0, -0.03), 0.062, _WHITE),),
    ),
    _Link(
        position=(0.0, 0.0, 0.0),
        quarter_turns=-1,
        limits=(-1.7628, 1.7628),
        capsules=(((0, 0, -0.05), (0, 0, 0.05), 0.064, _GREY), ((0, -0.06, 0), (0, -0.19, 0), 0.058, _WHITE)),
    ),
    _Link(
        position=(0.0, -0.316, 0.0),
        quarter_turns=1,
        limits=(-2.8973, 2.8973),
        capsules=(
            ((0, 0, -0.11), (0, 0, -0.04), 0.056, _WHITE),
            ((0, 0, -0.03), (0.0825, 0, 0), 0.05, _WHITE),
        ),
    ),
    _Link(
        position=(0.0825, 0.0, 0.0),
        quarter_turns=1,
        limits=(-3.0718, -0.0698),
        capsules=(
            ((0, 0, -0.05), (0, 0, 0.05), 0.058, _GREY),
            ((-0.03, 0.04, 0), (-0.0825, 0.11, 0), 0.052, _WHITE),
        ),
    ),
    _Link(
        position=(-0.0825, 0.384, 0.0),
        quarter_turns=-1,
        limits=(-2.8973, 2.8973),
        capsules=(((0, 0, -0.26), (0, 0.02, -0.05), 0.052, _WHITE),),
    ),
    _Link(
        position=(0.0, 0.0, 0.0),
        quarter_turns=1,
        limits=(-0.0175, 3.7525),
        capsules=(((0, 0, -0.04), (0, 0, 0.04), 0.052, _GREY), ((0.03, 0, 0), (0.088, 0, 0), 0.045, _WHITE)),
    ),
    _Link(
        position=(0.088, 0.0, 0.0),
        quarter_turns=1,
        limits=(-2.8973, 2.8973),
        capsules=(((0, 0, 0.0), (0, 0, 0.07), 0.042, _GREY),),
    ),
)


Cover = Callable[[mujoco.MjsBody, str], None]  # adds the geoms of "base", "link1" to "link7" or "hand"


def primitives(body: mujoco.MjsBody, link: str) -> None:
    """The default cover: capsules and boxes."""
    if link == "base":
        _capsule(body, "base", ((0, 0, 0.03), (0, 0, 0.13), 0.07, _WHITE))
        box = mujoco.mjtGeom.mjGEOM_BOX
        foot = body.add_geom(name="robot/foot", type=box, pos=(-0.02, 0, 0.012), size=(0.1, 0.09, 0.012))
        foot.rgba = _DARK
        robot_geom(foot)
    elif link == "hand":
        _box(body, "hand", (0, 0, 0.03), (0.024, 0.078, 0.032), _WHITE)
    else:
        for index, capsule in enumerate(_LINKS[int(link[-1]) - 1].capsules):
            _capsule(body, f"{link}_{index}", capsule)


def add_robot(spec: mujoco.MjSpec, *, fingers: bool = True, cover: Cover | None = primitives) -> None:
    """Add the arm with its base on the world's origin, its joints, actuators and (`fingers`) gripper.

    `cover` gives links and hand their geoms; None: they have none, for kinematics alone.
    """
    body = spec.worldbody
    if cover is not None:
        cover(body, "base")
    for number, link in enumerate(_LINKS, 1):
        quat = np.array(_ROLL[link.quarter_turns]) / np.linalg.norm(_ROLL[link.quarter_turns])
        body = body.add_body(name=f"robot/link{number}", pos=link.position, quat=quat, gravcomp=1)
        joint = body.add_joint(name=f"robot/joint{number}", type=mujoco.mjtJoint.mjJNT_HINGE, axis=(0, 0, 1))
        joint.range, joint.limited, joint.armature = link.limits, True, 0.1
        if cover is not None:
            cover(body, f"link{number}")
        else:
            body.mass, body.inertia, body.explicitinertial = 1.0, (0.01, 0.01, 0.01), True
        _servo(spec, number)
    turn = (math.cos(math.pi / 8), 0.0, 0.0, -math.sin(math.pi / 8))
    hand = body.add_body(name="robot/hand", pos=(0, 0, 0.107), quat=turn, gravcomp=1)
    hand.add_site(name="robot/tcp", pos=(0, 0, TCP_M), group=5, rgba=(0, 0, 0, 0))
    if cover is not None:
        cover(hand, "hand")
    else:
        hand.mass, hand.inertia, hand.explicitinertial = 0.5, (0.01, 0.01, 0.01), True
    if fingers:
        _add_fingers(spec, hand)


def _servo(spec: mujoco.MjSpec, number: int) -> None:
    index = number - 1
    servo = spec.add_actuator(name=f"robot/servo{number}", target=f"robot/joint{number}")
    servo.trntype = mujoco.mjtTrn.mjTRN_JOINT
    servo.gaintype, servo.biastype = mujoco.mjtGain.mjGAIN_FIXED, mujoco.mjtBias.mjBIAS_AFFINE
    servo.gainprm[0] = STIFFNESS[index]
    servo.biasprm[1], servo.biasprm[2] = -STIFFNESS[index], -DAMPING[index]
    servo.forcelimited, servo.forcerange = True, (-_TORQUE_NM[index], _TORQUE_NM[index])


def _add_fingers(spec: mujoco.MjSpec, hand: mujoco.MjsBody) -> None:
    for side, sign in (("left", 1.0), ("right", -1.0)):
        finger = hand.add_body(name=f"robot/finger_{side}", pos=(0, 0, 0), gravcomp=1)
        joint = finger.add_joint(
            name=f"robot/slide_{side}", type=mujoco.mjtJoint.mjJNT_SLIDE, axis=(0, sign, 0)
        )
        joint.range, joint.limited, joint.armature = (0.0, FINGER_STROKE_M), True, 0.2
        _box(finger, f"stem_{side}", (0, sign * 0.008, 0.092), (0.009, 0.006, 0.034), _GREY)
        # 30 mm wide: a cylinder creeps out between pads of 20 mm.
        _box(
            finger, f"pad_{side}", (0, sign * 0.005, TCP_M), (0.015, 0.005, PAD_HALF_HEIGHT_M), _DARK,
            friction=(1.5, 0.02, 0.001), condim=4,
        )  # fmt: skip
        servo = spec.add_actuator(name=f"robot/grip_{side}", target=f"robot/slide_{side}")
        servo.trntype = mujoco.mjtTrn.mjTRN_JOINT
        servo.gaintype, servo.biastype = mujoco.mjtGain.mjGAIN_FIXED, mujoco.mjtBias.mjBIAS_AFFINE
        servo.gainprm[0] = _FINGER_STIFFNESS
        servo.biasprm[1], servo.biasprm[2] = -_FINGER_STIFFNESS, -_FINGER_DAMPING
        servo.forcelimited, servo.forcerange = True, (-GRIP_FORCE_N, GRIP_FORCE_N)
    gear = spec.add_equality(
        name="robot/gear", type=mujoco.mjtEq.mjEQ_JOINT, name1="robot/slide_left", name2="robot/slide_right"
    )
    gear.objtype = mujoco.mjtObj.mjOBJ_JOINT
    gear.data[:2] = (0.0, 1.0)
    gear.solref = (0.004, 1.0)


def _capsule(body: mujoco.MjsBody, name: str, shape: Capsule) -> None:
    start, end, radius, rgba = shape
    geom = body.add_geom(
        name=f"robot/{name}", type=mujoco.mjtGeom.mjGEOM_CAPSULE, size=(radius, 0, 0), rgba=rgba
    )
    geom.fromto = (*start, *end)
    robot_geom(geom)


def _box(
    body: mujoco.MjsBody,
    name: str,
    position: tuple[float, float, float],
    size: tuple[float, float, float],
    rgba: tuple[float, ...],
    *,
    friction: tuple[float, float, float] = (0.6, 0.005, 0.0001),
    condim: int = 3,
) -> None:
    geom = body.add_geom(name=f"robot/{name}", type=mujoco.mjtGeom.mjGEOM_BOX, pos=position, size=size)
    geom.rgba, geom.friction, geom.condim = rgba, friction, condim
    robot_geom(geom)


def robot_geom(geom: mujoco.MjsGeom) -> None:
    """Mark a geom as one of the arm's."""
    geom.contype, geom.conaffinity = 1, 0  # touches everything but itself
    geom.group = 1  # so that rays can look past the robot; still drawn
    geom.density = 600.0
