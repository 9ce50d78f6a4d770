"""The arm: the Panda's dimensions, inverse kinematics within its promise, servos that follow."""

from __future__ import annotations

import math

import numpy as np

from emuworld.envs.tabletop.arm_body import FINGER_STROKE_M
from emuworld.envs.tabletop.layout import TablePlan
from emuworld.envs.tabletop.robot import CONTROL_S, HOME_RAD, Arm, Kinematics, down
from emuworld.envs.tabletop.scene import TableScene

REACH_M = 0.333 + 0.316 + 0.384  # of the Panda's data sheet: base to shoulder, upper arm, forearm


def test_upright_arm_has_the_pandas_length() -> None:
    position, _ = Kinematics().pose(np.zeros(7))
    # Upright with the hand pointing down: 8.8 cm out, 10.7 cm flange and 13 cm gripper below the wrist.
    np.testing.assert_allclose(position, (0.088, 0.0, REACH_M - 0.107 - 0.13), atol=1e-9)


def test_home_points_down_at_yaw_zero() -> None:
    position, yaw = Kinematics().pose(np.array(HOME_RAD))
    assert abs(yaw) < 1e-3 and position[2] > 0.35 and position[0] < 0.3


def test_solve_reaches_the_table_and_says_where_it_cannot() -> None:
    kinematics, rng = Kinematics(), np.random.default_rng(0)
    for _ in range(60):
        position = rng.uniform((0.32, -0.32, 0.02), (0.62, 0.32, 0.25))
        yaw = rng.uniform(-1.3, 1.3)
        angles = kinematics.solve(np.array(HOME_RAD), position, yaw)
        assert angles is not None
        reached, turned = kinematics.pose(angles)
        assert np.linalg.norm(reached - position) < 6e-4
        assert abs(math.remainder(turned - yaw, 2 * math.pi)) < 0.015
    assert kinematics.solve(np.array(HOME_RAD), np.array([1.2, 0.0, 0.1]), 0.0) is None


def test_fingers_close_along_y_at_yaw_zero() -> None:
    axes = down(0.0).as_matrix()
    np.testing.assert_allclose(axes[:, 2], (0, 0, -1), atol=1e-12)
    np.testing.assert_allclose(np.abs(axes[:, 1]), (0, 1, 0), atol=1e-12)


def test_a_move_is_tracked_to_two_millimetres_and_ends_on_its_point() -> None:
    scene = TableScene(TablePlan())
    arm = Arm(scene.model, scene.data)
    errors: list[float] = []

    def measure() -> None:
        wanted, _ = arm.kinematics.pose(arm.commanded)
        errors.append(float(np.linalg.norm(wanted - arm.tcp)))

    arm = Arm(scene.model, scene.data, on_step=measure)
    goal = np.array([0.5, 0.2, 0.05])
    arm.move(goal, 0.7, speed_m_s=0.7, settle=3)
    assert np.linalg.norm(arm.tcp - goal) < 1e-3
    assert max(errors) < 2e-3
    assert arm.control_steps == len(errors)
    assert abs(scene.data.time - len(errors) * CONTROL_S) < 1e-6


def test_grip_opens_and_closes_both_fingers_alike() -> None:
    scene = TableScene(TablePlan())
    arm = Arm(scene.model, scene.data)
    arm.grip(2 * FINGER_STROKE_M, control_steps=15)
    assert abs(arm.opening_m - 2 * FINGER_STROKE_M) < 2e-3
    arm.grip(0.0, control_steps=15)
    left, right = scene.data.qpos[arm.fingers]
    assert arm.opening_m < 1e-3 and abs(left - right) < 1e-3
