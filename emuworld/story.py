"""Stories: the form of every answer and of every episode on disk.

A `Story` is a question, reference pictures, and segments of text with pictures. Its bytes are the protobuf
message of the Emu3.5 release (`emu3p5.story.Story`; fact sheet, section 6), laid out as the release lays it
out: one clip with one segment per `StorySegment`, the text in `asr`, the global thought in `summary`. Files
go both ways between the published tools and this module. Fields of the schema that `Story` does not hold are
dropped on the way; `message_class` reads them all.

A shard is a file of many stories: a header, one block per record, an index, a trailer. Every block carries a
checksum, so a damaged or truncated shard is an error and never a wrong story.

Nothing here trusts a file: sizes and counts are checked before memory is taken for them, pictures are JPEG,
PNG or WEBP only and are decoded only when asked for, and paths inside a message are never opened.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from google.protobuf.message import DecodeError
from PIL import Image

from emuworld.files import written
from emuworld.story_schema import (
    IMAGE_FORMATS,
    MAX_STORY_BYTES,
    StoryError,
    check_structure,
    message_class,
)

MAX_IMAGE_PIXELS = 4096 * 4096  # four times the largest picture the release can make

# The formats that are read; the schema's BMP is not (no compression, and Pillow's reader has many dialects).
_FORMATS = {name: IMAGE_FORMATS[name] for name in ("JPEG", "PNG", "WEBP")}
_SIGNATURES = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.S),
}


class ShardError(StoryError):
    """A shard file is damaged, truncated or no shard; the message says which file and record."""


@dataclass(frozen=True, kw_only=True)
class StoryImage:
    """One picture as it is stored: encoded bytes, decoded by `to_array` only.

    `width` and `height` are in pixels. `thought` is the reasoning written before the picture; `features`
    holds named bytes (an episode's truth, for example). Raises StoryError for another format than JPEG, PNG
    or WEBP, for empty data and for sizes outside 1 .. `MAX_IMAGE_PIXELS`.
    """

    data: bytes
    format: str
    width: int
    height: int
    caption: str = ""
    thought: str = ""
    features: Mapping[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.format not in _FORMATS:
            raise StoryError(
                f"picture format {self.format!r} is not read: convert it to one of {sorted(_FORMATS)}"
            )
        if not self.data:
            raise StoryError("a picture holds no data: give its encoded bytes")
        _check_size(self.width, self.height)

    @classmethod
    def from_array(
        cls,
        pixels: np.ndarray,
        *,
        format: str = "PNG",
        quality: int = 95,
        caption: str = "",
        thought: str = "",
        features: Mapping[str, bytes] | None = None,
    ) -> StoryImage:
        """Encode uint8 [H, W, 3]. `quality` (1 to 100) is for JPEG (with full colour resolution) and WEBP."""
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise StoryError(f"a picture must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}")
        _check_size(pixels.shape[1], pixels.shape[0])
        options: dict[str, dict[str, int]] = {
            "PNG": {"compress_level": 6},
            "JPEG": {"quality": quality, "subsampling": 0},
            "WEBP": {"quality": quality},
        }
        if format not in options:
            raise StoryError(f"picture format {format!r} is not written: choose one of {sorted(options)}")
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format=format, **options[format])
        return cls(
            data=buffer.getvalue(),
            format=format,
            width=pixels.shape[1],
            height=pixels.shape[0],
            caption=caption,
            thought=thought,
            features=dict(features or {}),
        )

    def to_array(self) -> np.ndarray:
        """Decode to uint8 [H, W, 3]; StoryError where the data is damaged or of another size than it says."""
        try:
            with Image.open(io.BytesIO(self.data), formats=(self.format,)) as image:  # reads the header only
                if image.size != (self.width, self.height):
                    raise StoryError(
                        f"a picture says {self.width}x{self.height} but holds {image.width}x{image.height}"
                    )
                return np.array(image.convert("RGB") if image.mode != "RGB" else image)
        except StoryError:
            raise
        except (
            OSError,
            ValueError,
            SyntaxError,
            EOFError,
            struct.error,
            Image.DecompressionBombError,
            Image.DecompressionBombWarning,  # where the caller turned warnings into errors
        ) as error:
            raise StoryError(
                f"a {self.format} picture of {len(self.data)} bytes does not decode: {error}"
            ) from error


@dataclass(frozen=True, kw_only=True)
class StorySegment:
    """One step: what is said, and the pictures that go with it."""

    text: str = ""
    images: tuple[StoryImage, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Story:
    """A question, its reference pictures and the answer; `summary` is the thought before the answer."""

    question: str = ""
    reference_images: tuple[StoryImage, ...] = ()
    segments: tuple[StorySegment, ...] = ()
    story_id: str = ""
    summary: str = ""

    def to_bytes(self) -> bytes:
        """The protobuf message; equal stories give equal bytes."""
        message: Any = message_class("Story")()
        try:
            message.story_id, message.summary, message.question = self.story_id, self.summary, self.question
            for i, segment in enumerate(self.segments):
                clip = message.clips.add(clip_id=f"clip_{i:04d}")
                part = clip.segments.add(asr=segment.text)
                for image in segment.images:
                    _write_image(image, part.images.add())
            for image in self.reference_images:
                _write_image(image, message.reference_images.add())
        except UnicodeEncodeError as error:
            raise StoryError(
                f"a text of the story is not valid Unicode ({error}): replace lone surrogates"
            ) from error
        data = bytes(message.SerializeToString(deterministic=True))
        check_structure(data)
        return data

    @classmethod
    def from_bytes(cls, data: bytes) -> Story:
        """Read a published or own message, pictures still encoded. StoryError says what is wrong with it."""
        check_structure(data)
        message: Any = message_class("Story")()
        try:
            message.ParseFromString(data)
        except DecodeError as error:
            raise StoryError(f"{len(data)} bytes are no story message: {error}") from error
        return cls(
            question=message.question,
            reference_images=tuple(_read_image(meta) for meta in message.reference_images),
            segments=tuple(
                StorySegment(text=part.asr, images=tuple(_read_image(meta) for meta in part.images))
                for clip in message.clips
                for part in clip.segments
            ),
            story_id=message.story_id,
            summary=message.summary,
        )


def _write_image(image: StoryImage, meta: Any) -> None:
    meta.caption, meta.chain_of_thought = image.caption, image.thought
    for name, value in image.features.items():
        meta.features[name] = value
    meta.image.width, meta.image.height = image.width, image.height
    meta.image.format, meta.image.image_data = _FORMATS[image.format], image.data


def _read_image(meta: Any) -> StoryImage:
    image = meta.image
    if not image.image_data:
        raise StoryError(
            f"a picture holds no data (path {image.image_path!r} is not followed): embed its bytes"
        )
    names = {number: name for name, number in _FORMATS.items()}
    name = names.get(image.format)
    if image.format == 0:  # UNKNOWN: believe the file's own signature
        name = next(
            (known for known, signature in _SIGNATURES.items() if signature.match(image.image_data)), None
        )
    if name is None:
        raise StoryError(
            f"picture format number {image.format} is not read: convert to one of {sorted(_FORMATS)}"
        )
    return StoryImage(
        data=image.image_data,
        format=name,
        width=image.width,
        height=image.height,
        caption=meta.caption,
        thought=meta.chain_of_thought,
        features=dict(meta.features),
    )


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_IMAGE_PIXELS:
        raise StoryError(f"a picture of {width}x{height} is not read: 1 to {MAX_IMAGE_PIXELS} pixels are")


# A shard: "EMUSTORY" and a version; one block per story; one index block; a trailer. A block is a tag, the
# length of its payload, a checksum over tag, length and payload, and the payload. The index lists where each
# block starts.
_MAGIC, _VERSION = b"EMUSTORY", 1
_HEADER = struct.Struct("<8sI")
_BLOCK = struct.Struct("<4sII")  # tag, payload bytes, CRC-32
_TRAILER = struct.Struct("<QQ8s")  # offset of the index block, number of records, magic
_RECORD, _INDEX = b"STRY", b"INDX"


def write_shard(path: str | os.PathLike[str], stories: Iterable[Story | bytes]) -> int:
    """Write stories (or their bytes) to a shard and return how many. The file appears whole or not at all."""
    offsets: list[int] = []
    with written(path) as beside, beside.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, _VERSION))
        for story in stories:
            offsets.append(file.tell())
            _write_block(file, _RECORD, story if isinstance(story, bytes) else story.to_bytes())
        index_at = file.tell()
        _write_block(file, _INDEX, np.array(offsets, dtype="<u8").tobytes())
        file.write(_TRAILER.pack(index_at, len(offsets), _MAGIC))
        file.flush()
        os.fsync(file.fileno())
    return len(offsets)


def read_shard(path: str | os.PathLike[str]) -> Iterator[Story]:
    """Stories of a shard in order, pictures still encoded; ShardError at the first damaged record."""
    for i, data in enumerate(read_records(path)):
        yield _parse_record(path, i, data)


def read_records(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Records of a shard as bytes, checked but not parsed; ShardError as `read_shard`."""
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        _read_header(path, file)
        offsets: list[int] = []
        while True:
            at = file.tell()
            tag, data = _read_block(file, size=size, where=f"{path}: record {len(offsets)}")
            if tag == _INDEX:
                break
            offsets.append(at)
            yield data
        trailer = _TRAILER.pack(at, len(offsets), _MAGIC)
        if data != np.array(offsets, dtype="<u8").tobytes() or file.read(len(trailer) + 1) != trailer:
            raise ShardError(
                f"{path}: the index after record {len(offsets) - 1} is damaged: write the file again"
            )


@dataclass(frozen=True)
class Shard:
    """Random access to a shard: `len(shard)`, `shard[i]`. Holds offsets only and pickles."""

    path: Path
    offsets: np.ndarray = field(repr=False)  # [num_records] uint64, byte where each record's block starts

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Shard:
        """Read the index; ShardError where the file is truncated or no shard."""
        path = Path(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _read_header(path, file)
            file.seek(max(size - _TRAILER.size, 0))
            trailer = file.read()
            index_at, count, magic = (
                _TRAILER.unpack(trailer) if len(trailer) == _TRAILER.size else (0, 0, b"")
            )
            if magic != _MAGIC or index_at + _BLOCK.size + 8 * count + _TRAILER.size != size:
                raise ShardError(
                    f"{path}: the index at its end is missing: the file is truncated, write it again"
                )
            file.seek(index_at)
            tag, data = _read_block(file, size=size, where=f"{path}: index")
            if tag != _INDEX:
                raise ShardError(f"{path}: the index at its end is damaged: write it again")
        return cls(path, np.frombuffer(data, dtype="<u8"))

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int) -> Story:
        """Story `i`, counted from the end where negative; IndexError outside, ShardError where damaged."""
        at = int(self.offsets[i])
        with self.path.open("rb") as file:
            file.seek(at)
            size = os.fstat(file.fileno()).st_size
            tag, data = _read_block(file, size=size, where=f"{self.path}: record {i}")
        if tag != _RECORD:
            raise ShardError(f"{self.path}: record {i} is missing: the file changed since its index was read")
        return _parse_record(self.path, i, data)


def _write_block(file: BinaryIO, tag: bytes, payload: bytes) -> None:
    head = _BLOCK.pack(tag, len(payload), 0)[:8]
    file.write(head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head))))
    file.write(payload)


def _read_header(path: str | os.PathLike[str], file: BinaryIO) -> None:
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or header[:8] != _MAGIC:
        raise ShardError(f"{path}: not a story shard (it does not begin with {_MAGIC.decode()})")
    _, version = _HEADER.unpack(header)
    if version != _VERSION:
        raise ShardError(f"{path}: shard version {version}, this program reads version {_VERSION}")


def _read_block(file: BinaryIO, *, size: int, where: str) -> tuple[bytes, bytes]:
    """Tag and payload of the block at the file's position; the file's `size` bounds a bad length."""
    head = file.read(_BLOCK.size)
    if len(head) < _BLOCK.size:
        raise ShardError(f"{where} is missing: the file is truncated after {size} bytes")
    tag, length, checksum = _BLOCK.unpack(head)
    if tag not in (_RECORD, _INDEX) or length > MAX_STORY_BYTES:
        raise ShardError(f"{where} is damaged: its block says {tag!r} and {length} bytes")
    if length > size - file.tell():
        raise ShardError(f"{where} is truncated: {length} bytes were written, {size - file.tell()} are left")
    payload = file.read(length)
    if zlib.crc32(payload, zlib.crc32(head[:8])) != checksum:
        raise ShardError(f"{where} is damaged: its checksum does not fit")
    return tag, payload


def _parse_record(path: str | os.PathLike[str], i: int, data: bytes) -> Story:
    try:
        return Story.from_bytes(data)
    except StoryError as error:
        raise ShardError(f"{path}: record {i}: {error}") from error
