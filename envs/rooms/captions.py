"""What a view shows, in words, and back: captions and walk prompts from a `View`, and their parser.

A caption names what is really in view. The grammar is small on purpose: every caption written here is read by
`parse_caption`, which also takes prompts that a user writes with the same words in another order. What
training reads is asked for in freer words at times (`asked_caption`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from emuworld.envs.palette import (
    FLOOR_COLOURS,
    FURNITURE,
    OBJECT_COLOURS,
    SHAPES,
    WALL_COLOURS,
    joined,
    with_article,
)
from emuworld.envs.requests import request

LANDMARKS = (*FURNITURE, "door", "window", "picture", "rug")
FLOOR_WORDS = ("wooden", "checkered", "tiled", *FLOOR_COLOURS)
MAX_NAMED = 4
NAMED_SHARE = 0.015  # of the picture: smaller landmarks are not named
# An object is named where its shape can be told: half a token (16 x 16 pixels) large, and not cut in two by
# the picture's edge.
NAMED_PX, NAMED_IN_FRAME = 128, 0.6


@dataclass(frozen=True, kw_only=True)
class VisibleObject:
    """A salient object in view, about how many pixels it covers, and the column of its middle (0..1).

    `in_frame`: share of the rectangle around the whole object that lies inside the picture.
    """

    colour: str
    shape: str
    pixels: int
    column: float
    distance_m: float
    in_frame: float = 1.0

    @property
    def identity(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def clear(self) -> bool:
        """Large and whole enough to be called by its name."""
        return self.pixels >= NAMED_PX and self.in_frame >= NAMED_IN_FRAME


@dataclass(frozen=True, kw_only=True)
class View:
    """What is in view: objects by falling size; walls and landmarks with their share of the picture."""

    objects: tuple[VisibleObject, ...]
    walls: tuple[tuple[str, float], ...]
    floor: tuple[str, float]
    landmarks: tuple[tuple[str, float], ...]
    near_share: float
    """Share of the picture that is nearer than 0.8 m."""

    @property
    def named(self) -> tuple[VisibleObject, ...]:
        """The objects that a caption may name, by falling size."""
        return tuple(item for item in self.objects if item.clear)

    @property
    def bare(self) -> bool:
        """Nothing to see but a near or plain wall: no object, no landmark of 2 % of the picture."""
        return not self.objects and all(share < 0.02 for _, share in self.landmarks)


@dataclass(frozen=True, kw_only=True)
class CaptionContent:
    """What a caption or prompt says. `left_to_right`: two objects in the order of a relation, or ()."""

    objects: tuple[tuple[str, str], ...] = ()
    left_to_right: tuple[tuple[str, str], ...] = ()
    walls: tuple[str, ...] = ()
    floor: str | None = None
    landmarks: tuple[str, ...] = ()
    empty: bool = False


CAPTION_TEMPLATES = ("a room with {}", "a view of {}", "there is {}", "{} in a room", "{}")
HELD_OUT_CAPTION_TEMPLATES = ("a view of a room with {}",)
WALK_TEMPLATES = (
    "Explore a room with {}",
    "Walk through a room with {}",
    "Look around a room with {}",
    "Explore {}",
)
HELD_OUT_WALK_TEMPLATES = ("Walk around a room with {}",)
GENERIC_WALKS = ("Explore a room", "Explore the room", "Look around", "Walk around a room")


def _join(names: list[str]) -> str:
    return joined([with_article(name) for name in names])


def _ordered(view: View, rng: np.random.Generator | None) -> list[VisibleObject]:
    """At most `MAX_NAMED` objects, by size, or (half of the time with a generator) from left to right."""
    objects = list(view.named[:MAX_NAMED])
    if rng is not None and rng.random() < 0.5:
        objects.sort(key=lambda item: item.column)
    return objects


def _relation(view: View, rng: np.random.Generator, split: str) -> str | None:
    """ "a red ball to the left of a blue box", where two objects are clearly side by side."""
    first, second = view.named[:2]
    if abs(first.column - second.column) < 0.15:
        return None
    side = "left" if first.column < second.column else "right"
    middle = f"on the {side} of" if split == "test" and rng.random() < 0.3 else f"to the {side} of"
    return f"{with_article(first.identity)} {middle} {with_article(second.identity)}"


def _setting(view: View, rng: np.random.Generator) -> str:
    """Sometimes a few words on what is around the objects: the wall, the floor, a landmark."""
    draw = rng.random()
    if draw < 0.18 and view.walls and view.walls[0][1] > 0.15:
        return f" in front of {with_article(view.walls[0][0])} wall"
    if draw < 0.30 and view.floor[1] > 0.15:
        return f" on {with_article(view.floor[0])} floor"
    large = [noun for noun, share in view.landmarks if share > NAMED_SHARE]
    if draw < 0.48 and large:
        return f" near {with_article(large[int(rng.integers(len(large)))])}"
    return ""


def _empty(view: View, rng: np.random.Generator | None) -> str:
    """A view without objects: its landmarks or its walls."""
    large = [noun for noun, share in view.landmarks if share > NAMED_SHARE]
    walls = [name for name, share in view.walls if share > 0.08][:2]
    draw = 0.5 if rng is None else rng.random()
    if large and draw < 0.6:
        names = list(dict.fromkeys(large))[:2]
        wall = f" and {with_article(walls[0])} wall" if walls and len(names) == 1 and draw < 0.25 else ""
        return f"a room with {_join(names)}{wall}"
    if len(walls) == 1:
        return f"an empty room with {walls[0]} walls"
    if len(walls) == 2:
        return f"an empty room with {with_article(walls[0])} wall and {with_article(walls[1])} wall"
    return "an empty room"


def caption(view: View, rng: np.random.Generator | None = None, *, split: str = "train") -> str:
    """A sentence about a view. Without a generator the plainest: "a room with" and the objects by size.

    Names all objects that are clearly in view (at most `MAX_NAMED`). Phrasings of
    `HELD_OUT_CAPTION_TEMPLATES` and the relation "on the left of" appear for split "test" alone.
    """
    if not view.named:
        return _empty(view, rng)
    if rng is None:
        return CAPTION_TEMPLATES[0].format(_join([item.identity for item in _ordered(view, None)]))
    templates: tuple[str, ...] = CAPTION_TEMPLATES
    if split == "test" and rng.random() < 0.25:
        templates = HELD_OUT_CAPTION_TEMPLATES
    draw = rng.random()
    # The plain form is what users type, so it is the commonest.
    template = templates[0] if draw < 0.4 else templates[int(rng.integers(len(templates)))]
    body: str | None = None
    if len(view.named) == 2 and rng.random() < 0.3:
        body = _relation(view, rng, split)
    if body is None:
        body = _join([item.identity for item in _ordered(view, rng)])
    setting = "" if template == "{} in a room" else _setting(view, rng)
    return template.format(body) + setting


def asked_caption(view: View, rng: np.random.Generator, *, split: str = "train") -> str:
    """A caption as a model is taught it: in training every third time what it names is asked for in words
    that `parse_caption` does not read (`emuworld.envs.requests`).
    """
    if split == "train" and view.named and rng.random() < 1 / 3:
        return request([item.identity for item in _ordered(view, rng)], rng, place="room")
    return caption(view, rng, split=split)


def walk_prompt(view: View, rng: np.random.Generator, *, split: str = "train") -> str:
    """The question of a walk: a caption of its first view (two in five), "Explore ...", or a generic one."""
    draw = rng.random()
    if draw < 0.4:
        return caption(view, rng, split=split)
    if draw < 0.5 or not view.named:
        return GENERIC_WALKS[int(rng.integers(len(GENERIC_WALKS)))]
    templates: tuple[str, ...] = WALK_TEMPLATES
    if split == "test" and rng.random() < 0.25:
        templates = HELD_OUT_WALK_TEMPLATES
    template = templates[int(rng.integers(len(templates)))]
    return template.format(_join([item.identity for item in _ordered(view, rng)]))


_OBJECT = re.compile(rf"\b({'|'.join(OBJECT_COLOURS)}) ({'|'.join(SHAPES)})\b")
_WALL = re.compile(rf"\b({'|'.join(WALL_COLOURS)}) (walls?)\b")
_FLOOR = re.compile(rf"\b({'|'.join(FLOOR_WORDS)}) floor\b")
_LANDMARK = re.compile(rf"\b({'|'.join(LANDMARKS)})\b")
_EMPTY = re.compile(r"\bempty\b")
_RIGHT = re.compile(r"\b(?:to|on) the right of\b")
_LEFT = re.compile(r"\b(?:to|on) the left of\b")
_FILLERS = frozenset(
    [
        "a",
        "an",
        "the",
        "room",
        "with",
        "view",
        "of",
        "there",
        "is",
        "are",
        "in",
        "front",
        "on",
        "near",
        "and",
        "to",
        "left",
        "right",
        "explore",
        "walk",
        "through",
        "look",
        "around",
    ]
)


def read_caption(text: str) -> CaptionContent | None:
    """All that a caption or prompt says, or None where a word is not of this grammar or says nothing here."""
    rest = " ".join(re.sub(r"[.,!]", " ", text.lower().replace("grey", "gray")).split())
    objects = tuple((match[1], match[2]) for match in _OBJECT.finditer(rest))
    rest = _OBJECT.sub(" ", rest)
    walls = tuple(match[1] for match in _WALL.finditer(rest))
    rest = _WALL.sub(" ", rest)
    floor = _FLOOR.search(rest)
    rest = _FLOOR.sub(" ", rest)
    landmarks = tuple(match[1] for match in _LANDMARK.finditer(rest))
    rest = _LANDMARK.sub(" ", rest)
    empty = _EMPTY.search(rest) is not None
    rest = _EMPTY.sub(" ", rest)
    words = rest.split()
    said = objects or walls or floor or landmarks or "room" in words or "around" in words
    if not said or any(word not in _FILLERS for word in words) or (empty and objects):
        return None
    joined = " ".join(words)
    right, left = _RIGHT.search(joined) is not None, _LEFT.search(joined) is not None
    related: tuple[tuple[str, str], ...] = ()
    if len(objects) == 2 and (left or right):
        related = objects[::-1] if right else objects
    return CaptionContent(
        objects=objects,
        left_to_right=related,
        walls=walls,
        floor=None if floor is None else floor[1],
        landmarks=landmarks,
        empty=empty,
    )


def parse_caption(text: str) -> tuple[tuple[str, str], ...] | None:
    """The (colour, shape) pairs that a text names; () for none, None where it is not of this grammar."""
    content = read_caption(text)
    return None if content is None else content.objects
