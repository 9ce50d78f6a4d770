"""Edits of rooms with their truth: a view before, an instruction in words, the view after.

`sample_edit` draws one edit of what a view shows; every edit is done in MuJoCo (the plan is changed and
compiled again, or the camera moves), so the second view is exactly what the instruction asks for and nothing
else has changed. An edit is given only where it can be seen: counts of pixels by rays, before and after,
decide. Words are in `emuworld.envs.rooms.edit_words`, stories for training in
`emuworld.envs.rooms.edit_episodes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from emuworld.envs.edit_chains import Edit
from emuworld.envs.palette import (
    FLOOR_COLOURS,
    HELD_OUT_PAIRS,
    RGB,
    WALL_COLOURS,
    WOOD,
    object_pairs,
    with_article,
)
from emuworld.envs.rooms.commands import Pose, parse
from emuworld.envs.rooms.edit_phrases import edit_phrase
from emuworld.envs.rooms.edit_words import WAYS
from emuworld.envs.rooms.floorplan import Light, RoomPlan, choice
from emuworld.envs.rooms.furniture import shade
from emuworld.envs.rooms.placement import NUM_OBJECTS, new_object
from emuworld.envs.rooms.scenes import FOVY_RAD
from emuworld.envs.rooms.shots import (
    Shot,
    exchanged,
    free_spot,
    item_of,
    others,
    rest_kept,
    standing_without,
)

_CLEAR_WALL, _CLEAR_FLOOR = 0.12, 0.15  # shares of the picture
MOVE_M = 0.7
_CLEAR_SHIFT = 0.06  # of the picture's width
_LOW_OBJECT_M = 0.3  # a base below this is on the floor
# Darker and brighter multiply all light; a room is never made dark twice.
_DIM, _BRIGHT, _AMBIENT = 0.55, 1.4, (0.36, 0.54)
_TINTS: dict[str, RGB] = {"warm": (1.0, 0.78, 0.50), "cold": (0.62, 0.82, 1.0)}
_FLOORS = (("wooden", "planks_wide", WOOD[0]), *((name, "matte", rgb) for name, rgb in FLOOR_COLOURS.items()))
_FLOORS_APART = 0.2  # distance of their colours: a brown chequered floor and a brown one look alike
_COLUMNS = {"on the left": (0.0, 0.36), "in the middle": (0.40, 0.60), "on the right": (0.64, 1.0)}


@dataclass(frozen=True, kw_only=True)
class _Change:
    """What an edit does, before it is known whether it can be seen: a phrasing with its words, and a new plan
    or a new pose.
    """

    phrasing: str
    words: dict[str, str]
    target: str
    result: str = ""
    plan: RoomPlan | None = None
    pose: Pose | None = None
    seen: Callable[[Shot, Shot], bool] = lambda before, after: True


def sample_edit(shot: Shot, rng: np.random.Generator, *, kind: str | None = None) -> Edit[Shot] | None:
    """An edit of what a shot shows, of a random kind or of one of `EDIT_KINDS`; None where none can be seen.

    Phrasings, colours and shapes are those of the scene's split.
    """
    if kind is not None and kind not in _MAKERS:
        raise ValueError(f"edit kind {kind!r} is unknown; expected one of {', '.join(EDIT_KINDS)}")
    for _ in range(12):
        drawn = kind or choice(rng, EDIT_KINDS, tuple(weight for _, weight in _MAKERS.values()))
        change = _MAKERS[drawn][0](shot, rng)
        edit = None if change is None else _carried_out(shot, drawn, change, rng)
        if edit is not None:
            return edit
    return None


def _carried_out(shot: Shot, kind: str, change: _Change, rng: np.random.Generator) -> Edit[Shot] | None:
    """The edit, or None where it cannot be seen."""
    scene = shot.scene if change.plan is None else shot.scene.edited(change.plan)
    after = Shot(scene=scene, pose=change.pose or shot.pose)
    if not change.seen(shot, after):
        return None
    return Edit(
        kind=kind,
        instruction=edit_phrase(change.phrasing, rng, scene.split, in_view=shot.pixels(), **change.words),
        references=(shot,),
        answer=after,
        target=change.target,
        result=change.result,
    )


def _add(shot: Shot, rng: np.random.Generator) -> _Change | None:
    plan = shot.scene.plan
    pair = _new_pair(shot, rng)
    if pair is None or len(plan.objects) >= NUM_OBJECTS[1]:
        return None
    item = new_object(rng, pair, 0.0, 0.0)
    spot = free_spot(shot, rng, item.radius_m)
    if spot is None:
        return None
    item = replace(item, x_m=spot[0], y_m=spot[1])
    added = replace(plan, objects=(*plan.objects, item))
    name = item.identity
    words, phrasing = {"an_a": with_article(name)}, "add"
    off = math.atan2(item.y_m - shot.pose.y_m, item.x_m - shot.pose.x_m) - shot.pose.yaw_rad
    column = 0.5 - 0.5 * math.tan(off) / math.tan(FOVY_RAD / 2)
    where = [side for side, (low, high) in _COLUMNS.items() if low <= column < high]
    if where and rng.random() < 0.6:
        words["where"], phrasing = where[0], "add where"
    return _Change(phrasing=phrasing, words=words, target=name, result=name, plan=added, seen=appeared(name))


def _remove(shot: Shot, rng: np.random.Generator) -> _Change | None:
    name = _clear_object(shot, rng)
    if name is None:
        return None
    plan = shot.scene.plan
    return _Change(
        phrasing="remove", words={"a": name}, target=name, plan=replace(plan, objects=others(plan, name))
    )


def _recolour(shot: Shot, rng: np.random.Generator) -> _Change | None:
    name = _clear_object(shot, rng)
    pair = name and _new_pair(shot, rng, shape=item_of(shot, name).shape)
    if not name or not pair:
        return None
    item = replace(item_of(shot, name), colour=pair[0])
    return _Change(
        phrasing="recolour",
        words={"a": name, "colour": pair[0]},
        target=name,
        result=item.identity,
        plan=exchanged(shot.scene.plan, name, item),
    )


def _replace(shot: Shot, rng: np.random.Generator) -> _Change | None:
    name = _clear_object(shot, rng)
    pair = name and _new_pair(shot, rng)
    if not name or not pair:
        return None
    old = item_of(shot, name)
    most = 0.6 if old.base_m < _LOW_OBJECT_M else 0.36
    item = new_object(rng, pair, old.x_m, old.y_m, old.base_m, most)
    if old.base_m < _LOW_OBJECT_M and not standing_without(shot, name).clears(item.footprint(), 0.02):
        return None
    return _Change(
        phrasing="replace",
        words={"a": name, "an_b": with_article(item.identity)},
        target=name,
        result=item.identity,
        plan=exchanged(shot.scene.plan, name, item),
        seen=appeared(item.identity, instead_of=name),
    )


def _move(shot: Shot, rng: np.random.Generator) -> _Change | None:
    """An object by a fixed way, or beside, before or behind another one."""
    name = _clear_object(shot, rng, on_floor=True)
    if name is None:
        return None
    item, heading = item_of(shot, name), shot.pose.yaw_rad
    others = [other for other in _floor_objects(shot) if other != name]
    if others and rng.random() < 0.5:
        other = item_of(shot, choice(rng, tuple(others)))
        relation = choice(rng, ("to the left of", "to the right of", "in front of", "behind"))
        way = item.radius_m + other.radius_m + (0.45 if relation in ("in front of", "behind") else 0.15)
        start, words = (
            (other.x_m, other.y_m),
            {"a": name, "relation": relation, "b": other.identity},
        )
        phrasing, result = "place", f"{relation} the {other.identity}"
    else:
        relation = choice(rng, ("to the left", "to the right", "closer", "further away"))
        start, way, words = (item.x_m, item.y_m), MOVE_M, {"a": name, "way": relation}
        phrasing, result = "move", relation
    turn = WAYS[relation]
    x, y = start[0] + way * math.cos(heading + turn), start[1] + way * math.sin(heading + turn)
    moved = replace(item, x_m=x, y_m=y)
    if not standing_without(shot, name).clears(moved.footprint(), 0.04):
        return None
    return _Change(
        phrasing=phrasing,
        words=words,
        target=name,
        result=result,
        plan=exchanged(shot.scene.plan, name, moved),
        seen=_moved(name, relation),
    )


def _walls(shot: Shot, rng: np.random.Generator) -> _Change | None:
    """All walls, or those of one colour."""
    seen = [name for name, share in shot.view.walls if share > _CLEAR_WALL]
    if not seen:
        return None
    old = choice(rng, tuple(seen)) if len(seen) > 1 and rng.random() < 0.5 else None
    new = choice(rng, tuple(name for name in WALL_COLOURS if name not in seen))
    words = {"wall": new} if old is None else {"wall": new, "old": old}
    plan = painted(shot.scene.plan, new, rng, only=old)
    target = "walls" if old is None else f"{old} wall"
    return _Change(
        phrasing="walls" if old is None else "wall", words=words, target=target, result=new, plan=plan
    )


def _floor(shot: Shot, rng: np.random.Generator) -> _Change | None:
    name, share = shot.view.floor
    if share < _CLEAR_FLOOR:
        return None
    old = np.array(shot.scene.plan.floor[2])
    floors = [
        floor for floor in _FLOORS if floor[0] != name and np.linalg.norm(old - floor[2]) > _FLOORS_APART
    ]
    floor = choice(rng, tuple(floors))
    new = floor[0]
    words = {"floor": new, "a_floor": with_article(new)}
    return _Change(
        phrasing="floor",
        words=words,
        target="floor",
        result=new,
        plan=replace(shot.scene.plan, floor=floor),
    )


def _light(shot: Shot, rng: np.random.Generator) -> _Change | None:
    light = shot.scene.plan.light
    lowest, highest = _AMBIENT
    possible = [tone for tone in _TINTS if light.tint != _TINTS[tone]]
    possible += ["darker"] * (light.ambient > lowest) + ["brighter"] * (light.ambient < highest)
    tone = choice(rng, tuple(possible))
    if tone in _TINTS:
        new = _tinted(light, _TINTS[tone])
    else:
        new = brightened(light, _DIM if tone == "darker" else _BRIGHT)
    return _Change(
        phrasing=tone, words={}, target="light", result=tone, plan=replace(shot.scene.plan, light=new)
    )


def _viewpoint(shot: Shot, rng: np.random.Generator) -> _Change | None:
    text = choice(
        rng,
        (
            "step left",
            "step right",
            "move forward",
            "move back",
            "turn left",
            "turn right",
            "look up",
            "look down",
        ),
    )
    command = parse(text)
    assert command is not None
    outcome = shot.scene.execute(shot.pose, command)
    if outcome.blocked or outcome.pose == shot.pose:
        return None
    return _Change(
        phrasing=text,
        words={},
        target="viewpoint",
        result=text,
        pose=outcome.pose,
        seen=lambda before, after: after.view.near_share < 0.25 and not after.view.bare,
    )


_MAKERS: dict[str, tuple[Callable[[Shot, np.random.Generator], _Change | None], float]] = {
    "add": (_add, 2.5),
    "remove": (_remove, 2.0),
    "recolour": (_recolour, 2.0),
    "move": (_move, 4.5),
    "replace": (_replace, 2.5),
    "walls": (_walls, 1.8),
    "floor": (_floor, 1.8),
    "light": (_light, 1.8),
    "viewpoint": (_viewpoint, 2.0),
}
EDIT_KINDS = tuple(_MAKERS)


def appeared(name: str, *, instead_of: str = "") -> Callable[[Shot, Shot], bool]:
    """Whether the object is large in the second view, and hides half of no other."""
    return lambda before, after: name in after.clear() and rest_kept(before, after, {name, instead_of})


def _moved(name: str, relation: str) -> Callable[[Shot, Shot], bool]:
    """Whether the object is large in both views and clearly moved as `relation` says, and hides half of no
    other.
    """

    def seen(before: Shot, after: Shot) -> bool:
        old, new = before.pixels().get(name, 0), after.pixels().get(name, 0)
        if name not in after.clear() or not rest_kept(before, after, {name}):
            return False
        shift = after.column(name) - before.column(name)
        return {
            "to the left": shift < -_CLEAR_SHIFT and new > old / 2,  # not cut off by the picture's rim
            "to the right": shift > _CLEAR_SHIFT and new > old / 2,
            "closer": new > 1.2 * old,
            "further away": new < old / 1.2,
        }.get(relation, abs(shift) > _CLEAR_SHIFT or not 0.8 < new / old < 1.25)

    return seen


def _floor_objects(shot: Shot) -> list[str]:
    """Objects that are large in view and stand on the floor."""
    return [name for name in shot.clear() if item_of(shot, name).base_m < _LOW_OBJECT_M]


def _clear_object(shot: Shot, rng: np.random.Generator, *, on_floor: bool = False) -> str | None:
    """An object that is large in view."""
    names = _floor_objects(shot) if on_floor else shot.clear()
    return choice(rng, tuple(names)) if names else None


def _new_pair(shot: Shot, rng: np.random.Generator, *, shape: str | None = None) -> tuple[str, str] | None:
    """A pair that is not in the room; test edits take a held-out one about every third time."""
    split = shot.scene.split
    taken = {(item.colour, item.shape) for item in shot.scene.plan.objects}
    pairs = [pair for pair in object_pairs(split) if pair not in taken and shape in (None, pair[1])]
    held_out = [pair for pair in pairs if pair in HELD_OUT_PAIRS]
    if held_out and split == "test" and rng.random() < 0.35:
        pairs = held_out
    return choice(rng, tuple(pairs)) if pairs else None


def painted(plan: RoomPlan, colour: str, rng: np.random.Generator, *, only: str | None = None) -> RoomPlan:
    """The plan with all walls, or those of colour `only`, in one plain colour."""
    rgb = shade(WALL_COLOURS[colour], float(rng.uniform(0.95, 1.05)))
    walls = tuple(
        replace(wall, colour=colour, rgb=rgb, material="matte", panel=None, band=None)
        if only in (None, wall.colour)
        else wall
        for wall in plan.walls
    )
    partition = plan.partition
    if partition is not None and only in (None, partition[1]):
        partition = (partition[0], colour, rgb)
    return replace(plan, walls=walls, partition=partition)


def brightened(light: Light, factor: float) -> Light:
    """The light so many times as bright; below 1 it is darker."""
    red, green, blue = (channel * factor for channel in light.diffuse)
    ambient, headlight = light.ambient * factor, light.headlight * factor
    return replace(light, diffuse=(red, green, blue), ambient=ambient, headlight=headlight)


def _tinted(light: Light, tint: RGB) -> Light:
    """The light in another colour, as bright as before."""
    level = sum(light.diffuse) / 3
    red, green, blue = (level * channel for channel in tint)
    return replace(light, diffuse=(red, green, blue), tint=tint)
