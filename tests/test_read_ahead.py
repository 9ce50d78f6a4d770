"""Pictures that are read into the caches at the end of the call that drew them, as on a GPU: the same worlds.

The CPU form gives equal bits in any company, so every number can be compared with a walk that reads nothing
ahead.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_pictures_at_once import FREE, Result, begin, copied, same

from emuworld.cache_pool import CachePool
from emuworld.decoding.noise import Noise
from emuworld.model.exact import ExactTransformer
from emuworld.readings import Reading
from emuworld.world_model import WorldModel, WorldState, load

GUIDED_BY_PICTURES = dataclasses.replace(FREE, image_guidance=1.5, passes=2)
TOKEN_BY_TOKEN = dataclasses.replace(FREE, passes=0)


@pytest.fixture(scope="module")
def opened(tiny_folder: str, tmp_path_factory: pytest.TempPathFactory) -> WorldModel:
    return load(copied(tiny_folder, tmp_path_factory.mktemp("ahead") / "tiny", noise=Noise()), device="cpu")


@pytest.fixture
def model(opened: WorldModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorldModel]:
    """With caches that are filled as on a GPU."""
    monkeypatch.setattr("emuworld.cache_pool.rides_along", lambda device: True)
    opened.caches.clear()
    yield opened
    opened.caches.clear()


@pytest.fixture
def prefills(model: WorldModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many chunks each `prepare` computes."""
    counted: list[int] = []
    prepare = CachePool.prepare

    def counting(pool: CachePool, *args: object, **more: int) -> object:
        before = pool.num_prefills
        prepared = prepare(pool, *args, **more)  # type: ignore[arg-type]
        counted.append(pool.num_prefills - before)
        return prepared

    monkeypatch.setattr(CachePool, "prepare", counting)
    return counted


def walk(model: WorldModel, *, forks: bool = True) -> list[Result]:
    """Worlds of two sizes and three settings go on, fork, change their order and their company, and go back;
    one has ended, one is read from bytes."""
    settings = [FREE, GUIDED_BY_PICTURES, TOKEN_BY_TOKEN, FREE, FREE]
    states = [begin(model, world) for world in range(4)]
    states.append(model.begin(mode="t2i", prompt="a red ball", size=(64, 64), seed=9))
    first = model.imagine_batch(states, ["look up"] * 5, sampling=settings)
    assert first[4][0].ended
    after = [state for state, _ in first]
    order = [2, 0, 1, 0, 3]
    second = model.imagine_batch(
        [after[i] for i in order],
        ["turn left", "turn left", "look up", "turn right", "move forward"],
        sampling=[settings[i] for i in order],
    )
    again = model.imagine_batch([states[0], after[1]], ["turn right", "look up"], sampling=settings[:2])
    restored = WorldState.from_bytes(second[3][0].to_bytes())
    third = model.imagine_batch(
        [second[2][0], restored, second[1][0]],
        ["", None, "look up"],
        sampling=[GUIDED_BY_PICTURES, FREE, FREE],
    )
    return [*first, *second, *again, *third, model.imagine(second[3][0], "turn left", sampling=FREE)]


def test_worlds_are_the_same_as_without(model: WorldModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = walk(model)
    model.caches.clear()
    monkeypatch.setattr(CachePool, "read_ahead", lambda pool, sequences: None)
    assert all(same(*pair) for pair in zip(ahead, walk(model), strict=True))
    model.caches.clear()
    monkeypatch.setattr("emuworld.cache_pool.rides_along", lambda device: False)
    assert all(same(*pair) for pair in zip(ahead, walk(model), strict=True))


def test_the_next_step_finds_its_rows_filled(model: WorldModel, prefills: list[int]) -> None:
    """All rows of guided worlds, in another order and with a fork; nothing is read of what has ended."""
    states = [begin(model, world) for world in (2, 5, 0)]
    for step in range(4):
        pairs = model.imagine_batch(states, ["look up"] * len(states), sampling=GUIDED_BY_PICTURES)
        states = [state for state, _ in pairs][::-1]
        if step == 1:
            states.append(states[0])
    assert prefills[0] > 0 and prefills[1:] == [0, 0, 0]
    picture = model.begin(mode="t2i", prompt="a red ball", size=(64, 64))
    before = model.caches.num_prefills
    model.imagine(picture, "", sampling=FREE)
    assert model.caches.num_prefills - before == prefills[-1] > 0


def test_on_a_cpu_nothing_is_read_ahead(opened: WorldModel) -> None:
    opened.caches.clear()
    state, _ = opened.imagine(begin(opened, 0), "look up", sampling=FREE)
    before = opened.caches.num_prefills
    opened.caches.read_ahead(opened._context.readings(state, num_rows=1))
    assert opened.caches.num_prefills == before


@pytest.mark.parametrize("computed", [False, True])
def test_an_error_in_it_keeps_what_was_drawn(
    model: WorldModel, monkeypatch: pytest.MonkeyPatch, computed: bool
) -> None:
    """The frames come, with a warning, and the worlds go on as they would have; also where rows of the cache
    were half filled when it came."""
    states = [begin(model, world) for world in range(3)]
    first = model.imagine_batch(states, ["look up"] * 3, sampling=FREE)
    second = model.imagine_batch([state for state, _ in first], ["turn left"] * 3, sampling=FREE)
    model.caches.clear()
    read_ahead, forward = CachePool.read_ahead, ExactTransformer.forward

    def failing(*args: object, **more: object) -> None:
        if computed:
            forward(*args, **more)  # type: ignore[arg-type]
        raise torch.OutOfMemoryError("no memory")

    def breaking(pool: CachePool, sequences: list[Reading]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(ExactTransformer, "forward", failing)
            read_ahead(pool, sequences)

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="not ahead: no memory"):
        patch.setattr(CachePool, "read_ahead", breaking)
        found = model.imagine_batch(states, ["look up"] * 3, sampling=FREE)
    assert all(same(*pair) for pair in zip(found, first, strict=True))
    found = model.imagine_batch([state for state, _ in found], ["turn left"] * 3, sampling=FREE)
    assert all(same(*pair) for pair in zip(found, second, strict=True))


def test_it_takes_no_memory_and_no_rows_of_others(model: WorldModel) -> None:
    """Where there is no room, or no row that holds what comes before, the next step reads."""
    pool = CachePool(model._transformer)
    ids = [tuple(np.random.default_rng(i).integers(0, 97, 30).tolist()) for i in range(4)]
    with torch.inference_mode():
        pool.read_ahead([Reading([ids[0]])])
        assert pool.num_prefills == 0, "no working cache"
        cache = pool.prepare([ids[:1], ids[1:2]], room=34).cache
        assert cache.capacity == 64
        pool.read_ahead([Reading([ids[0], ids[2], ids[3]]), Reading([ids[3]]), Reading([ids[3], ids[2]])])
        assert pool.num_prefills == 2
        pool.read_ahead([Reading([ids[0], ids[2] + ids[3]]), Reading([ids[1], ids[2]])])
        assert pool.num_prefills == 3 and cache.capacity == 64
        pool.read_ahead([Reading([ids[1], ids[2]])])
        assert pool.num_prefills == 3, "it is there"
        pool.prepare([[ids[0], ids[2]], [ids[1], ids[2]]], room=1)
        assert pool.num_prefills == 4


@pytest.mark.gpu
def test_a_gpu_reads_ahead_and_nobody_waits_for_it(
    tiny_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that a walk of guided worlds finds all rows filled from its second step on, that nothing in the
    reading waits for the GPU, and that the same walk from empty caches draws equal pictures."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    model = load(copied(tiny_folder, tmp_path / "tiny", noise=Noise()), device="cuda")
    read_ahead, computed = CachePool.read_ahead, list[int]()

    def watched(pool: CachePool, sequences: list[Reading]) -> None:
        before = pool.num_prefills
        torch.cuda.set_sync_debug_mode("error" if computed else "default")  # the first may compile kernels
        try:
            read_ahead(pool, sequences)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        computed.append(pool.num_prefills - before)

    monkeypatch.setattr(CachePool, "read_ahead", watched)
    walks: list[list[Result]] = []
    for _ in range(2):
        model.caches.clear()
        states, results = [begin(model, world) for world in (0, 2, 5, 7)], list[Result]()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="pictures are read at the next step")
            for step in range(4):
                before = model.caches.num_prefills
                pairs = model.imagine_batch(states, ["look up"] * 4, sampling=GUIDED_BY_PICTURES)
                if step:
                    assert model.caches.num_prefills - before == computed[-1] > 0
                results += pairs
                states = [state for state, _ in pairs]
        walks.append(results)
    assert all(same(*pair) for pair in zip(*walks, strict=True))
