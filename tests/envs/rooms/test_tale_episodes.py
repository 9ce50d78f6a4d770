"""Tales: the characters look alike throughout, and every panel shows what its sentence says."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from emuworld.envs.episodes import TRUTH
from emuworld.envs.rendering.rays import RayRenderer
from emuworld.envs.rooms.captions import parse_caption
from emuworld.envs.rooms.placement import new_object
from emuworld.envs.rooms.tale_episodes import NAMES, NUM_PANELS, tale_story
from emuworld.envs.rooms.tale_events import EVENTS, Cast, Scenery, Spot
from emuworld.story import Story

RAYS = RayRenderer()
TALES = 40


class NoRenderer:
    """Black pictures: these tests read truths, which do not depend on the renderer."""

    def render(self, *arguments: object, height: int, width: int) -> np.ndarray:
        return np.zeros((height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def tales() -> list[Story]:
    found = [tale_story("train", seed, renderer=NoRenderer(), size=16) for seed in range(TALES)]
    kept = [story for story in found if story is not None]
    assert len(kept) > 0.8 * TALES
    return kept


def _truths(story: Story) -> list[dict]:
    return [json.loads(segment.images[0].features[TRUTH]) for segment in story.segments]


def _seen(truth: dict) -> dict[str, tuple[int, float]]:
    """Object -> pixels and column."""
    return {name: (pixels, column) for name, pixels, column, _ in truth["objects"]}


def test_the_same_two_characters_before_the_same_camera(tales: list[Story]) -> None:
    for story in tales:
        truths = _truths(story)
        assert NUM_PANELS[0] <= len(truths) <= NUM_PANELS[1]
        characters = truths[0]["tale"]["characters"]
        first, second = (name.split() for name in characters)
        assert first[0] != second[0] and first[1] != second[1]
        assert all(set(_seen(truth)) <= set(characters) for truth in truths)
        assert any(set(_seen(truth)) == set(characters) for truth in truths)
        assert len({tuple(truth["pose"]) for truth in truths}) == 1


def test_panels_show_what_happens(tales: list[Story]) -> None:
    told = Counter()
    for story in tales:
        truths = _truths(story)
        for before, after in pairwise(truths):
            event, who = after["tale"]["event"], after["tale"]["who"]
            (other,) = set(after["tale"]["characters"]) - {who}
            old, new = _seen(before), _seen(after)
            told[event] += 1
            if event == "alone":
                assert set(new) == {who} and other in old
            elif event == "appear":
                assert who in new and who not in old and other in new
            elif event in ("left", "right"):
                assert (new[who][1] < 0.5) == (event == "left")
            elif event == "closer":
                assert new[who][0] > old.get(who, (0, 0))[0]
            elif event == "further":
                assert who not in old or new[who][0] < old[who][0]
            elif event in ("towards", "beside"):
                assert abs(new[who][1] - new[other][1]) < 0.35
            elif event == "hide":
                assert new.get(who, (0, 0))[0] < 0.8 * max(old.get(who, (0, 0))[0], 500) and other in new
            elif event in ("night", "day"):
                assert old == new
    assert set(told) >= set(EVENTS) - {"day"}, told


def test_who_carries_the_other_stays_where_it_is() -> None:
    ball, box = (
        new_object(np.random.default_rng(0), pair, 0.0, 0.0) for pair in (("red", "ball"), ("blue", "box"))
    )
    cast = Cast(items=(ball, box), names=("the red ball", "the blue box"), named=False)
    below = Spot(ahead_m=2.5, left_m=0.0)
    stacked = Scenery(spots=(replace(below, base_m=box.height_m), below))
    for event in ("left", "right", "closer", "further", "hide"):
        assert EVENTS[event].act(stacked, cast, 1) is None
        moved = EVENTS[event].act(stacked, cast, 0)
        assert moved is None or all(spot is not None and not spot.base_m for spot in moved.spots)
    assert EVENTS["left"].act(replace(stacked, spots=(None, below)), cast, 1) is not None


def test_questions_tell_the_plot_or_its_theme(tales: list[Story]) -> None:
    plots = named = 0
    for story in tales:
        sentences = [segment.text for segment in story.segments]
        assert all(text[0].isupper() and text.endswith(".") and "{" not in text for text in sentences)
        assert re.fullmatch(r"[A-Z][A-Za-z ,.]+\.", story.question) and ",." not in story.question
        plots += story.question == " ".join(sentences)
        names = [name for name in NAMES if re.search(rf"\b{name}\b", story.question)]
        named += bool(names)
        assert len(names) in (0, 1, 2)
        truths = _truths(story)
        # Question and sentences say what both look like, whatever they are called.
        said = f"{story.question} {' '.join(sentences)}".lower()
        assert all(name in said for name in truths[0]["tale"]["characters"])
        assert not any(",." in text for text in sentences)
    assert 0.25 < plots / len(tales) < 0.75 and 0.25 < named / len(tales) < 0.75


def test_night_is_darker_and_all_is_the_same_again() -> None:
    for seed in range(40):
        story = tale_story("train", seed, renderer=NoRenderer(), size=16)
        if story is not None and "night" in [truth["tale"]["event"] for truth in _truths(story)]:
            break
    drawn = tale_story("train", seed, renderer=RAYS, size=32, format="PNG")
    assert drawn is not None
    assert drawn.to_bytes() == tale_story("train", seed, renderer=RAYS, size=32, format="PNG").to_bytes()  # type: ignore[union-attr]
    at = [truth["tale"]["event"] for truth in _truths(drawn)].index("night")
    day, night = (drawn.segments[i].images[0].to_array().mean() for i in (at - 1, at))
    assert night < 0.8 * day
    assert all(parse_caption(segment.images[0].caption) is not None for segment in drawn.segments)
