"""How people ask for a picture: the things of a caption in other words than a caption's.

A model that has only read captions draws what those say, and not what somebody wants who begins with "draw";
one that has also met openings of no language goes by the things that are named.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emuworld.envs.palette import joined, with_article
from emuworld.envs.rooms.floorplan import choice

PLACES = {"room": ("in a room", "a room with {}"), "table": ("on a table", "a table with {}")}
_OPENINGS = (
    "draw",
    "please draw",
    "can you draw",
    "paint",
    "paint a picture of",
    "a picture of",
    "a photo of",
    "an image with",
    "show me",
    "show",
    "generate",
    "generate an image of",
    "create",
    "make a picture with",
    "give me",
    "i want",
    "i want a picture of",
)
HELD_OUT_OPENINGS = (  # said in the validation and test splits alone
    "sketch",
    "let me see",
    "i would like to see",
    "could you imagine",
    "please depict",
    "render a scene that has",
)
_JOINTS = (" and ", " and ", ", ", " next to ", " beside ", " with ", " plus ")
_HELD_OUT_JOINTS = (" and ", ", ", " together with ")
_ENDS = ("", "", "", ".", "!", " please")
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def made_up(rng: np.random.Generator) -> str:
    """One to three words that no language has: syllables of a consonant and a vowel."""
    count = int(rng.choice((1, 2, 3), p=(0.6, 0.2, 0.2)))
    syllables = iter(rng.integers(len(_SYLLABLES), size=3 * count))
    lengths = rng.integers(1, 4, size=count)
    return " ".join("".join(_SYLLABLES[next(syllables)] for _ in range(length)) for length in lengths)


def request(
    things: Sequence[str],
    rng: np.random.Generator,
    *,
    place: str,
    split: str = "train",
) -> str:
    """Things ("red ball", or "a red cube on a blue plate" where the article is said) asked for as people do.

    `place`: of `PLACES`, where they are, which is told in some; of a table in all. Openings and joints
    are those of the split: a third of training's are made up, none of them is in another split.
    """
    opening = _opening(rng, split)
    joint = choice(rng, _JOINTS if split == "train" else _HELD_OUT_JOINTS)
    bare = rng.random() < 0.15
    words = joined(
        [thing if bare or thing.startswith(("a ", "an ")) else with_article(thing) for thing in things], joint
    )
    where, with_things = PLACES[place]
    draw = rng.random()
    if draw < 0.3 and not bare:
        words = with_things.format(words)
    elif draw < 0.45 or place == "table":
        words = f"{words} {where}"
    text = f"{opening} {words}".strip() + choice(rng, _ENDS)
    return text[0].upper() + text[1:] if rng.random() < 0.3 else text


def _opening(rng: np.random.Generator, split: str) -> str:
    if split != "train":
        return choice(rng, HELD_OUT_OPENINGS)
    draw = rng.random()
    if draw < 0.35:
        return f"{made_up(rng)}{choice(rng, ('', ' a picture of', ' me', ' of', ' with'))}"
    return choice(rng, _OPENINGS) if draw < 0.85 else ""
