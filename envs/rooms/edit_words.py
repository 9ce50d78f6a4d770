"""Edits in words: the phrasings of every kind of edit, those of the test split apart.

Each line is a template; `emuworld.envs.rooms.edits` says which words fill it, `edit_phrases` how. The words
of the training split are those that `emuworld.envs.prompts` uses for x2i, and many more: a model that has
heard three ways to ask understands no fourth. The test split's own are none of them, and most have a word
that training never says there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
    """Templates that all splits use, the plainest first, and those of training or of the test split alone."""

    templates: tuple[str, ...]
    training: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()

    def of_split(self, split: str) -> tuple[str, ...]:
        return self.templates + {"train": self.training, "test": self.held_out}.get(split, ())


def _phrasing(*templates: str, training: tuple[str, ...] = (), held_out: tuple[str, ...] = ()) -> Phrasing:
    return Phrasing(templates=templates, training=training, held_out=held_out)


PHRASINGS: dict[str, Phrasing] = {
    "add": _phrasing(
        "add {an_a}",
        "put {an_a} into the room",
        "place {an_a} in the room",
        training=(
            "there should be {an_a}",
            "i want {an_a} in the room",
            "draw {an_a}",
            "include {an_a}",
            "bring in {an_a}",
            "let there be {an_a} too",
        ),
        held_out=("insert {an_a}",),
    ),
    "add where": _phrasing(
        "add {an_a} {where}",
        "put {an_a} {where}",
        "place {an_a} {where}",
        training=(
            "there should be {an_a} {where}",
            "i want {an_a} {where}",
            "draw {an_a} {where}",
            "include {an_a} {where}",
            "bring in {an_a} {where}",
            "{where} there should be {an_a}",
        ),
        held_out=("insert {an_a} {where}",),
    ),
    "remove": _phrasing(
        "remove the {a}",
        "take away the {a}",
        "take the {a} out of the room",
        training=(
            "delete the {a}",
            "erase the {a}",
            "clear the {a} away",
            "get the {a} out of here",
            "make the {a} disappear",
            "show it without the {a}",
            "leave out the {a}",
            "there should be no {a}",
            "i do not want the {a}",
            "the {a} should be gone",
        ),
        held_out=("get rid of the {a}",),
    ),
    "recolour": _phrasing(
        "make the {a} {colour}",
        "paint the {a} {colour}",
        "change the colour of the {a} to {colour}",
        training=(
            "colour the {a} {colour}",
            "turn the {a} {colour}",
            "dye the {a} {colour}",
            "the {a} should be {colour}",
            "give the {a} the colour {colour}",
            "i want the {a} {colour}",
        ),
        held_out=("recolour the {a} {colour}",),
    ),
    "replace": _phrasing(
        "replace the {a} with {an_b}",
        "swap the {a} for {an_b}",
        "turn the {a} into {an_b}",
        training=(
            "exchange the {a} for {an_b}",
            "change the {a} into {an_b}",
            "the {a} should be {an_b}",
            "show {an_b} instead of the {a}",
            "put {an_b} where the {a} is",
            "let {an_b} take the place of the {a}",
            "substitute {an_b} for the {a}",
            "trade the {a} for {an_b}",
        ),
        held_out=("put {an_b} in place of the {a}",),
    ),
    "move": _phrasing(
        "move the {a} {way}",
        "push the {a} {way}",
        "slide the {a} {way}",
        training=(
            "drag the {a} {way}",
            "bring the {a} {way}",
            "nudge the {a} {way}",
            "the {a} should be more {way}",
            "i want the {a} {way}",
            "roll the {a} {way}",
        ),
        held_out=("shift the {a} {way}",),
    ),
    "place": _phrasing(
        "put the {a} {relation} the {b}",
        "move the {a} {relation} the {b}",
        "place the {a} {relation} the {b}",
        training=(
            "bring the {a} {relation} the {b}",
            "stand the {a} {relation} the {b}",
            "the {a} should be {relation} the {b}",
            "i want the {a} {relation} the {b}",
            "the {a} goes {relation} the {b}",
            "get the {a} {relation} the {b}",
        ),
        held_out=("set the {a} {relation} the {b}",),
    ),
    "walls": _phrasing(
        "paint the walls {wall}",
        "make the walls {wall}",
        "paint the wall {wall}",
        "change the colour of the walls to {wall}",
        training=(
            "colour the walls {wall}",
            "turn the walls {wall}",
            "the walls should be {wall}",
            "give the room {wall} walls",
            "i want {wall} walls",
            "redo the walls in {wall}",
        ),
        held_out=("recolour the walls {wall}",),
    ),
    "wall": _phrasing(
        "paint the {old} wall {wall}",
        "make the {old} wall {wall}",
        "change the {old} wall to {wall}",
        training=(
            "colour the {old} wall {wall}",
            "turn the {old} wall {wall}",
            "the {old} wall should be {wall}",
            "i want the {old} wall {wall}",
            "redo the {old} wall in {wall}",
        ),
        held_out=("recolour the {old} wall {wall}",),
    ),
    "floor": _phrasing(
        "make the floor {floor}",
        "change the floor to {a_floor} floor",
        "give the room {a_floor} floor",
        training=(
            "lay {a_floor} floor",
            "put {a_floor} floor into the room",
            "the floor should be {floor}",
            "i want {a_floor} floor",
            "turn the floor {floor}",
            "there should be {a_floor} floor",
            "replace the floor with {a_floor} floor",
        ),
        held_out=("put in {a_floor} floor",),
    ),
    "darker": _phrasing(
        "make it darker",
        "dim the light",
        "make the room darker",
        training=(
            "lower the light",
            "less light",
            "the light should be darker",
            "it should be darker",
            "make the light weaker",
        ),
        held_out=("turn down the light",),
    ),
    "brighter": _phrasing(
        "make it brighter",
        "brighten the light",
        "make the room brighter",
        training=(
            "raise the light",
            "more light",
            "the light should be brighter",
            "it should be brighter",
            "make the light stronger",
        ),
        held_out=("turn up the light",),
    ),
    "warm": _phrasing(
        "make the light warm",
        "change the light to warm",
        "give the room warm light",
        training=(
            "warm up the light",
            "the light should be warm",
            "i want warm light",
            "turn the light warm",
            "let the light be warmer",
        ),
        held_out=("use warm light",),
    ),
    "cold": _phrasing(
        "make the light cold",
        "change the light to cold",
        "give the room cold light",
        training=(
            "cool the light",
            "the light should be cold",
            "i want cold light",
            "turn the light cold",
            "let the light be colder",
        ),
        held_out=("use cold light",),
    ),
    "step left": _phrasing(
        "show it from further left",
        "move the camera to the left",
        training=(
            "look at it from further left",
            "go further left",
            "i want to see it from further left",
            "step to the left",
        ),
        held_out=("view it from further left",),
    ),
    "step right": _phrasing(
        "show it from further right",
        "move the camera to the right",
        training=(
            "look at it from further right",
            "go further right",
            "i want to see it from further right",
            "step to the right",
        ),
        held_out=("view it from further right",),
    ),
    "move forward": _phrasing(
        "show it from closer",
        "move the camera forward",
        training=(
            "look at it from closer",
            "go closer",
            "i want to see it from closer",
            "zoom in",
        ),
        held_out=("view it from closer",),
    ),
    "move back": _phrasing(
        "show it from further away",
        "move the camera back",
        training=(
            "look at it from further away",
            "go further away",
            "i want to see it from further away",
            "zoom out",
        ),
        held_out=("view it from further away",),
    ),
    "turn left": _phrasing(
        "turn the camera left",
        "turn the view to the left",
        training=(
            "look further to the left",
            "pan left",
            "rotate the camera to the left",
        ),
    ),
    "turn right": _phrasing(
        "turn the camera right",
        "turn the view to the right",
        training=(
            "look further to the right",
            "pan right",
            "rotate the camera to the right",
        ),
    ),
    "look up": _phrasing(
        "tilt the camera up",
        "show it looking up",
        training=(
            "look further up",
            "tilt the view up",
            "point the camera higher",
        ),
    ),
    "look down": _phrasing(
        "tilt the camera down",
        "show it looking down",
        training=(
            "look further down",
            "tilt the view down",
            "point the camera lower",
        ),
    ),
    "combine": _phrasing(
        "put the {a} from the first picture into the second picture",
        "add the {a} of the first picture to the second picture",
        training=(
            "bring the {a} from the first picture into the second picture",
            "the {a} of the first picture should be in the second picture",
            "copy the {a} from the first picture to the second one",
            "take the {a} from the first picture and add it to the second one",
            "i want the {a} of the first picture in the second picture",
            "show the second picture with the {a} of the first one",
        ),
        held_out=("take the {a} of the first picture and put it into the second picture",),
    ),
    "combine one": _phrasing(
        "put the object from the first picture into the second picture",
        "add the object of the first picture to the second picture",
        training=(
            "bring the object from the first picture into the second picture",
            "the object of the first picture should be in the second picture",
            "copy the object from the first picture to the second one",
            "take the object from the first picture and add it to the second one",
            "i want the object of the first picture in the second picture",
            "show the second picture with the object of the first one",
        ),
        held_out=("take the object of the first picture and put it into the second picture",),
    ),
}
