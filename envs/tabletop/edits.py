"""Edits of table-tops with their truth: a view before, an instruction in words, the view after.

As `emuworld.envs.rooms.edits` does for rooms: one edit changes the plan, MuJoCo compiles and settles it
again, and an edit is given only where it can be seen. The arm rests; nothing here is carried out by it. What
training must not know stays out of it: held-out colours of things and held-out uses of them, and the cameras
that tests of the planner have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from emuworld.envs.edit_chains import Edit
from emuworld.envs.palette import RGB, WALL_COLOURS, WOOD, with_article
from emuworld.envs.rooms.floorplan import choice
from emuworld.envs.tabletop import layout as sizes
from emuworld.envs.tabletop.drafts import HELD_OUT_TABLE_PAIRS, uses_new_composition
from emuworld.envs.tabletop.edit_words import table_edit_phrase
from emuworld.envs.tabletop.layout import (
    BIN_LOOKS,
    OBJECT_KINDS,
    CameraPlan,
    FurniturePlan,
    Look,
    ObjectPlan,
    TablePlan,
)
from emuworld.envs.tabletop.looks import WALL_NAMES
from emuworld.envs.tabletop.places import RADIUS_M, SIDES, draw_size
from emuworld.envs.tabletop.predicates import DIRECTIONS
from emuworld.envs.tabletop.shots import (
    CLEAR_PX,
    TableShot,
    Thing,
    clear_things,
    column_of,
    exchanged,
    free_at,
    free_colours,
    free_spot,
    stands_alone,
)
from emuworld.envs.tabletop.subtasks import Subtask

MOVE_M = 0.13  # about an eighth of the picture
MAX_OBJECTS = 7
_HOLDERS = ("plate", "bin")
_COLUMNS = {"on the left": (0.0, 0.36), "in the middle": (0.42, 0.58), "on the right": (0.64, 1.0)}
_WAYS = {"to the left": "left", "to the right": "right", "closer": "closer", "further away": "away"}
_BESIDE = {"to the left of": "left of", "to the right of": "right of", "in front of": "in front of",
           "behind": "behind"}  # fmt: skip
_GAP_M = 0.045
_TOPS: dict[str, tuple[str, RGB]] = {  # the tables of training, by name
    "white": ("matte", (0.80, 0.80, 0.78)),
    "gray": ("matte", (0.60, 0.61, 0.63)),
    "beige": ("matte", (0.82, 0.72, 0.56)),
    "wooden": ("planks_slim", WOOD[0]),
    "dark wooden": ("planks_wide", WOOD[1]),
}
_CLEAR_RGB = 0.14  # of a background's old and new colour, root of the mean square
_DIM, _BRIGHT, _AMBIENT = 0.58, 1.25, (0.30, 0.41)
# Colours of the lamp, of ambient light only through it: stronger than rooms' for the same picture.
_TINTS: dict[str, RGB] = {"warm": (1.16, 0.95, 0.58), "cold": (0.66, 0.95, 1.22)}
# Where the camera goes: a turn around the table, a rise (degrees), a share of the distance. Each lies beyond
# the cameras that are new in tests of the planner (`looks`), so that those remain new.
_VIEWS = {
    "step left": (-26.0, 0.0, 1.0),
    "step right": (26.0, 0.0, 1.0),
    "move up": (0.0, 20.0, 1.0),
    "move down": (0.0, -16.0, 1.0),
    "move forward": (0.0, 0.0, 0.76),
    "move back": (0.0, 0.0, 1.28),
}


@dataclass(frozen=True, kw_only=True)
class _Change:
    """What an edit does, before it is known whether it can be seen."""

    phrasing: str
    words: dict[str, str]
    target: str
    plan: TablePlan
    result: str = ""
    turned: bool = False
    about: tuple[str, ...] = ()  # things that may be less in view afterwards
    shown: str = ""  # what must be large in view afterwards


def sample_table_edit(
    shot: TableShot, rng: np.random.Generator, *, kind: str | None = None
) -> Edit[TableShot] | None:
    """An edit of what a shot shows, of a random kind or one of `TABLE_EDIT_KINDS`; None where none can be
    seen. Phrasings, colours and uses are those of the shot's split.
    """
    if kind is not None and kind not in _MAKERS:
        raise ValueError(f"edit kind {kind!r} is unknown; expected one of {', '.join(TABLE_EDIT_KINDS)}")
    for _ in range(12):
        drawn = kind or choice(rng, TABLE_EDIT_KINDS, tuple(weight for _, weight in _MAKERS.values()))
        change = _MAKERS[drawn][0](shot, rng)
        if change is None:
            continue
        after = replace(shot, plan=change.plan, turned=shot.turned or change.turned)
        if _can_be_seen(shot, after, change):
            return Edit(
                kind=drawn,
                instruction=table_edit_phrase(
                    change.phrasing, rng, shot.split, in_view=shot.pixels(), **change.words
                ),
                references=(shot,),
                answer=after,
                target=change.target,
                result=change.result,
            )
    return None


def _can_be_seen(before: TableShot, after: TableShot, change: _Change) -> bool:
    """Whether what is changed is large in view, and no other thing has lost half of its pixels."""
    old, new = before.pixels(), after.pixels()
    if change.shown and new.get(change.shown, 0) < CLEAR_PX:
        return False
    about = {change.target, change.result, *change.about}
    return all(new.get(name, 0) >= count / 2 for name, count in old.items() if name not in about)


def _add(shot: TableShot, rng: np.random.Generator) -> _Change | None:
    plan = shot.plan
    if len(plan.objects) >= MAX_OBJECTS:
        return None
    new = new_thing(shot, rng)
    spot = None if new is None else free_spot(plan, rng, _radius(new))
    if new is None or spot is None:
        return None
    new = _put(new, *spot)
    words, phrasing = {"an_a": with_article(new.name)}, "add"
    column = column_of(plan, *spot)
    where = [side for side, (low, high) in _COLUMNS.items() if low <= column < high]
    if where and rng.random() < 0.6:
        words["where"], phrasing = where[0], "add where"
    return _Change(
        phrasing=phrasing, words=words, target=new.name, result=new.name,
        plan=exchanged(plan, new.name, new), shown=new.name,
    )  # fmt: skip


def _remove(shot: TableShot, rng: np.random.Generator) -> _Change | None:
    thing = _any_thing(shot, rng)
    if thing is None:
        return None
    plan = exchanged(shot.plan, thing.name, None)
    return _Change(phrasing="remove", words={"a": thing.name}, target=thing.name, plan=plan)


def _recolour(shot: TableShot, rng: np.random.Generator) -> _Change | None:
    thing = _any_thing(shot, rng, alone=False)
    colour = thing and _new_colour(shot, rng, thing.kind)
    if not thing or not colour:
        return None
    new = replace(thing, colour=colour)
    return _Change(
        phrasing="recolour", words={"a": thing.name, "colour": colour}, target=thing.name, result=new.name,
        plan=exchanged(shot.plan, thing.name, new), shown=new.name,
    )  # fmt: skip


def _replace(shot: TableShot, rng: np.random.Generator) -> _Change | None:
    old = _any_thing(shot, rng)
    new = old and new_thing(shot, rng, but=old.kind)
    if not old or not new:
        return None
    new = _put(new, *old.position[:2])
    if not free_at(shot.plan, *old.position[:2], _radius(new), but=old.name):
        return None
    return _Change(
        phrasing="replace", words={"a": old.name, "an_b": with_article(new.name)}, target=old.name,
        result=new.name, plan=exchanged(shot.plan, old.name, new), shown=new.name,
    )  # fmt: skip


def _move(shot: TableShot, rng: np.random.Generator) -> _Change | None:
    """A loose object: by a fixed way, beside another thing, or onto a plate or into a bin."""
    names = clear_things(shot, OBJECT_KINDS)
    if not names:
        return None
    thing = shot.thing(choice(rng, tuple(names)))
    assert isinstance(thing, ObjectPlan)
    moved = choice(rng, (_moved_by, _moved_beside, _moved_into), (0.4, 0.35, 0.25))(shot, thing, rng)
    if moved is None:
        return None
    phrasing, words, result, use, new = moved
    if shot.split != "test" and uses_new_composition((use,)):
        return None
    return _Change(
        phrasing=phrasing, words={"a": thing.name, **words}, target=thing.name, result=result,
        plan=exchanged(shot.plan, thing.name, new), shown=thing.name,
    )  # fmt: skip


_Moved = tuple[str, dict[str, str], str, Subtask, ObjectPlan]  # phrasing, words, result, what it does, plan


def _moved_by(shot: TableShot, thing: ObjectPlan, rng: np.random.Generator) -> _Moved | None:
    way = choice(rng, tuple(_WAYS))
    dx, dy = DIRECTIONS[_WAYS[way]]
    x, y = thing.position[0] + MOVE_M * dx, thing.position[1] + MOVE_M * dy
    if not stands_alone(shot.plan, thing) or not free_at(shot.plan, x, y, thing.radius_m, but=thing.name):
        return None
    use = Subtask(skill="push", target=thing.name, relation=_WAYS[way])
    return "move", {"way": way}, way, use, _at(thing, x, y)


def _moved_beside(shot: TableShot, thing: ObjectPlan, rng: np.random.Generator) -> _Moved | None:
    others = [name for name in clear_things(shot, (*OBJECT_KINDS, *_HOLDERS)) if name != thing.name]
    if not others:
        return None
    other, relation = shot.thing(choice(rng, tuple(others))), choice(rng, tuple(_BESIDE))
    dx, dy = DIRECTIONS[SIDES[_BESIDE[relation]]]
    way = thing.radius_m + _radius(other) + _GAP_M
    x, y = other.position[0] + way * dx, other.position[1] + way * dy
    far = math.hypot(x - thing.position[0], y - thing.position[1]) > MOVE_M / 2
    if not stands_alone(shot.plan, other) or not far:
        return None
    if not free_at(shot.plan, x, y, thing.radius_m, but=thing.name):
        return None
    use = Subtask(skill="place", target=thing.name, relation=_BESIDE[relation], destination=other.name)
    words = {"relation": relation, "b": other.name}
    return "place", words, f"{relation} the {other.name}", use, _at(thing, x, y)


def _moved_into(shot: TableShot, thing: ObjectPlan, rng: np.random.Generator) -> _Moved | None:
    empty = [name for name in clear_things(shot, _HOLDERS) if stands_alone(shot.plan, shot.thing(name))]
    if not empty:
        return None
    holder = shot.thing(choice(rng, tuple(empty)))
    relation, floor = ("on", sizes.PLATE_HEIGHT_M) if holder.kind == "plate" else ("in", sizes.BIN_FLOOR_M)
    new = _at(thing, *holder.position[:2], floor_m=floor + 0.001)
    use = Subtask(skill="place", target=thing.name, relation=relation, destination=holder.name)
    words = {"relation": relation, "b": holder.name}
    return "put into", words, f"{relation} the {holder.name}", use, new


def _wall(shot: TableShot, rng: np.random.Generator) -> _Change | None:
    old = shot.plan.look.wall_rgb
    new = [name for name in WALL_NAMES if _apart(WALL_COLOURS[name], old) > _CLEAR_RGB]
    name = choice(rng, tuple(new))
    look = replace(shot.plan.look, wall="matte", wall_rgb=WALL_COLOURS[name])
    return _looks(shot, look, "wall", {"wall": name}, target="wall", result=name)


def _table(shot: TableShot, rng: np.random.Generator) -> _Change | None:
    old = shot.plan.look.table_rgb
    name = choice(rng, tuple(name for name, (_, rgb) in _TOPS.items() if _apart(rgb, old) > _CLEAR_RGB))
    material, rgb = _TOPS[name]
    look = replace(shot.plan.look, table=material, table_rgb=rgb)
    return _looks(
        shot, look, "table", {"top": name, "a_top": with_article(name)}, target="table", result=name
    )


def _light(shot: TableShot, rng: np.random.Generator) -> _Change | None:
    look = shot.plan.look
    lowest, highest = _AMBIENT
    warmth = look.lamp_rgb[0] / look.lamp_rgb[2]
    possible = ["warm"] * (warmth < 1.5) + ["cold"] * (warmth > 0.7)
    possible += ["darker"] * (look.ambient > lowest) + ["brighter"] * (look.ambient < highest)
    tone = choice(rng, tuple(possible))
    red, green, blue = look.lamp_rgb
    if tone in _TINTS:
        level = (red + green + blue) / 3
        red, green, blue = (level * channel for channel in _TINTS[tone])
        new = replace(look, lamp_rgb=(red, green, blue))
    else:
        factor = _DIM if tone == "darker" else _BRIGHT
        new = replace(
            look,
            lamp_rgb=(factor * red, factor * green, factor * blue),
            ambient=factor * look.ambient,
            headlight=factor * look.headlight,
        )
    return _looks(shot, new, tone, {}, target="light", result=tone)


def _looks(
    shot: TableShot, look: Look, phrasing: str, words: dict[str, str], *, target: str, result: str
) -> _Change:
    plan = replace(shot.plan, look=look)
    return _Change(phrasing=phrasing, words=words, target=target, result=result, plan=plan)


def _viewpoint(shot: TableShot, rng: np.random.Generator) -> _Change | None:
    """From where training's camera never is, so only once in a chain."""
    if shot.turned:
        return None
    way = choice(rng, tuple(_VIEWS))
    plan = replace(shot.plan, camera=_turned(shot.plan.camera, *_VIEWS[way]))
    return _Change(phrasing=way, words={}, target="viewpoint", result=way, plan=plan, turned=True)


def _turned(camera: CameraPlan, turn_deg: float, rise_deg: float, share: float) -> CameraPlan:
    """The camera after a turn around its target, a rise, and a change of its distance."""
    x, y, z = (a - b for a, b in zip(camera.position, camera.target, strict=True))
    distance, level = math.hypot(x, y, z) * share, math.hypot(x, y)
    turn = math.atan2(y, x) + math.radians(turn_deg)
    rise = math.atan2(z, level) + math.radians(rise_deg)
    level = distance * math.cos(rise)
    way = (level * math.cos(turn), level * math.sin(turn), distance * math.sin(rise))
    target = camera.target
    return replace(camera, position=(target[0] + way[0], target[1] + way[1], target[2] + way[2]))


_MAKERS: dict[str, tuple[Callable[[TableShot, np.random.Generator], _Change | None], float]] = {
    "add": (_add, 2.0),
    "remove": (_remove, 1.5),
    "recolour": (_recolour, 1.5),
    "move": (_move, 5.0),
    "replace": (_replace, 2.5),
    "wall": (_wall, 1.0),
    "table": (_table, 2.0),
    "light": (_light, 1.2),
    "viewpoint": (_viewpoint, 2.0),
}
TABLE_EDIT_KINDS = tuple(_MAKERS)


def new_thing(shot: TableShot, rng: np.random.Generator, *, but: str = "") -> Thing | None:
    """A thing of a colour that the table does not have, of another kind than `but`; it stands nowhere yet.
    Mostly a loose object, in tests often of a held-out pair.
    """
    kinds = [kind for kind in OBJECT_KINDS if kind != but]
    holders = [kind for kind in _HOLDERS if kind != but]
    kind = choice(rng, tuple(kinds if rng.random() < 0.75 else holders))
    colour = _new_colour(shot, rng, kind)
    if colour is None:
        return None
    if kind in _HOLDERS:
        return FurniturePlan(kind=kind, colour=colour, position=(0.0, 0.0))
    size = draw_size(kind, rng)
    yaw = float(rng.uniform(-math.pi / 4, math.pi / 4)) if kind == "cube" else 0.0
    return ObjectPlan(kind=kind, colour=colour, size_m=size, position=(0.0, 0.0, size[-1]), yaw_rad=yaw)


def _new_colour(shot: TableShot, rng: np.random.Generator, kind: str) -> str | None:
    """Held out in one of three test edits where it can be, in training never."""
    colours = free_colours(shot.plan)
    held_out = [colour for colour in colours if (colour, kind) in HELD_OUT_TABLE_PAIRS]
    if kind == "bin" and "wooden bin" not in {piece.name for piece in shot.plan.furniture}:
        colours += BIN_LOOKS
    if held_out and shot.split == "test" and rng.random() < 0.35:
        return choice(rng, tuple(held_out))
    usual = [colour for colour in colours if (colour, kind) not in HELD_OUT_TABLE_PAIRS]
    return choice(rng, tuple(usual)) if usual else None


def _any_thing(shot: TableShot, rng: np.random.Generator, *, alone: bool = True) -> Thing | None:
    """An object, plate or bin that is large in view; `alone`: it carries nothing and lies on nothing."""
    names = clear_things(shot, (*OBJECT_KINDS, *_HOLDERS))
    things = [shot.thing(name) for name in names]
    things = [thing for thing in things if not alone or stands_alone(shot.plan, thing)]
    return choice(rng, tuple(things)) if things else None


def _radius(thing: Thing) -> float:
    return thing.radius_m if isinstance(thing, ObjectPlan) else RADIUS_M[thing.kind]


def _put(thing: Thing, x_m: float, y_m: float) -> Thing:
    return _at(thing, x_m, y_m) if isinstance(thing, ObjectPlan) else replace(thing, position=(x_m, y_m))


def _at(thing: ObjectPlan, x_m: float, y_m: float, *, floor_m: float = 0.0) -> ObjectPlan:
    return replace(thing, position=(x_m, y_m, floor_m + thing.half_height_m))


def _apart(one: RGB, other: RGB) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / 3)
