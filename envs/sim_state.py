"""A simulator's state as bytes: a magic, a checksum and JSON, parsed by schema and never unpickled.

Not here: what a state holds. Each environment checks its own fields and names their faults with
`not_a_state`.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Collection, Mapping
from typing import Any

_PREFIX = struct.Struct("<8sI")  # magic, CRC-32 of the rest


class StateError(ValueError):
    """These bytes are not a state that `save_state` of this environment and release wrote."""


def not_a_state(reason: str) -> StateError:
    """The error for bytes that cannot be restored, with the reason in it."""
    return StateError(
        f"this is not a usable simulator state: {reason}. Pass the bytes that save_state() returned"
    )


def pack_state(fields: Mapping[str, Any], *, magic: bytes) -> bytes:
    """JSON values under a checksum. `magic` is 8 bytes, the last of which is the format's version."""
    body = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    return _PREFIX.pack(magic, zlib.crc32(body)) + body


def unpack_state(state: object, *, magic: bytes, names: Collection[str], max_bytes: int) -> dict[str, Any]:
    """The fields that `pack_state` wrote, just those of `names`. StateError for anything else."""
    if not isinstance(state, bytes | bytearray | memoryview):
        raise not_a_state(f"got {type(state).__name__}, expected bytes")
    data = bytes(state)
    if not _PREFIX.size <= len(data) <= max_bytes:
        raise not_a_state(f"got {len(data)} bytes, expected {_PREFIX.size} to {max_bytes}")
    found, checksum = _PREFIX.unpack_from(data)
    if found[:-1] != magic[:-1]:
        raise not_a_state(
            "it is of another environment (a dream's state belongs into the dream's environment, "
            "a room's into the room's)"
        )
    if found != magic:
        raise not_a_state(f"its format version is {found[-1]}, this release reads {magic[-1]}")
    body = data[_PREFIX.size :]
    if zlib.crc32(body) != checksum:
        raise not_a_state("its checksum does not match: it was cut short or changed")
    try:
        fields = json.loads(body)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise not_a_state(f"it is not JSON ({error})") from error
    if not isinstance(fields, dict) or fields.keys() != set(names):
        raise not_a_state(f"it needs the fields {', '.join(names)}")
    return fields
