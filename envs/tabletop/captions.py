"""What a table-top shows, in words: captions of what is in view, and how things lie to each other.

A caption names what the camera sees and nothing else: a cube inside a closed drawer is not there for it. What
is seen comes from a renderer's segmentation, what lies on what from physics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emuworld.envs.palette import joined, with_article
from emuworld.envs.requests import request
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.scene import TableScene

MIN_PIXELS = 60  # of a thing that is named, in a frame of 256 by 256; a cube of 6 cm covers 1,000 to 2,000
TEMPLATES = ("a table with {}", "there is {} on a table", "a robot arm over a table with {}", "{} on a table")
HELD_OUT_TEMPLATES = ("a view of a table with {}",)
_REFERENCE_PIXELS = 256 * 256
_MARK = "mark"  # painted on the table: a thing to see, but none of the scene's furniture


@dataclass(frozen=True, kw_only=True)
class Sight:
    """A thing in view: its pixels, of a frame of 256 by 256, and the column of their middle (0..1)."""

    name: str
    pixels: int
    column: float


def sights(scene: TableScene, segmentation: NDArray[np.int32]) -> tuple[Sight, ...]:
    """The objects and pieces of furniture that a frame of geom ids [H, W] shows, by falling size."""
    height, width = segmentation.shape
    ids, inverse, counts = np.unique(segmentation, return_inverse=True, return_counts=True)
    columns = np.bincount(inverse.ravel(), weights=np.tile(np.arange(width) + 0.5, height))
    known = {item.name for item in scene.objects} | {*scene.furniture, _MARK}
    pixels: dict[str, float] = {}
    sums: dict[str, float] = {}
    for geom, count, total in zip(ids.tolist(), counts.tolist(), columns.tolist(), strict=True):
        name = scene.identity_of_geom(geom)
        if name in known:
            assert name is not None
            pixels[name] = pixels.get(name, 0) + count
            sums[name] = sums.get(name, 0.0) + total
    found = [
        Sight(
            name=name,
            pixels=round(count * _REFERENCE_PIXELS / segmentation.size),
            column=round(sums[name] / count / width, 3),
        )
        for name, count in pixels.items()
    ]
    return tuple(sorted(found, key=lambda item: (-item.pixels, item.name)))


def table_caption(
    scene: TableScene, seen: Sequence[Sight], rng: np.random.Generator | None = None, *, split: str = "train"
) -> str:
    """A sentence about a table-top. Without a generator the plainest: "a table with" and all that is seen.

    Things on a plate or in a bin are named with it ("a red cube on a blue plate"). Phrasings of
    `HELD_OUT_TEMPLATES` appear for split "test" alone; in training every third caption is said as people ask
    for a picture.
    """
    shown = [item for item in seen if item.pixels >= MIN_PIXELS]
    if rng is not None and rng.random() < 0.5:
        shown.sort(key=lambda item: item.column)
    held = scene.held()
    parts = _parts(scene, [item.name for item in shown if item.name != held])
    if rng is not None and split == "train" and held is None and parts and rng.random() < 1 / 3:
        return request(parts, rng, place="table")
    template, holding = TEMPLATES[0], ""
    if rng is not None:
        unseen = split == "test" and rng.random() < 0.25
        templates = HELD_OUT_TEMPLATES if unseen else TEMPLATES
        # The plain form is what users type, so it is the commonest.
        template = templates[0] if rng.random() < 0.5 else templates[int(rng.integers(len(templates)))]
    if held is not None:
        template, holding = TEMPLATES[0], f" and a robot arm holding {with_article(held)}"
    if not parts:
        return f"an empty table{holding}"
    return template.format(joined(parts)) + holding


def _parts(scene: TableScene, names: Sequence[str]) -> list[str]:
    """A noun phrase for each thing that stands on the table itself, with all that lies on or in it."""
    below = {name: _support(scene, name, names) for name in names}
    return [_phrase(scene, name, below) for name in names if below[name] is None]


def _phrase(scene: TableScene, name: str, below: Mapping[str, str | None]) -> str:
    """ "a blue plate", "a red cube on a blue plate", "a red cube and a green ball in a wooden bin"."""
    said = with_article(_described(scene, name))
    above = [_phrase(scene, other, below) for other, support in below.items() if support == name]
    return f"{joined(above)} {_preposition(name)} {said}" if above else said


def _preposition(support: str) -> str:
    return "in" if support.split()[-1] in ("bin", "drawer") else "on"


def _described(scene: TableScene, name: str) -> str:
    if name == "drawer":
        if scene.holds(Predicate("Open", ("drawer",))):
            return "open drawer"
        return "closed drawer" if scene.holds(Predicate("Closed", ("drawer",))) else name
    if name == "button":
        return "pressed button" if scene.holds(Predicate("Pressed", ("button",))) else name
    return name


def _support(scene: TableScene, name: str, others: Sequence[str]) -> str | None:
    """What a thing lies on or in, among those that are seen; None for the table."""
    if name in (*scene.furniture, _MARK):
        return None
    supports = [other for other in others if other not in (name, "button", _MARK)]
    supports.sort(key=lambda other: other in scene.furniture)  # a cube in a bin may carry another one there
    facts = ((other, Predicate(_preposition(other).capitalize(), (name, other))) for other in supports)
    return next((other for other, fact in facts if scene.holds(fact)), None)
