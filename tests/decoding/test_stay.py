"""`Sampling.stay`: codes of the picture before are likelier at their own places; guided and drafted too."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from emuworld.decoding.sampling import Sampling, Truncation, favour, guide
from emuworld.state import block_codes, image_blocks
from emuworld.world_model import WorldModel, WorldState

FREE = Sampling(image=Truncation(temperature=1.0), guidance=1.5, image_guidance=1.2)


def edited(
    model: WorldModel, *, stay: float, seed: int = 1, mode: str = "x2i", window: int = 0
) -> WorldState:
    codes = np.random.default_rng(seed).integers(0, 64, (1, 4, 6))
    state = model.begin(mode=mode, prompt="a room", images=codes, seed=seed, size=(64, 96))
    sampling = dataclasses.replace(FREE, stay=stay, draft_window=window)
    return model.imagine(state, "", sampling=sampling)[0]


def codes_of(model: WorldModel, state: WorldState) -> tuple[np.ndarray, np.ndarray]:
    """Of the picture before, and of the one drawn."""
    vocabulary = model.manifest.vocabulary
    before, after = (image_blocks(ids, vocabulary)[-1] for ids in (state.prompt_ids, state.answer_ids))
    return block_codes(before, vocabulary), block_codes(after, vocabulary)


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("mode", ["x2i", "vla"])
def test_much_of_it_copies_the_picture(tiny_model: WorldModel, mode: str, window: int) -> None:
    before, copied = codes_of(tiny_model, edited(tiny_model, stay=1e4, mode=mode, window=window))
    assert np.array_equal(before, copied)
    before, free = codes_of(tiny_model, edited(tiny_model, stay=0.0, mode=mode, window=window))
    assert (before == free).mean() < 0.5
    before, avoided = codes_of(tiny_model, edited(tiny_model, stay=-1e4, mode=mode, window=window))
    assert (before != avoided).all()


def test_worlds_with_and_without_it_share_a_batch(tiny_model: WorldModel) -> None:
    codes = np.random.default_rng(3).integers(0, 64, (1, 4, 6))
    states = [
        tiny_model.begin(mode="x2i", prompt="a room", images=codes, seed=seed, size=(64, 96))
        for seed in range(4)
    ]
    settings = [dataclasses.replace(FREE, stay=stay) for stay in (0.0, 2.0, 2.0, 5.0)]
    together = tiny_model.imagine_batch(states, [""] * 4, sampling=settings)
    for state, sampling, (after, _) in zip(states, settings, together, strict=True):
        assert tiny_model.imagine(state, "", sampling=sampling)[0].ids == after.ids


def test_without_a_picture_before_or_with_one_of_another_size_it_does_nothing(tiny_model: WorldModel) -> None:
    codes = np.random.default_rng(3).integers(0, 64, (1, 4, 6))
    for images, size in (((), (64, 96)), (codes, (96, 64))):
        state = tiny_model.begin(mode="x2i", prompt="a room", images=images, seed=1, size=size)
        drawn = [
            tiny_model.imagine(state, "", sampling=dataclasses.replace(FREE, stay=stay))[0].ids
            for stay in (0.0, 1e4)
        ]
        assert drawn[0] == drawn[1]


def test_guidance_lets_it_through_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(3, 8, generator=generator) for _ in range(3)]
    ids_R = torch.tensor([2, -1, 7])
    plain = guide(*rows, guidance=3.0, image_guidance=1.5)
    favoured = guide(*(favour(row, ids_R, amount=2.5) for row in rows), guidance=3.0, image_guidance=1.5)
    added = favoured.log_softmax(-1) - favour(plain, ids_R, amount=2.5).log_softmax(-1)
    torch.testing.assert_close(added, torch.zeros_like(added), atol=1e-5, rtol=0)
    assert torch.equal(favour(rows[0], torch.full((3,), -1), amount=2.5), rows[0])


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="stay must be finite"):
        Sampling(stay=float("inf"))
    assert Sampling.from_json(Sampling(stay=1.5).to_json()).stay == 1.5
