"""Snapshots: a round trip, and a clear error for everything that is not one."""

import json
import struct
import zlib

import pytest

from emuworld.envs.snapshot import MAGIC, Snapshot

SNAPSHOT = Snapshot(
    mode="explore",
    prompt="a room with a red ball, 红球",
    size=(256, 192),
    seed=(1 << 63) - 1,
    frame_index=12,
    terminated=False,
    world=bytes(range(256)),
)


def test_round_trip() -> None:
    assert Snapshot.from_bytes(SNAPSHOT.to_bytes()) == SNAPSHOT


def test_the_envelope_is_small() -> None:
    assert len(SNAPSHOT.to_bytes()) - len(SNAPSHOT.world) - len(SNAPSHOT.prompt.encode()) < 150


@pytest.mark.parametrize("position", range(0, 200, 7))
def test_a_changed_byte_is_noticed(position: int) -> None:
    data = bytearray(SNAPSHOT.to_bytes())
    data[position] ^= 0x10
    with pytest.raises(ValueError, match="not a usable world snapshot"):
        Snapshot.from_bytes(bytes(data))


@pytest.mark.parametrize("data", [b"", b"EWSNAP", b"x" * 100, MAGIC + b"\xff" * 100, None, "text", 3])
def test_foreign_data_is_refused(data: object) -> None:
    with pytest.raises(ValueError, match="not a usable world snapshot"):
        Snapshot.from_bytes(data)  # type: ignore[arg-type]


def test_a_cut_snapshot_is_refused() -> None:
    with pytest.raises(ValueError, match="cut short"):
        Snapshot.from_bytes(SNAPSHOT.to_bytes()[:-1])


def test_a_later_format_names_its_version() -> None:
    data = MAGIC[:-1] + b"\x09" + SNAPSHOT.to_bytes()[len(MAGIC) :]
    with pytest.raises(ValueError, match="version is 9"):
        Snapshot.from_bytes(data)


@pytest.mark.parametrize(
    "change", [{"size": [16]}, {"seed": -1}, {"terminated": 1}, {"mode": None}, {"more": 1}]
)
def test_a_header_of_another_shape_is_refused(change: dict[str, object]) -> None:

    data = SNAPSHOT.to_bytes()
    length = struct.unpack_from("<I", data, 12)[0]
    header = json.dumps(json.loads(data[16 : 16 + length]) | change).encode()
    body = header + SNAPSHOT.world
    forged = MAGIC + struct.pack("<II", zlib.crc32(body), len(header)) + body
    with pytest.raises(ValueError, match="not a usable world snapshot"):
        Snapshot.from_bytes(forged)
