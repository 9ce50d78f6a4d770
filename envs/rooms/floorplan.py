"""Floor plans of furnished rooms, drawn from a generator: pure numbers, no physics, no pictures.

`sample_plan` draws the outline (a rectangle, a rectangle with a partition wall, an L, and for the test split
an alcove), wall and floor looks, doors, furniture, windows, a light and the salient objects;
`emuworld.envs.rooms.scenes` compiles the result. Objects that a prompt names are put in view of a start
pose, all others out of that view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from emuworld.envs.palette import (
    FLOOR_COLOURS,
    FLOOR_KINDS,
    FURNITURE,
    RGB,
    WALL_COLOURS,
    WOOD,
)
from emuworld.envs.rooms.collision import Footprint, Obstacles
from emuworld.envs.rooms.furniture import BUILDERS, Piece, shade

LAYOUTS = ("rectangle", "partition", "l_shape")
HELD_OUT_LAYOUTS = ("alcove",)
Point = tuple[float, float]
_Item = TypeVar("_Item")
Partition = tuple[Footprint, str, RGB]  # where it stands, its colour's name, its colour


@dataclass(frozen=True, kw_only=True)
class Wall:
    """One straight wall: it runs from start to end with the room on its left."""

    start: Point
    end: Point
    colour: str
    rgb: RGB
    material: str
    panel: RGB | None
    band: RGB | None

    @property
    def length_m(self) -> float:
        return math.dist(self.start, self.end)

    @property
    def direction(self) -> Point:
        return ((self.end[0] - self.start[0]) / self.length_m, (self.end[1] - self.start[1]) / self.length_m)

    @property
    def inward_rad(self) -> float:
        """Heading from the wall into the room."""
        x, y = self.direction
        return math.atan2(x, -y)


@dataclass(frozen=True, kw_only=True)
class PlacedPiece:
    """A piece of furniture at its place; its front faces `yaw_rad`."""

    piece: Piece
    x_m: float
    y_m: float
    yaw_rad: float

    def footprint(self) -> Footprint:
        piece = self.piece
        round_plan = piece.half_x_m == piece.half_y_m and piece.noun in ("table", "lamp", "plant", "rug")
        if round_plan:
            return Footprint(x_m=self.x_m, y_m=self.y_m, radius_m=piece.half_x_m)
        # A piece's own x axis is to the right of its front.
        yaw = self.yaw_rad - math.pi / 2
        return Footprint(
            x_m=self.x_m, y_m=self.y_m, half_x_m=piece.half_x_m, half_y_m=piece.half_y_m, yaw_rad=yaw
        )


@dataclass(frozen=True, kw_only=True)
class ObjectPlan:
    """A salient object and where it stands: `size` is MuJoCo's, `base_m` the height of what is under it."""

    colour: str
    shape: str
    x_m: float
    y_m: float
    base_m: float
    yaw_rad: float
    size: tuple[float, float, float]
    height_m: float
    radius_m: float
    mesh: str | None

    @property
    def identity(self) -> str:
        return f"{self.colour} {self.shape}"

    def footprint(self) -> Footprint:
        if self.shape in ("box", "pyramid"):
            half = self.radius_m / math.sqrt(2)
            return Footprint(x_m=self.x_m, y_m=self.y_m, half_x_m=half, half_y_m=half, yaw_rad=self.yaw_rad)
        return Footprint(x_m=self.x_m, y_m=self.y_m, radius_m=self.radius_m)


@dataclass(frozen=True, kw_only=True)
class Light:
    """The one light that casts shadows, and how bright everything is without it."""

    position: tuple[float, float, float]
    diffuse: RGB
    ambient: float
    headlight: float
    tint: RGB = (1.0, 1.0, 1.0)  # of `ambient` and `headlight`


@dataclass(frozen=True, kw_only=True)
class RoomPlan:
    """Everything that a room is made of."""

    layout: str
    size_m: tuple[float, float, float]
    walls: tuple[Wall, ...]
    blocks: tuple[Footprint, ...]
    partition: Partition | None
    floor: tuple[str, str, RGB]
    """Word ("wooden", "gray", ...), material, colour."""
    ceiling: RGB
    skirting: RGB | None
    wall_pieces: tuple[PlacedPiece, ...]
    furniture: tuple[PlacedPiece, ...]
    rugs: tuple[PlacedPiece, ...]
    objects: tuple[ObjectPlan, ...]
    light: Light
    start: tuple[float, float, float] | None
    """x, y, heading from which the objects of a prompt are in view."""

    def obstacles(self) -> Obstacles:
        """All that a walker can touch."""
        standing = [piece.footprint() for piece in self.furniture]
        standing += [item.footprint() for item in self.objects if item.base_m < 0.3]
        return Obstacles([*self.blocks, *standing])


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a prompt asks of a room. `ordered`: two objects are named from left to right."""

    objects: tuple[tuple[str, str], ...] = ()
    ordered: bool = False
    wall: str | None = None
    all_walls: bool = False
    furniture: tuple[str, ...] = ()


@dataclass
class Draft:
    """What stands in the room so far, while it is being furnished."""

    blocks: list[Footprint]
    taken: list[Footprint] = field(default_factory=list)
    door_zones: list[Footprint] = field(default_factory=list)  # also in `taken`, for furniture alone

    def clears(self, footprint: Footprint, gap_m: float) -> bool:
        return Obstacles([*self.blocks, *self.taken]).clears(footprint, gap_m)


def choice(
    rng: np.random.Generator, items: tuple[_Item, ...], weights: tuple[float, ...] | None = None
) -> _Item:
    """One of the items, by weight. (`Generator.choice` would turn them into NumPy's own types.)"""
    if weights is None:
        return items[int(rng.integers(len(items)))]
    edges = np.cumsum(weights)
    return items[min(int(np.searchsorted(edges, rng.random() * edges[-1], side="right")), len(items) - 1)]


def _rectangle_block(x0: float, x1: float, y0: float, y1: float) -> Footprint:
    return Footprint(x_m=(x0 + x1) / 2, y_m=(y0 + y1) / 2, half_x_m=(x1 - x0) / 2, half_y_m=(y1 - y0) / 2)


def outline(
    rng: np.random.Generator, layout: str
) -> tuple[list[Point], list[Footprint], tuple[float, float]]:
    """Corners counter-clockwise, the solid blocks outside them, and width and depth."""
    low = 4.2 if layout == "rectangle" else 5.2
    width, depth = float(rng.uniform(low, 7.0)), float(rng.uniform(low, 7.0))
    x, y = width / 2, depth / 2
    blocks = [
        _rectangle_block(-x - 2, -x, -y - 2, y + 2),
        _rectangle_block(x, x + 2, -y - 2, y + 2),
        _rectangle_block(-x - 2, x + 2, -y - 2, -y),
        _rectangle_block(-x - 2, x + 2, y, y + 2),
    ]
    cut_x, cut_y = float(rng.uniform(1.5, 0.42 * width)), float(rng.uniform(1.5, 0.42 * depth))
    if layout == "l_shape":
        corners = [(-x, -y), (x, -y), (x, y - cut_y), (x - cut_x, y - cut_y), (x - cut_x, y), (-x, y)]
        blocks.append(_rectangle_block(x - cut_x, x, y - cut_y, y))
    elif layout == "alcove":
        cut_x = min(cut_x, 0.3 * width)
        corners = [(-x, -y), (x, -y), (x, y - cut_y), (x - cut_x, y - cut_y), (x - cut_x, y)]
        corners += [(-x + cut_x, y), (-x + cut_x, y - cut_y), (-x, y - cut_y)]
        blocks += [
            _rectangle_block(x - cut_x, x, y - cut_y, y),
            _rectangle_block(-x, -x + cut_x, y - cut_y, y),
        ]
    else:
        corners = [(-x, -y), (x, -y), (x, y), (-x, y)]
    if rng.random() < 0.5:  # mirrored, so that an L's corner is missing on either side
        corners = [(-px, py) for px, py in reversed(corners)]
        blocks = [Footprint(x_m=-b.x_m, y_m=b.y_m, half_x_m=b.half_x_m, half_y_m=b.half_y_m) for b in blocks]
    return corners, blocks, (width, depth)


def paint_walls(
    rng: np.random.Generator, corners: list[Point], wish: Wish, facing: int | None = None
) -> tuple[Wall, ...]:
    """Walls with their colours and patterns; the wall `facing` (its index) gets the wished colour."""
    count = len(corners)
    names = [str(name) for name in rng.permutation(list(WALL_COLOURS))]
    if rng.random() < 0.2:  # two colours in turn instead of all different
        names = [names[index % 2] for index in range(count)]
    if wish.all_walls and wish.wall is not None:
        names = [wish.wall] * count
    elif wish.wall is not None and facing is not None:
        names = [name if name != wish.wall else names[facing] for name in names]
        names[facing] = wish.wall
    style = rng.random()
    walls = []
    for index in range(count):
        rgb = shade(WALL_COLOURS[names[index]], float(rng.uniform(0.93, 1.05)))
        patterned = rng.random() < 0.15
        walls.append(
            Wall(
                start=corners[index],
                end=corners[(index + 1) % count],
                colour=names[index],
                rgb=rgb,
                material=choice(rng, ("stripes", "bricks")) if patterned else "matte",
                panel=shade(rgb, 0.72) if style < 0.2 else (0.93, 0.93, 0.91) if style < 0.3 else None,
                band=shade(rgb, 0.68) if 0.3 <= style < 0.45 else None,
            )
        )
    return tuple(walls)


def paint_floor(rng: np.random.Generator) -> tuple[str, str, RGB]:
    kind = choice(rng, FLOOR_KINDS, (0.4, 0.2, 0.2, 0.2))
    name = choice(rng, tuple(FLOOR_COLOURS))
    rgb = shade(FLOOR_COLOURS[name], float(rng.uniform(0.9, 1.1)))
    if kind == "planks":
        return (
            "wooden",
            choice(rng, ("planks_wide", "planks_slim")),
            shade(choice(rng, WOOD[:3]), float(rng.uniform(0.9, 1.1))),
        )
    if kind == "checker":
        return "checkered", choice(rng, ("checker_large", "checker_small")), shade(rgb, 1.25)
    if kind == "tiles":
        return "tiled", choice(rng, ("tiles_large", "tiles_small")), shade(rgb, 1.2)
    return name, "matte", rgb


def _against(wall: Wall, piece: Piece, along_m: float) -> PlacedPiece:
    """The piece with its back at the wall, `along_m` from the wall's start."""
    (dx, dy), inward = wall.direction, wall.inward_rad
    off = piece.half_y_m + 0.03
    x = wall.start[0] + dx * along_m + math.cos(inward) * off
    y = wall.start[1] + dy * along_m + math.sin(inward) * off
    return PlacedPiece(piece=piece, x_m=x, y_m=y, yaw_rad=inward)


def _on_wall(wall: Wall, piece: Piece, along_m: float) -> PlacedPiece:
    dx, dy = wall.direction
    return PlacedPiece(
        piece=piece,
        x_m=wall.start[0] + dx * along_m,
        y_m=wall.start[1] + dy * along_m,
        yaw_rad=wall.inward_rad,
    )


def _spot(rng: np.random.Generator, walls: tuple[Wall, ...], half_m: float) -> tuple[Wall, float] | None:
    """A wall, long ones more often, and a place along it where something `half_m` wide each way fits."""
    wall = choice(rng, walls, tuple(wall.length_m for wall in walls))
    room = wall.length_m / 2 - half_m - 0.1
    return None if room <= 0 else (wall, wall.length_m / 2 + float(rng.uniform(-room, room)))


def place_doors(rng: np.random.Generator, walls: tuple[Wall, ...], draft: Draft) -> list[PlacedPiece]:
    """One or two doors on different walls; the floor before them stays free of furniture."""
    placed: list[PlacedPiece] = []
    used: list[Wall] = []
    for _ in range(int(rng.integers(1, 3))):
        spot = _spot(rng, walls, 0.55)
        if spot is None or spot[0] in used:
            continue
        door = _on_wall(spot[0], BUILDERS["door"](rng), spot[1])
        zone = Footprint(
            x_m=door.x_m + 0.45 * math.cos(door.yaw_rad),
            y_m=door.y_m + 0.45 * math.sin(door.yaw_rad),
            half_x_m=0.55,
            half_y_m=0.42,
            yaw_rad=door.yaw_rad - math.pi / 2,
        )
        if draft.clears(zone, 0.0):
            placed.append(door)
            used.append(spot[0])
            draft.taken.append(zone)
            draft.door_zones.append(zone)
    return placed


def furnish(
    rng: np.random.Generator, walls: tuple[Wall, ...], draft: Draft, size: tuple[float, float], wish: Wish
) -> list[PlacedPiece]:
    """One to four pieces, mostly at the walls; wished ones first."""
    wanted = [noun for noun in wish.furniture if noun in FURNITURE]
    count = max(len(wanted), int(choice(rng, (1, 2, 3, 4), (0.2, 0.35, 0.3, 0.15))))
    nouns = wanted + [str(noun) for noun in rng.permutation([n for n in FURNITURE if n not in wanted])]
    placed: list[PlacedPiece] = []
    for noun in nouns[:count]:
        for _ in range(12):
            piece = BUILDERS[noun](rng)
            if noun in ("table", "chair") and rng.random() < 0.45:
                x, y = (float(rng.uniform(-0.5, 0.5)) * extent for extent in size)
                spot = PlacedPiece(piece=piece, x_m=x, y_m=y, yaw_rad=float(rng.uniform(-math.pi, math.pi)))
                gap = 0.6
            else:
                wall = _spot(rng, walls, piece.half_x_m)
                if wall is None:
                    continue
                spot, gap = _against(wall[0], piece, wall[1]), 0.02
            if draft.clears(spot.footprint(), gap):
                placed.append(spot)
                draft.taken.append(spot.footprint())
                break
    return placed


def decorate(
    rng: np.random.Generator,
    walls: tuple[Wall, ...],
    doors: list[PlacedPiece],
    furniture: list[PlacedPiece],
    partition: Partition | None,
) -> list[PlacedPiece]:
    """Windows and pictures where neither a door nor tall furniture is."""
    placed = list(doors)
    bar = Obstacles([] if partition is None else [partition[0]])
    tall = [spot for spot in furniture if spot.piece.height_m > 1.0]
    for _ in range(int(rng.integers(1, 5))):
        piece = BUILDERS[choice(rng, ("window", "picture"))](rng)
        spot = _spot(rng, walls, piece.half_x_m)
        if spot is None:
            continue
        here = _on_wall(spot[0], piece, spot[1])
        apart = all(
            math.hypot(o.x_m - here.x_m, o.y_m - here.y_m) > o.piece.half_x_m + piece.half_x_m + 0.15
            for o in placed
        )
        seen = all(
            math.hypot(o.x_m - here.x_m, o.y_m - here.y_m) > o.piece.half_x_m + piece.half_x_m + 0.3
            for o in tall
        )
        clear = bar.distance(np.array([[here.x_m, here.y_m]]))[0] > piece.half_x_m
        if apart and seen and clear:
            placed.append(here)
    return placed


def place_partition(
    rng: np.random.Generator, size: tuple[float, float], walls: tuple[Wall, ...]
) -> Partition:
    """A thin wall that stands out from the middle third of a wall to about the middle of the room."""
    wall = walls[int(rng.integers(len(walls)))]
    across = size[1] if abs(wall.direction[0]) > 0.5 else size[0]
    length, along = across * float(rng.uniform(0.35, 0.5)), wall.length_m * float(rng.uniform(0.38, 0.62))
    inward = wall.inward_rad
    x = wall.start[0] + wall.direction[0] * along + math.cos(inward) * length / 2
    y = wall.start[1] + wall.direction[1] * along + math.sin(inward) * length / 2
    name = choice(rng, tuple(WALL_COLOURS))
    footprint = Footprint(x_m=x, y_m=y, half_x_m=length / 2, half_y_m=0.07, yaw_rad=inward)
    return footprint, name, WALL_COLOURS[name]


def lay_rugs(rng: np.random.Generator, draft: Draft, size: tuple[float, float]) -> list[PlacedPiece]:
    """In two rooms of five a rug on the free floor."""
    if rng.random() >= 0.4:
        return []
    piece = BUILDERS["rug"](rng)
    for _ in range(8):
        x, y = (float(rng.uniform(-0.35, 0.35)) * extent for extent in size)
        rug = PlacedPiece(piece=piece, x_m=x, y_m=y, yaw_rad=choice(rng, (0.0, math.pi / 2)))
        if draft.clears(rug.footprint(), 0.05):
            return [rug]
    return []
