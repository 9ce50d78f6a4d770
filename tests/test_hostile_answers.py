"""Hostile `.pb` files: each is refused with a clear error that names the file, and nothing in it is run.

The messages are written here byte by byte, so that they may be what no protobuf library writes.
"""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from emuworld.answers import load_story
from emuworld.story import Story, StoryImage, StorySegment
from emuworld.story_schema import MAX_FIELDS, MAX_MESSAGES, MAX_STORY_BYTES, StoryError
from emuworld.tasks.export import Export, export_file

PNG = 2  # in the schema's enum ImageFormat


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def varint(number: int) -> bytes:
    data = b""
    while number > 127:
        data, number = data + bytes([number & 127 | 128]), number >> 7
    return data + bytes([number])


def field(number: int, content: bytes | int) -> bytes:
    """A field by hand: bytes with their length, or a number."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def png(width: int, height: int, *extra: tuple[bytes, bytes], pixel_bytes: int = 99) -> bytes:
    """A PNG that announces a size, with further chunks and `pixel_bytes` zero bytes as its pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(bytes(pixel_bytes))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def with_picture(
    *, data: bytes = b"", width: int = 16, height: int = 16, kind: int = PNG, path: str = ""
) -> bytes:
    """A story with one picture, written field by field."""
    image = field(1, width % 2**64) + field(2, height % 2**64) + field(3, kind)
    image += field(4, data) + field(5, path.encode())
    return field(12, b"Why?") + field(2, field(101, field(101, field(11, image))))


class Bomb:
    """Unpickling it writes a file."""

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("unpickled",)


def nested_groups(depth: int) -> bytes:
    return field(12, b"Why?") + varint(200 << 3 | 3) * depth + varint(200 << 3 | 4) * depth


GOOD = with_picture(data=StoryImage.from_array(pixels(1)).data)
GIANT = 2**31 - 1

# name -> (content of the file, what the error says)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "truncated": (GOOD[:-7], "truncated"),
    "truncated in a length": (field(12, b"Why?") + b"\x12\x80", "truncated or damaged"),
    "a length of a terabyte": (field(12, b"Why?") + b"\x12" + varint(2**40), "truncated"),
    "too many clips": (b"\x12\x00" * (MAX_MESSAGES + 1), "nests more than 65536 messages"),
    "too many map entries": (
        field(17, field(5, b"") * (MAX_MESSAGES + 1)),
        "nests more than 65536 messages",
    ),
    "too many empty texts": (field(12, b"") * (MAX_FIELDS + 1), f"nests more than {MAX_FIELDS} fields"),
    "too many unknown fields": (field(12, b"") + field(20, 0) * MAX_FIELDS, f"more than {MAX_FIELDS} fields"),
    "a question that is a number": (field(12, 7), "Story.question holds a number, expected bytes"),
    "clips of eight bytes": (varint(2 << 3 | 1) + bytes(8), "Story.clips holds eight bytes"),
    "a width of four bytes": (
        field(17, field(11, varint(1 << 3 | 5) + bytes(4))),
        "Image.width holds four bytes, expected a number",
    ),
    "a score that is text": (
        field(17, field(6, field(1, b"clip") + field(2, b"high"))),
        "the value of a map holds bytes, expected eight bytes",
    ),
    "nested groups": (nested_groups(100_000), "field 200 of wire type 3"),
    "an end without a group": (field(12, b"Why?") + varint(200 << 3 | 4), "field 200 of wire type 4"),
    "wire type 7": (b"\x0f" + GOOD, "field 1 of wire type 7"),
    "field number 0": (b"\x02\x00" + GOOD, "field 0 of wire type 2"),
    "a varint without end": (b"\x18" + b"\xff" * 20, "truncated or damaged"),
    "a text that is no UTF-8": (field(12, b"\xff\xfe"), "are no story message"),
    "a giant picture": (with_picture(data=b"x", width=GIANT, height=GIANT), f"{GIANT}x{GIANT} is not read"),
    "a picture of no width": (with_picture(data=b"x", width=0), "0x16 is not read"),
    "a picture of negative height": (with_picture(data=b"x", height=-5), "16x-5 is not read"),
    "a picture of format 4, BMP": (with_picture(data=b"BM", kind=4), "format number 4 is not read"),
    "a picture of format 99": (with_picture(data=b"?", kind=99), "format number 99 is not read"),
    "a picture of no known kind": (with_picture(data=b"GIF89a", kind=0), "format number 0 is not read"),
    "a path instead of a picture": (with_picture(path="/etc/passwd"), "'/etc/passwd' is not followed"),
    "a pickle": (pickle.dumps(Bomb()), "is a pickle, which is never opened"),
    "an old pickle": (pickle.dumps(Bomb(), protocol=0), "story"),
    "a PNG": (png(16, 16), "is a picture, not the .pb file"),
    "a shard": (b"EMUSTORY\x01\x00\x00\x00", "is a shard of stories"),
    "JSON": (b'{"question": "Why?"}', "is JSON"),
    "prose": (b"How to cook dumplings?", "no story message"),
    "another message": (field(40, b"something else"), "hold none of a story's fields"),
}
# Seen when the picture is decoded, as an export does: name -> (content, what the error says)
HOSTILE_PICTURES: dict[str, tuple[bytes, str]] = {
    "a JPEG named PNG": (
        with_picture(data=StoryImage.from_array(pixels(1), format="JPEG").data),
        "does not decode",
    ),
    "larger than it says": (with_picture(data=png(10_000, 10_000)), "says 16x16 but holds 10000x10000"),
    "a decompression bomb": (with_picture(data=png(30_000, 30_000)), "decompression bomb"),
    "pixels of another size": (with_picture(data=png(16, 16)), "does not decode"),
    "a bomb of text": (
        with_picture(data=png(16, 16, (b"zTXt", b"k\0\0" + zlib.compress(bytes(2**27))), pixel_bytes=800)),
        "does not decode",
    ),
    "cut off": (with_picture(data=StoryImage.from_array(pixels(1)).data[:-60]), "does not decode"),
    "a pickle": (with_picture(data=pickle.dumps(Bomb())), "does not decode"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_named_and_run_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, said = HOSTILE[name]
    path = tmp_path / "000.pb"
    path.write_bytes(content)
    with pytest.raises(StoryError) as error:
        load_story(path)
    assert "000.pb" in str(error.value) and said in str(error.value)
    assert len(str(error.value)) < 400 and list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", HOSTILE_PICTURES)
def test_hostile_pictures_are_named_and_leave_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content, said = HOSTILE_PICTURES[name]
    path = tmp_path / "000.pb"
    path.write_bytes(content)
    with pytest.raises(StoryError) as error:
        export_file(path, tmp_path / "out", config=Export(video=False))
    assert "000.pb: 001 00 image" in str(error.value) and said in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_every_truncation_of_a_good_file_is_an_error_or_a_whole_beginning(tmp_path: Path) -> None:
    """Protobuf has no end mark: a cut between two fields leaves a shorter story, any other is an error."""
    assert Story.from_bytes(GOOD).question == "Why?"
    path = tmp_path / "000.pb"
    whole = []
    for length in range(1, len(GOOD)):
        path.write_bytes(GOOD[:length])
        try:
            whole.append((length, load_story(path)))
        except StoryError as error:
            assert "truncated" in str(error)
    assert whole == [(6, Story(question="Why?"))]


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pb")  # opening it would wait for a writer
    with zipfile.ZipFile(tmp_path / "model.pb", "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Bomb()))
    (tmp_path / "folder.pb").mkdir()
    with (tmp_path / "long.pb").open("wb") as file:
        file.truncate(MAX_STORY_BYTES + 1)
    said = {
        "pipe.pb": "is no file",
        "folder.pb": "is no file",
        "missing.pb": "cannot be read: No such file",
        "model.pb": "zip archive",
        "long.pb": "too large",
    }
    for name, words in said.items():
        with pytest.raises(StoryError, match=f"{name}.*{words}"):
            load_story(tmp_path / name)


def test_a_picture_of_a_picture_file_keeps_its_words(tmp_path: Path) -> None:
    """A WEBP of the training schema, without a format: read by its signature, nothing lost."""
    image = StoryImage.from_array(pixels(3), format="WEBP")
    path = tmp_path / "000.pb"
    path.write_bytes(with_picture(data=image.data, kind=0))
    story = load_story(path)
    assert story.segments == (StorySegment(images=(image,)),)
    assert Image.fromarray(story.segments[0].images[0].to_array()).size == (16, 16)
