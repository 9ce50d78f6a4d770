"""What all skills share: refusals, moves of the hand over the table, taking hold. No skill is here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from emuworld.envs.tabletop.arm_body import PAD_HALF_HEIGHT_M
from emuworld.envs.tabletop.grasps import Grip, Planner, height_of
from emuworld.envs.tabletop.predicates import Predicate, ThingState
from emuworld.envs.tabletop.robot import HOME_RAD, Arm, Vector

if TYPE_CHECKING:
    from emuworld.envs.tabletop.scene import TableScene

FAST_M_S, SLOW_M_S = 0.7, 0.25
CLEAR_M = 0.03  # between what is carried and the tallest thing on the table
LEAST_HEIGHT_M = 0.16
REST_OPENING_M = 0.06
ATTEMPTS = 2


class Refused(Exception):
    """Cannot be done from this state; before any motion where that can be known."""


class Failed(Exception):
    """Was tried and did not come out."""


class Hand:
    """The arm of one scene during one request, and the planner of its poses."""

    def __init__(self, scene: TableScene, arm: Arm) -> None:
        self.scene, self.arm = scene, arm
        self.planner = Planner(scene, arm)
        self.names = scene.names

    # Refusals

    def need_object(self, name: str) -> None:
        if name in self.scene.furniture:
            raise Refused(f"the {name} is fixed to the table")
        if name not in self.names:
            raise Refused(f"there is no {name} on this table")

    def need_furniture(self, name: str, kind: str) -> ThingState:
        if name not in self.names:
            raise Refused(f"there is no {name} on this table")
        state = self.scene.state(name)
        if state.kind != kind:
            raise Refused(f"the {name} is no {kind}")
        return state

    def need_empty(self) -> None:
        held = self.scene.held()
        if held is not None:
            raise Refused(f"the gripper holds the {held}")

    def need_free_top(self, name: str) -> None:
        for item in self.scene.objects:
            if item.name != name and self.scene.holds(Predicate("On", (item.name, name))):
                raise Refused(f"the {item.name} stands on the {name}")

    # Moves

    def above(self, position: Vector, *, carried: str | None = None) -> Vector:
        """The point over a position at which hand and load clear everything on the table."""
        scene, tallest = self.scene, 0.0
        for item in scene.objects:
            if item.name != carried:
                tallest = max(tallest, item.position[2] + height_of(scene.state(item.name)))
        for name in scene.furniture:
            tallest = max(tallest, 2 * scene.state(name).half_m[2])
        below = PAD_HALF_HEIGHT_M
        if carried is not None:
            below = max(below, 2 * height_of(scene.state(carried)) - 0.01)
        height = max(LEAST_HEIGHT_M, position[2], tallest + below + CLEAR_M)
        return np.array([position[0], position[1], height])

    def descend(self, position: Vector, yaw_rad: float, *, opening_m: float) -> None:
        """From wherever it is over a position, open, and straight down to it."""
        self.arm.set_grip(opening_m)
        self.arm.move(self.above(position), yaw_rad, speed_m_s=FAST_M_S)
        self.arm.move(position, yaw_rad, speed_m_s=SLOW_M_S)

    def rise(self, *, carried: str | None = None) -> None:
        """Straight up, clear of everything."""
        here, yaw = self.arm.kinematics.pose(self.arm.commanded)
        above = self.above(here, carried=carried)
        if here[2] < above[2] - 1e-4:
            self.arm.move(above, yaw, speed_m_s=SLOW_M_S)

    def go_home(self) -> None:
        """Up and back to rest, out of the camera's way, with whatever is held."""
        held = self.scene.held()
        self.rise(carried=held)
        if held is None:
            self.arm.set_grip(REST_OPENING_M)
        self.arm.move_joints(np.array(HOME_RAD))

    # Taking hold

    def plan_grasp(self, name: str) -> Grip:
        self.need_free_top(name)
        grasp = self.planner.grasp(name)
        if grasp is None:
            raise Refused(f"the gripper cannot get around the {name}")
        return grasp

    def take(self, name: str) -> None:
        """Pick an object up, with a second try; it is held afterwards, clear of everything."""
        for _ in range(ATTEMPTS):
            grasp = self.plan_grasp(name)
            self.descend(grasp.position, grasp.yaw_rad, opening_m=grasp.opening_m)
            self.arm.grip(0.0)
            self.rise(carried=name)
            if self.scene.held() == name:
                return
        raise Failed(f"the {name} was not held")
