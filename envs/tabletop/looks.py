"""How a table-top looks: table, room, light and camera, drawn for training and, apart from that, for tests.

Nothing here changes what can be done on the table; a novel look or camera never occurs in training.
"""

from __future__ import annotations

import math

import numpy as np

from emuworld.envs.palette import FLOOR_COLOURS, RGB, WALL_COLOURS, WOOD
from emuworld.envs.tabletop.layout import CameraPlan, Look

TABLES, NOVEL_TABLES = ("planks_slim", "planks_wide", "matte", "stripes"), ("checker_small", "tiles_small")
WALLS, NOVEL_WALLS = ("matte",), ("stripes", "bricks")
FLOORS, NOVEL_FLOORS = ("matte", "planks_wide"), ("checker_large", "tiles_large")
# Soft colours, before which every object stands out; the others are for tests.
WALL_NAMES, NOVEL_WALL_NAMES = (
    ("white", "gray", "beige", "blue", "green"),
    ("teal", "pink", "purple", "brown"),
)
_PALE: tuple[RGB, ...] = ((0.80, 0.80, 0.78), (0.66, 0.67, 0.69), (0.82, 0.76, 0.66))
_NOVEL_TOPS: tuple[RGB, ...] = ((0.52, 0.62, 0.56), (0.58, 0.60, 0.70), (0.72, 0.62, 0.62))
# As seen from the middle of the table: heading from straight ahead, height over the table, and distance.
_TARGET_M = (0.42, 0.0, 0.07)
_TURN_DEG, _RISE_DEG, _DISTANCE_M = 5.0, (41.0, 47.0), (1.12, 1.22)
_NOVEL_TURN_DEG, _NOVEL_RISE_DEG, _NOVEL_DISTANCE_M = (11.0, 18.0), ((33.0, 38.0), (51.0, 57.0)), (1.10, 1.28)


def sample_look(rng: np.random.Generator, *, novel: bool = False) -> Look:
    """Table, walls, floor and light. `novel`: materials, colours and light that training never has."""
    table = _pick(rng, NOVEL_TABLES if novel else TABLES)
    tops = _NOVEL_TOPS if novel else (*WOOD[:3], *_PALE)
    wall_name = _pick(rng, NOVEL_WALL_NAMES if novel else WALL_NAMES)
    # From the side and warm or cold in tests, from above and nearly white in training.
    side = (
        float(rng.choice((-1.0, 1.0)) * rng.uniform(0.5, 0.75)) if novel else float(rng.uniform(-0.35, 0.35))
    )
    warmth = float(rng.choice((-0.14, 0.14))) if novel else float(rng.uniform(-0.03, 0.03))
    power = float(rng.uniform(0.52, 0.60)) if novel else float(rng.uniform(0.60, 0.70))
    lamp_rgb = (power * (1 + warmth), power, power * (1 - warmth))
    return Look(
        table=table,
        table_rgb=_shade(rng, tops[int(rng.integers(len(tops)))]),
        floor=_pick(rng, NOVEL_FLOORS if novel else FLOORS),
        floor_rgb=_shade(rng, FLOOR_COLOURS[_pick(rng, tuple(FLOOR_COLOURS))]),
        wall=_pick(rng, NOVEL_WALLS if novel else WALLS),
        wall_rgb=_shade(rng, WALL_COLOURS[wall_name]),
        # Before the table, so that the sides of things that the camera sees are lit.
        lamp=(_mm(rng.uniform(0.9, 1.2)), _mm(side), _mm(rng.uniform(1.7, 2.0))),
        lamp_rgb=(_mm(lamp_rgb[0]), _mm(lamp_rgb[1]), _mm(lamp_rgb[2])),
        ambient=_mm(rng.uniform(0.32, 0.40)),
        headlight=_mm(rng.uniform(0.10, 0.18)),
    )


def sample_camera(rng: np.random.Generator, *, novel: bool = False) -> CameraPlan:
    """The front camera, jittered. `novel`: from farther aside, and lower or higher, than in training."""
    turn = float(rng.uniform(-_TURN_DEG, _TURN_DEG))
    rise, distance = float(rng.uniform(*_RISE_DEG)), float(rng.uniform(*_DISTANCE_M))
    if novel:
        turn = float(rng.choice((-1.0, 1.0)) * rng.uniform(*_NOVEL_TURN_DEG))
        rise = float(rng.uniform(*_NOVEL_RISE_DEG[int(rng.integers(2))]))
        distance = float(rng.uniform(*_NOVEL_DISTANCE_M))
    turn, rise = math.radians(turn), math.radians(rise)
    level = distance * math.cos(rise)
    x, y, z = _TARGET_M
    position = (
        _mm(x + level * math.cos(turn)), _mm(y + level * math.sin(turn)), _mm(z + distance * math.sin(rise)),
    )  # fmt: skip
    return CameraPlan(position=position, target=_TARGET_M)


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _shade(rng: np.random.Generator, rgb: RGB) -> RGB:
    level = float(rng.uniform(0.92, 1.05))
    red, green, blue = (_mm(min(1.0, level * value)) for value in rgb)
    return red, green, blue


def _mm(value: float) -> float:
    return round(float(value), 3)
