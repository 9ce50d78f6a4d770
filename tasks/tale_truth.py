"""Tales as the simulator shows them: question, lines, panels, and what each panel must show.

The tales are those of `emuworld.envs.rooms.tale_episodes`, which makes the training tales too. As `truth.py`:
worker processes, no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emuworld.envs.episodes import TRUTH
from emuworld.envs.palette import HELD_OUT_PAIRS
from emuworld.envs.rooms.tale_episodes import tale_story
from emuworld.story import Story
from emuworld.tasks.tale_judge import CLEAR, NEED_BEFORE, RULES, Panel
from emuworld.tasks.truth import Request, shared_renderer

_FRAME_PX = 256 * 256  # the simulator counts pixels of pictures of this size
_STAY_HIDDEN = ("night", "day")  # what may happen while one hides, and leave it hiding


@dataclass(frozen=True, kw_only=True, eq=False)
class TaleTruth:
    """One tale: frames [panels, H, W, 3] with their lines and what each must show."""

    index: int
    question: str
    lines: tuple[str, ...]
    cast: tuple[str, str]
    panels: tuple[Panel, ...]
    frames: NDArray[np.uint8]

    @property
    def is_plot(self) -> bool:
        """Whether the question tells all that happens, not the theme alone."""
        return self.question == " ".join(self.lines)

    @property
    def is_named(self) -> bool:
        """Whether the characters have names: "Ruby is a red ball" and from then on "Ruby"."""
        return not self.lines[0].startswith(("A ", "An "))

    @property
    def held_out(self) -> bool:
        """Whether one of them appears in no training tale."""
        return any(tuple(name.split()) in HELD_OUT_PAIRS for name in self.cast)


def make_tale(request: Request) -> TaleTruth:
    """A tale of the split, in a room that has a stage for it."""
    for attempt in range(200):
        rng = np.random.default_rng([request.seed, attempt])
        story = tale_story(
            request.split,
            int(rng.integers(2**31)),
            renderer=shared_renderer(request.renderer),
            size=request.size_px,
            format="PNG",
        )
        if story is not None:
            return _read(story, request.index)
    raise ValueError(f"no tale in 200 rooms of the {request.split} split; use another seed")


def _read(story: Story, index: int) -> TaleTruth:
    images = [segment.images[0] for segment in story.segments]
    truths = [json.loads(image.features[TRUTH]) for image in images]
    lines = tuple(segment.text for segment in story.segments)
    first, second = truths[0]["tale"]["characters"]
    return TaleTruth(
        index=index,
        question=story.question,
        lines=lines,
        cast=(first, second),
        panels=tuple(panels_of(lines, truths)),
        frames=np.stack([image.to_array() for image in images]),
    )


def panels_of(lines: Sequence[str], truths: Sequence[dict[str, Any]]) -> Iterator[Panel]:
    """What each panel must show, from the truths that are stored with the panels.

    Who is on the stage follows from what happens. Who hides may be seen in part or not at all, for the words
    do not say how much: that one is asked for neither there nor gone.
    """
    cast: list[str] = truths[0]["tale"]["characters"]
    there, hides = {name for name in cast if name in lines[0]}, ""
    shown: tuple[str, ...] = ()
    for truth in truths:
        event, who = truth["tale"]["event"], truth["tale"]["who"]
        (other,) = set(cast) - {who}
        if event == "alone":
            there = {who}
        elif event == "appear":
            there = {who, other}
        if event not in _STAY_HIDDEN:
            hides = who if event == "hide" else ""
        shares = {name: pixels / _FRAME_PX for name, pixels, *_ in truth["objects"]}
        before = shown
        shown = tuple(name for name in cast if shares.get(name, 0.0) >= CLEAR and name != hides)
        yield Panel(
            event=event,
            who=who,
            other=other,
            shown=shown,
            away=tuple(name for name in cast if name not in there),
            shares=shares,
            is_readable=event in RULES and (event not in NEED_BEFORE or who in before),
        )
