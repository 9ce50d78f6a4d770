"""Prompts and sizes of new worlds: the published table and area rule to the letter, for both kinds of
checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from emuworld import pictures
from emuworld.checkpoint_folder import find, open_parts
from emuworld.state import block_codes, image_blocks
from emuworld.tokens.sequence import MODES, prompt_ids, unconditional_ids
from emuworld.world_model import WorldModel, WorldState

# Fact sheet, section 4.4: tokens h*w.
TABLE = "4:3 55*73 · 21:9 41*97 · 16:9 47*85 · 3:2 52*78 · 1:1 64*64 · 3:4 73*55 · 9:16 85*47 · 2:3 78*52"


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def published(tiny_folder: str) -> WorldModel:
    """The tiny weights with the sizes and the context of the published checkpoint."""
    parts = open_parts(find(tiny_folder), device=torch.device("cpu"))
    parts.transformer.config = dataclasses.replace(parts.transformer.config, max_position_embeddings=32_768)  # type: ignore[misc]
    manifest = dataclasses.replace(
        parts.manifest, default_size=None, smallest_side=128, largest_side=2048, modes=("t2i",)
    )
    return WorldModel(dataclasses.replace(parts, manifest=manifest))


def reference_sizes(model: WorldModel, state: WorldState) -> list[tuple[int, ...]]:
    """Height and width in tokens of each picture in the prompt."""
    vocabulary = model.manifest.vocabulary
    return [block_codes(block, vocabulary).shape for block in image_blocks(state.prompt_ids, vocabulary)]


@pytest.mark.parametrize(
    ("size", "area", "expected"),
    [  # (height, width); the first two stand in the fact sheet
        ((1080, 1920), 518_400, (544, 960)),
        ((1080, 1920), 1_048_576, (768, 1360)),
        ((10, 10), 518_400, (720, 720)),
        ((4000, 4000), 1_048_576, (1024, 1024)),
        ((480, 640), 1_048_576, (880, 1184)),  # sqrt(786432) = 886.8; 886 * 4 / 3 = 1181.3
        ((100, 10_000), 518_400, (80, 7200)),  # never clamped: sqrt(5184) = 72, 72 + 8 = 80
    ],
)
def test_area_resizing_by_hand(size: tuple[int, int], area: int, expected: tuple[int, int]) -> None:
    assert pictures.area_size(size, area=area) == expected


def test_references_are_resized_bicubically() -> None:
    image = picture(0, 90, 160)
    expected = np.asarray(Image.fromarray(image).resize((960, 544), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pictures.area_resized(image, area=518_400), expected)


def test_a_thread_of_a_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="too narrow"):
        pictures.area_size((1, 100_000), area=518_400)


@pytest.mark.parametrize("entry", TABLE.split(" · "))
def test_the_published_table(published: WorldModel, entry: str) -> None:
    name, tokens = entry.split(" ")
    height, width = (16 * int(side) for side in tokens.split("*"))
    for mode in ("t2i", "x2i"):
        assert published.picture_size(name, mode=mode) == (height, width)
    state = published.begin(mode="t2i", prompt="a cat", size=name)
    assert state.size == (height, width)


def test_names_of_sizes(published: WorldModel, tiny_model: WorldModel) -> None:
    assert published.picture_size("default", mode="t2i") == (55 * 16, 73 * 16)
    assert published.picture_size("auto", mode="t2i") is published.picture_size(None, mode="t2i") is None
    # 720 x 720 pixels where an answer holds many pictures: sqrt(518400 * 9 / 16) = 540.
    assert published.picture_size("16:9", mode="story") == (544, 960)
    assert published.picture_size("1:1", mode="explore") == (720, 720)
    # A checkpoint with a size of its own keeps its area, 128 x 128 here: sqrt(16384 * 9 / 16) = 96.
    for mode in MODES:
        assert tiny_model.picture_size("default", mode=mode) == (128, 128)
        assert tiny_model.picture_size("16:9", mode=mode) == (96, 176)
        assert tiny_model.picture_size("9:16", mode=mode) == (176, 96)
        assert tiny_model.picture_size("auto", mode=mode) is None
    for name in pictures.SIZE_NAMES:
        state = tiny_model.begin(mode="t2i", size=name)
        if state.size is not None:
            tiny_model.manifest.check_size(state.size)


def test_ratios_stay_within_what_a_checkpoint_draws(published: WorldModel) -> None:
    manifest = dataclasses.replace(published.manifest, largest_side=512)
    for name in pictures.ASPECTS:
        height, width = pictures.asked_size(name, mode="t2i", manifest=manifest) or (0, 0)
        wide, high = map(int, name.split(":"))
        assert max(height, width) <= 512
        assert abs(width / height - wide / high) < 0.15 * wide / high


@pytest.mark.parametrize("size", ["5:4", "", "AUTO", (100, 128), (2064, 128), (128,), (112, 128)])
def test_unusable_sizes_say_why(published: WorldModel, size: Any) -> None:
    with pytest.raises(ValueError, match="size"):
        published.begin(mode="t2i", size=size)


def test_every_mode_begins_whatever_the_checkpoint_was_trained_for(published: WorldModel) -> None:
    assert published.manifest.modes == ("t2i",)
    for mode in MODES:
        state = published.begin(mode=mode, prompt="a red box", size=(128, 128))
        expected = prompt_ids(mode, question="a red box", tokenizer=published.tokenizer)
        assert list(state.prompt_ids) == expected
        assert published.imagine(state, "")[0].mode == mode


@pytest.fixture
def unread(published: WorldModel, monkeypatch: pytest.MonkeyPatch) -> WorldModel:
    """The same handle with a quick `encode` that sees sizes alone."""

    def encode(images: list[np.ndarray]) -> list[np.ndarray]:
        return [np.full((image.shape[0] // 16, image.shape[1] // 16), 3) for image in images]

    monkeypatch.setattr(published, "encode", encode)
    return published


def test_a_reference_is_read_at_the_modes_area(published: WorldModel) -> None:
    image = picture(0, 108, 192)
    codes = published.encode([pictures.area_resized(image, area=518_400)])
    state = published.begin(mode="story", prompt="go on", images=[image])
    assert list(state.prompt_ids) == prompt_ids(
        "story", question="go on", images=codes, tokenizer=published.tokenizer
    )
    assert codes[0].shape == (34, 60)


def test_references_keep_their_own_sizes(unread: WorldModel) -> None:
    images = [picture(0, 108, 192), picture(1, 300, 300), picture(2, 300, 100)]
    state = unread.begin(mode="story", prompt="go on", images=images)
    assert reference_sizes(unread, state) == [(34, 60), (45, 45), (78, 26)]
    assert state.size is None, "of several references none decides"
    shown = [np.full(size, 3) for size in ((34, 60), (45, 45), (78, 26))]
    assert unread._context.unguided_chunks(state) == [
        tuple(unconditional_ids(shown, tokenizer=unread.tokenizer))
    ]


def test_one_reference_decides_unless_told_otherwise(unread: WorldModel) -> None:
    def begin(size: Any = None, image: np.ndarray | None = None) -> WorldState:
        return unread.begin(
            mode="story", size=size, images=[picture(0, 108, 192) if image is None else image]
        )

    assert begin().size == (544, 960)
    assert begin((256, 128)).size == (256, 128)
    assert begin("1:1").size == (720, 720)
    assert begin("auto").size is None
    assert reference_sizes(unread, begin((256, 128))) == [(34, 60)], "the world's size is not the reference's"
    # Codes stay as they are and say their size; a strip is cut to what can be drawn, as a size of its own.
    assert begin(image=np.zeros((8, 10), dtype=np.int64)).size == (128, 160)
    assert begin(image=np.zeros((4, 200), dtype=np.int64)).size == (128, 2048)


def test_a_checkpoint_with_its_own_size_stretches_its_references(tiny_model: WorldModel) -> None:
    images = [picture(0, 108, 192), picture(1, 300, 300)]
    for size, tokens in ((None, (8, 8)), ((64, 96), (4, 6)), ("auto", (8, 8))):
        state = tiny_model.begin(mode="x2i", images=images, size=size)
        assert reference_sizes(tiny_model, state) == [tokens] * 2


def test_codes_begin_a_world_without_a_loss(tiny_model: WorldModel) -> None:
    state = tiny_model.begin(mode="explore", images=[picture(0, 128, 128)], seed=1)
    state, segment = tiny_model.imagine(state, "look up")
    first, drawn = tiny_model.picture_codes(state)
    again = tiny_model.begin(mode="x2i", prompt="make it red", images=[drawn, first])
    for one, other in zip(tiny_model.picture_codes(again), (drawn, first), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(tiny_model.decode([drawn])[0], segment.image)
    assert tiny_model.picture_codes(tiny_model.begin(mode="t2i")) == []


@pytest.mark.parametrize("codes", [np.full((4, 4), 64), np.full((4, 4), -1), np.zeros((0, 4), np.int64)])
def test_unusable_codes_say_why(tiny_model: WorldModel, codes: np.ndarray) -> None:
    with pytest.raises(ValueError, match="codes"):
        tiny_model.begin(mode="x2i", images=[codes])
