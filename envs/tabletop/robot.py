"""The arm of the table-top: seven joints with the Panda's dimensions and a parallel gripper, from primitives.

`add_robot` builds it into a spec, `Kinematics` solves poses on a robot-only model (mink), `Arm` drives the
joints of a scene through Cartesian moves. No skill and no object is known here. Joint frames and limits are
those of the Franka Panda; the gripper is ours: longer fingers and a wider stroke, so that the hand stays
clear of bin walls.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import mink
import mujoco
import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Capsule = tuple[tuple[float, ...], tuple[float, ...], float, tuple[float, ...]]  # ends, radius, colour

NUM_JOINTS = 7
TIMESTEP_S = 0.002
CONTROL_STEPS = 20  # physics steps a control step
WAY_ERROR_M = 0.004  # how well a straight way to a pose has to be followed for the pose to count as reached
LARGEST_STEP_RAD = 0.3  # of one Gauss-Newton step: near a joint's limit a full one flies off
CONTROL_S = TIMESTEP_S * CONTROL_STEPS
MAX_CONTROL_STEPS = 1000  # of one request: 40 s; a place takes 170, one with every second try 700
FINGER_STROKE_M = 0.05  # of each finger: the gripper opens to twice this
GRIP_FORCE_N = 20.0  # of each finger at most
TCP_M = 0.13  # from the hand's frame to the middle between the finger pads
PAD_HALF_HEIGHT_M = 0.014
# Joint angles at rest: the hand is back and up, out of the way of the camera.
HOME_RAD = (0.0, -0.95, 0.0, -2.62, 0.0, 1.67, 0.785)

_STIFFNESS = (4500.0, 4500.0, 3500.0, 3500.0, 2000.0, 2000.0, 2000.0)  # N m / rad
_DAMPING = tuple(value / 12 for value in _STIFFNESS)  # N m s / rad
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


class OutOfStepsError(Exception):
    """A request used up its control steps."""


def add_robot(spec: mujoco.MjSpec, *, fingers: bool = True, drawn: bool = True) -> None:
    """Add the arm with its base on the world's origin, its joints, actuators and (`fingers`) gripper."""
    body = spec.worldbody
    if drawn:
        _capsule(body, "base", ((0, 0, 0.03), (0, 0, 0.13), 0.07, _WHITE))
        box = mujoco.mjtGeom.mjGEOM_BOX
        foot = body.add_geom(name="robot/foot", type=box, pos=(-0.02, 0, 0.012), size=(0.1, 0.09, 0.012))
        foot.rgba = _DARK
        _robot_geom(foot)
    for number, link in enumerate(_LINKS, 1):
        quat = np.array(_ROLL[link.quarter_turns]) / np.linalg.norm(_ROLL[link.quarter_turns])
        body = body.add_body(name=f"robot/link{number}", pos=link.position, quat=quat, gravcomp=1)
        joint = body.add_joint(name=f"robot/joint{number}", type=mujoco.mjtJoint.mjJNT_HINGE, axis=(0, 0, 1))
        joint.range, joint.limited, joint.armature = link.limits, True, 0.1
        if drawn:
            for index, capsule in enumerate(link.capsules):
                _capsule(body, f"link{number}_{index}", capsule)
        else:
            body.mass, body.inertia, body.explicitinertial = 1.0, (0.01, 0.01, 0.01), True
        _servo(spec, number)
    turn = (math.cos(math.pi / 8), 0.0, 0.0, -math.sin(math.pi / 8))
    hand = body.add_body(name="robot/hand", pos=(0, 0, 0.107), quat=turn, gravcomp=1)
    hand.add_site(name="robot/tcp", pos=(0, 0, TCP_M), group=5, rgba=(0, 0, 0, 0))
    if drawn:
        _box(hand, "hand", (0, 0, 0.03), (0.024, 0.078, 0.032), _WHITE)
    else:
        hand.mass, hand.inertia, hand.explicitinertial = 0.5, (0.01, 0.01, 0.01), True
    if fingers:
        _add_fingers(spec, hand)


def _servo(spec: mujoco.MjSpec, number: int) -> None:
    index = number - 1
    servo = spec.add_actuator(name=f"robot/servo{number}", target=f"robot/joint{number}")
    servo.trntype = mujoco.mjtTrn.mjTRN_JOINT
    servo.gaintype, servo.biastype = mujoco.mjtGain.mjGAIN_FIXED, mujoco.mjtBias.mjBIAS_AFFINE
    servo.gainprm[0] = _STIFFNESS[index]
    servo.biasprm[1], servo.biasprm[2] = -_STIFFNESS[index], -_DAMPING[index]
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
    _robot_geom(geom)


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
    _robot_geom(geom)


def _robot_geom(geom: mujoco.MjsGeom) -> None:
    geom.contype, geom.conaffinity = 1, 0  # touches everything but itself
    geom.group = 1  # so that rays can look past the robot; still drawn
    geom.density = 600.0


def down(yaw_rad: float) -> mink.SO3:
    """The gripper pointing down; at yaw 0 its fingers close along y, at 90 degrees along x."""
    return mink.SO3.from_z_radians(yaw_rad) @ mink.SO3.from_x_radians(math.pi)


@functools.cache
def _arm_model() -> mujoco.MjModel:
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    add_robot(spec, fingers=False, drawn=False)
    return spec.compile()


class Kinematics:
    """Poses of the arm alone, on its own small model. Holds joint angles only while it solves."""

    def __init__(self) -> None:
        model = _arm_model()
        self._configuration = mink.Configuration(model)
        self._frame = mink.FrameTask(
            "robot/tcp", "site", position_cost=1.0, orientation_cost=0.3, lm_damping=1e-6
        )
        # A faint pull that settles the elbow, too weak to bend the hand's pose.
        self._posture = mink.PostureTask(model, cost=2e-3)
        self._posture.set_target(np.array(HOME_RAD))
        self._limits = [mink.ConfigurationLimit(model)]

    def step(self, angles: Vector, position: Vector, yaw_rad: float, *, turns: int = 1) -> Vector:
        """Joint angles [7] a few Gauss-Newton steps from `angles` towards a pose of the gripper."""
        self._aim(angles, position, yaw_rad)
        for _ in range(turns):
            self._advance()
        return np.array(self._configuration.q)

    def solve(self, angles: Vector, position: Vector, yaw_rad: float) -> Vector | None:
        """Joint angles [7] with the gripper at a pose (0.5 mm, 0.5 degrees); None where it cannot reach."""
        start, start_yaw = self.pose(angles)
        turn = math.remainder(yaw_rad - start_yaw, 2 * math.pi)
        # Full steps to a far pose wind the arm up, so the target comes along in stages.
        for share in (0.2, 0.4, 0.6, 0.8):
            point = start + share * (position - start)
            angles = self.step(angles, point, start_yaw + share * turn, turns=2)
            if np.linalg.norm(self._error()[:3]) > WAY_ERROR_M:
                return None
        self._aim(angles, position, yaw_rad)
        for _ in range(20):
            error = self._error()
            if np.linalg.norm(error[:3]) < 5e-4 and np.linalg.norm(error[3:]) < 9e-3:
                return np.array(self._configuration.q)
            self._advance()
        return None

    def pose(self, angles: Vector) -> tuple[Vector, float]:
        """The gripper's position [3] and yaw at joint angles."""
        self._configuration.update(angles)
        pose = self._configuration.get_transform_frame_to_world("robot/tcp", "site")
        across = pose.rotation().as_matrix()[:, 1]  # fingers close along it
        return pose.translation(), math.atan2(across[0], -across[1])

    def _error(self) -> Vector:
        """Of the hand's place [3] and turn [3] against the aim."""
        return self._frame.compute_error(self._configuration)

    def _aim(self, angles: Vector, position: Vector, yaw_rad: float) -> None:
        self._configuration.update(angles)
        self._frame.set_target(mink.SE3.from_rotation_and_translation(down(yaw_rad), position))

    def _advance(self) -> None:
        tasks = [self._frame, self._posture]
        velocity = mink.solve_ik(self._configuration, tasks, 1.0, "daqp", limits=self._limits)
        velocity *= min(1.0, LARGEST_STEP_RAD / max(1e-9, float(np.abs(velocity).max())))
        self._configuration.integrate_inplace(velocity, 1.0)


class Arm:
    """Drives the arm of a scene. Stateless but for its addresses: what it does is all in `data`."""

    def __init__(
        self, model: mujoco.MjModel, data: mujoco.MjData, *, on_step: Callable[[], None] | None = None
    ) -> None:
        self.model, self.data, self._on_step = model, data, on_step
        self.kinematics = Kinematics()
        joints = [model.joint(f"robot/joint{number}") for number in range(1, NUM_JOINTS + 1)]
        self.addresses = np.array([joint.qposadr[0] for joint in joints])
        self.fingers = np.array([model.joint(f"robot/slide_{side}").qposadr[0] for side in ("left", "right")])
        self._servos = np.array([model.actuator(f"robot/servo{n}").id for n in range(1, NUM_JOINTS + 1)])
        self._grips = np.array([model.actuator(f"robot/grip_{side}").id for side in ("left", "right")])
        self._lead_s = np.array(_DAMPING) / np.array(_STIFFNESS)
        self.control_steps = 0

    @property
    def commanded(self) -> Vector:
        """Joint angles [7] that the servos hold; between control steps they command no velocity."""
        return np.array(self.data.ctrl[self._servos])

    @property
    def tcp(self) -> Vector:
        """The gripper's true position [3]."""
        return np.array(self.data.site("robot/tcp").xpos)

    @property
    def opening_m(self) -> float:
        """Distance between the pads."""
        return float(self.data.qpos[self.fingers].sum())

    def set_home(self) -> None:
        """Put the arm at rest without motion (for a scene's start)."""
        self.data.qpos[self.addresses] = self.data.ctrl[self._servos] = HOME_RAD
        self.data.qpos[self.fingers] = self.data.ctrl[self._grips] = 0.03

    def set_grip(self, opening_m: float) -> None:
        """Command a distance between the pads; they get there during what follows."""
        self.data.ctrl[self._grips] = opening_m / 2

    def grip(self, opening_m: float, *, control_steps: int = 8) -> None:
        """Command a distance between the pads (0 closes with the grip's full force) and wait."""
        target = min(max(opening_m / 2, 0.0), FINGER_STROKE_M)
        # Beyond closed, so that the force stays full on thin things too.
        target = target if opening_m > 0 else -0.02
        start = np.clip(self.data.qpos[self.fingers].mean(), 0.0, FINGER_STROKE_M)
        angles = self.commanded
        for step in range(control_steps):
            share = min(1.0, (step + 1) / (0.6 * control_steps))
            self.data.ctrl[self._grips] = start + share * (target - start)
            self._advance(angles, angles)

    def wait(self, control_steps: int) -> None:
        angles = self.commanded
        for _ in range(control_steps):
            self._advance(angles, angles)

    def move(
        self,
        position: Vector,
        yaw_rad: float,
        *,
        speed_m_s: float = 0.6,
        settle: int = 1,
        until: Callable[[], bool] | None = None,
    ) -> None:
        """A straight line of the gripper to a pose, with a smooth start and end.

        `until` ends it early. The nearer of the two equal yaws (half a turn apart) must be given.
        """
        angles = self.commanded
        start, start_yaw = self.kinematics.pose(angles)
        turn = math.remainder(yaw_rad - start_yaw, 2 * math.pi)
        duration = max(float(np.linalg.norm(position - start)) / speed_m_s, abs(turn) / 3.0)
        steps = max(2, math.ceil(1.5 * duration / CONTROL_S))
        for step in range(1, steps + 1):
            t = step / steps
            share = t * t * (3 - 2 * t)
            turns = 1 if step < steps else 3
            point = start + share * (position - start)
            following = self.kinematics.step(angles, point, start_yaw + share * turn, turns=turns)
            self._advance(angles, following)
            angles = following
            if until is not None and until():
                break
        self.wait(settle)

    def move_joints(self, target: Vector, *, speed_rad_s: float = 1.6) -> None:
        """A straight line in joint space, with a smooth start and end."""
        start = self.commanded
        steps = max(2, math.ceil(1.5 * float(np.abs(target - start).max()) / speed_rad_s / CONTROL_S))
        angles = start
        for step in range(1, steps + 1):
            t = step / steps
            following = start + t * t * (3 - 2 * t) * (target - start)
            self._advance(angles, following)
            angles = following
        self.wait(1)

    def _advance(self, start: Vector, end: Vector) -> None:
        """One control step from `start` to `end`; the servos lead by what their damping holds back."""
        if self.control_steps >= MAX_CONTROL_STEPS:
            raise OutOfStepsError(f"it took more than {MAX_CONTROL_STEPS} control steps")
        lead = self._lead_s * (end - start) / CONTROL_S
        for step in range(1, CONTROL_STEPS + 1, 4):
            self.data.ctrl[self._servos] = start + (step + 1.5) / CONTROL_STEPS * (end - start) + lead
            mujoco.mj_step(self.model, self.data, nstep=4)
        self.data.ctrl[self._servos] = end
        self.control_steps += 1
        if self._on_step is not None:
            self._on_step()
