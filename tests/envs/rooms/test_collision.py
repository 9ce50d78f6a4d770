"""Collision in plan view: hand-computed distances, and the exact way against tiny steps."""

import math

import numpy as np
import pytest

from emuworld.envs.rooms.collision import BODY_RADIUS_M, SKIN_M, Footprint, Obstacles

BOX = Footprint(x_m=2.0, y_m=0.0, half_x_m=0.5, half_y_m=0.5)
DISC = Footprint(x_m=0.0, y_m=3.0, radius_m=0.4)


def test_distances_by_hand() -> None:
    points = np.array([[0.0, 0.0], [2.0, 0.0], [2.5 + 3.0, 0.5 + 4.0], [0.0, 2.0]])
    distances = Obstacles([BOX]).distance(points)
    assert distances[:3] == pytest.approx([1.5, -0.5, 5.0])
    assert Obstacles([DISC]).distance(points[3:])[0] == pytest.approx(0.6)
    assert np.isinf(Obstacles([]).distance(points)).all()


def test_ways_by_hand() -> None:
    obstacles = Obstacles([BOX, DISC])
    assert obstacles.free_way((0.0, 0.0), 0.0, 5.0) == pytest.approx(1.5 - BODY_RADIUS_M - SKIN_M)
    assert obstacles.free_way((0.0, 0.0), math.pi / 2, 5.0) == pytest.approx(2.6 - BODY_RADIUS_M - SKIN_M)
    assert obstacles.free_way((0.0, 0.0), math.pi, 5.0) == 5.0
    assert obstacles.free_way((0.0, 0.0), 0.0, 1.0) == 1.0
    # Straight at a corner: the rounded corner is met, not the corner of a larger box.
    at_corner = math.hypot(0.5, 0.5)
    assert obstacles.free_way((1.0, -1.0), math.pi / 4, 5.0) == pytest.approx(
        at_corner - BODY_RADIUS_M - SKIN_M
    )


def test_a_touching_walker_may_leave_but_not_enter() -> None:
    obstacles = Obstacles([BOX])
    touching = (1.5 - BODY_RADIUS_M - SKIN_M, 0.0)
    assert obstacles.free_way(touching, 0.0, 1.0) == pytest.approx(0.0, abs=1e-9)
    assert obstacles.free_way(touching, math.pi, 1.0) == 1.0
    assert obstacles.free_way(touching, math.pi / 2, 1.0) == 1.0


def test_the_exact_way_agrees_with_tiny_steps() -> None:
    rng = np.random.Generator(np.random.Philox(5))
    step = 2e-3
    for _ in range(60):
        footprints = [
            Footprint(
                x_m=float(rng.uniform(-3, 3)),
                y_m=float(rng.uniform(-3, 3)),
                half_x_m=float(rng.uniform(0, 0.8)),
                half_y_m=float(rng.uniform(0, 0.8)),
                yaw_rad=float(rng.uniform(-3, 3)),
                radius_m=float(rng.uniform(0.05, 0.4)),
            )
            for _ in range(5)
        ]
        obstacles = Obstacles(footprints)
        if obstacles.distance(np.zeros((1, 2)))[0] < BODY_RADIUS_M:
            continue
        heading = float(rng.uniform(-math.pi, math.pi))
        ways = np.arange(0, 3, step)
        points = ways[:, None] * np.array([math.cos(heading), math.sin(heading)])
        touching = np.flatnonzero(obstacles.distance(points) < BODY_RADIUS_M)
        walked = ways[touching[0]] if len(touching) else 3.0
        # A line that only grazes sinks less than a step's reach into an obstacle: tiny steps may miss it.
        exact = obstacles.free_way((0.0, 0.0), heading, 3.0)
        deepest = obstacles.distance(points).min() - BODY_RADIUS_M
        if abs(deepest) > 1e-3:
            assert exact == pytest.approx(walked, abs=2 * step)


def test_clears_sees_a_thin_thing_inside_a_large_one() -> None:
    small = Footprint(x_m=2.0, y_m=0.1, radius_m=0.05)
    assert not Obstacles([BOX]).clears(small, 0.0)
    assert not Obstacles([small]).clears(BOX, 0.0)
    assert Obstacles([BOX]).clears(DISC, 0.5)
