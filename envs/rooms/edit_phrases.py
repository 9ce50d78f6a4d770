"""Instructions of edits: a phrasing (`edit_words`) said in words.

In training some begin with made-up words, and some name things by their shape alone: what is wanted can be
told by the rest, and by the picture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np

from emuworld.envs.requests import made_up
from emuworld.envs.rooms.edit_words import PHRASINGS, Phrasing

_UNHEARD, _BY_SHAPE = 2, 3
# First words without which nobody knows what is wanted, and those that are no verbs.
_NEEDED = {"dim", "lower", "less", "raise", "more", "brighten", "cool", "warm", "the", "on", "in"}
_ENDS = tuple("dgkmnprst")
_LITTLE = ("of", "off", "out", "up", "with", "away with")


def edit_phrase(
    name: str, rng: np.random.Generator, split: str, *, in_view: Collection[str] = (), **words: str
) -> str:
    """An instruction: the plainest template every second time (in training every third), else any that texts
    of the split may use. `in_view`: the things in the picture that is edited.
    """
    return said(PHRASINGS[name], rng, split, in_view=in_view, **words)


def said(
    phrasing: Phrasing, rng: np.random.Generator, split: str, *, in_view: Collection[str] = (), **words: str
) -> str:
    """A phrasing in words; see `edit_phrase`. In training one in `_BY_SHAPE` is `by_shape`, and one in
    `_UNHEARD` `unheard`.
    """
    templates = phrasing.of_split(split)
    plainest = rng.random() < (1 / 3 if split == "train" else 1 / 2)
    template = templates[0] if plainest else templates[int(rng.integers(len(templates)))]
    text = template.format(**words)
    if split != "train":
        return text
    if rng.random() < 1 / _BY_SHAPE:
        text = by_shape(text, in_view)
    return unheard(text, rng, as_trained=True) if rng.random() < 1 / _UNHEARD else text


def unheard(instruction: str, rng: np.random.Generator, *, as_trained: bool = False) -> str:
    """An instruction that begins with made-up words in place of its first; as it is where that one is needed
    to tell what is wanted. Those of training may end in consonants, and a little word behind them, for people
    also ask so: "do away with the ball".
    """
    first, _, rest = instruction.partition(" ")
    if first in _NEEDED:
        return instruction
    words = made_up(rng)
    if as_trained:
        ended = (
            word + rng.choice(_ENDS) if len(word) > 2 and rng.random() < 0.5 else word
            for word in words.split()
        )
        words = " ".join(ended)
        if rng.random() < 1 / 3:
            words = f"{words} {rng.choice(_LITTLE)}"
    return f"{words} {rest}"


def by_shape(instruction: str, in_view: Collection[str]) -> str:
    """An instruction that says "the ball" for "the red ball", and so on, of all things in view that no other
    has the shape of. As it is where there are none.
    """
    shapes = Counter(name.rpartition(" ")[2] for name in in_view)
    for name in in_view:
        shape = name.rpartition(" ")[2]
        if shapes[shape] == 1:
            instruction = instruction.replace(f"the {name}", f"the {shape}")
    return instruction
