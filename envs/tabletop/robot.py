"""How the arm of the table-top moves: `Kinematics` solves poses on a robot-only model (mink), `Arm` drives
the joints of a scene through Cartesian moves. No skill and no object is known here; what the arm is made of
is in `arm_body.py`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import mink
import mujoco
import numpy as np
from numpy.typing import NDArray

from emuworld.envs.tabletop.arm_body import DAMPING, FINGER_STROKE_M, STIFFNESS, TIMESTEP_S, add_robot

Vector = NDArray[np.float64]

NUM_JOINTS = 7
CONTROL_STEPS = 20  # physics steps a control step
WAY_ERROR_M = 0.004  # how well a straight way to a pose has to be followed for the pose to count as reached
LARGEST_STEP_RAD = 0.3  # of one Gauss-Newton step: near a joint's limit a full one flies off
CONTROL_S = TIMESTEP_S * CONTROL_STEPS
MAX_CONTROL_STEPS = 1000  # of one request: 40 s; a place takes 170, one with every second try 700
# Joint angles at rest: the hand is back and up, out of the way of the camera.
HOME_RAD = (0.0, -0.95, 0.0, -2.62, 0.0, 1.67, 0.785)


class OutOfStepsError(Exception):
    """A request used up its control steps."""


class StillError(Exception):
    """An arm that is to stay where it is was about to move."""


def down(yaw_rad: float) -> mink.SO3:
    """The gripper pointing down; at yaw 0 its fingers close along y, at 90 degrees along x."""
    return mink.SO3.from_z_radians(yaw_rad) @ mink.SO3.from_x_radians(math.pi)


@functools.cache
def _arm_model() -> mujoco.MjModel:
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    add_robot(spec, fingers=False, cover=None)
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
        self,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        *,
        on_step: Callable[[], None] | None = None,
        still: bool = False,
    ) -> None:
        self.model, self.data, self._on_step, self._still = model, data, on_step, still
        self.kinematics = Kinematics()
        joints = [model.joint(f"robot/joint{number}") for number in range(1, NUM_JOINTS + 1)]
        self.addresses = np.array([joint.qposadr[0] for joint in joints])
        self.fingers = np.array([model.joint(f"robot/slide_{side}").qposadr[0] for side in ("left", "right")])
        self._servos = np.array([model.actuator(f"robot/servo{n}").id for n in range(1, NUM_JOINTS + 1)])
        self._grips = np.array([model.actuator(f"robot/grip_{side}").id for side in ("left", "right")])
        self._lead_s = np.array(DAMPING) / np.array(STIFFNESS)
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
        if self._still:
            raise StillError
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
