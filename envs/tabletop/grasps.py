"""Where the gripper can go: grasps and places that touch nothing they should not.

Planning only, on a scratch copy of the state: what it returns are poses that the arm reaches and in which
MuJoCo's own collision check finds the hand, and what it carries, free. `skills.py` moves there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mujoco
import numpy as np

from emuworld.envs.tabletop.arm_body import PAD_HALF_HEIGHT_M
from emuworld.envs.tabletop.predicates import ThingState
from emuworld.envs.tabletop.robot import Arm, Vector

if TYPE_CHECKING:
    from emuworld.envs.tabletop.scene import TableScene

MARGIN_M = 0.006  # a hand planned this much more open than it will be keeps its distance
OVER_M = 0.2  # from where the hand comes down
AIR_M = 0.004  # around a carried object, which may hang a little askew
DEEPEST_M = 2e-4  # resting contacts are this deep at most
LOWEST_M = PAD_HALF_HEIGHT_M + 0.004  # of the gripper over what it reaches down to
ROUND_YAWS = tuple(math.radians(angle) for angle in (0, 45, -45, 90, 22.5, -22.5, 67.5, -67.5))


@dataclass(frozen=True, kw_only=True)
class Grip:
    """A pose of the gripper over or around something, and how far it is open there."""

    position: Vector  # [3]
    yaw_rad: float
    opening_m: float


@dataclass(frozen=True, kw_only=True)
class Carried:
    """A held object in the gripper's axes: where its middle is and how it is turned."""

    name: str
    offset: Vector  # [3]
    yaw_rad: float


def upright_yaw(rotation: Vector) -> float:
    """The turn about the vertical of a body: of its own axis that lies flattest, x first."""
    axis = 0 if abs(rotation[2, 0]) < 0.3 else int(np.argmin(np.abs(rotation[2])))
    return math.atan2(rotation[1, axis], rotation[0, axis])


def ahead(position: Vector, yaw_rad: float) -> float:
    """The equal yaw of a gripper (it is the same after half a turn) within 90 degrees of straight ahead.

    Straight ahead is the way from the robot's base to a position; farther off the wrist runs into its limits.
    """
    heading = math.atan2(position[1], position[0])
    return heading + math.remainder(yaw_rad - heading, math.pi)


def height_of(state: ThingState) -> float:
    """From the middle of a loose object to its lowest point, in whatever way it lies."""
    up = np.abs(state.rotation[2])
    if state.kind == "ball":
        return state.half_m[0]
    if state.kind == "cylinder":
        return float(state.half_m[2] * up[2] + state.half_m[0] * math.sqrt(max(0.0, 1 - up[2] ** 2)))
    return float(up @ np.array(state.half_m))


def turned(yaw_rad: float, vector: Vector) -> Vector:
    """A vector [3] turned about the vertical."""
    cos, sin = math.cos(yaw_rad), math.sin(yaw_rad)
    return np.array([cos * vector[0] - sin * vector[1], sin * vector[0] + cos * vector[1], vector[2]])


class Planner:
    """Tries poses on a scratch copy of one scene's state; makes no change to the scene."""

    def __init__(self, scene: TableScene, arm: Arm) -> None:
        self._scene, self._arm = scene, arm
        self._scratch = mujoco.MjData(scene.model)
        self._groups = np.array([1, 0, 0, 0, 0, 0], np.uint8)  # all but the robot

    def grasp(self, name: str) -> Grip | None:
        """How to take hold of an object from above; None where the hand cannot get there."""
        state = self._scene.state(name)
        width, yaws = _faces(state)
        position = state.position.copy()
        position[2] = max(position[2], position[2] - height_of(state) + LOWEST_M)
        openings = [min(width + more, 0.098) for more in (0.03, 0.02, 0.012)]
        return self._first_free(position, yaws, openings, carried=None)

    def carried(self, name: str) -> Carried:
        """How the object is held now."""
        state, yaw = self._scene.state(name), self._arm.kinematics.pose(self._arm.commanded)[1]
        offset = turned(-yaw, state.position - self._arm.tcp)
        return Carried(name=name, offset=offset, yaw_rad=upright_yaw(state.rotation) - yaw)

    def presumed(self, name: str, grasp: Grip) -> Carried:
        """How the object will be held after a grasp."""
        state = self._scene.state(name)
        offset = turned(-grasp.yaw_rad, state.position - grasp.position)
        return Carried(name=name, offset=offset, yaw_rad=upright_yaw(state.rotation) - grasp.yaw_rad)

    def release(
        self, carried: Carried, spot: Vector, *, align_rad: float, drop_m: float = 0.0
    ) -> Grip | None:
        """How to put a held object's middle over `spot` [2], `drop_m` above what is below.

        None where the hand or the object would touch something. Cubes are turned to `align_rad` where that is
        free.
        """
        state = self._scene.state(carried.name)
        width, _ = _faces(state)
        ground = self.support(carried.name, spot)
        middle = np.array([spot[0], spot[1], ground + height_of(state) + 0.0015 + drop_m])
        heading = math.atan2(spot[1], spot[0])
        yaws = [heading + yaw for yaw in ROUND_YAWS]
        if state.kind == "cube":
            square = [ahead(spot, align_rad + k * math.pi / 2 - carried.yaw_rad) for k in (0, 1)]
            square.sort(key=lambda yaw: abs(yaw - heading))
            yaws = [ahead(spot, yaw + turn) for turn in (0.0, math.pi / 4, -math.pi / 8) for yaw in square]
        for yaw in yaws:
            position = middle - turned(yaw, carried.offset)
            position[2] = max(position[2], ground + LOWEST_M)
            openings = [width + more for more in (0.02, 0.012)]
            placed = (carried, middle)
            found = self._first_free(position, [yaw], openings, carried=placed)
            if found is not None and self._has_air(found, carried, middle):
                return found
        return None

    def _has_air(self, grip: Grip, carried: Carried, middle: Vector) -> bool:
        """Whether the held object keeps its distance from what stands beside the place."""
        angles = self.reachable(grip.position, grip.yaw_rad)
        turn = grip.yaw_rad + carried.yaw_rad - upright_yaw(self._scene.state(carried.name).rotation)
        for x, y in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            aside = middle + AIR_M * np.array([x, y, 0.0])
            free = angles is not None and self.free(
                angles, grip.opening_m, moved={carried.name: aside}, turns={carried.name: turn}
            )
            if not free:
                return False
        return True

    def support(self, name: str, spot: Vector) -> float:
        """Height of what an object would stand on at a spot [2]: the highest thing below its foot."""
        scene, state = self._scene, self._scene.state(name)
        # A little less than the whole foot, so that a snug neighbour is not below it.
        foot = 0.85 * state.half_m[0] * (1.0 if state.kind == "cube" else 0.75)
        body = scene.model.body(f"object/{name}").id
        geom, highest = np.zeros(1, np.int32), 0.0
        for x, y in ((0, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            start = np.array([spot[0] + foot * x, spot[1] + foot * y, 0.6])
            down = np.array([0.0, 0.0, -1.0])
            depth = mujoco.mj_ray(scene.model, scene.data, start, down, self._groups, 1, body, geom)
            if geom[0] >= 0:
                highest = max(highest, 0.6 - depth)
        return highest

    def reachable(self, position: Vector, yaw_rad: float) -> Vector | None:
        """Joint angles with the gripper there, from straight above; None out of reach."""
        kinematics = self._arm.kinematics
        over = np.array([position[0], position[1], max(position[2] + 0.08, OVER_M)])
        angles = kinematics.solve(self._arm.commanded, over, yaw_rad)
        return None if angles is None else kinematics.solve(angles, position, yaw_rad)

    def free(
        self,
        angles: Vector,
        opening_m: float,
        *,
        moved: Mapping[str, Vector] | None = None,
        turns: Mapping[str, float] | None = None,
        drawer: tuple[str, float] | None = None,
    ) -> bool:
        """Whether the hand at joint angles, and moved objects [3], touch nothing but each other.

        `turns` turns moved objects about the vertical, radians; `drawer` sets its opening, metres.
        """
        scene, scratch = self._scene, self._scratch
        scratch.qpos[:] = scene.data.qpos
        scratch.qpos[self._arm.addresses] = angles
        scratch.qpos[self._arm.fingers] = opening_m / 2
        movers = set(moved or {}) | {"robot"}
        for name, position in (moved or {}).items():
            address = int(scene.model.joint(f"object/{name}").qposadr[0])
            scratch.qpos[address : address + 3] = position
            turn = np.array([1.0, 0.0, 0.0, 0.0])
            mujoco.mju_axisAngle2Quat(turn, np.array([0.0, 0.0, 1.0]), (turns or {}).get(name, 0.0))
            was = scratch.qpos[address + 3 : address + 7].copy()
            mujoco.mju_mulQuat(scratch.qpos[address + 3 : address + 7], turn, was)
        if drawer is not None:
            scratch.qpos[int(scene.model.joint(f"joint/{drawer[0]}").qposadr[0])] = drawer[1]
            movers.add(drawer[0])
        mujoco.mj_kinematics(scene.model, scratch)
        mujoco.mj_collision(scene.model, scratch)
        contact = scratch.contact
        loads = set(moved or {})
        for (a, b), depth in zip(contact.geom.tolist(), contact.dist.tolist(), strict=True):
            first, second = scene.identity_of_geom(a), scene.identity_of_geom(b)
            if depth > -DEEPEST_M or not {first, second} & movers:
                continue
            if "robot" in (first, second) and {first, second} & loads:
                continue
            return False
        return True

    def _first_free(
        self,
        position: Vector,
        yaws: Sequence[float],
        openings: Sequence[float],
        *,
        carried: tuple[Carried, Vector] | None,
    ) -> Grip | None:
        solved: dict[float, Vector | None] = {}
        for opening in openings:
            for yaw in yaws:
                if yaw not in solved:
                    solved[yaw] = self.reachable(position, yaw)
                angles = solved[yaw]
                if angles is None:
                    continue
                moved, turns = {}, {}
                if carried is not None:
                    item, middle = carried
                    now = upright_yaw(self._scene.state(item.name).rotation)
                    moved, turns = {item.name: middle}, {item.name: yaw + item.yaw_rad - now}
                if self.free(angles, opening + MARGIN_M, moved=moved, turns=turns):
                    return Grip(position=position, yaw_rad=yaw, opening_m=opening)
        return None


def _faces(state: ThingState) -> tuple[float, list[float]]:
    """Width of an object between the pads, and the gripper's yaws that hold it well, best first."""
    width = 2 * state.half_m[0]
    heading = math.atan2(state.position[1], state.position[0])
    if state.kind == "ball" or (state.kind == "cylinder" and abs(state.rotation[2, 2]) > 0.7):
        return width, [heading + yaw for yaw in ROUND_YAWS]
    if state.kind == "cylinder":  # lies: across its axis
        axis = state.rotation[:2, 2]
        return width, [ahead(state.position, math.atan2(axis[1], axis[0]))]
    yaw = upright_yaw(state.rotation)
    yaws = [ahead(state.position, yaw + turn) for turn in (0.0, math.pi / 2)]
    return width, sorted(yaws, key=lambda one: abs(one - heading))
