"""What may happen in a tale: where it leads the two characters, and its sentence.

A stage is seen from one camera; spots are metres ahead of it, to its left and above the floor. Pure numbers
and words: `emuworld.envs.rooms.tale_episodes` builds the rooms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from emuworld.envs.palette import with_article
from emuworld.envs.rooms.floorplan import ObjectPlan

_FLAT = ("box", "cylinder")
NEAR_M, MIDDLE_M, FAR_M = 1.8, 2.5, 3.1  # how far from the camera the stage is played on
SIDE_M = 0.75


@dataclass(frozen=True, kw_only=True)
class Spot:
    """Where a character is, seen from the camera: metres ahead, to the left, above the floor."""

    ahead_m: float
    left_m: float
    base_m: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scenery:
    """What a panel shows: each character's spot, None where it is away, and whether it is night."""

    spots: tuple[Spot | None, Spot | None]
    night: bool = False

    def moved(self, who: int, spot: Spot | None) -> Scenery:
        spots = (spot, self.spots[1]) if who == 0 else (self.spots[0], spot)
        return replace(self, spots=spots)


@dataclass(frozen=True, kw_only=True)
class Cast:
    """The two characters, and what sentences call them: "the red ball" or "Ruby"."""

    items: tuple[ObjectPlan, ObjectPlan]
    names: tuple[str, str]
    named: bool

    def introduced(self, who: int) -> str:
        """ "a red ball", or "Ruby, a red ball,"."""
        noun = with_article(self.items[who].identity)
        return f"{self.names[who]}, {noun}," if self.named else noun


def _carries(scenery: Scenery, who: int) -> bool:
    """Whether the other one stands on this one, which therefore stays where it is."""
    there = scenery.spots[1 - who]
    return there is not None and there.base_m > 0


def reach_m(cast: Cast) -> float:
    """Distance of the characters' middles when they touch, metres."""
    return cast.items[0].radius_m + cast.items[1].radius_m


_Act = Callable[[Scenery, Cast, int], Scenery | None]


def _towards(scenery: Scenery, cast: Cast, who: int) -> Scenery | None:
    """Up to the other one, from the side on which it was."""
    here, there = scenery.spots[who], scenery.spots[1 - who]
    if here is None or there is None or there.base_m or here.base_m:
        return None
    way = reach_m(cast) + 0.15
    side = 1.0 if here.left_m > there.left_m else -1.0
    if abs(here.left_m - there.left_m) < way + 0.2:  # it is there already
        return None
    return scenery.moved(who, Spot(ahead_m=there.ahead_m, left_m=there.left_m + side * way))


def _hide(scenery: Scenery, cast: Cast, who: int) -> Scenery | None:
    there = scenery.spots[1 - who]
    if scenery.spots[who] is None or there is None or there.base_m:
        return None
    further = 1.0 + (reach_m(cast) + 0.1) / there.ahead_m
    return scenery.moved(who, Spot(ahead_m=there.ahead_m * further, left_m=there.left_m * further))


def _beside(scenery: Scenery, cast: Cast, who: int) -> Scenery | None:
    """Both in the middle, next to each other, each on its own side."""
    here, there = scenery.spots[who], scenery.spots[1 - who]
    if here is None or there is None or abs(here.left_m - there.left_m) < reach_m(cast) + 0.2:
        return None
    half = math.copysign((reach_m(cast) + 0.1) / 2, here.left_m - there.left_m)
    here, there = Spot(ahead_m=MIDDLE_M, left_m=half), Spot(ahead_m=MIDDLE_M, left_m=-half)
    return scenery.moved(who, here).moved(1 - who, there)


def _alone(scenery: Scenery, cast: Cast, who: int) -> Scenery | None:
    here, there = scenery.spots[who], scenery.spots[1 - who]
    return None if here is None or there is None or here.base_m else scenery.moved(1 - who, None)


def _appear(scenery: Scenery, cast: Cast, who: int) -> Scenery | None:
    """In from the side that is free."""
    there = scenery.spots[1 - who]
    if scenery.spots[who] is not None or there is None:
        return None
    side = -1.0 if there.left_m > 0 else 1.0
    return scenery.moved(who, Spot(ahead_m=MIDDLE_M, left_m=side * SIDE_M))


def _to_side(side: float) -> _Act:
    def act(scenery: Scenery, cast: Cast, who: int) -> Scenery | None:
        here = scenery.spots[who]
        if here is None or _carries(scenery, who) or here.left_m * side > 0.4:
            return None
        return scenery.moved(who, Spot(ahead_m=MIDDLE_M, left_m=side * SIDE_M))

    return act


def _to_depth(ahead_m: float) -> _Act:
    def act(scenery: Scenery, cast: Cast, who: int) -> Scenery | None:
        here = scenery.spots[who]
        if here is None or _carries(scenery, who) or abs(here.ahead_m - ahead_m) < 0.4:
            return None
        return scenery.moved(who, Spot(ahead_m=ahead_m, left_m=here.left_m * min(1.0, ahead_m / MIDDLE_M)))

    return act


def _on_top(scenery: Scenery, cast: Cast, who: int) -> Scenery | None:
    here, there = scenery.spots[who], scenery.spots[1 - who]
    below = cast.items[1 - who]
    if here is None or here.base_m or there is None or there.base_m or below.shape not in _FLAT:
        return None
    return scenery.moved(who, replace(there, base_m=below.height_m))


def _light(night: bool) -> _Act:
    def act(scenery: Scenery, cast: Cast, who: int) -> Scenery | None:
        return None if scenery.night == night else replace(scenery, night=night)

    return act


@dataclass(frozen=True, kw_only=True)
class Event:
    """What may happen: {a} does it, {b} is the other one. `held_out`: templates of the test split alone."""

    act: _Act
    templates: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    weight: float = 1.0


EVENTS: dict[str, Event] = {
    "towards": Event(
        act=_towards,
        templates=("{a} rolls towards {b}.", "{a} goes to {b}."),
        held_out=("{a} comes up to {b}.",),
        weight=2.0,
    ),
    "hide": Event(
        act=_hide, templates=("{a} hides behind {b}.",), held_out=("{a} slips behind {b}.",), weight=1.5
    ),
    "beside": Event(
        act=_beside,
        templates=("{a} and {b} are side by side.", "{a} and {b} stand next to each other."),
        held_out=("{a} stands beside {b}.",),
        weight=1.5,
    ),
    "alone": Event(
        act=_alone, templates=("now {a} is all alone.", "{b} goes away."), held_out=("{b} is gone.",)
    ),
    "appear": Event(
        act=_appear, templates=("{a} comes in.", "there is {a}."), held_out=("{a} appears.",), weight=3
    ),
    "left": Event(act=_to_side(1.0), templates=("{a} goes to the left.",), held_out=("{a} moves left.",)),
    "right": Event(act=_to_side(-1.0), templates=("{a} goes to the right.",), held_out=("{a} moves right.",)),
    "closer": Event(act=_to_depth(NEAR_M), templates=("{a} comes closer.",), weight=0.8),
    "further": Event(act=_to_depth(FAR_M), templates=("{a} rolls further away.",), weight=0.8),
    "top": Event(
        act=_on_top,
        templates=("{a} jumps onto {b}.", "{a} is on top of {b}."),
        held_out=("{a} climbs onto {b}.",),
        weight=1.5,
    ),
    "night": Event(act=_light(True), templates=("night falls.",), held_out=("it gets dark.",), weight=0.4),
    "day": Event(
        act=_light(False), templates=("a new day begins.",), held_out=("it gets light.",), weight=2.0
    ),
}
