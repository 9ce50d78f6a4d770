"""Where a request may put a thing: points on the table to try, best first. Geometry only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from emuworld.envs.tabletop import layout as sizes
from emuworld.envs.tabletop.grasps import height_of
from emuworld.envs.tabletop.predicates import DIRECTIONS, NEIGHBOUR_M, ThingState
from emuworld.envs.tabletop.robot import Vector

# Where loose things may be put: within the arm's reach and the camera's view.
TABLE_X_M, TABLE_Y_M, REACH_M = (0.28, 0.74), (-0.42, 0.42), (0.34, 0.75)
STEADY_SHARE = 0.3  # of a cube's half width: what is put so far off its middle stands
BESIDE_M = (
    0.03,
    NEIGHBOUR_M - 0.01,
)  # along the way: what a relation's predicate asks for, and a little room
_WAYS = {"left of": "left", "right of": "right", "behind": "away", "in front of": "closer"}


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A point [2] for the middle of a thing, the heights that what is below may have, how high to let go."""

    point: Vector
    low_m: float = 0.0
    high_m: float = 0.3
    drop_m: float = 0.0


def on_table(point: Vector) -> bool:
    """Whether a point is where loose things may be."""
    distance = math.hypot(point[0], point[1])
    return bool(
        REACH_M[0] < distance < REACH_M[1]
        and TABLE_X_M[0] < point[0] < TABLE_X_M[1]
        and TABLE_Y_M[0] < point[1] < TABLE_Y_M[1]
    )


def near(point: Vector) -> Iterator[Spot]:
    """A point that a picture gave, then ever farther around it, within what a predicate forgives."""
    for radius in (0.0, 0.008, 0.016):
        for turn in range(8 if radius else 1):
            yield Spot(point=point[:2] + radius * _direction(turn))


def agreeing(point: Vector, named: Sequence[Spot], state: ThingState, relation: str) -> Iterator[Spot]:
    """Spots at and around a point that a picture gave, held to what words say of the same place.

    `named`: the spots of the words, best first; `state`: the thing that they name. Beside a thing a point on
    another side of it gives none; on top of a small thing it comes in to where what is put there stands.
    """
    reach = STEADY_SHARE * state.half_m[0] if state.kind in ("cube", "cylinder") else math.inf
    for spot in near(point):
        off = spot.point - state.position[:2]
        if relation in _WAYS:
            along = float(off @ np.array(DIRECTIONS[_WAYS[relation]]))
            if not BESIDE_M[0] < along < BESIDE_M[1] or along < float(np.linalg.norm(off)) * math.sqrt(0.5):
                continue
        elif np.linalg.norm(off) > reach:
            off *= reach / np.linalg.norm(off)
        yield replace(named[0], point=state.position[:2] + off)


def beside(target: ThingState, other: ThingState, relation: str) -> Iterator[Spot]:
    """On the bare table, "left of", "right of", "behind" or "in front of" another thing."""
    forward = np.array(DIRECTIONS[_WAYS[relation]])
    across = np.array([-forward[1], forward[0]])
    reach = _half_width(target) + _half_width(other)
    for gap in (0.04, 0.025, 0.055, 0.07):
        for aside in (0.0, 0.02, -0.02, 0.045, -0.045):
            if reach + gap > abs(aside) + 0.01:
                yield Spot(point=other.position[:2] + (reach + gap) * forward + aside * across, high_m=0.003)


def inside(state: ThingState) -> Iterator[Spot]:
    """In a bin or an open drawer: first on its floor, then from ever higher, at last on what is in there."""
    if state.kind == "bin":
        offsets = [(x, y) for x in (0.036, -0.036) for y in (-0.036, 0.036)] + [(0.0, 0.0)]
    else:  # the part of the tray that is outside of the cabinet
        offsets = [(0.03, 0.0), (0.03, 0.034), (0.03, -0.034), (0.045, 0.034), (0.045, -0.034)]
    for drop, high in ((0.0, 0.02), (0.02, 0.02), (0.04, 0.02), (0.0, 0.075), (0.02, 0.075)):
        for offset in offsets:
            point = state.position[:2] + state.rotation[:2, :2] @ np.array(offset)
            yield Spot(point=point, high_m=high, drop_m=drop)


def onto(state: ThingState) -> Iterator[Spot]:
    """On a plate, its middle first, or on top of a cube or cylinder."""
    if state.kind == "plate":
        for radius in (0.0, 0.03, 0.045, 0.06, 0.07):
            for turn in range(8 if radius else 1):
                point = state.position[:2] + radius * _direction(turn)
                yield Spot(point=point, low_m=0.004, high_m=sizes.PLATE_HEIGHT_M + 0.003)
        return
    top = state.position[2] + height_of(state)
    yield Spot(point=state.position[:2], low_m=top - 0.004, high_m=top + 0.004)


def _direction(eighth: int) -> Vector:
    angle = eighth * math.pi / 4
    return np.array([math.cos(angle), math.sin(angle)])


def _half_width(state: ThingState) -> float:
    """Of a thing's footprint along the axes of the table, about."""
    outer = {"bin": sizes.BIN_INNER_M + 2 * sizes.BIN_WALL_M, "drawer": 0.10}
    return outer.get(state.kind, max(state.half_m[:2]))
