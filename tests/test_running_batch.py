"""Worlds that join a running batch: the same segments as one by one, places taken as they become free."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from processes import run_together
from test_pictures_at_once import copied

from emuworld import following, parallel
from emuworld.decoding.noise import Noise
from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.world_model import ContextFull, Segment, WorldModel, WorldState, load

PLAIN = Sampling(text=Truncation(top_p=0.9), image=Truncation(top_k=20))
GUIDED = dataclasses.replace(PLAIN, guidance=3.0)
THREE_ROWS = dataclasses.replace(GUIDED, image_guidance=1.5)
DRAFTED = dataclasses.replace(GUIDED, draft_window=4)
SETTINGS = (PLAIN, GUIDED, DRAFTED, THREE_ROWS)
TEXTS = ("turn left", None, "", "go to the red ball and then look up", None)
Result = tuple[WorldState, Segment]


@pytest.fixture(scope="module")
def model(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    """A handle of its own, which may also draw pictures at once."""
    folder = tmp_path_factory.mktemp("running") / "tiny"
    return load(copied(tiny_folder, folder, noise=Noise(path="mixture")), device="cpu")


def begin(model: WorldModel, world: int) -> WorldState:
    images = [np.full((64, 64, 3), 20 * world, np.uint8)] if world % 4 == 3 else []
    size = ((64, 64), (32, 96), (96, 64))[world % 3]
    return model.begin(mode="explore", prompt="a room " * (world % 4), images=images, seed=world, size=size)


def steps(model: WorldModel, world: int, settings: tuple[Sampling, ...]) -> Iterator[Result]:
    """A world alone, step by step; worlds take one to three steps."""
    state = begin(model, world)
    for step in range(1 + world % 3):
        state, segment = model.imagine(
            state, TEXTS[(world + step) % len(TEXTS)], sampling=settings[world % len(settings)]
        )
        yield state, segment
        if state.ended:
            return


def running(
    model: WorldModel, worlds: range, settings: tuple[Sampling, ...], *, num_worlds: int
) -> dict[tuple[int, int], Result]:
    """The same worlds in a running batch; the next step of one is asked for when the last is there."""
    told: dict[tuple[int, int], Result] = {}

    def ask(world: int, step: int, state: WorldState) -> None:
        text = TEXTS[(world + step) % len(TEXTS)]
        batch.add(state, text, sampling=settings[world % len(settings)], name=(world, step))

    with model.running_batch(num_worlds) as batch:
        for world in worlds:
            ask(world, 0, begin(model, world))
        assert len(batch) == len(worlds)
        for (world, step), state, segment in batch:
            told[world, step] = (state, segment)
            if not state.ended and step < world % 3:
                ask(world, step + 1, state)
        assert len(batch) == 0
    return told


def assert_same(one: Result, other: Result) -> None:
    (state, segment), (twin_state, twin_segment) = one, other
    assert state == twin_state
    assert (segment.text, segment.ended, segment.stop_reason) == (
        twin_segment.text,
        twin_segment.ended,
        twin_segment.stop_reason,
    )
    assert (segment.image is None) == (twin_segment.image is None)
    assert segment.image is None or segment.image.tobytes() == twin_segment.image.tobytes()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param((GUIDED,), id="guided"),
        pytest.param(SETTINGS, id="one to three rows, drafted or not"),
        pytest.param((PLAIN, dataclasses.replace(GUIDED, passes=2)), id="some draw at once"),
    ],
)
def test_every_world_is_as_if_alone(model: WorldModel, settings: tuple[Sampling, ...]) -> None:
    worlds = range(9)
    alone = {
        (world, step): result for world in worlds for step, result in enumerate(steps(model, world, settings))
    }
    assert len(alone) > len(worlds), "some worlds take more than a step"
    for num_worlds in (1, 3, 16):
        model.caches.clear()
        told = running(model, worlds, settings, num_worlds=num_worlds)
        assert told.keys() == alone.keys()
        for name, result in told.items():
            assert_same(result, alone[name])


def test_a_short_segment_does_not_wait_for_a_long_one(model: WorldModel) -> None:
    """Two places: while one world draws a large picture, the other place serves three small ones."""
    large = model.begin(mode="explore", prompt="a room", seed=0, size=(192, 192))
    small = [model.begin(mode="explore", prompt="a room", seed=k, size=(32, 32)) for k in range(3)]
    with model.running_batch(2) as batch:
        batch.add(large, "", sampling=PLAIN, name="large")
        for k, state in enumerate(small):
            batch.add(state, "", sampling=PLAIN, name=f"small {k}")
        assert [imagined.name for imagined in batch] == ["small 0", "small 1", "small 2", "large"]


def test_what_is_stopped_goes_on_or_is_given_up(model: WorldModel) -> None:
    states = [begin(model, world) for world in range(4)]
    expected = [model.imagine(state, "", sampling=PLAIN) for state in states]
    with model.running_batch(2) as batch:
        for world, state in enumerate(states):
            batch.add(state, "", sampling=PLAIN, name=world)
        told = {next(iter(batch)).name}
        assert_same(model.imagine(states[3], "", sampling=PLAIN), expected[3])  # the model is free meanwhile
        model.caches.clear()
        for world, state, segment in batch:
            told.add(world)
            assert_same((state, segment), expected[world])
        assert told == {0, 1, 2, 3}
        batch.add(states[0], "", sampling=PLAIN, name=0)
        batch.add(states[1], "", sampling=PLAIN, name=1)
        next(iter(batch))
    assert len(batch) == 0 and list(batch) == []
    assert_same(model.imagine(states[0], "", sampling=PLAIN), expected[0])


def test_bad_questions_are_refused_when_asked(model: WorldModel) -> None:
    state = begin(model, 0)
    with pytest.raises(ValueError, match="num_worlds must be 1 or more, got 0"):
        model.running_batch(0)
    with model.running_batch(2) as batch:
        with pytest.raises(ContextFull):
            batch.add(state, "word " * 5000, name=0)
        with pytest.raises(ValueError, match="text must be a str"):
            batch.add(state, 3, name=0)  # type: ignore[arg-type]
        assert len(batch) == 0


def test_an_error_gives_up_what_runs_and_no_more(model: WorldModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(written: int, expected: int) -> None:
        if written > 10:
            raise RuntimeError("stop")

    with model.running_batch(1, on_step=broken) as batch:
        batch.add(begin(model, 0), "", sampling=PLAIN, name="given up")
        batch.add(begin(model, 1), "", sampling=PLAIN, name="waits")
        with pytest.raises(RuntimeError, match="stop"):
            list(batch)
        assert len(batch) == 1
        with pytest.raises(RuntimeError, match="stop"):
            list(batch)
        assert len(batch) == 0
    assert model.imagine(begin(model, 0), "", sampling=PLAIN)[1].image is not None


def test_led_processes_draw_the_same(tmp_path: Path, tiny_folder: str) -> None:
    """Worlds join while others write, in two processes that have a half of the transformer each."""
    run_together(_led, tiny_folder, str(tmp_path))
    with np.load(tmp_path / "told.npz") as told:
        assert told["running"].tolist() == told["batched"].tolist()


def _led(rank: int, folder: str, out: str) -> None:
    parallel.join()
    model = load(folder, device="cpu")
    if rank > 0:
        model.follow()
        return
    greedy = Sampling(text=Truncation(top_k=1), image=Truncation(top_k=1), guidance=2.0)
    states = [model.begin(mode="explore", prompt="a room", seed=k, size=(32, 32)) for k in range(4)]
    batched = [model.imagine(state, "turn left", sampling=greedy)[0].ids for state in states]
    model.caches.clear()
    with model.running_batch(2) as batch:
        for k, state in enumerate(states):
            batch.add(state, "turn left", sampling=greedy, name=k)
        told = {imagined.name: imagined.state.ids for imagined in batch}
    np.savez(Path(out, "told.npz"), running=[told[k] for k in range(4)], batched=batched)
    following.end()
