"""A world on disk or on its way to another process: the environment's few facts around the model's own state
bytes.

Layout: magic (8 bytes, the last is the version), CRC-32 of the rest (4), header length (4), header (UTF-8
JSON), state bytes of `WorldState.to_bytes` (absent before the first question of t2i). Parsed by schema with
size limits; nothing is unpickled, so a snapshot from a stranger is safe to open.
"""

import json
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from emuworld.world_model import SnapshotError

MAGIC = b"EWSNAP\x00\x01"
MAX_BYTES = 1 << 24  # 16 MiB; a 32,768-token world of the published model takes about 80 kB
_PREFIX = struct.Struct("<8sII")
_FIELDS: dict[str, type] = {
    "mode": str,
    "prompt": str,
    "size": list,
    "seed": int,
    "frame_index": int,
    "terminated": bool,
}


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The parts of an episode that outlive the process it was imagined in."""

    mode: str
    prompt: str
    size: tuple[int, int]  # (height, width) in pixels
    seed: int
    frame_index: int
    terminated: bool
    world: bytes  # WorldState.to_bytes(), or b"" before the first question of t2i

    def to_bytes(self) -> bytes:
        """The snapshot as bytes; `from_bytes` is its inverse."""
        header = json.dumps(
            {name: getattr(self, name) for name in _FIELDS}, ensure_ascii=False, separators=(",", ":")
        ).encode()
        body = header + self.world
        return _PREFIX.pack(MAGIC, zlib.crc32(body), len(header)) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> "Snapshot":
        """Parse `data`. SnapshotError (a ValueError) for what `save_state` did not write like this."""
        if not isinstance(data, bytes | bytearray | memoryview):
            raise _not_a_snapshot(f"got {type(data).__name__}, expected bytes")
        data = bytes(data)
        if not _PREFIX.size <= len(data) <= MAX_BYTES:
            raise _not_a_snapshot(f"got {len(data)} bytes, expected {_PREFIX.size} to {MAX_BYTES}")
        magic, checksum, header_length = _PREFIX.unpack_from(data)
        if magic[:-1] != MAGIC[:-1]:
            raise _not_a_snapshot(f"it begins with {magic!r}, expected {MAGIC!r}")
        if magic != MAGIC:
            raise _not_a_snapshot(f"its format version is {magic[-1]}, this release reads {MAGIC[-1]}")
        body = data[_PREFIX.size :]
        if zlib.crc32(body) != checksum or header_length > len(body):
            raise _not_a_snapshot("its checksum does not match: it was cut short or changed")
        header = _parse_header(body[:header_length])
        size = header.pop("size")
        return cls(**header, size=(size[0], size[1]), world=body[header_length:])


def _parse_header(data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _not_a_snapshot(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict) or header.keys() != _FIELDS.keys():
        raise _not_a_snapshot(f"its header needs the fields {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        if type(header[name]) is not kind:
            raise _not_a_snapshot(f"its {name} is {header[name]!r}, expected {kind.__name__}")
    size = header["size"]
    if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        raise _not_a_snapshot(f"its size is {size!r}, expected [height, width]")
    if not 0 <= header["seed"] < 1 << 63 or header["frame_index"] < 0:
        raise _not_a_snapshot("its seed or frame_index is out of range")
    return header


def _not_a_snapshot(reason: str) -> SnapshotError:
    return SnapshotError(
        f"this is not a usable world snapshot: {reason}. Pass the bytes that save_state() returned, unchanged"
    )
