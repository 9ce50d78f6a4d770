"""Words and looks of the worlds: named colours, shapes, textures, and what is held out for the test split.

One table for what captions say and what scenes draw, so that a word and its colour cannot drift apart. Every
room is compiled with the same textures, materials and meshes in the same order (`add_assets`): a renderer
may then keep one graphics context for all rooms, and all variety comes from geom colours and sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mujoco
import numpy as np
from numpy.typing import NDArray

RGB = tuple[float, float, float]

# Chosen far apart in hue or lightness, so that a name has one meaning even in shade; no brown (a dark
# orange) and no gray (a shaded white).
OBJECT_COLOURS: dict[str, RGB] = {
    "red": (0.85, 0.06, 0.06),
    "green": (0.05, 0.58, 0.12),
    "blue": (0.07, 0.20, 0.90),
    "yellow": (0.98, 0.86, 0.04),
    "orange": (1.00, 0.42, 0.00),
    "purple": (0.45, 0.10, 0.68),
    "pink": (1.00, 0.45, 0.68),
    "cyan": (0.05, 0.82, 0.88),
    "white": (0.97, 0.97, 0.97),
    "black": (0.05, 0.05, 0.06),
}
SHAPES = ("ball", "box", "cylinder", "capsule", "egg", "cone", "pyramid")
# Test only: one pair of each shape, seven different colours (10 % of the 70 pairs).
HELD_OUT_PAIRS = frozenset(
    {
        ("green", "ball"),
        ("purple", "box"),
        ("yellow", "cylinder"),
        ("cyan", "capsule"),
        ("orange", "egg"),
        ("blue", "cone"),
        ("white", "pyramid"),
    }
)

# Walls and floors are softer than objects, so that objects stand out before a wall of the same name.
WALL_COLOURS: dict[str, RGB] = {
    "white": (0.92, 0.92, 0.90),
    "gray": (0.58, 0.60, 0.62),
    "beige": (0.87, 0.78, 0.62),
    "brown": (0.55, 0.38, 0.27),
    "yellow": (0.93, 0.82, 0.45),
    "orange": (0.90, 0.58, 0.36),
    "red": (0.72, 0.33, 0.30),
    "pink": (0.92, 0.68, 0.72),
    "purple": (0.62, 0.52, 0.76),
    "blue": (0.42, 0.58, 0.82),
    "teal": (0.28, 0.58, 0.58),
    "green": (0.52, 0.72, 0.48),
}
FLOOR_COLOURS: dict[str, RGB] = {
    "gray": (0.55, 0.55, 0.56),
    "beige": (0.80, 0.72, 0.58),
    "brown": (0.48, 0.33, 0.22),
    "blue": (0.34, 0.42, 0.58),
    "green": (0.40, 0.50, 0.38),
    "red": (0.56, 0.30, 0.27),
}
WOOD: tuple[RGB, ...] = ((0.72, 0.52, 0.33), (0.52, 0.34, 0.20), (0.86, 0.70, 0.50), (0.36, 0.24, 0.16))
FABRIC: tuple[RGB, ...] = (
    (0.45, 0.47, 0.50),
    (0.30, 0.36, 0.46),
    (0.56, 0.44, 0.36),
    (0.38, 0.44, 0.36),
    (0.50, 0.32, 0.34),
    (0.74, 0.70, 0.62),
)
FURNITURE = ("table", "chair", "shelf", "lamp", "sofa", "bed", "plant", "cabinet")
FLOOR_KINDS = ("plain", "checker", "planks", "tiles")

# Sizes of the two mesh shapes (base radius or half side, height), metres: a mesh has one size in a model.
MESH_SIZES: tuple[tuple[float, float], ...] = ((0.17, 0.40), (0.22, 0.50), (0.27, 0.60))


def object_pairs(split: str) -> tuple[tuple[str, str], ...]:
    """Colour and shape pairs that rooms of a split may hold: all in "test", else those not held out."""
    pairs = [(colour, shape) for colour in OBJECT_COLOURS for shape in SHAPES]
    return tuple(pair for pair in pairs if split == "test" or pair not in HELD_OUT_PAIRS)


def with_article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def joined(nouns: Sequence[str], joint: str = " and ") -> str:
    """ "a red ball, a blue box and a cone": commas, and the joint before the last."""
    return nouns[0] if len(nouns) == 1 else f"{', '.join(nouns[:-1])}{joint}{nouns[-1]}"


# Material name -> (texture, its period in metres, specular, shininess, emission). A texture holds two to
# four cells a period, none below 25 cm: finer patterns do not survive a 16x tokenizer.
MATERIALS: dict[str, tuple[str | None, float, float, float, float]] = {
    "matte": (None, 1.0, 0.0, 0.0, 0.0),
    "gloss": (None, 1.0, 0.25, 0.35, 0.0),
    "glow": (None, 1.0, 0.0, 0.0, 0.3),
    "ceiling": (None, 1.0, 0.0, 0.0, 0.3),  # no lamp shines up at it
    "checker_large": ("checker", 1.2, 0.05, 0.1, 0.0),
    "checker_small": ("checker", 0.8, 0.05, 0.1, 0.0),
    "tiles_large": ("tiles", 1.2, 0.05, 0.1, 0.0),
    "tiles_small": ("tiles", 0.8, 0.05, 0.1, 0.0),
    "planks_wide": ("planks", 1.6, 0.05, 0.1, 0.0),
    "planks_slim": ("planks", 1.2, 0.05, 0.1, 0.0),
    "stripes": ("stripes", 1.4, 0.0, 0.0, 0.0),
    "bricks": ("bricks", 1.5, 0.0, 0.0, 0.0),
}
_TEXTURE_PX = 128
_TEXTURE_CONTRAST = 0.45  # of the levels drawn below: joints keep visible and cost a 16x tokenizer few bits


def _blank(level: float = 1.0) -> NDArray[np.float64]:
    return np.full((_TEXTURE_PX, _TEXTURE_PX), level)


def _checker() -> NDArray[np.float64]:
    grid = np.indices((_TEXTURE_PX, _TEXTURE_PX)) * 2 // _TEXTURE_PX
    return np.where((grid[0] + grid[1]) % 2 == 0, 1.0, 0.45)


def _tiles() -> NDArray[np.float64]:
    """Two by two tiles of slightly different brightness with dark joints."""
    half = _TEXTURE_PX // 2
    texture = _blank()
    texture[:half, :half], texture[half:, half:], texture[:half, half:] = 0.94, 0.97, 0.90
    row, column = np.indices(texture.shape)
    texture[((row % half) < 5) | ((column % half) < 5)] = 0.55
    return texture


def _planks() -> NDArray[np.float64]:
    """Four boards side by side along x, each with its own brightness and a joint at its own place."""
    board = _TEXTURE_PX // 4
    texture = _blank()
    for index, (level, joint) in enumerate(zip((1.0, 0.80, 0.92, 0.70), (20, 84, 52, 116), strict=True)):
        rows = slice(index * board, (index + 1) * board)
        texture[rows] = level
        texture[rows, joint : joint + 4] = 0.45
        texture[index * board : index * board + 3] = 0.5
    return texture


def _stripes() -> NDArray[np.float64]:
    column = np.indices((_TEXTURE_PX, _TEXTURE_PX))[1]
    return np.where(column * 4 // _TEXTURE_PX % 2 == 0, 1.0, 0.78)


def _bricks() -> NDArray[np.float64]:
    """Four courses of bricks, every second one shifted by half a brick."""
    row, column = np.indices((_TEXTURE_PX, _TEXTURE_PX))
    course = _TEXTURE_PX // 4
    shifted = (column + (row // course % 2) * course) % (2 * course)
    level = 0.86 + 0.14 * ((row // course * 3 + column // (2 * course) * 2) % 4) / 3
    return np.where((row % course < 4) | (shifted < 4), 0.62, level)


_TEXTURES = {"checker": _checker, "tiles": _tiles, "planks": _planks, "stripes": _stripes, "bricks": _bricks}


def _texture_bytes(levels: NDArray[np.float64]) -> bytes:
    levels = 1.0 - _TEXTURE_CONTRAST * (1.0 - levels)
    return np.repeat(np.round(levels * 255).astype(np.uint8)[..., None], 3, axis=2).tobytes()


_TEXTURE_BYTES = {name: _texture_bytes(draw()) for name, draw in _TEXTURES.items()}


def _cone_mesh(radius: float, height: float, sides: int, turn_rad: float) -> tuple[list[float], list[int]]:
    """Vertices and faces of a cone about its base centre: `sides` base points, the apex, the base centre."""
    angles = [turn_rad + 2 * math.pi * side / sides for side in range(sides)]
    vertices = [
        value for angle in angles for value in (radius * math.cos(angle), radius * math.sin(angle), 0.0)
    ]
    vertices += [0.0, 0.0, height, 0.0, 0.0, 0.0]
    faces: list[int] = []
    for side in range(sides):
        following = (side + 1) % sides
        faces += [side, following, sides, following, side, sides + 1]
    return vertices, faces


def add_assets(spec: mujoco.MjSpec) -> None:
    """Add the textures, materials and meshes that every room has, always in the same order."""
    for name, data in _TEXTURE_BYTES.items():
        texture = spec.add_texture(
            name=name, type=mujoco.mjtTexture.mjTEXTURE_2D, width=_TEXTURE_PX, height=_TEXTURE_PX, nchannel=3
        )
        texture.data = data
    for name, (texture_name, period_m, specular, shininess, emission) in MATERIALS.items():
        material = spec.add_material(name=name, specular=specular, shininess=shininess, emission=emission)
        # With texuniform MuJoCo repeats a texture every 2 / texrepeat metres.
        material.texuniform, material.texrepeat = True, (2 / period_m, 2 / period_m)
        if texture_name is not None:
            material.textures[int(mujoco.mjtTextureRole.mjTEXROLE_RGB)] = texture_name
    for index, (radius, height) in enumerate(MESH_SIZES):
        for shape, sides, base in (("cone", 32, radius), ("pyramid", 4, radius * math.sqrt(2))):
            vertices, faces = _cone_mesh(base, height, sides, math.pi / 4)
            spec.add_mesh(name=f"{shape}_{index}", uservert=vertices, userface=faces)
