"""Salient objects, light and start pose of a room: the second half of `sample_plan`."""

from __future__ import annotations

import math

import numpy as np

from emuworld.envs.palette import HELD_OUT_PAIRS, MESH_SIZES, object_pairs
from emuworld.envs.rooms.collision import BODY_RADIUS_M, Obstacles
from emuworld.envs.rooms.floorplan import (
    HELD_OUT_LAYOUTS,
    LAYOUTS,
    Draft,
    Light,
    ObjectPlan,
    PlacedPiece,
    RoomPlan,
    Wall,
    Wish,
    choice,
    decorate,
    furnish,
    lay_rugs,
    outline,
    paint_floor,
    paint_walls,
    place_doors,
    place_partition,
)

NUM_OBJECTS = (3, 8)
# A prompt's objects must fit side by side into one view.
MAX_WISHED_OBJECTS = 5
_VIEW_HALF_RAD = math.radians(29)
_OUT_OF_VIEW_RAD = math.radians(48)


class NoRoomError(RuntimeError):
    """This draw of a room cannot hold what was wished; another draw may."""


def new_object(
    rng: np.random.Generator, pair: tuple[str, str], x: float, y: float, base: float = 0.0, most: float = 0.6
) -> ObjectPlan:
    """An object of random size between 0.28 m and `most` at a place, `base` metres above the floor."""
    colour, shape = pair
    scale = float(rng.uniform(min(0.36, most - 0.06), most))
    mesh: str | None = None
    if shape == "ball":
        size, height, radius = (scale / 2, 0.0, 0.0), scale, scale / 2
    elif shape == "box":
        half = tuple(float(scale / 2 * rng.uniform(0.8, 1.0)) for _ in range(3))
        size, height, radius = (half[0], half[1], half[2]), 2 * half[2], math.hypot(half[0], half[1])
    elif shape == "cylinder":
        radius, height = scale * 0.38, scale
        size = (radius, height / 2, 0.0)
    elif shape == "capsule":
        radius, height = scale * 0.27, scale * 1.25
        size = (radius, height / 2 - radius, 0.0)
    elif shape == "egg":
        radius, height = scale * 0.38, scale * 1.1
        size = (radius, radius, height / 2)
    else:
        fitting = [
            index for index, (_, tall) in enumerate(MESH_SIZES) if tall <= max(scale, MESH_SIZES[0][1])
        ]
        index = fitting[int(rng.integers(len(fitting)))]
        base_radius, height = MESH_SIZES[index]
        mesh = f"{shape}_{index}"
        size, radius = (0.0, 0.0, 0.0), base_radius * (1.0 if shape == "cone" else math.sqrt(2))
    return ObjectPlan(
        colour=colour,
        shape=shape,
        x_m=x,
        y_m=y,
        base_m=base,
        yaw_rad=float(rng.uniform(-math.pi, math.pi)),
        size=size,
        height_m=height,
        radius_m=radius,
        mesh=mesh,
    )


def draw_pair(rng: np.random.Generator, split: str, taken: set[tuple[str, str]]) -> tuple[str, str]:
    """A pair not in the room yet; test rooms draw held-out pairs about every third time."""
    pairs = object_pairs(split)
    if split == "test" and rng.random() < 0.35:
        pairs = tuple(pair for pair in pairs if pair in HELD_OUT_PAIRS)
    free = [pair for pair in pairs if pair not in taken] or [p for p in object_pairs(split) if p not in taken]
    return choice(rng, tuple(free))


def _on_furniture(
    rng: np.random.Generator, pair: tuple[str, str], surfaces: list[PlacedPiece]
) -> ObjectPlan | None:
    """The object on a free surface, which is then taken; None if there is none or it would overhang."""
    if not surfaces:
        return None
    spot = surfaces[int(rng.integers(len(surfaces)))]
    assert spot.piece.surface is not None
    half_x, half_y, height = spot.piece.surface
    right, front = float(rng.uniform(-half_x, half_x)), float(rng.uniform(-half_y, half_y))
    yaw = spot.yaw_rad - math.pi / 2
    x = spot.x_m + right * math.cos(yaw) - front * math.sin(yaw)
    y = spot.y_m + right * math.sin(yaw) + front * math.cos(yaw)
    item = new_object(rng, pair, x, y, height, most=0.36)
    overhang = item.radius_m - min(spot.piece.half_x_m - abs(right), spot.piece.half_y_m - abs(front))
    if overhang > 0.03:
        return None
    surfaces.remove(spot)
    return item


def _on_floor(
    rng: np.random.Generator, pair: tuple[str, str], draft: Draft, size: tuple[float, float]
) -> ObjectPlan | None:
    for _ in range(10):
        x, y = (float(rng.uniform(-0.5, 0.5)) * extent for extent in size)
        item = new_object(rng, pair, x, y)
        if draft.clears(item.footprint(), 0.12):
            return item
    return None


def _out_of_view(item: ObjectPlan, start: tuple[float, float, float] | None) -> bool:
    if start is None:
        return True
    off = math.atan2(item.y_m - start[1], item.x_m - start[0]) - start[2]
    distance = math.hypot(item.x_m - start[0], item.y_m - start[1])
    return (
        abs(math.remainder(off, 2 * math.pi)) > _OUT_OF_VIEW_RAD
        and distance > BODY_RADIUS_M + item.radius_m + 0.1
    )


def _scatter(
    rng: np.random.Generator,
    *,
    split: str,
    count: int,
    draft: Draft,
    size: tuple[float, float],
    furniture: list[PlacedPiece],
    taken: set[tuple[str, str]],
    start: tuple[float, float, float] | None,
) -> list[ObjectPlan]:
    """Up to `count` objects on the floor and on furniture, none of them in view of a prompt's start pose."""
    surfaces = [spot for spot in furniture if spot.piece.surface is not None]
    items: list[ObjectPlan] = []
    for _ in range(count * 6):
        if len(items) == count:
            break
        pair = draw_pair(rng, split, taken)
        item = _on_furniture(rng, pair, surfaces) if rng.random() < 0.4 else None
        item = item or _on_floor(rng, pair, draft, size)
        if item is not None and _out_of_view(item, start):
            items.append(item)
            taken.add(pair)
            if item.base_m < 0.3:
                draft.taken.append(item.footprint())
    return items


def _stand(rng: np.random.Generator, draft: Draft, size: tuple[float, float]) -> tuple[float, float, float]:
    """A start pose with at least 2.4 m of free floor ahead, looking roughly across the room."""
    obstacles = Obstacles([*draft.blocks, *draft.taken])
    for _ in range(60):
        x, y = (float(rng.uniform(-0.5, 0.5)) * extent for extent in size)
        if float(obstacles.distance(np.array([[x, y]]))[0]) < BODY_RADIUS_M + 0.05:
            continue
        yaw = math.atan2(-y, -x) + float(rng.uniform(-0.6, 0.6))
        if obstacles.free_way((x, y), yaw, 5.0) > 2.4:
            return x, y, yaw
    raise NoRoomError("no start pose with a free floor before it")


def _in_view(
    rng: np.random.Generator, wish: Wish, draft: Draft, start: tuple[float, float, float]
) -> list[ObjectPlan]:
    """The wished objects on the floor before the start pose, none hiding another."""
    x, y, yaw = start
    standing = Obstacles([*draft.blocks, *draft.taken])
    items: list[ObjectPlan] = []
    spans: list[tuple[float, float]] = []
    for index, pair in enumerate(wish.objects):
        # Two objects side by side: the first in the left half of the view, the second in the right half.
        right, left = (-_VIEW_HALF_RAD, _VIEW_HALF_RAD)
        if wish.ordered:
            right, left = (0.06, left) if index == 0 else (right, -0.06)
        for _ in range(40):
            angle, way = float(rng.uniform(right, left)), float(rng.uniform(1.7, 3.6))
            heading = yaw + angle
            item = new_object(rng, pair, x + way * math.cos(heading), y + way * math.sin(heading))
            span = item.radius_m / way
            hidden = any(abs(angle - other) < span + width + 0.02 for other, width in spans)
            ahead = standing.free_way((x, y), heading, way, 0.1) >= way
            if ahead and not hidden and draft.clears(item.footprint(), 0.08):
                break
        else:
            raise NoRoomError("the wished objects do not fit into one view")
        items.append(item)
        spans.append((angle, span))
        draft.taken.append(item.footprint())
    return items


def _light(rng: np.random.Generator, draft: Draft, size: tuple[float, float], height: float) -> Light:
    """A wide lamp under the ceiling, away from the walls, white, warm or cool."""
    blocks = Obstacles(draft.blocks)
    x, y = 0.0, 0.0
    for _ in range(20):
        x, y = (float(rng.uniform(-0.3, 0.3)) * extent for extent in size)
        if float(blocks.distance(np.array([[x, y]]))[0]) > 0.9:
            break
    bright = float(rng.uniform(0.46, 0.62))
    red, green, blue = choice(rng, ((1.0, 1.0, 1.0), (1.0, 0.95, 0.86), (0.90, 0.96, 1.0)), (0.5, 0.3, 0.2))
    return Light(
        position=(x, y, height - 0.08),
        diffuse=(bright * red, bright * green, bright * blue),
        ambient=float(rng.uniform(0.42, 0.52)),
        headlight=float(rng.uniform(0.12, 0.18)),
    )


def _wall_behind(walls: tuple[Wall, ...], start: tuple[float, float, float]) -> int:
    """Index of the wall that the start pose looks at."""
    x, y, yaw = start
    best, nearest = 0, math.inf
    for index, wall in enumerate(walls):
        (dx, dy), (rx, ry) = wall.direction, (math.cos(yaw), math.sin(yaw))
        cross = rx * dy - ry * dx
        if abs(cross) < 1e-9:
            continue
        px, py = wall.start[0] - x, wall.start[1] - y
        way, along = (px * dy - py * dx) / cross, (px * ry - py * rx) / cross
        if 0 < way < nearest and -1e-9 <= along <= wall.length_m + 1e-9:
            best, nearest = index, way
    return best


def sample_plan(
    rng: np.random.Generator,
    *,
    split: str,
    num_objects: int | None = None,
    layout: str | None = None,
    wish: Wish | None = None,
) -> RoomPlan:
    """Draw a room. Raises `NoRoomError` when a wish does not fit into this draw."""
    layouts = LAYOUTS + HELD_OUT_LAYOUTS if split == "test" else LAYOUTS
    drawn = choice(rng, layouts, (0.5, 0.25, 0.25, 0.3)[: len(layouts)])
    layout = layout or drawn
    wanted = wish or Wish()
    corners, blocks, size = outline(rng, layout)
    height = float(rng.uniform(2.4, 3.0))
    draft = Draft(blocks=blocks)
    walls = paint_walls(rng, corners, wanted)
    partition = place_partition(rng, size, walls) if layout == "partition" else None
    if partition is not None:
        draft.blocks.append(partition[0])
    doors = place_doors(rng, walls, draft)
    furniture = furnish(rng, walls, draft, size, wanted)
    wall_pieces = decorate(rng, walls, doors, furniture, partition)
    rugs = lay_rugs(rng, draft, size)
    count = (
        num_objects
        if num_objects is not None
        else choice(rng, (3, 4, 5, 6, 7, 8), (0.2, 0.25, 0.22, 0.15, 0.1, 0.08))
    )
    start, objects = None, []
    if wish is not None:
        start = _stand(rng, draft, size)
        objects = _in_view(rng, wanted, draft, start)
        count = max(0, count - len(objects)) if num_objects is not None else int(rng.integers(0, 3))
        if wanted.wall is not None and not wanted.all_walls:
            walls = paint_walls(rng, corners, wanted, facing=_wall_behind(walls, start))
    # Doors keep furniture away, objects may stand before them.
    open_floor = Draft(
        blocks=blocks, taken=[f for f in draft.taken if not any(f is d for d in draft.door_zones)]
    )
    taken = {(item.colour, item.shape) for item in objects}
    objects += _scatter(
        rng,
        split=split,
        count=count,
        draft=open_floor,
        size=size,
        furniture=furniture,
        taken=taken,
        start=start,
    )
    return RoomPlan(
        layout=layout,
        size_m=(*size, height),
        walls=walls,
        blocks=tuple(blocks),
        partition=partition,
        floor=paint_floor(rng),
        ceiling=choice(rng, ((0.95, 0.95, 0.94), (0.90, 0.90, 0.92), (0.94, 0.91, 0.85))),
        skirting=choice(rng, (None, (0.94, 0.94, 0.93), (0.36, 0.27, 0.20)), (0.45, 0.35, 0.2)),
        wall_pieces=tuple(wall_pieces),
        furniture=tuple(furniture),
        rugs=tuple(rugs),
        objects=tuple(objects),
        light=_light(rng, draft, size, height),
        start=start,
    )
