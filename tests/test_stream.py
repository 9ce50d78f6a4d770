"""Streaming: what is told adds up to the segment, and the segment is the one that `imagine` gives."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.tokens.sequence import MODES
from emuworld.world_model import (
    Event,
    ImageDone,
    ImageRow,
    Segment,
    SegmentDone,
    TextPiece,
    ThoughtPiece,
    WorldModel,
    WorldState,
)

GUIDED = Sampling(text=Truncation(top_p=0.9), image=Truncation(top_k=20), guidance=3.0)
TEXTS = ("turn left", None, "", None)


@pytest.fixture
def model(tiny_model: WorldModel) -> Iterator[WorldModel]:
    """The shared handle without anything that earlier tests left in its caches."""
    tiny_model.caches.clear()
    yield tiny_model


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (128, 128, 3), dtype=np.uint8)


def begin(model: WorldModel, seed: int) -> WorldState:
    mode = MODES[seed % len(MODES)]
    images = [picture(seed)] * (mode in ("x2i", "vla"))
    return model.begin(mode=mode, prompt="a room " * (seed % 3), images=images, seed=seed, size=(64, 96))


def done(events: list[Event]) -> tuple[WorldState, Segment]:
    assert isinstance(events[-1], SegmentDone)
    assert not any(isinstance(event, SegmentDone) for event in events[:-1])
    return events[-1].state, events[-1].segment


def same(one: tuple[WorldState, Segment], other: tuple[WorldState, Segment]) -> bool:
    pixels = [None if segment.image is None else segment.image.tobytes() for _, segment in (one, other)]
    words = [dataclasses.replace(segment, image=None) for _, segment in (one, other)]
    return (
        one[0] == other[0]
        and pixels[0] == pixels[1]
        and dataclasses.astuple(words[0]) == dataclasses.astuple(words[1])
    )


@pytest.mark.parametrize("seed", range(12))
def test_a_stream_tells_what_imagine_gives(model: WorldModel, seed: int) -> None:
    """All modes, given and written texts, two segments, guided by words and by pictures."""
    state = begin(model, seed)
    sampling = dataclasses.replace(GUIDED, image_guidance=(1.0, 1.5)[seed % 2])
    for text in (TEXTS[seed % 4], TEXTS[(seed + 1) % 4]):
        if state.ended:
            break
        expected = model.imagine(state, text, sampling=sampling)
        events = list(model.stream(state, text, sampling=sampling))
        after, segment = done(events)
        assert same((after, segment), expected)
        assert "".join(event.text for event in events if isinstance(event, TextPiece)) == segment.text
        for about, thought in (("image", segment.thought), ("answer", segment.answer_thought)):
            pieces = [e.text for e in events if isinstance(e, ThoughtPiece) and e.about == about]
            assert "".join(pieces) == (thought or "")
        rows = [event for event in events if isinstance(event, ImageRow)]
        images = [event.image for event in events if isinstance(event, ImageDone)]
        if segment.image is None:
            assert (rows, images) == ([], [])
        else:
            assert [(row.row, row.num_rows) for row in rows] == [(i, 4) for i in range(4)]
            codes = np.stack([row.codes for row in rows])
            np.testing.assert_array_equal(model.decode([codes])[0], segment.image)
            assert [image is segment.image for image in images] == [True]
            assert events[-6:-2] == rows
        state = after


@pytest.mark.parametrize("seed", range(6))
def test_words_alone_are_those_that_would_be_drawn(model: WorldModel, seed: int) -> None:
    state = begin(model, seed)
    segment = model.imagine(state, sampling=GUIDED)[1]
    words = model.imagine_words(state, sampling=GUIDED)
    assert words == (None if segment.image is None else segment.text)
    bolder = {model.imagine_words(state, sampling=GUIDED, temperature=float(t)) for t in range(1, 5)}
    assert not words or bolder != {words}  # though the seed is the same


def test_rows_come_while_the_picture_is_drawn(model: WorldModel) -> None:
    """The first row is told before the others are computed: its tokens are all the model has fed by then."""
    calls = 0
    transformer = model._transformer

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(transformer, name)

        def __call__(self, *args: object, **settings: object) -> object:
            nonlocal calls
            calls += 1
            return transformer(*args, **settings)  # type: ignore[operator]

    writer = model._writer
    state = begin(model, 0)
    list(model.stream(state, "", sampling=Sampling()))  # what the prompt costs is paid
    writer._transformer = Counting()  # type: ignore[assignment]
    try:
        stream = model.stream(state, "", sampling=Sampling())
        seen = [calls for event in stream if isinstance(event, ImageRow)]
    finally:
        writer._transformer = transformer
    assert seen == [6, 12, 18, 24]  # the size prefix and five codes; then the sixth with EOL and five codes


def test_streams_and_calls_that_interleave_do_not_disturb_each_other(model: WorldModel) -> None:
    states = [begin(model, seed) for seed in (0, 3, 4)]
    expected = [model.imagine(state, "turn left", sampling=GUIDED) for state in states]
    model.caches.clear()
    streams = [model.stream(state, "turn left", sampling=GUIDED) for state in states]
    told: list[list[Event]] = [[], [], []]
    for round_, events in enumerate(itertools.zip_longest(*streams)):
        for mine, event in zip(told, events, strict=True):
            mine += [event] if event is not None else []
        if round_ == 2:
            assert same(model.imagine(states[1], "turn left", sampling=GUIDED), expected[1])
    for mine, one in zip(told, expected, strict=True):
        assert same(done(mine), one)


def test_whoever_stops_listening_leaves_nothing_behind(model: WorldModel) -> None:
    state = begin(model, 3)
    expected = model.imagine(state, "look up", sampling=GUIDED)
    count = model.caches.num_prefills
    stream = model.stream(state, "look up", sampling=GUIDED)
    assert isinstance(next(event for event in stream if isinstance(event, ImageRow)), ImageRow)
    del stream
    assert same(model.imagine(state, "look up", sampling=GUIDED), expected)
    assert model.caches.num_prefills == count, "the working cache came back with what it held"


def test_other_threads_imagine_while_a_stream_waits(model: WorldModel) -> None:
    state = begin(model, 0)
    expected = model.imagine(state, "", sampling=GUIDED)
    stream = model.stream(state, "", sampling=GUIDED)
    head = [next(stream), next(stream)]
    results: list[tuple[WorldState, Segment]] = []
    thread = threading.Thread(target=lambda: results.append(model.imagine(state, "", sampling=GUIDED)))
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert same(results[0], expected)
    assert same(done([*head, *stream]), expected)


def test_errors_come_at_the_call(model: WorldModel) -> None:
    state = begin(model, 0)
    with pytest.raises(ValueError, match="text must be a str"):
        model.stream(state, 3)  # type: ignore[arg-type]
    ended, _ = model.imagine(state, "")
    with pytest.raises(ValueError, match="has ended"):
        model.stream(ended)


def test_limits_are_told_in_the_last_event(model: WorldModel) -> None:
    state = begin(model, 3)
    events = list(model.stream(state, "turn left", sampling=Sampling(max_new_tokens=20)))
    after, segment = done(events)
    assert (segment.text, segment.image, segment.ended) == ("turn left", None, True)
    assert segment.stop_reason == "token_limit"
    assert "".join(e.text for e in events if isinstance(e, TextPiece)) == "turn left"
    assert after.ended
