"""Answers as `.pb` files: the published layout both ways, from what the model thinks and draws to the file.

The published side is played by protobuf classes that are built here, from the fact sheet's table (section 6)
and independently of `emuworld.story_schema`, and by a writer written here from the same section.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from safetensors.torch import load_file, save_file

from emuworld.answers import load_story, save_story, to_story
from emuworld.manifest import Manifest
from emuworld.state import Segment
from emuworld.story import StoryImage
from emuworld.world_model import load

# (number, name, type, message) of each field; "*" repeated, "map" a map from text.
TABLE: dict[str, list[tuple[int, str, str]]] = {
    "TimeStamp": [(1, "start", "double"), (2, "end", "double")],
    "Image": [
        (1, "width", "int32"),
        (2, "height", "int32"),
        (3, "format", "ImageFormat"),
        (4, "image_data", "bytes"),
        (5, "image_path", "string"),
    ],
    "ImageMeta": [
        (1, "image_id", "string"),
        (2, "timestamp", "TimeStamp"),
        (3, "caption", "string"),
        (4, "detail_caption", "string"),
        (5, "features", "map bytes"),
        (6, "scores", "map double"),
        (7, "chain_of_thought", "string"),
        (8, "cot_translate", "string"),
        (11, "image", "Image"),
        (12, "is_keyframe_status", "sint32"),
    ],
    "Segment": [
        (1, "timestamp", "TimeStamp"),
        (2, "asr", "string"),
        (3, "caption", "string"),
        (4, "asr_translate", "string"),
        (101, "images", "*ImageMeta"),
    ],
    "Clip": [
        (1, "clip_id", "string"),
        (2, "timestamp", "TimeStamp"),
        (11, "story", "string"),
        (21, "caption", "string"),
        (101, "segments", "*Segment"),
    ],
    "Story": [
        (1, "story_id", "string"),
        (2, "clips", "*Clip"),
        (3, "deprecated", "bool"),
        (4, "deprecate_reason", "string"),
        (11, "summary", "string"),
        (12, "question", "string"),
        (13, "refined_summary", "string"),
        (14, "question_translate", "string"),
        (15, "summary_translate", "string"),
        (16, "refined_summary_translate", "string"),
        (17, "reference_images", "*ImageMeta"),
    ],
}
PNG = 2


def independent_story_class() -> Any:
    """`emu3p5.story.Story` from the table above, in a descriptor pool of its own."""
    proto = descriptor_pb2.FileDescriptorProto(
        name="published.proto", package="emu3p5.story", syntax="proto3"
    )
    enum = proto.enum_type.add(name="ImageFormat")
    for number, name in enumerate(["UNKNOWN", "JPEG", "PNG", "WEBP", "BMP"]):
        enum.value.add(name=name, number=number)
    scalars = {"double": 1, "int32": 5, "bool": 8, "string": 9, "bytes": 12, "sint32": 17}
    for message_name, fields in TABLE.items():
        message = proto.message_type.add(name=message_name)
        for number, name, kind in fields:
            field = message.field.add(name=name, number=number, label=1)
            if kind.startswith("map "):
                entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, label=1, type=9)
                entry.field.add(name="value", number=2, label=1, type=scalars[kind[4:]])
                field.label, field.type = 3, 11
                field.type_name = f".emu3p5.story.{message_name}.{entry.name}"
            elif kind in scalars:
                field.type = scalars[kind]
            else:
                field.label = 3 if kind.startswith("*") else 1
                field.type = 14 if kind == "ImageFormat" else 11
                field.type_name = f".emu3p5.story.{kind.lstrip('*')}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(proto)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("emu3p5.story.Story"))


PublishedStory = independent_story_class()


def pixels(seed: int, size: tuple[int, int] = (32, 48)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def published_writer(question: str, references: list[np.ndarray], parts: list[tuple[str, Any]]) -> Any:
    """The fact sheet's writer (section 6) over what the published parser (4.3) makes of an answer."""
    story = PublishedStory(question=question)
    for image in references:
        fill(story.reference_images.add().image, image)
    waiting_thought = ""
    for kind, content in parts:
        if kind == "text" and not content.strip():
            continue
        if kind == "text" or (kind == "image" and not story.clips):
            clip = story.clips.add(clip_id=f"clip_{len(story.clips):04d}")
            clip.segments.add(asr=content if kind == "text" else "")
        if kind == "global_cot":
            story.summary = content
        elif kind == "image_cot":
            waiting_thought = content
        elif kind == "image":
            meta = story.clips[-1].segments[0].images.add(chain_of_thought=waiting_thought)
            fill(meta.image, content)
            waiting_thought = ""
    return story


def fill(image: Any, array: np.ndarray) -> None:
    image.height, image.width, image.format = *array.shape[:2], PNG
    image.image_data = StoryImage.from_array(array).data


def segment(text: str, image: np.ndarray | None, thought: str | None = None, **other: Any) -> Segment:
    return Segment(text=text, image=image, thought=thought, ended=False, **other)


ANSWERS: dict[str, tuple[list[Segment], list[tuple[str, Any]]]] = {
    "a picture alone": ([segment("", pixels(1))], [("image", pixels(1))]),
    "a story with both kinds of thought": (
        [
            segment("Once — 昔々", pixels(1), "a wide shot", answer_thought="three panels"),
            segment("then", pixels(2)),
            segment("The end.", None, "nothing comes of this"),
        ],
        [
            ("global_cot", "three panels"),
            ("text", "Once — 昔々"),
            ("image_cot", "a wide shot"),
            ("image", pixels(1)),
            ("text", "then"),
            ("image", pixels(2)),
            ("text", "The end."),
            ("image_cot", "nothing comes of this"),
        ],
    ),
    "pictures without words join the last clip": (
        [segment(" ", pixels(1)), segment("go", pixels(2)), segment("\n", pixels(3), "hm")],
        [
            ("text", " "),
            ("image", pixels(1)),
            ("text", "go"),
            ("image", pixels(2)),
            ("text", "\n"),
            ("image_cot", "hm"),
            ("image", pixels(3)),
        ],
    ),
    "words alone": ([segment("no picture", None)], [("text", "no picture")]),
    "nothing": ([segment("", None)], []),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_laid_out_as_the_published_writer_does(name: str) -> None:
    segments, parts = ANSWERS[name]
    published = published_writer("Why?", [pixels(8), pixels(9)], parts)
    ours = to_story("Why?", references=[pixels(8), pixels(9)], segments=segments).to_bytes()
    assert ours == published.SerializeToString(deterministic=True)
    assert PublishedStory.FromString(ours) == published


def test_a_published_file_is_read_whole(tmp_path: Path) -> None:
    """Every field that a `Story` holds, from a message that also fills those which it does not."""
    message = published_writer("Why?", [pixels(9)], ANSWERS["a story with both kinds of thought"][1])
    message.story_id, message.deprecated, message.refined_summary = "s7", True, "short"
    meta = message.clips[0].segments[0].images[0]
    meta.caption, meta.is_keyframe_status, meta.scores["clip"] = "a fox", -1, 0.25
    meta.features["pose"], meta.timestamp.start = b"\x00\xff", 1.5
    (tmp_path / "000.pb").write_bytes(message.SerializeToString())
    story = load_story(tmp_path / "000.pb")
    assert (story.story_id, story.question, story.summary) == ("s7", "Why?", "three panels")
    assert [part.text for part in story.segments] == ["Once — 昔々", "then", "The end."]
    first = story.segments[0].images[0]
    assert (first.caption, first.thought, dict(first.features)) == (
        "a fox",
        "a wide shot",
        {"pose": b"\x00\xff"},
    )
    np.testing.assert_array_equal(first.to_array(), pixels(1))
    np.testing.assert_array_equal(story.reference_images[0].to_array(), pixels(9))


def test_files_come_back_and_appear_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "000.pb"
    story = to_story("Why?", segments=ANSWERS["a picture alone"][0])
    save_story(path, story)
    assert load_story(path) == story

    def full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        save_story(path, to_story("Another", segments=[]))
    assert load_story(path) == story and [p.name for p in path.parent.iterdir()] == ["000.pb"]


def test_thoughts_go_from_the_model_to_the_file(tiny_folder: str, tmp_path: Path) -> None:
    """A tiny model that likes to think: what it thinks of the answer and of a picture reach their fields."""
    shutil.copytree(tiny_folder, tmp_path, dirs_exist_ok=True)
    manifest = replace(Manifest.load(tmp_path), max_text_tokens=300)
    manifest.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    v = manifest.vocabulary
    # Column 0 of the head makes tokens likelier, see conftest: BOG at once, then the others now and then.
    likelier = torch.tensor([90.0, 25.0, 25.0, 25.0, 25.0]).to(torch.bfloat16)
    weights["lm_head.weight"][[v.bog, v.eog, v.boc, v.eoc, v.boi], 0] = likelier
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = load(tmp_path, device="cpu")
    states = [model.begin(mode="story", prompt="a room", seed=seed, size=(32, 32)) for seed in range(12)]
    segments = [segment for _, segment in model.imagine_batch(states, [None] * len(states))]
    whole = [s for s in segments if s.answer_thought and s.thought and s.image is not None]
    assert whole, "twelve answers, and none with both kinds of thought and a picture"
    message = PublishedStory.FromString(to_story("a room", segments=whole[:1]).to_bytes())
    assert message.summary == whole[0].answer_thought
    assert message.clips[0].segments[0].images[0].chain_of_thought == whole[0].thought
    assert message.clips[0].segments[0].asr == (whole[0].text if whole[0].text.strip() else "")
