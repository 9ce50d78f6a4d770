"""Edits of table-tops in words: the phrasings of every kind of edit, those of the test split apart.

`emuworld.envs.tabletop.edits` says which words fill the templates. What is asked of rooms in the same way is
worded the same way there (`emuworld.envs.rooms.edit_words`).
"""

from __future__ import annotations

import numpy as np

from emuworld.envs.rooms.edit_words import PHRASINGS as ROOM_PHRASINGS
from emuworld.envs.rooms.edit_words import Phrasing, said

_SHARED = (
    "recolour", "replace", "move", "place", "step left", "step right", "move forward", "move back",
    "combine", "combine one",
)  # fmt: skip

TABLE_PHRASINGS: dict[str, Phrasing] = {
    **{name: ROOM_PHRASINGS[name] for name in _SHARED},
    "add": Phrasing(
        templates=("add {an_a}", "put {an_a} on the table", "place {an_a} on the table"),
        held_out=("insert {an_a}",),
    ),
    "add where": Phrasing(
        templates=("add {an_a} {where}", "put {an_a} {where}", "place {an_a} {where}"),
        held_out=("insert {an_a} {where}",),
    ),
    "remove": Phrasing(
        templates=("remove the {a}", "take away the {a}", "take the {a} off the table"),
        held_out=("get rid of the {a}",),
    ),
    "put into": Phrasing(
        templates=(
            "put the {a} {relation} the {b}",
            "move the {a} {relation}to the {b}",
            "place the {a} {relation} the {b}",
        ),
        held_out=("set the {a} {relation} the {b}",),
    ),
    "wall": Phrasing(
        templates=(
            "paint the wall {wall}",
            "make the wall {wall}",
            "change the colour of the wall to {wall}",
        ),
        held_out=("recolour the wall {wall}",),
    ),
    "table": Phrasing(
        templates=("make the table {top}", "change the table to {a_top} table", "use {a_top} table"),
        held_out=("put it on {a_top} table",),
    ),
    "darker": Phrasing(
        templates=("make it darker", "dim the light", "make the picture darker"),
        held_out=("turn down the light",),
    ),
    "brighter": Phrasing(
        templates=("make it brighter", "brighten the light", "make the picture brighter"),
        held_out=("turn up the light",),
    ),
    "warm": Phrasing(
        templates=("make the light warm", "change the light to warm", "give the table warm light"),
        held_out=("use warm light",),
    ),
    "cold": Phrasing(
        templates=("make the light cold", "change the light to cold", "give the table cold light"),
        held_out=("use cold light",),
    ),
    "move up": Phrasing(
        templates=("show it from further up", "move the camera up"), held_out=("view it from further up",)
    ),
    "move down": Phrasing(
        templates=("show it from further down", "move the camera down"),
        held_out=("view it from further down",),
    ),
}


def table_edit_phrase(name: str, rng: np.random.Generator, split: str, **words: str) -> str:
    """An instruction: the plainest template every second time, else any that texts of the split may use."""
    return said(TABLE_PHRASINGS[name], rng, split, **words)
