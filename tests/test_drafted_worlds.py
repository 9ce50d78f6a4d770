"""Worlds and environments that draft: alone, together, in a stream, at the end of the context."""

from __future__ import annotations

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest

from emuworld.decoding.sampling import MAX_DRAFT_WINDOW, Sampling
from emuworld.world_model import WorldModel, WorldState


def drawn(model: WorldModel, state: WorldState, window: int) -> tuple[int, ...]:
    sampling = replace(model.default_sampling(state.mode), draft_window=window)
    return model.imagine(state, "turn left", sampling=sampling)[0].ids


def test_worlds_draft_alone_together_and_in_a_stream(tiny_model: WorldModel) -> None:
    states = [
        tiny_model.begin(mode=mode, prompt="a room", seed=seed, size=size)
        for seed, (mode, size) in enumerate([("explore", (64, 96)), ("t2i", (128, 32)), ("vla", (32, 32))])
    ]
    settings = [replace(tiny_model.default_sampling(s.mode), draft_window=5) for s in states]
    tiny_model.caches.clear()
    together = tiny_model.imagine_batch(states, ["turn left"] * 3, sampling=settings)
    for state, (after, segment), sampling in zip(states, together, settings, strict=True):
        tiny_model.caches.clear()
        assert drawn(tiny_model, state, 5) == after.ids
        *_, last = tiny_model.stream(state, "turn left", sampling=sampling)
        assert np.array_equal(last.segment.image, segment.image)  # type: ignore[union-attr]


def test_a_window_at_the_end_of_the_context_draws_the_last_picture(tiny_model: WorldModel) -> None:
    """Guesses never reach beyond the picture, so it may end where the context ends."""
    codes = np.random.default_rng(0).integers(0, 64, (13, 16, 16))
    state = tiny_model.begin(mode="explore", prompt="a room", images=codes, seed=1, size=(256, 256))
    while tiny_model.fits(state, ""):
        state, _ = tiny_model.imagine(
            state, "", sampling=Sampling(guidance=1.5, draft_window=MAX_DRAFT_WINDOW)
        )
    assert tiny_model.max_tokens - len(state.ids) < 300


@pytest.mark.parametrize("window", [-1, MAX_DRAFT_WINDOW + 1])
def test_windows_out_of_bounds_are_refused(window: int) -> None:
    with pytest.raises(ValueError, match="draft_window must lie in 0"):
        Sampling(draft_window=window)


def test_environments_draft_on_request(tiny_folder: str) -> None:
    """The same seed gives the same frames through any window, alone and in a vector environment."""
    frames = []
    for window in (1, 6):
        env = gym.make("EmuWorld/Explore-v0", model=tiny_folder, draft_window=window)
        env.reset(seed=3)
        frames.append(env.step("turn left")[0])
    envs = gym.make_vec("EmuWorld/Explore-v0", num_envs=2, model=tiny_folder, draft_window=6)
    envs.reset(seed=[3, 4])
    frames.append(envs.step(["turn left", "move forward"])[0][0])
    assert np.array_equal(frames[0], frames[1]) and np.array_equal(frames[0], frames[2])
