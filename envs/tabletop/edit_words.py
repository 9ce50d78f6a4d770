"""Edits of table-tops in words: the phrasings of every kind of edit, those of the test split apart.

`emuworld.envs.tabletop.edits` says which words fill the templates. What is asked of rooms in the same way is
worded the same way there (`emuworld.envs.rooms.edit_words`).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from emuworld.envs.rooms.edit_phrases import said
from emuworld.envs.rooms.edit_words import PHRASINGS as ROOM_PHRASINGS
from emuworld.envs.rooms.edit_words import Phrasing

_SHARED = (
    "recolour", "replace", "move", "place", "step left", "step right", "move forward", "move back",
    "combine", "combine one",
)  # fmt: skip

TABLE_PHRASINGS: dict[str, Phrasing] = {
    **{name: ROOM_PHRASINGS[name] for name in _SHARED},
    "add": Phrasing(
        templates=("add {an_a}", "put {an_a} on the table", "place {an_a} on the table"),
        training=(
            "there should be {an_a}",
            "i want {an_a} on the table",
            "draw {an_a}",
            "include {an_a}",
            "bring in {an_a}",
            "let there be {an_a} too",
        ),
        held_out=("insert {an_a}",),
    ),
    "add where": Phrasing(
        templates=("add {an_a} {where}", "put {an_a} {where}", "place {an_a} {where}"),
        training=ROOM_PHRASINGS["add where"].training,
        held_out=("insert {an_a} {where}",),
    ),
    "remove": Phrasing(
        templates=("remove the {a}", "take away the {a}", "take the {a} off the table"),
        training=ROOM_PHRASINGS["remove"].training,
        held_out=("get rid of the {a}",),
    ),
    "put into": Phrasing(
        templates=(
            "put the {a} {relation} the {b}",
            "move the {a} {relation}to the {b}",
            "place the {a} {relation} the {b}",
        ),
        training=(
            "bring the {a} {relation} the {b}",
            "drop the {a} {relation} the {b}",
            "the {a} should be {relation} the {b}",
            "i want the {a} {relation} the {b}",
            "the {a} goes {relation} the {b}",
            "get the {a} {relation} the {b}",
        ),
        held_out=("set the {a} {relation} the {b}",),
    ),
    "wall": Phrasing(
        templates=(
            "paint the wall {wall}",
            "make the wall {wall}",
            "change the colour of the wall to {wall}",
        ),
        training=(
            "colour the wall {wall}",
            "turn the wall {wall}",
            "the wall should be {wall}",
            "i want the wall {wall}",
            "redo the wall in {wall}",
        ),
        held_out=("recolour the wall {wall}",),
    ),
    "table": Phrasing(
        templates=("make the table {top}", "change the table to {a_top} table", "use {a_top} table"),
        training=(
            "the table should be {top}",
            "i want {a_top} table",
            "turn the table {top}",
            "replace the table with {a_top} table",
            "there should be {a_top} table",
            "show it on {a_top} table",
            "everything should stand on {a_top} table",
        ),
        held_out=("put it on {a_top} table",),
    ),
    "darker": Phrasing(
        templates=("make it darker", "dim the light", "make the picture darker"),
        training=ROOM_PHRASINGS["darker"].training,
        held_out=("turn down the light",),
    ),
    "brighter": Phrasing(
        templates=("make it brighter", "brighten the light", "make the picture brighter"),
        training=ROOM_PHRASINGS["brighter"].training,
        held_out=("turn up the light",),
    ),
    "warm": Phrasing(
        templates=("make the light warm", "change the light to warm", "give the table warm light"),
        training=ROOM_PHRASINGS["warm"].training,
        held_out=("use warm light",),
    ),
    "cold": Phrasing(
        templates=("make the light cold", "change the light to cold", "give the table cold light"),
        training=ROOM_PHRASINGS["cold"].training,
        held_out=("use cold light",),
    ),
    "move up": Phrasing(
        templates=("show it from further up", "move the camera up"),
        training=(
            "look at it from further up",
            "go further up",
            "i want to see it from further up",
        ),
        held_out=("view it from further up",),
    ),
    "move down": Phrasing(
        templates=("show it from further down", "move the camera down"),
        training=(
            "look at it from further down",
            "go further down",
            "i want to see it from further down",
        ),
        held_out=("view it from further down",),
    ),
}


def table_edit_phrase(
    name: str, rng: np.random.Generator, split: str, *, in_view: Collection[str] = (), **words: str
) -> str:
    """See `emuworld.envs.rooms.edit_phrases.edit_phrase`."""
    return said(TABLE_PHRASINGS[name], rng, split, in_view=in_view, **words)
