"""A row of an image drawn in one call is what one draw after another gives, token for token."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from emuworld.decoding import draws
from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.model.exact import ExactTransformer
from emuworld.state import WorldState
from emuworld.world_model import WorldModel

FREE = Sampling(image=Truncation(top_p=0.9), guidance=2.0)
SETTINGS = [
    FREE,
    dataclasses.replace(FREE, image_guidance=1.5, stay=1.0),
    Sampling(image=Truncation(temperature=0.7)),
    dataclasses.replace(FREE, stay=-2.0),
    dataclasses.replace(FREE, guidance=1.0, image=Truncation(temperature=1.3, top_p=0.5)),
]
SIZES = [(64, 96), (64, 96), (32, 64), (64, 64), (96, 64)]


def begun(model: WorldModel) -> list[WorldState]:
    codes = np.random.default_rng(3).integers(0, 64, (1, 4, 6))
    return [
        model.begin(mode="vla", prompt="a room", images=codes, seed=seed, size=size)
        for seed, size in enumerate(SIZES)
    ]


def imagined(model: WorldModel, count: int) -> list[tuple[int, ...]]:
    """Two segments each of the first so many worlds, in one batch."""
    model.caches.clear()
    states = begun(model)[:count]
    for _ in range(2):
        steps = model.imagine_batch(states, ["pick it up"] * count, sampling=SETTINGS[:count])
        states = [state for state, _ in steps]
    return [state.ids for state in states]


def test_worlds_of_all_kinds(
    tiny_model: WorldModel, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to three rows, other settings and other widths, alone and together."""
    calls = []

    def counted(self: ExactTransformer, ids_WN: np.ndarray, *given: object, **others: object) -> torch.Tensor:
        calls.append(ids_WN.shape)
        return draw_ahead(self, ids_WN, *given, **others)  # type: ignore[arg-type]

    draw_ahead = ExactTransformer.draw_ahead
    monkeypatch.setattr(ExactTransformer, "draw_ahead", counted)
    ahead = [imagined(tiny_model, count) for count in (1, len(SETTINGS))]
    assert {shape[0] for shape in calls} >= {1, len(SETTINGS)} and max(shape[1] for shape in calls) == 6
    del calls[:]
    monkeypatch.setattr(draws.Draw, "is_compiled", False)
    assert [imagined(tiny_model, count) for count in (1, len(SETTINGS))] == ahead
    assert not calls and ahead[0][0] == ahead[1][0]


@pytest.mark.parametrize("image", [Truncation(temperature=0.0), Truncation(top_k=8)])
def test_what_machine_code_cannot_draw_is_drawn_one_by_one(
    tiny_model: WorldModel, image: Truncation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object, **others: object) -> None:
        raise AssertionError("drawn ahead")

    monkeypatch.setattr(ExactTransformer, "draw_ahead", refuse)
    for sampling, refused in ((dataclasses.replace(FREE, image=image), False), (FREE, True)):
        (state, *_) = begun(tiny_model)
        if refused:
            with pytest.raises(AssertionError, match="drawn ahead"):
                tiny_model.imagine(state, "", sampling=sampling)
        else:
            assert tiny_model.imagine(state, "", sampling=sampling)[1].image is not None
