"""Where an object is in a picture: a matched filter over the places where it could stand.

Nothing is learned and nothing is guessed about the scene: the camera, the shape and colours of the object and
everything that does not move are known from the present state; only the object's new place comes from the
picture. Each pixel is asked whether it looks more like the object than like what would be seen without it;
the place whose silhouette gathers the most such pixels is the answer. Heights follow from what carries the
object there. Source of the way: `reference/mujoco.md`, section 4 (colour, known camera, known support, after
undoing gain and shift); the matched filter replaces its mask and centroid, because it bears objects of the
same colour, holes and halves hidden behind others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emuworld.envs.rendering.camera import Camera
from emuworld.tasks.metrics import project
from emuworld.tasks.robot.calibration import Frame

Floats = NDArray[np.float64]
Position = Floats  # [3] metres, world coordinates, an object's middle

_ALIKE = (
    60.0**2
)  # squared distance of colours, summed over channels, at which a pixel is no longer the object
_FADED = 0.8  # a pixel that has only gone towards the object's colour counts so much of one that has it
_WHOLE_SHARE, _ASIDE = 0.7, 0.15  # of the way; squared distance from the straight way, in squared ways
_RING_PX = 3  # around a silhouette, nothing should look like the object
_RING_WEIGHT = 0.5
_GRID_M, _STEPS_M = 0.02, (0.010, 0.005, 0.0025, 0.00125)
_OVERLAP = 1.3  # of the larger radius: nearer than this in the picture, two places are one blob
_MOST_TRIED = 24  # places of the grid, best first
_APART_M = 0.03  # places nearer than this are one place
_NUM_DIRECTIONS = 24  # sides of the polygon that stands for a silhouette
_HIDDEN_M = 0.01  # what is nearer to the camera than the object by more hides it
_MIN_VISIBLE = 0.25  # share of a silhouette that must be in view for a place to be judged


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """An object that is looked for, and the scene around it as it is known.

    Attributes:
        name: "red cube".
        position: where it is now.
        points: [N, 3] metres about its middle, on its surface, turned as it is now.
        colours: [K, 3] levels of 255 that it shows.
        backgrounds: the scene without it, uint8 [H, W, 3]; more than one where the arm may be here or there.
        depth: metres along the optical axis of the scene without it, [H, W].
        area: x from, x to, y from, y to: where its middle could be.
        support: height of what would carry it at (x, y) and the name of that; nan where nothing would.
        draw: the scene with the object at a place, uint8 [H, W, 3].
    """

    name: str
    position: Position
    points: Floats
    colours: Floats
    backgrounds: tuple[Frame, ...]
    depth: NDArray[np.float32]
    camera: Camera
    area: tuple[float, float, float, float]
    support: Callable[[float, float], tuple[float, str]]
    draw: Callable[[Position], Frame]

    @functools.cached_property
    def spots(self) -> list[tuple[Position, str]]:
        """A grid of places where its middle could be, and on what it would stand there."""
        x_from, x_to, y_from, y_to = self.area
        xs, ys = np.arange(x_from, x_to + 1e-9, _GRID_M), np.arange(y_from, y_to + 1e-9, _GRID_M)
        found = (self.resting(float(x), float(y)) for x in xs for y in ys)
        return [spot for spot in found if spot is not None]

    @functools.cached_property
    def radius_m(self) -> float:
        """Of a ball that hides as much of the view as it does, about."""
        return float(np.linalg.norm(self.points, axis=1).mean()) * 0.9

    def resting(self, x: float, y: float) -> tuple[Position, str] | None:
        """Its middle when it stands at (x, y), and on what; None where nothing would carry it."""
        height, on = self.support(x, y)
        if math.isnan(height):
            return None
        return np.array([x, y, height - float(self.points[:, 2].min())]), on


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A place that an object could be at, as far as a picture goes.

    `score`: from about 1 (the whole silhouette looks like the object, nothing around it does) to below 0
    (nothing there). `on` names what carries it ("": not asked).
    """

    position: Position
    on: str
    score: float
    pixel: Floats  # [2] row and column of its middle
    radius_px: float  # of its silhouette


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """Where the object is in a picture: its place and that one's `score`, `on` and distance from the old one.

    `at_old_place` is the score where it stood before. `sightings` are all the places that look like the
    object and do not overlap in the picture, the old one among them: more than one is a double.
    """

    position: Position
    score: float
    at_old_place: float
    on: str
    moved_m: float
    sightings: tuple[Place, ...]

    @property
    def found(self) -> bool:
        return self.score >= FOUND


FOUND = 0.35  # score from which an object counts as seen


def read_position(picture: Frame, target: Target, *, on: str | None = None) -> Reading:
    """Find the object in a calibrated picture.

    Where it is seen at its old place and at a new one too, the new one is the answer.

    Args:
        picture: uint8 [H, W, 3], of the size of `target.backgrounds`.
        on: what it should rest on, where the words say so; a place on that wins over a like one beside it.
    """
    likeness = object_likeness(picture, target)
    old = _place(likeness, target, target.position, "")
    places = _places(likeness, target)
    new = [place for place in places if _between(place.position, target.position) > _APART_M]
    seen = [place for place in new if place.score >= FOUND]
    best = _choose(picture, target, seen or places or [old], on=on)
    return Reading(
        position=best.position,
        score=best.score,
        at_old_place=old.score,
        on=best.on,
        moved_m=_between(best.position, target.position),
        sightings=_apart([best, old, *seen]),
    )


def overlap(one: Place, other: Place) -> bool:
    """Whether two places cover the same part of the picture."""
    radius = max(one.radius_px, other.radius_px)
    return float(np.linalg.norm(one.pixel - other.pixel)) < _OVERLAP * radius


def _apart(places: list[Place]) -> tuple[Place, ...]:
    """Those that are seen and do not overlap one before them."""
    kept: list[Place] = []
    for place in places:
        if place.score >= FOUND and not any(overlap(place, one) for one in kept):
            kept.append(place)
    return tuple(kept)


def object_likeness(picture: Frame, target: Target) -> Floats:
    """For each pixel: 1 = looks like the object, -1 = like the scene without it, in between = like neither.

    [H, W]. Where object and background look alike it is about 0: such a pixel says nothing.
    """
    seen = picture.astype(np.float64)
    to_object = ((seen[:, :, None, :] - target.colours) ** 2).sum(axis=3).min(axis=2)
    to_background = np.minimum.reduce([_least_near(seen, one.astype(float)) for one in target.backgrounds])
    alike = np.maximum(np.exp(-to_object / _ALIKE), _FADED * _towards(seen, target))
    empty = np.exp(-to_background / _ALIKE)
    return np.asarray(np.where(np.maximum(alike, empty) > 0.05, alike - empty, -0.2))


def _towards(seen: Floats, target: Target) -> Floats:
    """How far each pixel has gone from the background's colour straight towards the object's, [H, W] 0 to 1.

    A generated picture fades and mixes colours: a red cube in a green bin may be brown.
    """
    by_background = []
    for background in target.backgrounds:
        change = seen - background
        by_colour = []
        for colour in target.colours:
            way = colour - background
            length = np.maximum((way**2).sum(axis=2), 1.0)
            share = (change * way).sum(axis=2) / length
            aside = ((change - share[..., None] * way) ** 2).sum(axis=2) / length
            part = np.clip(share / _WHOLE_SHARE, 0.0, 1.0) * np.exp(-aside / _ASIDE)
            by_colour.append(np.where(length > _ALIKE, part, 0.0))
        by_background.append(np.maximum.reduce(by_colour))
    return np.asarray(np.minimum.reduce(by_background))


def _places(likeness: Floats, target: Target) -> list[Place]:
    """Local maxima over the area, finely placed, best first."""
    grid = [
        place
        for position, on in _promising(likeness, target)
        if (place := _place(likeness, target, position, on)).score > 0.0
    ]
    grid.sort(key=lambda place: -place.score)
    found: list[Place] = []
    for place in grid[:_MOST_TRIED]:
        if any(_between(place.position, one.position) < _GRID_M + _APART_M for one in found):
            continue  # it would climb to the same place
        better = _climb(likeness, target, place)
        if all(_between(better.position, one.position) > _APART_M for one in found):
            found.append(better)
        if len(found) == 4:
            break
    return sorted(found, key=lambda place: -place.score)


def _promising(likeness: Floats, target: Target) -> list[tuple[Position, str]]:
    """Places of a grid over the area around whose middle some pixels look like the object."""
    spots = target.spots
    if not spots:
        return []
    height, width = likeness.shape
    middles = _pixels(target.camera, np.array([spot[0] for spot in spots]), height=height, width=width)
    rows, columns = np.floor(middles).astype(int).T
    in_view = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    near = _dilated(likeness > 0.5, max(2, round(height / 42)))  # 6 px of 256: half an object's width
    keep = in_view & near[np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)]
    return [spots[index] for index in np.flatnonzero(keep)]


def _climb(likeness: Floats, target: Target, place: Place) -> Place:
    for step in _STEPS_M:
        for _ in range(8):
            around = [
                _at(likeness, target, place.position[0] + dx * step, place.position[1] + dy * step)
                for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1))
            ]
            best = max((one for one in around if one is not None), key=lambda one: one.score, default=place)
            if best.score <= place.score:
                break
            place = best
    return place


def _at(likeness: Floats, target: Target, x: float, y: float) -> Place | None:
    spot = target.resting(x, y)
    if spot is None:
        return None
    return _place(likeness, target, *spot)


def _place(likeness: Floats, target: Target, position: Position, on: str) -> Place:
    height, width = likeness.shape
    pixel = _pixels(target.camera, position[None], height=height, width=width)[0]
    radius = (
        height / 2 / math.tan(target.camera.fovy_rad / 2) * target.radius_m / _depth(target.camera, position)
    )
    score = _judge(likeness, target, position)
    return Place(position=position, on=on, score=score, pixel=pixel, radius_px=radius)


def _judge(likeness: Floats, target: Target, position: Position) -> float:
    """Mean likeness inside the silhouette less what looks like the object around it."""
    rows, columns, inside, ring = _silhouette(target, position, likeness.shape)
    if not inside.any():
        return -1.0
    part = likeness[rows, columns]
    visible = target.depth[rows, columns] > _depth(target.camera, position) - _HIDDEN_M
    seen = inside & visible
    if seen.sum() < _MIN_VISIBLE * inside.sum():
        return -1.0
    around = np.maximum(part[ring & visible], 0.0).sum()
    return float((part[seen].sum() - _RING_WEIGHT * around) / inside.sum())


def _choose(picture: Frame, target: Target, places: list[Place], *, on: str | None) -> Place:
    """The place that the words name, else the one whose drawing is nearest to the picture."""
    if on is not None:
        fitting = [place for place in places if place.on == on]
        places = fitting or places
    near = [place for place in places if place.score > places[0].score - 0.35]
    if len(near) == 1:
        return near[0]
    drawings = [target.draw(place.position) for place in near]
    windows = [_silhouette(target, place.position, picture.shape[:2])[:2] for place in near]
    region = np.zeros(picture.shape[:2], dtype=bool)
    for rows, columns in windows:
        region[rows, columns] = True
    errors = [np.minimum(np.abs(picture.astype(int) - one), 80)[region].mean() for one in drawings]
    return near[int(np.argmin(errors))]


def _silhouette(
    target: Target, position: Position, shape: tuple[int, ...]
) -> tuple[slice, slice, NDArray[np.bool_], NDArray[np.bool_]]:
    """A window of the picture, and in it the object's silhouette and the ring around that."""
    height, width = shape[:2]
    points = _pixels(target.camera, position + target.points, height=height, width=width)  # [N, 2]
    low = np.floor(points.min(axis=0)).astype(int) - _RING_PX
    high = np.ceil(points.max(axis=0)).astype(int) + _RING_PX + 1
    rows = slice(max(low[0], 0), min(high[0], height))
    columns = slice(max(low[1], 0), min(high[1], width))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        empty = np.zeros((0, 0), dtype=bool)
        return slice(0, 0), slice(0, 0), empty, empty
    extent = (points @ _DIRECTIONS).max(axis=0)  # [K]
    centres = (np.arange(rows.start, rows.stop) + 0.5)[:, None, None] * _DIRECTIONS[0] + (
        np.arange(columns.start, columns.stop) + 0.5
    )[None, :, None] * _DIRECTIONS[1]  # [h, w, K]
    beyond = (centres - extent).max(axis=2)
    return rows, columns, beyond <= 0.0, (beyond > 1.0) & (beyond <= _RING_PX)


_ANGLES = 2 * math.pi * np.arange(_NUM_DIRECTIONS) / _NUM_DIRECTIONS
_DIRECTIONS = np.stack([np.sin(_ANGLES), np.cos(_ANGLES)])  # [2, K] (down, right)


def _pixels(camera: Camera, points: Floats, *, height: int, width: int) -> Floats:
    """World points [N, 3] -> (row, column) [N, 2] in pixels from the picture's upper left corner."""
    rows, columns, _ = project(points, camera, height=height, width=width)
    return np.stack([rows, columns], axis=1) + 0.5


def _depth(camera: Camera, position: Position) -> float:
    return float(-((position - camera.position) @ camera.rotation)[2])


def _least_near(seen: Floats, background: Floats) -> Floats:
    """Squared distance of each pixel to the nearest of the background's 3 x 3 around it, [H, W]."""
    height, width = seen.shape[:2]
    padded = np.pad(background, ((1, 1), (1, 1), (0, 0)), mode="edge")
    distances = [
        ((seen - padded[row : row + height, column : column + width]) ** 2).sum(axis=2)
        for row in range(3)
        for column in range(3)
    ]
    return np.asarray(np.minimum.reduce(distances))


def _dilated(mask: NDArray[np.bool_], radius: int) -> NDArray[np.bool_]:
    """True within `radius` rows and columns of a True pixel."""
    for axis in (0, 1):
        grown = mask.copy()
        for step in range(1, radius + 1):
            low, high = [slice(None)] * 2, [slice(None)] * 2
            low[axis], high[axis] = slice(None, -step), slice(step, None)
            grown[tuple(high)] |= mask[tuple(low)]
            grown[tuple(low)] |= mask[tuple(high)]
        mask = grown
    return mask


def _between(one: Position, other: Position) -> float:
    return float(np.linalg.norm(one - other))
