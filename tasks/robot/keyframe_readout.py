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
from emuworld.tasks.robot.calibration import Frame
from emuworld.tasks.robot.likeness import object_likeness
from emuworld.tasks.robot.silhouettes import Silhouettes

Floats = NDArray[np.float64]
Position = Floats  # [3] metres, world coordinates, an object's middle
Support = Callable[
    [float, float], tuple[float, str]
]  # height of what carries a thing at (x, y), and its name

_GRID_M, _STEPS_M = 0.02, (0.010, 0.005, 0.0025, 0.00125)
_OVERLAP = 1.3  # of the larger radius: nearer than this in the picture, two places are one blob
_MOST_TRIED = 24  # places of the grid, best first
_APART_M = 0.03  # places nearer than this are one place
_AROUND = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)], dtype=np.float64)


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
    support: Support
    draw: Callable[[Position], Frame]

    @functools.cached_property
    def spots(self) -> list[tuple[Position, str]]:
        """A grid of places where its middle could be, and on what it would stand there."""
        x_from, x_to, y_from, y_to = self.area
        xs, ys = np.arange(x_from, x_to + 1e-9, _GRID_M), np.arange(y_from, y_to + 1e-9, _GRID_M)
        found = (self.resting(float(x), float(y)) for x in xs for y in ys)
        return [spot for spot in found if spot is not None]

    @functools.cached_property
    def spot_pixels(self) -> Floats:
        """[P, 2] row and column of the `spots`."""
        return self.silhouettes.pixels(np.array([position for position, _ in self.spots]).reshape(-1, 3))

    @functools.cached_property
    def silhouettes(self) -> Silhouettes:
        """What it looks like from the camera at any place."""
        return Silhouettes(points=self.points, depth=self.depth, camera=self.camera)

    @functools.cached_property
    def radius_m(self) -> float:
        """Of a ball that hides as much of the view as it does, about."""
        return float(np.linalg.norm(self.points, axis=1).mean()) * 0.9

    def resting(self, x: float, y: float) -> tuple[Position, str] | None:
        """Its middle when it stands at (x, y), and on what; None where nothing would carry it."""
        height, on = self.support(x, y)
        if math.isnan(height):
            return None
        return np.array([x, y, height + self._half_height_m]), on

    @functools.cached_property
    def _half_height_m(self) -> float:
        return -float(self.points[:, 2].min())


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
    likeness = object_likeness(picture, colours=target.colours, backgrounds=target.backgrounds)
    (old,) = _judged(likeness, target, [(target.position, "")])
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


def _places(likeness: Floats, target: Target) -> list[Place]:
    """Local maxima over the area, finely placed, best first."""
    grid = _judged(likeness, target, _promising(likeness, target))
    grid = sorted((place for place in grid if place.score > 0.0), key=lambda place: -place.score)
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
    height, width = likeness.shape
    rows, columns = np.floor(target.spot_pixels).astype(int).T
    in_view = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    near = _dilated(likeness > 0.5, max(2, round(height / 42)))  # 6 px of 256: half an object's width
    keep = in_view & near[np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)]
    return [target.spots[index] for index in np.flatnonzero(keep)]


def _climb(likeness: Floats, target: Target, place: Place) -> Place:
    for step in _STEPS_M:
        for _ in range(8):
            around = (target.resting(*xy) for xy in (place.position[:2] + step * _AROUND).tolist())
            places = _judged(likeness, target, [spot for spot in around if spot is not None])
            best = max(places, key=lambda one: one.score, default=place)
            if best.score <= place.score:
                break
            place = best
    return place


def _judged(likeness: Floats, target: Target, spots: list[tuple[Position, str]]) -> list[Place]:
    """These positions, each with what carries the object there, as places."""
    if not spots:
        return []
    silhouettes, positions = target.silhouettes, np.array([position for position, _ in spots])
    focal_px = likeness.shape[0] / 2 / math.tan(target.camera.fovy_rad / 2)
    radii = focal_px * target.radius_m / silhouettes.depths(positions)
    rated = zip(
        spots,
        silhouettes.scores(likeness, positions).tolist(),
        silhouettes.pixels(positions),
        radii.tolist(),
        strict=True,
    )
    return [
        Place(position=position, on=on, score=score, pixel=pixel, radius_px=radius)
        for (position, on), score, pixel, radius in rated
    ]


def _choose(picture: Frame, target: Target, places: list[Place], *, on: str | None) -> Place:
    """The place that the words name, else the one whose drawing is nearest to the picture."""
    if on is not None:
        fitting = [place for place in places if place.on == on]
        places = fitting or places
    near = [place for place in places if place.score > places[0].score - 0.35]
    if len(near) == 1:
        return near[0]
    drawings = [target.draw(place.position) for place in near]
    region = target.silhouettes.windows(np.array([place.position for place in near]))
    errors = [np.minimum(np.abs(picture.astype(int) - one), 80)[region].mean() for one in drawings]
    return near[int(np.argmin(errors))]


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
