"""The published story schema: message classes built at run time, and a guard to run before parsing.

The schema is `proto/interleave_story.proto` of the Emu3.5 release, package `emu3p5.story` (fact sheet,
section 6), field numbers included. No protoc and no generated file: the table below is turned into
descriptors on import.
"""

from __future__ import annotations

import re

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

MAX_STORY_BYTES = 256 * 2**20  # forty pictures of 2048 px as PNG
MAX_MESSAGES = 65_536  # nested messages in a story: about 8,000 pictures with a few features each

IMAGE_FORMATS = {"UNKNOWN": 0, "JPEG": 1, "PNG": 2, "WEBP": 3, "BMP": 4}  # the enum ImageFormat
_SCHEMA = {
    "TimeStamp": "double start=1; double end=2",
    "Image": "int32 width=1; int32 height=2; ImageFormat format=3; bytes image_data=4; string image_path=5",
    "ImageMeta": """string image_id=1; TimeStamp timestamp=2; string caption=3; string detail_caption=4;
        map<string,bytes> features=5; map<string,double> scores=6; string chain_of_thought=7;
        string cot_translate=8; Image image=11; sint32 is_keyframe_status=12""",
    "Segment": """TimeStamp timestamp=1; string asr=2; string caption=3; string asr_translate=4;
        repeated ImageMeta images=101""",
    "Clip": """string clip_id=1; TimeStamp timestamp=2; string story=11; string caption=21;
        repeated Segment segments=101""",
    "Story": """string story_id=1; repeated Clip clips=2; bool deprecated=3; string deprecate_reason=4;
        string summary=11; string question=12; string refined_summary=13; string question_translate=14;
        string summary_translate=15; string refined_summary_translate=16;
        repeated ImageMeta reference_images=17""",
}


class StoryError(ValueError):
    """A story or one of its pictures is malformed, too large, or of a kind that is not read."""


_FIELD = re.compile(r"\s*(repeated )?(map<string,(\w+)>|\w+) (\w+)=(\d+)")


def _fields(name: str) -> list[re.Match[str]]:
    """The fields of one message of `_SCHEMA`: repeated, kind, a map's value kind, name, number."""
    matches = [_FIELD.fullmatch(field) for field in _SCHEMA[name].split(";")]
    assert all(matches), f"a field of {name} does not parse"
    return [match for match in matches if match]


def _build_classes() -> dict[str, type[Message]]:
    """Message classes from `_SCHEMA`, in a pool of their own beside the published module's."""
    file = descriptor_pb2.FileDescriptorProto(
        name="proto/interleave_story.proto", package="emu3p5.story", syntax="proto3"
    )
    enum = file.enum_type.add(name="ImageFormat")
    for name, number in IMAGE_FORMATS.items():
        enum.value.add(name=name, number=number)
    for name in _SCHEMA:
        message = file.message_type.add(name=name)
        for match in _fields(name):
            _add_field(message, match)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"emu3p5.story.{name}"))
        for name in _SCHEMA
    }


def _add_field(message: descriptor_pb2.DescriptorProto, match: re.Match[str]) -> None:
    repeated, kind, map_value, name, number = match.groups()
    if map_value:  # a map is a repeated nested message {key, value}
        kind = f"{message.name}.{name.capitalize()}Entry"
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _set_field(entry.field.add(name="key", number=1), "string", repeated=False)
        _set_field(entry.field.add(name="value", number=2), map_value, repeated=False)
    _set_field(message.field.add(name=name, number=int(number)), kind, repeated=bool(repeated or map_value))


def _set_field(target: descriptor_pb2.FieldDescriptorProto, kind: str, *, repeated: bool) -> None:
    target.label = target.LABEL_REPEATED if repeated else target.LABEL_OPTIONAL
    scalar = f"TYPE_{kind.upper()}"
    if scalar in descriptor_pb2.FieldDescriptorProto.Type.keys():  # noqa: SIM118 (an enum, no dict)
        target.type = target.Type.Value(scalar)
    else:
        target.type = target.TYPE_ENUM if kind == "ImageFormat" else target.TYPE_MESSAGE
        target.type_name = f".emu3p5.story.{kind}"


_CLASSES = _build_classes()
# Message name -> {field number -> message name} of the fields that are messages, a map's entries among them.
_CHILDREN = {
    name: {
        int(match[5]): match[2] if match[2] in _SCHEMA else "entry"
        for match in _fields(name)
        if match[2] in _SCHEMA or match[3]
    }
    for name in _SCHEMA
}


def message_class(name: str) -> type[Message]:
    """Protobuf class of one message of the published schema ("Story", "Clip", "Segment", "ImageMeta", …)."""
    return _CLASSES[name]


def check_structure(data: bytes) -> None:
    """Walk the wire format and refuse a story that is too large or nests too many messages, before memory is
    taken.

    An empty message costs two bytes on the wire and about a hundred in memory, so a size limit alone is not
    enough.
    """
    if len(data) > MAX_STORY_BYTES:
        raise StoryError(f"a story of {len(data)} bytes is too large: at most {MAX_STORY_BYTES} are read")
    count = 0
    open_messages = [(0, len(data), _CHILDREN["Story"])]
    while open_messages:
        at, end, children = open_messages.pop()
        while at < end:
            tag, at = _varint(data, at, end)
            wire = tag & 7
            length = 0
            if wire == 0:
                _, at = _varint(data, at, end)
            elif wire == 2:
                length, at = _varint(data, at, end)
                child = children.get(tag >> 3)
                if child is not None:
                    count += 1
                    if child != "entry":
                        open_messages.append((at, min(at + length, end), _CHILDREN[child]))
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise StoryError(f"byte {at} is no story message: wire type {wire}")
            at += length
            if at > end or count > MAX_MESSAGES:
                raise StoryError(
                    f"a story is truncated at byte {end}"
                    if at > end
                    else f"a story nests more than {MAX_MESSAGES} messages: split it"
                )


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise StoryError(f"a story is truncated or damaged at byte {at}")
