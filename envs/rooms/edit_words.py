"""Edits in words: the phrasings of every kind of edit, those of the test split apart.

Each line is a template; `emuworld.envs.rooms.edits` says which words fill it. The words of the training
split are those that `emuworld.envs.prompts` uses for x2i, and more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# Where to, as a turn from the heading of the camera: to the left is a quarter turn counter-clockwise.
WAYS = {
    "to the left": math.pi / 2,
    "to the right": -math.pi / 2,
    "closer": math.pi,
    "further away": 0.0,
    "to the left of": math.pi / 2,
    "to the right of": -math.pi / 2,
    "in front of": math.pi,
    "behind": 0.0,
}


@dataclass(frozen=True, kw_only=True)
class Phrasing:
    """Templates that all splits use, the plainest first, and those of the test split alone."""

    templates: tuple[str, ...]
    held_out: tuple[str, ...] = ()


def _phrasing(*templates: str, held_out: tuple[str, ...] = ()) -> Phrasing:
    return Phrasing(templates=templates, held_out=held_out)


PHRASINGS: dict[str, Phrasing] = {
    "add": _phrasing(
        "add {an_a}", "put {an_a} into the room", "place {an_a} in the room", held_out=("insert {an_a}",)
    ),
    "add where": _phrasing(
        "add {an_a} {where}",
        "put {an_a} {where}",
        "place {an_a} {where}",
        held_out=("insert {an_a} {where}",),
    ),
    "remove": _phrasing(
        "remove the {a}",
        "take away the {a}",
        "take the {a} out of the room",
        held_out=("get rid of the {a}",),
    ),
    "recolour": _phrasing(
        "make the {a} {colour}",
        "paint the {a} {colour}",
        "change the colour of the {a} to {colour}",
        held_out=("recolour the {a} {colour}",),
    ),
    "replace": _phrasing(
        "replace the {a} with {an_b}",
        "swap the {a} for {an_b}",
        "turn the {a} into {an_b}",
        held_out=("put {an_b} in place of the {a}",),
    ),
    "move": _phrasing(
        "move the {a} {way}", "push the {a} {way}", "slide the {a} {way}", held_out=("shift the {a} {way}",)
    ),
    "place": _phrasing(
        "put the {a} {relation} the {b}",
        "move the {a} {relation} the {b}",
        "place the {a} {relation} the {b}",
        held_out=("set the {a} {relation} the {b}",),
    ),
    "walls": _phrasing(
        "paint the walls {wall}",
        "make the walls {wall}",
        "paint the wall {wall}",
        "change the colour of the walls to {wall}",
        held_out=("recolour the walls {wall}",),
    ),
    "wall": _phrasing(
        "paint the {old} wall {wall}",
        "make the {old} wall {wall}",
        "change the {old} wall to {wall}",
        held_out=("recolour the {old} wall {wall}",),
    ),
    "floor": _phrasing(
        "make the floor {floor}",
        "change the floor to {a_floor} floor",
        "give the room {a_floor} floor",
        held_out=("put in {a_floor} floor",),
    ),
    "darker": _phrasing(
        "make it darker", "dim the light", "make the room darker", held_out=("turn down the light",)
    ),
    "brighter": _phrasing(
        "make it brighter", "brighten the light", "make the room brighter", held_out=("turn up the light",)
    ),
    "warm": _phrasing(
        "make the light warm",
        "change the light to warm",
        "give the room warm light",
        held_out=("use warm light",),
    ),
    "cold": _phrasing(
        "make the light cold",
        "change the light to cold",
        "give the room cold light",
        held_out=("use cold light",),
    ),
    "step left": _phrasing(
        "show it from further left", "move the camera to the left", held_out=("view it from further left",)
    ),
    "step right": _phrasing(
        "show it from further right", "move the camera to the right", held_out=("view it from further right",)
    ),
    "move forward": _phrasing(
        "show it from closer", "move the camera forward", held_out=("view it from closer",)
    ),
    "move back": _phrasing(
        "show it from further away", "move the camera back", held_out=("view it from further away",)
    ),
    "turn left": _phrasing("turn the camera left", "turn the view to the left"),
    "turn right": _phrasing("turn the camera right", "turn the view to the right"),
    "look up": _phrasing("tilt the camera up", "show it looking up"),
    "look down": _phrasing("tilt the camera down", "show it looking down"),
    "combine": _phrasing(
        "put the {a} from the first picture into the second picture",
        "add the {a} of the first picture to the second picture",
        held_out=("take the {a} of the first picture and put it into the second picture",),
    ),
    "combine one": _phrasing(
        "put the object from the first picture into the second picture",
        "add the object of the first picture to the second picture",
        held_out=("take the object of the first picture and put it into the second picture",),
    ),
}


def edit_phrase(name: str, rng: np.random.Generator, split: str, **words: str) -> str:
    """An instruction: the plainest template every second time, else any that texts of the split may use."""
    return said(PHRASINGS[name], rng, split, **words)


def said(phrasing: Phrasing, rng: np.random.Generator, split: str, **words: str) -> str:
    """A phrasing in words; see `edit_phrase`."""
    templates = (*phrasing.templates, *(phrasing.held_out if split == "test" else ()))
    template = templates[0] if rng.random() < 0.5 else templates[int(rng.integers(len(templates)))]
    return template.format(**words)
