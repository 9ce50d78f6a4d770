"""Where the things of a task stand: free places within the arm's reach, with room for what the plan needs.

Every thing and every place that a plan will use (beside a thing, along a push, before a drawer) is a circle
on the table; circles keep their distance. World axes as in `emuworld.envs.tabletop.layout`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emuworld.envs.tabletop import layout as sizes
from emuworld.envs.tabletop.drafts import Draft
from emuworld.envs.tabletop.layout import FurniturePlan, ObjectPlan, TablePlan
from emuworld.envs.tabletop.predicates import DIRECTIONS
from emuworld.envs.tabletop.subtasks import Subtask

LAYOUTS = ("spread", "halves")
HELD_OUT_LAYOUTS = ("row", "arc")  # test only: loose things in a line, or all equally far from the arm
X_M, Y_M, REACH_M = (0.36, 0.64), (-0.34, 0.34), 0.68
GAP_M = 0.035  # between footprints, for the fingers
SIDES = {"left of": "left", "right of": "right", "behind": "away", "in front of": "closer"}
_BESIDE_M = 0.11
RADIUS_M = {"plate": sizes.PLATE_RADIUS_M, "bin": 0.125, "button": 0.065, "mark": sizes.MARK_RADIUS_M}
_DRAWER_Y_M, _DRAWER_X_M = 0.30, 0.36


class NoPlaceError(ValueError):
    """The things of a draft found no free places."""


@dataclass(frozen=True, kw_only=True)
class Circle:
    """A thing, or a place that a plan needs, as a circle on the table."""

    x_m: float
    y_m: float
    radius_m: float

    def meets(self, other: Circle) -> bool:
        gap = math.hypot(self.x_m - other.x_m, self.y_m - other.y_m)
        return gap < self.radius_m + other.radius_m + GAP_M


@dataclass(frozen=True, kw_only=True)
class Places:
    """What stands where; `mark`: the goal place that only the picture shows."""

    objects: tuple[ObjectPlan, ...]
    furniture: tuple[FurniturePlan, ...]
    mark: tuple[float, float] | None


def find_places(draft: Draft, rng: np.random.Generator, *, layout: str) -> Places:
    """Places for everything in a draft, in a layout of `LAYOUTS` or `HELD_OUT_LAYOUTS`.

    Raises NoPlaceError after 40 attempts.
    """
    for _ in range(40):
        try:
            return _Table(rng, layout).set(draft)
        except NoPlaceError:
            continue
    raise NoPlaceError(f"{len(draft.movables)} things in layout {layout!r} found no free places")


class _Table:
    """One attempt: circles that are taken, and the areas of a layout."""

    def __init__(self, rng: np.random.Generator, layout: str) -> None:
        self._rng, self._layout = rng, layout
        self._taken: list[Circle] = []
        self._side = 1 if rng.random() < 0.5 else -1  # of the drawer, and of the loose things in "halves"
        self._line_x, self._line_r = rng.uniform(0.42, 0.58), rng.uniform(0.48, 0.60)

    def set(self, draft: Draft) -> Places:
        furniture = []
        if draft.drawer is not None:
            furniture.append(self._drawer(draft.drawer))
        if draft.button:
            furniture.append(self._furniture("button", _pick(self._rng, ("red", "green", "blue", "yellow"))))
        for name in draft.holders:
            colour, kind = name.split()
            furniture.append(self._furniture(kind, colour))
        mark = None
        if draft.mark:
            furniture.append(self._furniture("mark", "white"))
            mark = furniture[-1].position
        room = {step.target: _room(step) for step in draft.oracle if step.skill == "push"}
        room |= {str(step.destination): _room(step) for step in draft.oracle if step.relation in SIDES}
        wide = sorted(draft.movables, key=lambda name: -len(room.get(name, ())))
        found = {name: self._object(name, room.get(name, ())) for name in wide}
        objects = tuple(
            dataclasses.replace(found[name], distractor=bool(draft.oracle) and name in draft.bystanders)
            for name in draft.movables
        )
        return Places(objects=objects, furniture=tuple(furniture), mark=mark)

    def _drawer(self, state: str) -> FurniturePlan:
        y = self._side * _DRAWER_Y_M
        self._taken += _drawer_circles(y)
        open_m = sizes.DRAWER_TRAVEL_M if state == "open" else 0.0
        colour = _pick(self._rng, ("white", "blue", "green", "red", "yellow"))
        return FurniturePlan(kind="drawer", colour=colour, position=(_DRAWER_X_M, y), open_m=open_m)

    def _furniture(self, kind: str, colour: str) -> FurniturePlan:
        area = (X_M, Y_M) if self._layout != "halves" else (X_M, self._half(-self._side))
        circle = self._free(RADIUS_M[kind], area=area)
        return FurniturePlan(kind=kind, colour=colour, position=(circle.x_m, circle.y_m))

    def _object(self, name: str, room: tuple[tuple[float, float], ...]) -> ObjectPlan:
        colour, kind = name.split()
        size = draw_size(kind, self._rng)
        yaw = float(self._rng.uniform(-math.pi / 4, math.pi / 4)) if kind == "cube" else 0.0
        plan = ObjectPlan(kind=kind, colour=colour, size_m=size, position=(0.0, 0.0, size[-1]), yaw_rad=yaw)
        area = (X_M, Y_M) if self._layout != "halves" else (X_M, self._half(self._side))
        circle = self._free(plan.radius_m, area=area, room=room, lined=True)
        return dataclasses.replace(plan, position=(circle.x_m, circle.y_m, plan.half_height_m))

    def _half(self, side: int) -> tuple[float, float]:
        return (Y_M[0], 0.04) if side < 0 else (-0.04, Y_M[1])

    def _free(
        self,
        radius: float,
        *,
        area: tuple[tuple[float, float], tuple[float, float]],
        room: tuple[tuple[float, float], ...] = (),
        lined: bool = False,
    ) -> Circle:
        """A free circle, and free ones at the offsets of `room`; all are taken afterwards."""
        for _ in range(60):
            x, y = (float(self._rng.uniform(*side)) for side in area)
            if lined and self._layout == "row":
                x = self._line_x + float(self._rng.uniform(-0.01, 0.01))
            elif lined and self._layout == "arc":
                x = math.sqrt(max(0.0, self._line_r**2 - y**2))
            here = Circle(x_m=round(x, 4), y_m=round(y, 4), radius_m=radius)
            more = [Circle(x_m=x + dx, y_m=y + dy, radius_m=0.045) for dx, dy in room]
            if all(is_free(circle, self._taken) for circle in (here, *more)):
                self._taken += [here, *more]
                return here
        raise NoPlaceError("no free place")


def is_free(circle: Circle, taken: Sequence[Circle]) -> bool:
    """Whether a thing may stand here: in the picture, within the arm's reach, with room for the fingers."""
    inside = X_M[0] - 0.01 <= circle.x_m <= X_M[1] + 0.01
    # The picture is narrower near the camera.
    inside = inside and abs(circle.y_m) + circle.radius_m <= 0.41 - 0.27 * (circle.x_m - X_M[0])
    near = math.hypot(circle.x_m, circle.y_m) < REACH_M
    return inside and near and not any(circle.meets(other) for other in taken)


def circles_of(plan: TablePlan, *, but: str = "") -> list[Circle]:
    """What stands on a table as circles, without the thing of a name."""
    taken = [
        Circle(x_m=item.position[0], y_m=item.position[1], radius_m=item.radius_m)
        for item in plan.objects
        if item.name != but
    ]
    for piece in plan.furniture:
        if piece.kind == "drawer":
            taken += _drawer_circles(piece.position[1])
        elif piece.name != but:
            taken.append(Circle(x_m=piece.position[0], y_m=piece.position[1], radius_m=RADIUS_M[piece.kind]))
    return taken


def _drawer_circles(y_m: float) -> list[Circle]:
    """A cabinet and all that its drawer reaches."""
    front = _DRAWER_X_M + sizes.CABINET_DEPTH_M + sizes.DRAWER_TRAVEL_M + sizes.HANDLE_OUT_M
    return [
        Circle(x_m=float(x), y_m=y_m, radius_m=0.10)
        for x in np.arange(_DRAWER_X_M - 0.02, front + 0.01, 0.05)
    ]


def _room(step: Subtask) -> tuple[tuple[float, float], ...]:
    """Offsets from a thing that have to be free: beside it, or before and behind it along a push."""
    if step.skill == "push":
        dx, dy = DIRECTIONS[str(step.relation)]
        return tuple((share * dx, share * dy) for share in (-0.06, 0.08, 0.14))
    dx, dy = DIRECTIONS[SIDES[str(step.relation)]]
    return ((_BESIDE_M * dx, _BESIDE_M * dy),)


def draw_size(kind: str, rng: np.random.Generator) -> tuple[float, ...]:
    """Half edge of a cube, radius of a ball, radius and half height of a cylinder, metres."""
    if kind == "cylinder":
        return round(float(rng.uniform(0.024, 0.028)), 4), round(float(rng.uniform(0.03, 0.04)), 4)
    return (round(float(rng.uniform(0.025, 0.030)), 4),)


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]
