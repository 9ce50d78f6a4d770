"""How people ask for a picture: the things of a caption in other words than a caption's.

A model that has only read captions draws what those say, and not what somebody wants who begins with "draw";
one that has also met openings of no language goes by the things that are named.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from emuworld.envs.palette import with_article

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
    need_place: bool = False,
) -> str:
    """Things ("red ball", or "a red cube on a blue plate" where the article is said) asked for as people do.

    `place`: of `PLACES`, where they are, which is told in some; in all with `need_place`. Openings and joints
    are those of the split: a third of training's are made up, none of them is in another split.
    """
    opening = _opening(rng, split)
    joint = _pick(rng, _JOINTS if split == "train" else _HELD_OUT_JOINTS)
    bare = rng.random() < 0.15
    words = _joined(
        [thing if bare or thing.startswith(("a ", "an ")) else with_article(thing) for thing in things], joint
    )
    where, with_things = PLACES[place]
    draw = rng.random()
    if draw < 0.3 and not bare:
        words = with_things.format(words)
    elif draw < 0.45 or need_place:
        words = f"{words} {where}"
    text = f"{opening} {words}".strip() + _pick(rng, _ENDS)
    return text[0].upper() + text[1:] if rng.random() < 0.3 else text


def _opening(rng: np.random.Generator, split: str) -> str:
    if split != "train":
        return _pick(rng, HELD_OUT_OPENINGS)
    draw = rng.random()
    if draw < 0.35:
        return f"{made_up(rng)}{_pick(rng, ('', ' a picture of', ' me', ' of', ' with'))}"
    return _pick(rng, _OPENINGS) if draw < 0.85 else ""


def _joined(nouns: Sequence[str], joint: str) -> str:
    """Two with the joint between them; more as a list."""
    if joint == ", " or len(nouns) < 3:
        return joint.join(nouns)
    return f"{', '.join(nouns[:-1])}{joint}{nouns[-1]}"


def _pick(rng: np.random.Generator, texts: Sequence[str]) -> str:
    return texts[int(rng.integers(len(texts)))]
