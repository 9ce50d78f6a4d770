"""Segments of unequal worlds in one batch, guidance by pictures, and every way in which a segment stops."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from emuworld.checkpoint_folder import find, open_parts
from emuworld.decoding.sampling import Sampling, Truncation
from emuworld.tokens.sequence import MODES
from emuworld.world_model import Segment, WorldModel, load

UNGUIDED = Sampling()
GUIDED = Sampling(text=Truncation(top_p=0.9), image=Truncation(top_k=20), guidance=3.0)
COMMANDS = ("turn left", "", None, "move forward", "go to the red ball", None, "look up", "turn right")


def picture(seed: int, height: int = 128, width: int = 128) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pixels(segment: Segment) -> bytes | None:
    return None if segment.image is None else segment.image.tobytes()


@pytest.fixture
def model(tiny_model: WorldModel) -> Iterator[WorldModel]:
    """The shared handle without anything that earlier tests left in its caches."""
    tiny_model.caches.clear()
    yield tiny_model


def test_one_call_equals_eight_single_calls(model: WorldModel) -> None:
    """Eight unequal prompts of different modes, sizes, pictures and settings; three segments each."""
    three_way = dataclasses.replace(GUIDED, image_guidance=1.5)
    settings = [None, GUIDED, UNGUIDED, three_way, None, three_way, Sampling.greedy(guidance=2.0), None]
    modes = [*MODES, "explore", "story"]
    states = [
        model.begin(
            mode=mode,
            prompt="a red ball " * (i + 1),
            images=[picture(i), picture(i + 8, 50, 70)][: (i * 2) % 3],
            seed=i,
            size=((128, 128), (64, 96), (32, 32))[i % 3],
        )
        for i, mode in enumerate(modes)
    ]
    segments = 0
    for step in range(3):
        alive = [i for i, state in enumerate(states) if not state.ended]
        texts = [COMMANDS[(i + step) % len(COMMANDS)] for i in alive]
        together = model.imagine_batch(
            [states[i] for i in alive], texts, sampling=[settings[i] for i in alive]
        )
        for i, text, result in zip(alive, texts, together, strict=True):
            model.caches.clear()
            single = model.imagine(states[i], text, sampling=settings[i])
            assert single[0].answer_ids == result[0].answer_ids, (step, i)
            assert single[0] == result[0]
            assert pixels(single[1]) == pixels(result[1])
            states[i] = result[0]
            segments += 1
    assert segments >= 14


def test_image_guidance_counts_only_beside_reference_pictures(model: WorldModel) -> None:
    plain = Sampling.greedy(guidance=3.0)
    strong = dataclasses.replace(plain, image_guidance=4.0)
    for images, equal in (([], True), ([picture(0)], False)):
        state = model.begin(mode="explore", prompt="a room", images=images, seed=1)
        one, other = (model.imagine(state, "look up", sampling=s)[0] for s in (plain, strong))
        assert (one.answer_ids == other.answer_ids) == equal
    # No pull of anything: what the unconditional prompt alone would draw, whatever the references.
    blind = Sampling.greedy(guidance=0.0, image_guidance=0.0)
    drawn = {
        model.imagine(model.begin(mode="explore", prompt=text, images=[picture(i)]), "", sampling=blind)[
            0
        ].answer_ids
        for i, text in enumerate(("a room", "a box", ""))
    }
    assert len(drawn) == 1


def test_every_way_an_answer_can_stop_is_clean_and_named(tiny_folder: str) -> None:
    """With room for one picture and twenty words, answers draw or end, fit the context and say why."""
    parts = open_parts(find(tiny_folder), device=torch.device("cpu"))
    parts = dataclasses.replace(parts, manifest=dataclasses.replace(parts.manifest, max_text_tokens=21))
    prompt = WorldModel(parts).begin(mode="explore", prompt="room 0").prompt_ids
    limit = len(prompt) + (3 + 2 + 64 + 7 + 1) + 2 + 20
    config = dataclasses.replace(parts.transformer.config, max_position_embeddings=limit)
    parts.transformer.config = config  # type: ignore[misc]
    model = WorldModel(parts)
    outcomes = {}
    for seed in range(24):
        state = model.begin(mode="explore", prompt=f"room {seed % 10}", seed=seed)
        longest = len(state.ids)
        while not state.ended:
            state, segment = model.imagine(state, None, sampling=UNGUIDED)
            outcomes.setdefault(segment.stop_reason.value, (state, segment))
            assert len(state.ids) <= limit
            assert len(state.ids) > longest
            longest = len(state.ids)
            assert segment.ended == state.ended == (segment.image is None)
            assert (segment.stop_reason == "image") == (segment.image is not None)
        assert state.answer_ids[-1] == model.manifest.vocabulary.eos
        assert not model.fits(state, "")
        with pytest.raises(ValueError, match="has ended"):
            model.imagine(state, "")
    assert set(outcomes) >= {"image", "context", "text_limit"}
    assert len(outcomes["text_limit"][0].answer_ids) >= 21 + 2


def test_the_cap_of_an_answer_counts_all_its_segments(model: WorldModel) -> None:
    state = model.begin(mode="explore", prompt="a room", seed=2)
    block = 3 + 2 + 64 + 7 + 1
    capped = dataclasses.replace(UNGUIDED, max_new_tokens=2 * block + 2)
    for _ in range(2):
        state, segment = model.imagine(state, "", sampling=capped)
        assert (segment.ended, segment.stop_reason) == (False, "image")
    after, segment = model.imagine(state, "", sampling=capped)
    assert (segment.text, segment.image, segment.ended) == ("", None, True)
    assert segment.stop_reason == "token_limit"
    assert len(after.answer_ids) == 2 * block + 2
    # The same state goes on where the cap is higher: it belongs to the settings, not to the world.
    assert model.imagine(state, "", sampling=UNGUIDED)[1].stop_reason == "image"


@pytest.mark.parametrize("mode", MODES)
def test_the_first_picture_ends_t2i_and_x2i_only(model: WorldModel, mode: str) -> None:
    state = model.begin(mode=mode, prompt="a red ball", images=[picture(1)] * (mode == "x2i"), seed=3)
    after, segment = model.imagine(state, "")
    assert segment.image is not None
    assert segment.stop_reason == "image"
    assert segment.ended == after.ended == (mode in ("t2i", "x2i"))
    assert after.answer_ids[-1] == model.manifest.vocabulary.eoi


@pytest.mark.gpu
def test_on_a_gpu_the_host_waits_once_an_image_row(tiny_folder: str) -> None:
    """Proves that pictures twice as wide cost no more waiting, also when one world of the batch is done."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: waiting for one cannot be counted")
    model = load(tiny_folder, device="cuda")

    def waits(width: int) -> int:
        states = [
            model.begin(mode="explore", prompt="a room", seed=seed, size=(height, width))
            for seed, height in enumerate((64, 32, 64))
        ]
        for _ in range(3):  # the first calls compile kernels and record graphs
            model.imagine_batch(states, ["look up"] * 3, sampling=GUIDED)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                model.imagine_batch(states, ["look up"] * 3, sampling=GUIDED)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)

    narrow, wide = waits(96), waits(192)
    assert 0 < wide <= narrow
