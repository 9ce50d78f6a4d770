"""Edits as stories: reference pictures, then an instruction and its answer, chained as x2i edits on.

A segment's text is the instruction and its image the answer, which the next segment edits; the first edits
the reference pictures. That is an episode of `EmuWorld/X2I-v0`, and costs one frame more than it has edits.
What is drawn and edited is not known here: a shot is whatever the world calls so.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from emuworld.story import Story, StoryImage, StorySegment

CHAIN_EDITS = 3
COMBINATION_SHARE = 0.3  # of chains that are followed by a story with two reference pictures

S = TypeVar("S")  # a shot: what a picture is taken of


@dataclass(frozen=True, kw_only=True)
class Edit(Generic[S]):
    """One edit: the pictures that are given, the instruction, and the picture that answers it.

    `target` is what it is about ("red ball", "walls", "light", ...), `result` what that is afterwards ("blue
    ball", "teal", "warm", "to the left", "on the blue plate"; "" where it is gone).
    """

    kind: str
    instruction: str
    references: tuple[S, ...]
    answer: S
    target: str
    result: str = ""

    @property
    def truth(self) -> dict[str, dict[str, str]]:
        """What its answer's feature "truth" names besides."""
        return {"edit": {"kind": self.kind, "target": self.target, "result": self.result}}


Draw = Callable[[S, np.random.Generator], Edit[S] | None]  # an edit of a shot, None where none is found


def edit_chains(
    story_id: str,
    shots: Iterator[S],
    rng: np.random.Generator,
    *,
    num_edits: int,
    edit: Draw[S],
    combination: Draw[S],
    image: Callable[[S, Edit[S] | None], StoryImage],
) -> Iterator[Story]:
    """`num_edits` edits, fewer where `shots` run out: a chain of up to `CHAIN_EDITS` from each shot, some
    followed by a combination of two reference pictures. `image` draws a shot, or the answer of an edit.
    """
    left, numbers = num_edits, itertools.count()

    def story(references: tuple[StoryImage, ...], edits: Sequence[Edit[S]]) -> Story:
        segments = [StorySegment(text=one.instruction, images=(image(one.answer, one),)) for one in edits]
        return Story(
            reference_images=references, segments=tuple(segments), story_id=f"{story_id}-{next(numbers)}"
        )

    while left > 0 and (first := next(shots, None)) is not None:
        chain = _chain(first, rng, edit, min(left, CHAIN_EDITS))
        if not chain:
            continue
        before = image(first, None)
        yield story((before,), chain)
        left -= len(chain)
        both = combination(first, rng) if left > 0 and rng.random() < COMBINATION_SHARE else None
        if both is not None:
            yield story((before, image(both.references[1], None)), [both])
            left -= 1


def _chain(shot: S, rng: np.random.Generator, draw: Draw[S], count: int) -> list[Edit[S]]:
    """Up to `count` edits, each of the one before."""
    edits: list[Edit[S]] = []
    while len(edits) < count and (edit := draw(shot, rng)) is not None:
        edits.append(edit)
        shot = edit.answer
    return edits
