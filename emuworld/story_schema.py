"""The published story schema: message classes built at run time, and a guard to run before parsing.

The schema is `proto/interleave_story.proto` of the Emu3.5 release, package `emu3p5.story` (fact sheet,
section 6), field numbers included. No protoc and no generated file: the table below is turned into
descriptors on import.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

MAX_STORY_BYTES = 256 * 2**20  # forty pictures of 2048 px as PNG
MAX_MESSAGES = 65_536  # nested messages in a story: about 8,000 pictures with a few features each
MAX_FIELDS = 16 * MAX_MESSAGES  # a second's walk; a picture has about eight

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


@dataclass(frozen=True, kw_only=True)
class _Known:
    """A field of the schema as it must be on the wire; `child` is the message that it holds, if it does."""

    name: str
    wire: int
    child: str = ""


_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_WIRE_NAMES = {
    _VARINT: "a number",
    _EIGHT_BYTES: "eight bytes",
    _LENGTH: "bytes",
    _FOUR_BYTES: "four bytes",
}
_WIRES = {"double": _EIGHT_BYTES, "string": _LENGTH, "bytes": _LENGTH}  # else a message or a number


def _known(message: str, match: re.Match[str]) -> tuple[int, _Known]:
    _, kind, map_value, name, number = match.groups()
    child = f"entry of {map_value}" if map_value else kind if kind in _SCHEMA else ""
    wire = _LENGTH if child else _WIRES.get(kind, _VARINT)
    return int(number), _Known(name=f"{message}.{name}", wire=wire, child=child)


# Message name -> field number -> what it must be; a map's entries are messages too.
_KNOWN = {name: dict(_known(name, match) for match in _fields(name)) for name in _SCHEMA}
_KNOWN |= {
    f"entry of {kind}": {
        1: _Known(name="the key of a map", wire=_LENGTH),
        2: _Known(name="the value of a map", wire=_WIRES[kind]),
    }
    for kind in ("bytes", "double")
}


def message_class(name: str) -> type[Message]:
    """Protobuf class of one message of the published schema ("Story", "Clip", "Segment", "ImageMeta", …)."""
    return _CLASSES[name]


def check_structure(data: bytes) -> None:
    """Walk the wire format and refuse what is no story, before protobuf takes memory for it.

    Refused with a StoryError: more bytes, messages or fields than a story has (an empty message costs two
    bytes here and about a hundred in memory, an empty text costs time, so a size limit alone is not enough);
    a field of the schema that holds another kind of value, which protobuf would silently leave out; bytes
    that hold none of a story's fields. Fields that the schema does not know are passed over, as protobuf
    does.
    """
    if len(data) > MAX_STORY_BYTES:
        raise StoryError(f"a story of {len(data)} bytes is too large: at most {MAX_STORY_BYTES} are read")
    num_messages = num_fields = num_known = 0
    open_messages = [(0, len(data), "Story")]
    while open_messages:
        at, end, message = open_messages.pop()
        while at < end:
            known, start, at = _read_field(data, at, end, message)
            num_fields += 1
            if known is not None:
                num_known += 1
                if known.child:
                    num_messages += 1
                    open_messages.append((start, at, known.child))
            if num_messages > MAX_MESSAGES or num_fields > MAX_FIELDS:
                limit = "messages" if num_messages > MAX_MESSAGES else "fields"
                most = MAX_MESSAGES if num_messages > MAX_MESSAGES else MAX_FIELDS
                raise StoryError(f"a story nests more than {most} {limit}: split it")
    if data and not num_known:
        raise StoryError(f"{len(data)} bytes hold none of a story's fields: they are no story message")


def _read_field(data: bytes, at: int, end: int, message: str) -> tuple[_Known | None, int, int]:
    """What the field at `at` is, where its content starts and where it stops; it must stop before `end`."""
    tag, content = _varint(data, at, end)
    number, wire = tag >> 3, tag & 7
    known = _KNOWN[message].get(number)
    if wire not in (_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES) or not 1 <= number < 1 << 29:
        raise StoryError(f"byte {at} is no story message: field {number} of wire type {wire}")
    if known is not None and wire != known.wire:
        raise StoryError(
            f"byte {at} is no story message: {known.name} holds {_WIRE_NAMES[wire]}, expected "
            f"{_WIRE_NAMES[known.wire]}"
        )
    if wire == _VARINT:
        _, stop = _varint(data, content, end)
    elif wire == _LENGTH:
        length, content = _varint(data, content, end)
        stop = content + length
    else:
        stop = content + (8 if wire == _EIGHT_BYTES else 4)
    if stop > end:
        raise StoryError(
            f"a story is truncated at byte {end}: the field at byte {at} says that it goes on to {stop}"
        )
    return known, content, stop


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
