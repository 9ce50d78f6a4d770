"""Furniture, doors and windows as lists of primitives: the landmarks of a room.

A piece is drawn in its own frame: x to its right, y out of its front, z up, origin on the floor under its
middle (for wall pieces: on the wall's surface at floor height). Each builder takes a generator for its sizes
and colours and returns a `Piece`; `emuworld.envs.rooms.floorplan` puts pieces into rooms and
`emuworld.envs.rooms.scenes` compiles them. Sizes are metres, boxes and ellipsoids are given by half extents
as in MuJoCo.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from emuworld.envs.palette import FABRIC, RGB, WOOD


@dataclass(frozen=True, kw_only=True)
class Part:
    """One primitive of a piece: kind of MuJoCo geom, place, half sizes, colour and material."""

    kind: str
    position: tuple[float, float, float]
    size: tuple[float, float, float]
    rgb: RGB
    material: str = "matte"
    mesh: str | None = None


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Furniture or a wall piece: its noun, primitives, plan, and the surface that objects may stand on."""

    noun: str
    parts: tuple[Part, ...]
    half_x_m: float
    half_y_m: float
    height_m: float
    surface: tuple[float, float, float] | None = None
    """Half x, half y and height of a free surface on top, or None."""


def shade(rgb: RGB, factor: float) -> RGB:
    """The colour made darker or lighter by a factor, clipped to 1."""
    red, green, blue = (min(1.0, channel * factor) for channel in rgb)
    return red, green, blue


def _pick(rng: np.random.Generator, colours: tuple[RGB, ...]) -> RGB:
    return colours[int(rng.integers(len(colours)))]


def _box(
    x: float, y: float, z: float, half: tuple[float, float, float], rgb: RGB, material: str = "matte"
) -> Part:
    return Part(kind="box", position=(x, y, z), size=half, rgb=rgb, material=material)


def _cylinder(z: float, radius: float, half_height: float, rgb: RGB, material: str = "matte") -> Part:
    return Part(
        kind="cylinder", position=(0.0, 0.0, z), size=(radius, half_height, 0.0), rgb=rgb, material=material
    )


def _legs(half_x: float, half_y: float, height: float, thickness: float, rgb: RGB) -> list[Part]:
    half = (thickness, thickness, height / 2)
    return [
        _box(x * (half_x - thickness), y * (half_y - thickness), height / 2, half, rgb)
        for x in (-1, 1)
        for y in (-1, 1)
    ]


def table(rng: np.random.Generator) -> Piece:
    """A rectangular table on four legs, or a round one on a column."""
    wood, height = _pick(rng, WOOD), rng.uniform(0.62, 0.74)
    if rng.random() < 0.3:
        radius = rng.uniform(0.42, 0.58)
        parts = [
            _cylinder(height - 0.03, radius, 0.03, wood),
            _cylinder(height / 2, 0.05, height / 2 - 0.03, shade(wood, 0.7)),
            _cylinder(0.02, 0.28, 0.02, shade(wood, 0.7)),
        ]
        free = radius * 0.6
        return Piece(
            noun="table",
            parts=tuple(parts),
            half_x_m=radius,
            half_y_m=radius,
            height_m=height,
            surface=(free, free, height),
        )
    half_x, half_y = rng.uniform(0.48, 0.75), rng.uniform(0.35, 0.45)
    parts = [_box(0, 0, height - 0.03, (half_x, half_y, 0.03), wood)]
    parts += _legs(half_x, half_y, height - 0.06, 0.035, shade(wood, 0.75))
    surface = (half_x - 0.15, half_y - 0.12, height)
    return Piece(
        noun="table", parts=tuple(parts), half_x_m=half_x, half_y_m=half_y, height_m=height, surface=surface
    )


def chair(rng: np.random.Generator) -> Piece:
    """A chair with a slatted back."""
    wood = _pick(rng, WOOD + FABRIC)
    parts = [_box(0, 0, 0.45, (0.23, 0.23, 0.03), wood)]
    parts += _legs(0.23, 0.23, 0.42, 0.025, shade(wood, 0.75))
    parts += [_box(x * 0.2, -0.205, 0.7, (0.025, 0.025, 0.22), shade(wood, 0.75)) for x in (-1, 1)]
    parts += [_box(0, -0.205, z, (0.2, 0.018, 0.06), wood) for z in (0.68, 0.86)]
    return Piece(noun="chair", parts=tuple(parts), half_x_m=0.24, half_y_m=0.24, height_m=0.92)


def shelf(rng: np.random.Generator) -> Piece:
    """A book shelf with muted books on its boards; a low one has room on top."""
    wood, height = _pick(rng, WOOD), rng.uniform(0.85, 1.75)
    half_x, half_y = rng.uniform(0.38, 0.6), 0.17
    boards = 3 if height < 1.2 else 4
    levels = np.linspace(0.06, height - 0.02, boards)
    parts = [_box(x * (half_x - 0.02), 0, height / 2, (0.02, half_y, height / 2), wood) for x in (-1, 1)]
    parts += [_box(0, 0, float(z), (half_x - 0.04, half_y, 0.02), wood) for z in levels]
    parts.append(_box(0, -half_y + 0.01, height / 2, (half_x - 0.04, 0.01, height / 2), shade(wood, 0.6)))
    for z in levels[:-1]:
        width, tall = rng.uniform(0.12, half_x * 0.6), rng.uniform(0.10, 0.14)
        x = rng.uniform(-1, 1) * (half_x - 0.06 - width)
        parts.append(_box(float(x), 0.0, float(z) + 0.02 + tall, (width, 0.11, tall), _pick(rng, FABRIC)))
    surface = (half_x - 0.15, 0.03, height) if height < 1.2 else None
    return Piece(
        noun="shelf", parts=tuple(parts), half_x_m=half_x, half_y_m=half_y, height_m=height, surface=surface
    )


def lamp(rng: np.random.Generator) -> Piece:
    """A floor lamp with a glowing shade."""
    metal = shade((0.35, 0.33, 0.30), rng.uniform(0.5, 1.4))
    height, radius = rng.uniform(1.35, 1.6), rng.uniform(0.18, 0.24)
    parts = (
        _cylinder(0.02, 0.17, 0.02, metal),
        _cylinder(height / 2, 0.022, height / 2, metal),
        _cylinder(height, radius, 0.15, (0.98, 0.88, 0.62), "glow"),
    )
    return Piece(noun="lamp", parts=parts, half_x_m=radius, half_y_m=radius, height_m=height + 0.15)


def sofa(rng: np.random.Generator) -> Piece:
    """A sofa with arms, a back and two cushions."""
    fabric, half_x = _pick(rng, FABRIC), rng.uniform(0.75, 0.98)
    parts = [
        _box(0, 0.02, 0.16, (half_x, 0.38, 0.12), shade(fabric, 0.8)),
        _box(0, -0.32, 0.50, (half_x, 0.09, 0.28), fabric),
    ]
    parts += [_box(x * (half_x - 0.08), 0.02, 0.34, (0.09, 0.40, 0.26), fabric) for x in (-1, 1)]
    seat = (half_x - 0.18) / 2
    parts += [_box(x * seat, 0.06, 0.34, (seat - 0.01, 0.33, 0.08), shade(fabric, 1.2)) for x in (-1, 1)]
    surface = (half_x - 0.42, 0.05, 0.42)
    return Piece(
        noun="sofa", parts=tuple(parts), half_x_m=half_x, half_y_m=0.42, height_m=0.78, surface=surface
    )


def bed(rng: np.random.Generator) -> Piece:
    """A bed with its head at the wall, a pillow and a blanket."""
    wood, blanket, half_x, half_y = _pick(rng, WOOD), _pick(rng, FABRIC), rng.uniform(0.5, 0.75), 1.0
    parts = (
        _box(0, 0, 0.15, (half_x, half_y, 0.13), wood),
        _box(0, 0.02, 0.36, (half_x - 0.04, half_y - 0.06, 0.10), (0.90, 0.89, 0.86)),
        _box(0, 0.28, 0.385, (half_x - 0.01, half_y - 0.29, 0.10), shade(blanket, 1.15)),
        _box(0, -half_y + 0.28, 0.50, (half_x * 0.6, 0.18, 0.06), (0.96, 0.95, 0.93)),
        _box(0, -half_y + 0.03, 0.45, (half_x, 0.03, 0.45), shade(wood, 0.85)),
    )
    surface = (half_x - 0.25, 0.5, 0.485)
    return Piece(noun="bed", parts=parts, half_x_m=half_x, half_y_m=half_y, height_m=0.9, surface=surface)


def plant(rng: np.random.Generator) -> Piece:
    """A potted plant: a bush of dark olive leaves."""
    pot = shade((0.66, 0.40, 0.28), rng.uniform(0.7, 1.2))
    leaf, height = shade((0.20, 0.34, 0.16), rng.uniform(0.8, 1.3)), rng.uniform(0.8, 1.15)
    parts = [_cylinder(0.15, 0.17, 0.15, pot), _cylinder(height / 2, 0.025, height / 2, (0.32, 0.24, 0.16))]
    for turn in range(5):
        angle = 2 * np.pi * turn / 5 + rng.uniform(-0.3, 0.3)
        reach, z = rng.uniform(0.12, 0.17), height * rng.uniform(0.72, 1.0)
        size = (rng.uniform(0.11, 0.15), rng.uniform(0.11, 0.15), rng.uniform(0.16, 0.26))
        position = (float(reach * np.cos(angle)), float(reach * np.sin(angle)), float(z))
        parts.append(
            Part(kind="ellipsoid", position=position, size=size, rgb=shade(leaf, rng.uniform(0.85, 1.25)))
        )
    return Piece(noun="plant", parts=tuple(parts), half_x_m=0.26, half_y_m=0.26, height_m=height + 0.2)


def cabinet(rng: np.random.Generator) -> Piece:
    """A low cabinet with two or three drawers and room on top."""
    wood, height = _pick(rng, (*WOOD, (0.85, 0.84, 0.80))), rng.uniform(0.6, 0.9)
    half_x, half_y, rows = rng.uniform(0.4, 0.6), 0.22, int(rng.integers(2, 4))
    parts = [_box(0, 0, height / 2, (half_x, half_y, height / 2), wood)]
    tall = height / rows
    for row in range(rows):
        z = tall * (row + 0.5)
        parts.append(_box(0, half_y, z, (half_x - 0.04, 0.012, tall / 2 - 0.03), shade(wood, 0.78)))
        parts.append(_box(0, half_y + 0.02, z, (0.07, 0.015, 0.015), (0.25, 0.25, 0.26)))
    surface = (half_x - 0.17, half_y - 0.14, height)
    return Piece(
        noun="cabinet", parts=tuple(parts), half_x_m=half_x, half_y_m=half_y, height_m=height, surface=surface
    )


def door(rng: np.random.Generator) -> Piece:
    """A closed door in a light or dark frame."""
    panel = _pick(
        rng, (*WOOD, (0.93, 0.93, 0.91), (0.30, 0.36, 0.42), (0.48, 0.20, 0.18), (0.22, 0.36, 0.30))
    )
    frame = _pick(rng, ((0.95, 0.95, 0.93), (0.30, 0.22, 0.16)))
    parts = [_box(0, 0.015, 1.05, (0.53, 0.015, 1.05), frame), _box(0, 0.03, 1.0, (0.44, 0.02, 1.0), panel)]
    parts += [
        _box(0, 0.05, z, (0.29, 0.008, half), shade(panel, 0.82)) for z, half in ((0.5, 0.34), (1.42, 0.42))
    ]
    knob = Part(kind="sphere", position=(0.36, 0.08, 0.98), size=(0.035, 0.0, 0.0), rgb=(0.85, 0.72, 0.30))
    return Piece(noun="door", parts=(*parts, knob), half_x_m=0.53, half_y_m=0.06, height_m=2.1)


def window(rng: np.random.Generator) -> Piece:
    """A bright window with a cross of bars."""
    half_x, half_z, z = rng.uniform(0.45, 0.8), rng.uniform(0.42, 0.52), 1.55
    frame = _pick(rng, ((0.95, 0.95, 0.94), (0.34, 0.26, 0.20)))
    sky = _pick(rng, ((0.48, 0.70, 0.94), (0.66, 0.80, 0.90), (0.90, 0.72, 0.50)))
    parts = (
        _box(0, 0.015, z, (half_x, 0.015, half_z), frame),
        _box(0, 0.025, z, (half_x - 0.06, 0.015, half_z - 0.06), sky, "glow"),
        _box(0, 0.035, z, (0.025, 0.015, half_z - 0.05), frame),
        _box(0, 0.035, z, (half_x - 0.05, 0.015, 0.025), frame),
    )
    return Piece(noun="window", parts=parts, half_x_m=half_x, half_y_m=0.05, height_m=z + half_z)


def picture(rng: np.random.Generator) -> Piece:
    """A framed picture: a band of land, a band of sky and a sun, in muted colours."""
    half_x, half_z, z = rng.uniform(0.3, 0.55), rng.uniform(0.25, 0.4), 1.5
    land = _pick(rng, ((0.36, 0.44, 0.30), (0.52, 0.42, 0.32), (0.26, 0.36, 0.50)))
    sky = _pick(rng, ((0.88, 0.82, 0.70), (0.70, 0.80, 0.86), (0.90, 0.66, 0.52)))
    frame = _pick(rng, ((0.20, 0.16, 0.13), (0.72, 0.58, 0.30), (0.94, 0.94, 0.92)))
    parts = (
        _box(0, 0.015, z, (half_x, 0.015, half_z), frame),
        _box(0, 0.022, z, (half_x - 0.05, 0.015, half_z - 0.05), sky),
        _box(0, 0.026, z - half_z * 0.45, (half_x - 0.05, 0.015, half_z * 0.45), land),
        Part(
            kind="ellipsoid",
            position=(half_x * rng.uniform(-0.5, 0.5), 0.036, z + half_z * 0.35),
            size=(0.07, 0.008, 0.07),
            rgb=(0.98, 0.94, 0.80),
        ),
    )
    return Piece(noun="picture", parts=parts, half_x_m=half_x, half_y_m=0.05, height_m=z + half_z)


def rug(rng: np.random.Generator) -> Piece:
    """A flat rug with a border, rectangular or round; one walks over it."""
    colour = _pick(
        rng,
        ((0.62, 0.30, 0.28), (0.30, 0.38, 0.52), (0.78, 0.72, 0.60), (0.34, 0.42, 0.34), (0.42, 0.34, 0.46)),
    )
    half_x, half_y = rng.uniform(0.8, 1.2), rng.uniform(0.6, 0.9)
    if rng.random() < 0.4:
        parts: tuple[Part, ...] = (
            _cylinder(0.004, half_y, 0.004, colour),
            _cylinder(0.006, half_y * 0.72, 0.006, shade(colour, 1.35)),
        )
        half_x = half_y
    else:
        parts = (
            _box(0, 0, 0.004, (half_x, half_y, 0.004), colour),
            _box(0, 0, 0.006, (half_x - 0.16, half_y - 0.16, 0.006), shade(colour, 1.35)),
        )
    return Piece(noun="rug", parts=parts, half_x_m=half_x, half_y_m=half_y, height_m=0.01)


BUILDERS: dict[str, Callable[[np.random.Generator], Piece]] = {
    "table": table,
    "chair": chair,
    "shelf": shelf,
    "lamp": lamp,
    "sofa": sofa,
    "bed": bed,
    "plant": plant,
    "cabinet": cabinet,
    "door": door,
    "window": window,
    "picture": picture,
    "rug": rug,
}
