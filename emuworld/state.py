"""A world's whole state: token ids, a seed and a step count, a few kilobytes as bytes. No weights, caches or
pixels.

What it is not: a model. The ids mean something only under the checkpoint whose fingerprint the state carries.

Snapshot, version 1 (little endian): magic, version, flags, length of the mode, bits an id, seed, step, height
and width in pixels (0 = the model's choice), number of prompt and answer ids, fingerprint; the mode; the ids,
`bits` bits each, most significant first; a checksum over all of it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from emuworld.decoding.request import Stop
from emuworld.tokens.token_ids import TokenIds
from emuworld.tokens.vocabulary import Vocabulary

_MAGIC = b"EmuW"
_VERSION = 1
_HEADER = struct.Struct("<4sBBBBQQHHII16s")
_CHECKSUM_BYTES = 8
_ENDED = 1
_MAX_IDS = 1 << 20  # 32 times the published context; a bound on what opening a snapshot may allocate
MAX_SNAPSHOT_BYTES = _HEADER.size + 255 + 4 * _MAX_IDS + _CHECKSUM_BYTES
FINGERPRINT_BYTES = 16


class SnapshotError(ValueError):
    """Bytes that are no snapshot, or a damaged one, or one of another model."""


class ContextFull(ValueError):
    """The world's context has no room for another image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Segment:
    """One step of an answer. `image` is uint8 [H, W, 3], None where the model ended the answer without one.

    Chain of thought, where the model wrote any: `thought` is what it thought before this picture (between BOC
    and EOC), `answer_thought` what it thought before the whole answer (between BOG and EOG; on the first
    segment only). `ended`: nothing can follow in this world.

    `stop_reason`: why the segment is over: "image" (its picture is finished), "end" (the model ended its
    answer), or the limit at which the answer was closed: "text_limit" (words of one segment), "token_limit"
    (`Sampling.max_new_tokens`), "context" (no room is left in the context).
    """

    text: str
    image: NDArray[np.uint8] | None
    thought: str | None
    ended: bool
    answer_thought: str | None = None
    stop_reason: Stop = Stop.IMAGE


@dataclass(frozen=True, kw_only=True)
class WorldState:
    """One world at one moment. Compares and hashes by value; every step makes a new one.

    Attributes:
        mode: one of `emuworld.tokens.sequence.MODES`.
        prompt_ids: BOS to BSS, reference images included. Any numbers may be given; `TokenIds` are kept.
        answer_ids: everything behind it so far; likewise.
        seed: key of the world's random numbers, 0 .. 2**64 - 1.
        step: segments so far, the other half of the key.
        size: height and width of every image, in pixels; None until the model has chosen.
        ended: the answer is over.
        fingerprint: 16 bytes that name the checkpoint.

    Raises:
        SnapshotError: ids that are no integers of 32 bits.
    """

    mode: str
    prompt_ids: TokenIds
    answer_ids: TokenIds
    seed: int
    step: int
    size: tuple[int, int] | None
    ended: bool
    fingerprint: bytes

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "answer_ids"):
            ids = getattr(self, name)
            if not isinstance(ids, TokenIds):
                try:
                    object.__setattr__(self, name, TokenIds(ids))
                except ValueError as error:
                    raise SnapshotError(f"the state's {name} are no ids: {error}") from error

    @property
    def ids(self) -> TokenIds:
        """Prompt and answer."""
        return self.prompt_ids + self.answer_ids

    @property
    def num_tokens(self) -> int:
        """Of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)

    def after(self, ids: Iterable[int], *, size: tuple[int, int] | None, ended: bool) -> WorldState:
        """The world one segment later, with these ids behind its answer."""
        return WorldState(  # not dataclasses.replace, which takes three times as long
            mode=self.mode,
            prompt_ids=self.prompt_ids,
            answer_ids=self.answer_ids + ids,
            seed=self.seed,
            step=self.step + 1,
            size=size,
            ended=ended,
            fingerprint=self.fingerprint,
        )

    def to_bytes(self) -> bytes:
        """The snapshot that `from_bytes` reads; at most 1 kB a frame of 256 px."""
        mode = self.mode.encode()
        ids = self.ids.numbers
        bits = max(1, int(ids.max(initial=0)).bit_length())
        height, width = self.size or (0, 0)
        header = _HEADER.pack(
            _MAGIC,
            _VERSION,
            _ENDED * self.ended,
            len(mode),
            bits,
            self.seed,
            self.step,
            height,
            width,
            len(self.prompt_ids),
            len(self.answer_ids),
            self.fingerprint,
        )
        content = header + mode + _pack(ids, bits)
        return content + _checksum(content)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> WorldState:
        """Read a snapshot. Nothing is executed or unpickled, and what a header claims is checked before it is
        used.

        Raises:
            SnapshotError: truncated, altered, oversized, or of another version.
        """
        if not isinstance(data, bytes | bytearray | memoryview):
            raise SnapshotError(
                f"a snapshot must be bytes, got {type(data).__name__}; give what save_state returned"
            )
        data = bytes(data) if len(data) <= MAX_SNAPSHOT_BYTES else b""
        if not data:
            raise SnapshotError(
                f"a snapshot has 1 to {MAX_SNAPSHOT_BYTES} bytes; give what save_state returned"
            )
        if data[:4] != _MAGIC[: len(data)]:
            raise SnapshotError(f"expected a snapshot that begins with {_MAGIC!r}, got {data[:4]!r}")
        if len(data) < _HEADER.size + _CHECKSUM_BYTES:
            raise SnapshotError(f"the snapshot is cut off after {len(data)} bytes; save it again")
        if data[4] != _VERSION:
            raise SnapshotError(
                f"the snapshot has version {data[4]}, this emuworld reads {_VERSION}; "
                "open it with the version that wrote it"
            )
        content, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
        if _checksum(content) != checksum:
            raise SnapshotError(
                "the snapshot is cut off or altered (its checksum does not fit); save it again"
            )
        return cls._from_content(content)

    @classmethod
    def _from_content(cls, content: bytes) -> WorldState:
        _, _, flags, mode_length, bits, seed, step, height, width, num_prompt, num_answer, fingerprint = (
            _HEADER.unpack_from(content)
        )
        num_ids = num_prompt + num_answer
        start = _HEADER.size + mode_length
        if not 1 <= bits <= 31 or num_ids > _MAX_IDS or len(content) != start + (num_ids * bits + 7) // 8:
            raise SnapshotError(
                f"the snapshot's header claims {num_ids} ids of {bits} bits, which is not what follows it; "
                "save it again"
            )
        try:
            mode = content[_HEADER.size : start].decode()
        except UnicodeDecodeError as error:
            raise SnapshotError("the snapshot's mode is not text; save it again") from error
        ids = TokenIds(_unpack(content[start:], bits=bits, count=num_ids))
        return cls(
            mode=mode,
            prompt_ids=ids[:num_prompt],
            answer_ids=ids[num_prompt:],
            seed=seed,
            step=step,
            size=(height, width) if height and width else None,
            ended=bool(flags & _ENDED),
            fingerprint=fingerprint,
        )


def split_chunks(ids: Iterable[int], *, eoi: int) -> list[TokenIds]:
    """Cut behind every EOI; what follows the last one is a chunk of its own, if there is anything."""
    ids = TokenIds.of(ids)
    cuts = sorted({0, *(place + 1 for place in ids.places(eoi)), len(ids)})
    return [ids[start:stop] for start, stop in pairwise(cuts)]


def image_blocks(ids: Iterable[int], vocabulary: Vocabulary) -> list[TokenIds]:
    """Every BOI ... EOI in the ids, both included. SnapshotError where one is not closed."""
    blocks, start = [], None
    ids = TokenIds.of(ids)
    ids_N = ids.numbers
    for i in np.flatnonzero((ids_N == vocabulary.boi) | (ids_N == vocabulary.eoi)).tolist():
        if ids_N[i] == vocabulary.boi:
            start = i
        elif start is not None:
            blocks.append(ids[start : i + 1])
            start = None
    if start is not None:
        raise SnapshotError("the state holds an image that is not closed; it is damaged, save it again")
    return blocks


def block_codes(block: Iterable[int], vocabulary: Vocabulary) -> NDArray[np.int64]:
    """Codes [h, w] of one image block; its rows say its size. SnapshotError where they are ragged or hold no
    codes."""
    block = TokenIds.of(block)
    start = block.index(vocabulary.img) + 1 if vocabulary.img in block else len(block)
    body = block.numbers[start:].astype(np.int64)
    rows = np.flatnonzero((body == vocabulary.eol) | (body == vocabulary.eoi))
    width = int(rows[0]) + 1 if len(rows) else 1
    if len(rows) == 0 or len(body) != len(rows) * width or width < 2:
        raise SnapshotError("the state holds a ragged image; it is damaged, save it again")
    codes = body.reshape(len(rows), width)[:, :-1] - vocabulary.visual_start
    if codes.min() < 0 or codes.max() >= vocabulary.num_visual_tokens:
        raise SnapshotError(
            "the state holds an image with ids that are no codes; it is damaged, save it again"
        )
    return codes


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_CHECKSUM_BYTES, person=b"emuworld").digest()


def _pack(ids: NDArray[np.int32], bits: int) -> bytes:
    shifts = np.arange(bits - 1, -1, -1)
    return np.packbits(((ids[:, None] >> shifts) & 1).astype(np.uint8)).tobytes()


def _unpack(data: bytes, *, bits: int, count: int) -> list[int]:
    flat = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=count * bits)
    weights = 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    numbers: list[int] = (flat.reshape(count, bits).astype(np.int64) @ weights).tolist()
    return numbers
