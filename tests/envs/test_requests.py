"""Captions in the words of people who ask for a picture."""

import numpy as np
import pytest

from emuworld.envs.requests import HELD_OUT_OPENINGS, made_up, request

RED, BLUE = "red ball", "orange box"


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_request_names_everything_in_order(split: str) -> None:
    rng = np.random.default_rng(0)
    for place in ("room", "table"):
        for _ in range(300):
            text = request([RED, BLUE], rng, place=place, split=split).lower()
            assert 0 <= text.index(RED) < text.index(BLUE), text
            assert f"a {BLUE}" not in text.replace(f"an {BLUE}", "")
            if place == "table":
                assert place in text


def test_training_never_opens_as_the_other_splits_do() -> None:
    rng = np.random.default_rng(1)
    trained = [request([RED], rng, place="room").lower() for _ in range(4000)]
    assert any(text.startswith("draw a red ball") for text in trained)
    words = {word for text in trained for word in text.split()}
    for opening in HELD_OUT_OPENINGS:
        assert not any(text.startswith(opening) for text in trained)
        assert set(opening.split()) - words, f"training says every word of {opening!r}"
    others = [request([RED], rng, place="room", split="validation").lower() for _ in range(400)]
    assert all(text.startswith(HELD_OUT_OPENINGS) for text in others)


def test_made_up_words_open_a_third_of_training() -> None:
    rng = np.random.default_rng(2)
    heard = {word for _ in range(3000) for word in made_up(rng).split()}
    known = {"a", "an", "the", "me", "to", "so"}
    assert len(heard) > 1500 and not (heard - known) & {"draw", "paint", "show", "create", "sketch"}
    opened = [request([RED], rng, place="room").lower().split()[0] in heard - known for _ in range(2000)]
    assert 0.15 < np.mean(opened) < 0.4  # of one syllable and two many were heard, of three few
