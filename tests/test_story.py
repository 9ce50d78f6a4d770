"""Stories and shards: the published schema both ways, and files that are safe to open whatever is in them."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from PIL import Image

from emuworld import story_schema
from emuworld.story import (
    MAX_IMAGE_PIXELS,
    Shard,
    ShardError,
    Story,
    StoryError,
    StoryImage,
    StorySegment,
    read_records,
    read_shard,
    write_shard,
)

# The schema of the fact sheet, section 6: message -> "number name type", an asterisk for repeated.
PUBLISHED = {
    "TimeStamp": "1 start double, 2 end double",
    "Image": "1 width int32, 2 height int32, 3 format ImageFormat, 4 image_data bytes, 5 image_path string",
    "ImageMeta": "1 image_id string, 2 timestamp TimeStamp, 3 caption string, 4 detail_caption string, "
    "5 features *FeaturesEntry, 6 scores *ScoresEntry, 7 chain_of_thought string, 8 cot_translate string, "
    "11 image Image, 12 is_keyframe_status sint32",
    "Segment": "1 timestamp TimeStamp, 2 asr string, 3 caption string, 4 asr_translate string, "
    "101 images *ImageMeta",
    "Clip": "1 clip_id string, 2 timestamp TimeStamp, 11 story string, 21 caption string, "
    "101 segments *Segment",
    "Story": "1 story_id string, 2 clips *Clip, 3 deprecated bool, 4 deprecate_reason string, "
    "11 summary string, 12 question string, 13 refined_summary string, 14 question_translate string, "
    "15 summary_translate string, 16 refined_summary_translate string, 17 reference_images *ImageMeta",
}


def pixels(seed: int, *, size: tuple[int, int] = (24, 40)) -> np.ndarray:
    """A smooth picture, uint8 [H, W, 3]: smooth so that lossy formats stay near it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def example(seed: int = 0) -> Story:
    image = StoryImage.from_array(
        pixels(seed), caption="a red ball", thought="left", features={"pose": b"\x00\xff", "b": b""}
    )
    return Story(
        question="go on — 続けて",
        reference_images=(StoryImage.from_array(pixels(seed + 1), format="WEBP"),),
        segments=(
            StorySegment(text="turn left", images=(image, StoryImage.from_array(pixels(2), format="JPEG"))),
            StorySegment(images=(image,)),
            StorySegment(text="the end"),
        ),
        story_id=f"s{seed}",
        summary="a plan",
    )


def parsed(data: bytes) -> Any:
    message = story_schema.message_class("Story")()
    message.ParseFromString(data)
    return message


# ---- the schema ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_schema_is_the_published_one(name: str) -> None:
    descriptor = story_schema.message_class(name).DESCRIPTOR
    assert descriptor.full_name == f"emu3p5.story.{name}"
    proto = descriptor_pb2.DescriptorProto()
    descriptor.CopyToProto(proto)
    kinds = {number: kind.removeprefix("TYPE_").lower() for kind, number in proto.field.add().Type.items()}
    fields = []
    for field in list(proto.field)[:-1]:
        kind = field.type_name.split(".")[-1] or kinds[field.type]
        fields.append(f"{field.number} {field.name} {'*' * (field.label == field.LABEL_REPEATED)}{kind}")
    assert ", ".join(fields) == PUBLISHED[name]
    values = {"FeaturesEntry": "bytes", "ScoresEntry": "double"}
    assert {e.name: kinds[e.field[1].type] for e in proto.nested_type} == (
        values if name == "ImageMeta" else {}
    )


def test_enum_numbers() -> None:
    enum = story_schema.message_class("Image").DESCRIPTOR.fields_by_name["format"].enum_type
    assert {value.name: value.number for value in enum.values} == {
        "UNKNOWN": 0,
        "JPEG": 1,
        "PNG": 2,
        "WEBP": 3,
        "BMP": 4,
    }


def test_bytes_by_hand() -> None:
    """Wire format written by hand: field << 3 | 2, length, bytes."""
    story = Story(question="hi", segments=(StorySegment(text="go"),))
    segment = b"\x12\x02go"
    clip = b"\x0a\x09clip_0000" + b"\xaa\x06" + bytes([len(segment)]) + segment  # field 101 is tag 810
    assert story.to_bytes() == b"\x12" + bytes([len(clip)]) + clip + b"\x62\x02hi"


def test_a_story_of_the_published_writer_goes_through_unchanged() -> None:
    """Laid out as the release's writer does it: clips numbered from 0, one segment each, text in `asr`."""
    message: Any = story_schema.message_class("Story")()
    message.question, message.summary = "How to cook?", "think"
    for i, text in enumerate(["", "Chop."]):
        clip = message.clips.add(clip_id=f"clip_{i:04d}")
        meta = clip.segments.add(asr=text).images.add(chain_of_thought="hm")
        data = StoryImage.from_array(pixels(i)).data
        meta.image.width, meta.image.height, meta.image.format, meta.image.image_data = 40, 24, 2, data
    published = message.SerializeToString()
    story = Story.from_bytes(published)
    assert [s.text for s in story.segments] == ["", "Chop."]
    assert np.array_equal(story.segments[1].images[0].to_array(), pixels(1))
    assert story.to_bytes() == published


def test_round_trip_and_equal_bytes() -> None:
    story = example()
    assert Story.from_bytes(story.to_bytes()) == story
    assert Story.from_bytes(story.to_bytes()).to_bytes() == story.to_bytes()
    assert Story.from_bytes(b"") == Story()


# ---- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format, tolerance", [("PNG", 0), ("JPEG", 12), ("WEBP", 24)])
def test_pictures_come_back(format: str, tolerance: int) -> None:
    image = StoryImage.from_array(pixels(3), format=format)
    back = image.to_array()
    assert (back.dtype, back.shape, back.flags.writeable) == (np.uint8, (24, 40, 3), True)
    assert np.abs(back.astype(int) - pixels(3)).max() <= tolerance


def test_grey_and_palette_pictures_become_rgb() -> None:
    for mode in ("L", "P", "RGBA", "1"):
        buffer = io.BytesIO()
        Image.fromarray(pixels(0)).convert(mode).save(buffer, format="PNG")
        image = StoryImage(data=buffer.getvalue(), format="PNG", width=40, height=24)
        assert image.to_array().shape == (24, 40, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3)),
        np.zeros((0, 4, 3), np.uint8),
    ],
)
def test_arrays_of_another_kind(wrong: np.ndarray) -> None:
    with pytest.raises(StoryError):
        StoryImage.from_array(wrong)


def test_unknown_formats_are_refused_by_name() -> None:
    with pytest.raises(StoryError, match="'BMP' is not written"):
        StoryImage.from_array(pixels(0), format="BMP")
    with pytest.raises(StoryError, match="'GIF' is not read"):
        StoryImage(data=b"x", format="GIF", width=1, height=1)
    message = parsed(example().to_bytes())
    message.reference_images[0].image.format = 4
    with pytest.raises(StoryError, match="format number 4 is not read"):
        Story.from_bytes(message.SerializeToString())


def test_format_unknown_follows_the_signature() -> None:
    message = parsed(example().to_bytes())
    for meta in [message.reference_images[0], *message.clips[0].segments[0].images]:
        meta.image.format = 0
    assert Story.from_bytes(message.SerializeToString()) == example()
    message.reference_images[0].image.image_data = b"BM not a picture"
    with pytest.raises(StoryError, match="format number 0 is not read"):
        Story.from_bytes(message.SerializeToString())


def test_paths_are_never_followed(tmp_path: Path) -> None:
    message = parsed(example().to_bytes())
    message.reference_images[0].image.image_data = b""
    message.reference_images[0].image.image_path = str(tmp_path / "secret.png")
    with pytest.raises(StoryError, match=r"secret\.png' is not followed"):
        Story.from_bytes(message.SerializeToString())


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and holds a handful of bytes: a decompression bomb."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(99)))
        + chunk(b"IEND", b"")
    )


def test_decompression_bombs() -> None:
    with pytest.raises(StoryError, match="1 to 16777216 pixels"):
        StoryImage(data=png_header(30000, 30000), format="PNG", width=30000, height=30000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (10000, 30000):  # below and above Pillow's own limit
            liar = StoryImage(data=png_header(size, size), format="PNG", width=16, height=16)
            with pytest.raises(StoryError):
                liar.to_array()
    for width, height in [(0, 5), (5, -1), (MAX_IMAGE_PIXELS + 1, 1)]:
        with pytest.raises(StoryError, match="is not read"):
            StoryImage(data=b"x", format="PNG", width=width, height=height)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_damaged_pictures_raise_nothing_else(format: str) -> None:
    """Flips and cuts anywhere: a picture or a StoryError."""
    rng = random.Random(4)
    good = StoryImage.from_array(pixels(5), format=format)
    for _ in range(300):
        data = bytearray(good.data)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        del data[rng.randrange(1, len(data) + 1) if rng.random() < 0.3 else len(data) :]
        image = StoryImage(data=bytes(data), format=format, width=40, height=24)
        with contextlib.suppress(StoryError):
            assert image.to_array().shape == (24, 40, 3)


def test_another_format_than_named() -> None:
    image = StoryImage(data=StoryImage.from_array(pixels(0)).data, format="JPEG", width=40, height=24)
    with pytest.raises(StoryError, match=r"JPEG picture of .* bytes does not decode"):
        image.to_array()


# ---- limits --------------------------------------------------------------------------------------


def test_a_story_of_empty_messages_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story_schema, "MAX_MESSAGES", 1000)
    Story.from_bytes(b"\x12\x00" * 1000)
    with pytest.raises(StoryError, match="nests more than 1000 messages"):
        Story.from_bytes(b"\x12\x00" * 1001)
    features = b"\x2a\x00" * 1001  # map entries count too
    meta = b"\x8a\x01" + bytes([128 | len(features) & 127, len(features) >> 7]) + features
    with pytest.raises(StoryError, match="nests more than 1000 messages"):
        Story.from_bytes(meta)


def test_too_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story_schema, "MAX_STORY_BYTES", 100)
    with pytest.raises(StoryError, match="too large: at most 100"):
        example().to_bytes()
    with pytest.raises(StoryError, match="too large: at most 100"):
        Story.from_bytes(bytes(101))


def test_random_and_damaged_bytes_raise_nothing_else() -> None:
    rng = random.Random(6)
    good = example().to_bytes()
    for i in range(3000):
        data = bytearray(good if i % 2 else rng.randbytes(rng.randrange(60)))
        for _ in range(rng.randrange(1, 5)):
            if data:
                data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        with contextlib.suppress(StoryError):
            Story.from_bytes(bytes(data))


def test_text_that_is_no_unicode() -> None:
    with pytest.raises(StoryError, match="replace lone surrogates"):
        Story(question="\ud800").to_bytes()


# ---- shards --------------------------------------------------------------------------------------


@pytest.fixture
def shard_path(tmp_path: Path) -> Path:
    path = tmp_path / "train-000.shard"
    assert write_shard(path, (example(i) for i in range(5))) == 5
    return path


def test_shards_come_back(shard_path: Path) -> None:
    stories = [example(i) for i in range(5)]
    assert list(read_shard(shard_path)) == stories
    assert [Story.from_bytes(data) for data in read_records(shard_path)] == stories
    shard = pickle.loads(pickle.dumps(Shard.open(shard_path)))
    assert len(shard) == 5
    assert [shard[3], shard[-1], shard[0]] == [stories[3], stories[4], stories[0]]
    assert list(shard) == stories
    with pytest.raises(IndexError):
        shard[5]


def test_records_are_copied_without_parsing(shard_path: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "copy", read_records(shard_path))
    assert (tmp_path / "copy").read_bytes() == shard_path.read_bytes()


def test_an_empty_shard(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "empty", []) == 0
    assert list(read_shard(tmp_path / "empty")) == []
    assert len(Shard.open(tmp_path / "empty")) == 0


def test_a_failed_write_leaves_the_old_file(shard_path: Path) -> None:
    def stories() -> Any:
        yield example()
        raise RuntimeError("renderer died")

    before = shard_path.read_bytes()
    with pytest.raises(RuntimeError, match="renderer died"):
        write_shard(shard_path, stories())
    assert shard_path.read_bytes() == before
    assert [p.name for p in shard_path.parent.iterdir()] == [shard_path.name]


def test_every_truncation_is_an_error(shard_path: Path) -> None:
    data = shard_path.read_bytes()
    rng = random.Random(7)
    offsets = [int(at) for at in Shard.open(shard_path).offsets]
    for length in [0, 5, 11, 12, *offsets, len(data) - 1, *(rng.randrange(len(data)) for _ in range(60))]:
        shard_path.write_bytes(data[:length])
        stories: list[Story] = []
        with pytest.raises(ShardError, match=r"train-000\.shard") as error:
            stories.extend(example(i) for i, _ in enumerate(read_shard(shard_path)))
        whole = sum(at <= length for at in offsets[1:])
        if 12 < length < offsets[-1]:
            assert f"record {whole}" in str(error.value)
        with pytest.raises(ShardError, match=r"train-000\.shard"):
            Shard.open(shard_path)


def test_every_flipped_bit_is_an_error(shard_path: Path) -> None:
    """No byte of a shard can change without a ShardError, and the records before it are still read."""
    data = shard_path.read_bytes()
    rng = random.Random(8)
    for at in [
        *range(60),
        *range(len(data) - 80, len(data)),
        *(rng.randrange(len(data)) for _ in range(100)),
    ]:
        shard_path.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        with pytest.raises(ShardError, match=r"train-000\.shard"):
            list(read_shard(shard_path))


def test_damage_names_its_record(shard_path: Path) -> None:
    data = bytearray(shard_path.read_bytes())
    shard = Shard.open(shard_path)
    data[int(shard.offsets[2]) + 40] ^= 1
    shard_path.write_bytes(data)
    reader = read_shard(shard_path)
    assert [next(reader), next(reader)] == [example(0), example(1)]
    with pytest.raises(ShardError, match=r"record 2 is damaged: its checksum"):
        next(reader)
    assert shard[3] == example(3)
    with pytest.raises(ShardError, match="record 2 is damaged"):
        shard[2]


def test_a_record_that_is_no_story_names_its_place(tmp_path: Path) -> None:
    write_shard(tmp_path / "odd", [example().to_bytes(), b"\xff\xff"])
    with pytest.raises(ShardError, match=r"odd: record 1: "):
        list(read_shard(tmp_path / "odd"))


def test_other_files_and_versions(tmp_path: Path, shard_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"PK\x03\x04" * 10)
    with pytest.raises(ShardError, match="not a story shard"):
        next(read_shard(tmp_path / "x"))
    data = shard_path.read_bytes()
    shard_path.write_bytes(data[:8] + struct.pack("<I", 2) + data[12:])
    with pytest.raises(ShardError, match="shard version 2, this program reads version 1"):
        Shard.open(shard_path)
