"""Captions say what is in view and are read back as what they say."""

from dataclasses import replace

import numpy as np
import pytest

from emuworld.envs.rooms.captions import (
    GENERIC_WALKS,
    View,
    VisibleObject,
    asked_caption,
    caption,
    parse_caption,
    read_caption,
    walk_prompt,
)


def view_of(
    *names: str, walls: tuple[str, ...] = ("green", "blue"), landmarks: tuple[str, ...] = ("table", "door")
) -> View:
    objects = []
    for index, name in enumerate(names):
        colour, shape = name.split()
        column = (0.7, 0.2, 0.5, 0.9, 0.1)[index]
        objects.append(
            VisibleObject(colour=colour, shape=shape, pixels=900 - index, column=column, distance_m=2.0)
        )
    return View(
        objects=tuple(objects),
        walls=tuple((wall, 0.3) for wall in walls),
        floor=("wooden", 0.3),
        landmarks=tuple((noun, 0.05) for noun in landmarks),
        near_share=0.0,
    )


def generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def test_the_plain_caption_names_objects_by_size() -> None:
    assert caption(view_of("red ball")) == "a room with a red ball"
    assert caption(view_of("orange egg", "blue box")) == "a room with an orange egg and a blue box"
    assert (
        caption(view_of("red ball", "blue box", "white cone"))
        == "a room with a red ball, a blue box and a white cone"
    )


def test_what_is_tiny_or_cut_by_the_edge_is_not_named() -> None:
    red, blue, white = view_of("red ball", "blue box", "white cone").objects
    cut, tiny = replace(blue, in_frame=0.4), replace(white, pixels=80)
    view = replace(view_of(), objects=(red, cut, tiny))
    assert [item.identity for item in view.named] == ["red ball"]
    assert caption(view) == "a room with a red ball"
    assert caption(replace(view, objects=(cut, tiny))) == caption(view_of())
    for seed in range(40):
        words = caption(view, generator(seed)) + walk_prompt(view, generator(seed))
        assert "blue box" not in words and "white cone" not in words


def test_an_empty_view_is_called_by_its_walls_or_landmarks() -> None:
    assert caption(view_of(walls=("blue",), landmarks=())) == "an empty room with blue walls"
    assert caption(view_of(landmarks=())) == "an empty room with a green wall and a blue wall"
    assert caption(view_of(walls=(), landmarks=())) == "an empty room"
    assert caption(view_of(landmarks=("table",))) == "a room with a table"


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_and_walk_prompts_are_read_back(split: str) -> None:
    names = ("red ball", "blue box", "white cone", "orange egg", "black pyramid")
    rng = generator(1)
    for count in range(6):
        view = view_of(*names[:count])
        pairs = {(item.colour, item.shape) for item in view.objects}
        for _ in range(200):
            said = caption(view, rng, split=split)
            read = parse_caption(said)
            assert read is not None, said
            assert set(read) == (pairs if count <= 4 else {(o.colour, o.shape) for o in view.objects[:4]}), (
                said
            )
            prompt = walk_prompt(view, rng, split=split)
            read = parse_caption(prompt)
            assert read is not None, prompt
            assert prompt in GENERIC_WALKS or set(read) <= pairs


def test_held_out_phrasings_are_the_test_split_s_alone() -> None:
    rng = generator(2)
    view = view_of("red ball", "blue box")
    said = {split: {caption(view, rng, split=split) for _ in range(1500)} for split in ("train", "test")}
    for words in ("a view of a room with", "on the left of", "on the right of"):
        assert not any(words in text for text in said["train"])
    assert any("a view of a room with" in text for text in said["test"])
    assert any("on the right of" in text for text in said["test"])


def test_training_asks_in_freer_words_at_times() -> None:
    view = view_of("red ball", "blue box")
    asked = {
        split: [asked_caption(view, rng, split=split) for rng in map(generator, range(400))]
        for split in ("train", "validation", "test")
    }
    for split in ("validation", "test"):
        assert asked[split] == [caption(view, rng, split=split) for rng in map(generator, range(400))]
    free = [text for text in asked["train"] if parse_caption(text) is None]
    assert 60 < len(free) < 170
    assert all("red ball" in text.lower() and "blue box" in text.lower() for text in asked["train"])
    nothing = view_of()
    assert all(parse_caption(asked_caption(nothing, generator(seed))) == () for seed in range(50))


def test_relations_say_where_things_are() -> None:
    rng = generator(3)
    view = view_of("red ball", "blue box")  # the ball is right of the box
    related = [
        text
        for text in (caption(view, rng) for _ in range(400))
        if " of a blue box" in text and "to the" in text
    ]
    assert related and all("a red ball to the right of a blue box" in text for text in related)
    content = read_caption("a red ball to the right of a blue box")
    assert content is not None
    assert content.objects == (("red", "ball"), ("blue", "box"))
    assert content.left_to_right == (("blue", "box"), ("red", "ball"))


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("a room with a red ball and a blue box", (("red", "ball"), ("blue", "box"))),
        ("Explore a room with a RED ball, and a blue box.", (("red", "ball"), ("blue", "box"))),
        ("an empty room with blue walls", ()),
        ("a grey wall and a door", ()),
        ("Look around", ()),
        ("a red ball on a checkered floor near a rug", (("red", "ball"),)),
        ("a ball", None),
        ("a red dragon", None),
        ("an empty room with a red ball", None),
        ("the", None),
        ("", None),
        ("paint the room", None),
    ],
)
def test_what_can_be_read(text: str, pairs: tuple[tuple[str, str], ...] | None) -> None:
    assert parse_caption(text) == pairs


def test_details_are_read() -> None:
    content = read_caption("a room with a red ball in front of a green wall")
    assert content is not None and content.walls == ("green",)
    content = read_caption("a view of a white cone on a tiled floor near a sofa")
    assert content is not None and content.floor == "tiled" and content.landmarks == ("sofa",)
