"""What can be true of a table-top, read from its physics state and never from pixels.

`Predicate("On", ("red cube", "blue plate"))` is a value; `holds(predicate, truth)` evaluates it. Names and
arguments (names of things, as in captions):

    On(a, b)        a rests on b (plate, cube, cylinder, or "table"), touching it, its middle over it
    In(a, b)        the middle of a is inside bin or drawer b, and nothing holds a
    Stack(a, b, …)  each rests on the next one: Stack(top, …, bottom)
    LeftOf, RightOf, Behind, InFrontOf(a, b)
                    as the camera sees the table, on the table's level: beside b, within 0.2 m, and more in
                    this direction than across it; nothing holds a
    Open, Closed(d) drawer d is open by more than 70 % of its travel, or by less than 10 %
    Pressed(b)      button b has been pressed since the start of the scene (its lamp is lit)
    Held(a)         both fingers touch a, and it is off what it stood on
    NotMoved(a)     a is within 1 cm of its start
    Moved(a, d)     a has moved at least 5 cm to the "left", "right", "away" or "closer", and less across
    At(a, x, y)     the middle of a is within 4 cm of the point (x, y) metres, and nothing holds a
    Not(name, …)    the rest is not true
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from emuworld.envs.tabletop import layout as sizes
from emuworld.envs.tabletop.robot import Vector

# As the camera sees them, in x and y of the world (x is towards the camera).
DIRECTIONS: dict[str, tuple[float, float]] = {
    "left": (0.0, -1.0),
    "right": (0.0, 1.0),
    "away": (-1.0, 0.0),
    "closer": (1.0, 0.0),
}
_BESIDE = {"LeftOf": "left", "RightOf": "right", "Behind": "away", "InFrontOf": "closer"}
NEIGHBOUR_M, MOVED_M, STILL_M, AT_M = 0.20, 0.05, 0.01, 0.04
OPEN_SHARE, CLOSED_SHARE = 0.7, 0.1


@dataclass(frozen=True, kw_only=True)
class ThingState:
    """Truth about a thing now. `half_m` are half extents in its own axes; furniture has its resting frame."""

    name: str
    kind: str
    position: Vector  # [3] of its middle; of furniture: the middle of its foot on the table
    rotation: Vector  # [3, 3]
    half_m: tuple[float, float, float]


class Truth(Protocol):
    """What predicates ask of a scene."""

    def state(self, name: str) -> ThingState:
        """Where a thing is; raises ValueError for a name the scene does not know."""
        ...

    def start(self, name: str) -> Vector:
        """Where an object was at the start, [3]."""
        ...

    def touching(self, first: str, second: str) -> bool: ...

    def held(self) -> str | None:
        """The object between the fingers, off its support."""
        ...

    def joint_share(self, name: str) -> float:
        """How far a drawer is open, 0 to 1."""
        ...

    def pressed(self, name: str) -> bool: ...


@dataclass(frozen=True)
class Predicate:
    """A name and its arguments; `Predicate("On", ("red cube", "blue plate"))`."""

    name: str
    args: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.name not in _NUM_ARGS:
            raise ValueError(f"predicate {self.name!r} is unknown; expected one of {', '.join(_NUM_ARGS)}")
        low, high = _NUM_ARGS[self.name]
        if not low <= len(self.args) <= high:
            raise ValueError(
                f"{self.name} got {len(self.args)} arguments {self.args}; expected {low} to {high}"
            )

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.args)})"

    @property
    def things(self) -> tuple[str, ...]:
        """The arguments that name something on the table: not a place, nor a direction."""
        return self.args[:1] if self.name in ("At", "Moved") else self.args

    def to_json(self) -> list[str]:
        """Name and arguments in one list; `from_json` reads it."""
        return [self.name, *self.args]

    @classmethod
    def from_json(cls, spec: Sequence[str]) -> Predicate:
        return cls(str(spec[0]), tuple(map(str, spec[1:])))

    def to_dict(self) -> dict[str, Any]:
        """Name and arguments apart; `from_dict` reads it."""
        return {"name": self.name, "args": list(self.args)}

    @classmethod
    def from_dict(cls, spec: Mapping[str, Any]) -> Predicate:
        return cls(str(spec["name"]), tuple(map(str, spec["args"])))


_NUM_ARGS: dict[str, tuple[int, int]] = {
    "On": (2, 2),
    "In": (2, 2),
    "Stack": (2, 8),
    **dict.fromkeys(_BESIDE, (2, 2)),
    "Open": (1, 1),
    "Closed": (1, 1),
    "Pressed": (1, 1),
    "Held": (1, 1),
    "NotMoved": (1, 1),
    "Moved": (2, 2),
    "At": (3, 3),
    "Not": (2, 9),
}


def holds(predicate: Predicate, truth: Truth) -> bool:
    """Whether the predicate is true now. Raises ValueError for things the scene does not have."""
    name, args = predicate.name, predicate.args
    match name:
        case "Not":
            return not holds(Predicate(args[0], args[1:]), truth)
        case "On":
            return _on(truth, args[0], args[1])
        case "Stack":
            return all(_on(truth, above, below) for above, below in itertools.pairwise(args))
        case "In":
            return _inside(truth, args[0], args[1])
        case "Open":
            return truth.joint_share(args[0]) > OPEN_SHARE
        case "Closed":
            return truth.joint_share(args[0]) < CLOSED_SHARE
        case "Pressed":
            return truth.pressed(args[0])
        case "Held":
            truth.state(args[0])
            return truth.held() == args[0]
        case "NotMoved":
            return float(np.linalg.norm(truth.state(args[0]).position - truth.start(args[0]))) < STILL_M
        case "Moved":
            return _moved(truth, args[0], args[1])
        case "At":
            gap = truth.state(args[0]).position[:2] - np.array([float(args[1]), float(args[2])])
            return float(np.linalg.norm(gap)) < AT_M and truth.held() != args[0]
    return _beside(truth, args[0], args[1], DIRECTIONS[_BESIDE[name]])


def _on(truth: Truth, above: str, below: str) -> bool:
    upper = truth.state(above)
    if truth.held() == above or not truth.touching(above, below):
        return False
    if below == "table":
        return True
    lower = truth.state(below)
    gap = upper.position - lower.position
    reach = sizes.PLATE_RADIUS_M if lower.kind == "plate" else max(lower.half_m[:2])
    return bool(gap[2] > 0.5 * min(upper.half_m) and np.linalg.norm(gap[:2]) < reach)


def _inside(truth: Truth, name: str, container: str) -> bool:
    inner, outer = truth.state(name), truth.state(container)
    if truth.held() == name:
        return False
    x, y, z = outer.rotation.T @ (inner.position - outer.position)
    if outer.kind == "bin":
        half = sizes.BIN_INNER_M
        return bool(abs(x) < half and abs(y) < half and 0 < z < sizes.BIN_HEIGHT_M + 0.03)
    if outer.kind != "drawer":
        raise ValueError(f"In({name}, {container}): a {outer.kind} holds nothing inside; use On")
    # The frame of a drawer's state moves with its tray.
    return bool(abs(x) < sizes.CABINET_DEPTH_M and abs(y) < sizes.CABINET_WIDTH_M and 0 < z < 0.1)


def _moved(truth: Truth, name: str, direction: str) -> bool:
    if direction not in DIRECTIONS:
        raise ValueError(f"Moved got direction {direction!r}; expected one of {', '.join(DIRECTIONS)}")
    along, across = _split(truth.state(name).position - truth.start(name), DIRECTIONS[direction])
    return along >= MOVED_M and along > across


def _beside(truth: Truth, name: str, other: str, direction: tuple[float, float]) -> bool:
    first, second = truth.state(name), truth.state(other)
    along, across = _split(first.position - second.position, direction)
    level = bool(first.position[2] < max(first.half_m) + 0.012)  # stands on the table, or lies on a plate
    return level and truth.held() != name and 0.02 < along < NEIGHBOUR_M and along > across


def _split(gap: Vector, direction: tuple[float, float]) -> tuple[float, float]:
    """A gap's parts along a direction (signed) and across it, metres."""
    along = float(gap[0] * direction[0] + gap[1] * direction[1])
    return along, math.sqrt(max(0.0, float(gap[0] ** 2 + gap[1] ** 2) - along**2))
