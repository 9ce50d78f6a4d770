"""Snapshots: round trips, their size, and every kind of damage refused by name."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest

from emuworld.state import (
    MAX_SNAPSHOT_BYTES,
    SnapshotError,
    WorldState,
    block_codes,
    image_blocks,
    split_chunks,
)
from emuworld.tokens.sequence import image_block
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.token_ids import TokenIds
from emuworld.tokens.vocabulary import EMU35, builtin

TOKENIZER = TextTokenizer(
    {bytes([i]): i for i in range(256)}, vocabulary=builtin(num_text_tokens=256, num_visual_tokens=4096)
)
V = TOKENIZER.vocabulary


def make_state(num_ids: int = 50, *, num_tokens: int = 4367, **fields: object) -> WorldState:
    ids = tuple(np.random.default_rng(num_ids).integers(0, num_tokens, num_ids).tolist())
    values = {
        "mode": "explore",
        "prompt_ids": ids[: num_ids // 3],
        "answer_ids": ids[num_ids // 3 :],
        "seed": 2**64 - 1,
        "step": 7,
        "size": (256, 512),
        "ended": False,
        "fingerprint": bytes(range(16)),
    }
    return WorldState(**{**values, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("num_ids", [0, 1, 2, 3, 50, 13_001])
@pytest.mark.parametrize("num_tokens", [2, 4096, 4367, EMU35.size])
def test_round_trip(num_ids: int, num_tokens: int) -> None:
    state = make_state(num_ids, num_tokens=num_tokens)
    assert WorldState.from_bytes(state.to_bytes()) == state
    assert hash(WorldState.from_bytes(bytearray(state.to_bytes()))) == hash(state)


@pytest.mark.parametrize(
    "fields",
    [{"size": None}, {"ended": True}, {"seed": 0}, {"mode": "t2i"}, {"answer_ids": ()}, {"step": 10**9}],
)
def test_every_field_survives(fields: dict[str, object]) -> None:
    state = make_state(**fields)  # type: ignore[arg-type]
    restored = WorldState.from_bytes(state.to_bytes())
    assert dataclasses.asdict(restored) == dataclasses.asdict(state)
    assert state.to_bytes() != make_state().to_bytes()


def test_ids_are_given_as_anything_and_kept_in_one_form() -> None:
    state = make_state()
    for given in (state.answer_ids, list(state.answer_ids), np.array(state.answer_ids)):
        same = dataclasses.replace(state, answer_ids=given)
        assert isinstance(same.answer_ids, TokenIds) and same == state and hash(same) == hash(state)
    assert same.answer_ids == tuple(state.answer_ids) and state.ids == (*state.prompt_ids, *state.answer_ids)
    for wrong in ([2**31], [0.5], ["a"]):
        with pytest.raises(SnapshotError, match="answer_ids are no ids"):
            dataclasses.replace(state, answer_ids=wrong)


def test_a_segment_later() -> None:
    """Nothing else has changed."""
    state = make_state()
    expected = dataclasses.replace(
        state, answer_ids=(*state.answer_ids, 3, 4), step=state.step + 1, size=(16, 32), ended=True
    )
    assert state.after([3, 4], size=(16, 32), ended=True) == expected
    assert state == make_state()


def test_a_snapshot_of_today_is_one_of_before() -> None:
    """The bytes of a state whose ids were a tuple, as they were written then."""
    digest = hashlib.sha256(make_state(300, num_tokens=EMU35.size).to_bytes()).hexdigest()
    assert digest == "392e689be73310f166c1fd506f20ef3ecdc470e03ee016e7b00a403fac20a7f6"


@pytest.mark.parametrize(("vocabulary_size", "side"), [(6111, 16), (EMU35.size, 16), (6111, 8)])
def test_at_most_one_kilobyte_a_frame_of_256_px(vocabulary_size: int, side: int) -> None:
    """48 frames with a 40-token command each, under the built-in and the published number of ids."""
    frames, block = 48, 40 + 7 + side * (side + 1)
    state = make_state(frames * block, num_tokens=vocabulary_size)
    assert len(state.to_bytes()) <= frames * 1000


def test_every_truncation_and_every_altered_byte_is_refused() -> None:
    data = make_state(20).to_bytes()
    for length in range(len(data)):
        with pytest.raises(SnapshotError):
            WorldState.from_bytes(data[:length])
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= 0x10
        with pytest.raises(SnapshotError):
            WorldState.from_bytes(altered)
    with pytest.raises(SnapshotError):
        WorldState.from_bytes(data + b"\0")


def test_errors_say_what_to_do() -> None:
    data = bytearray(make_state().to_bytes())
    with pytest.raises(SnapshotError, match="must be bytes, got str"):
        WorldState.from_bytes("text")  # type: ignore[arg-type]
    with pytest.raises(SnapshotError, match="begins with"):
        WorldState.from_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(SnapshotError, match=f"1 to {MAX_SNAPSHOT_BYTES} bytes"):
        WorldState.from_bytes(bytes(MAX_SNAPSHOT_BYTES + 1))
    with pytest.raises(SnapshotError, match="checksum"):
        WorldState.from_bytes(data[:-1])
    data[4] = 9
    with pytest.raises(SnapshotError, match="version 9"):
        WorldState.from_bytes(data)


def test_random_bytes_never_raise_anything_else() -> None:
    rng = np.random.default_rng(0)
    for length in rng.integers(0, 400, 300):
        with pytest.raises(SnapshotError):
            WorldState.from_bytes(b"EmuW\1" + rng.bytes(int(length)))


def test_images_are_found_again_in_the_ids() -> None:
    rng = np.random.default_rng(3)
    grids = [rng.integers(0, 4096, shape) for shape in ((2, 3), (16, 16), (1, 1), (5, 1), (1, 5))]
    words = TOKENIZER.encode("turn left")
    ids = [token for codes in grids for token in (*words, *image_block(codes, tokenizer=TOKENIZER))]
    ids += words
    blocks = image_blocks(ids, V)
    for block, codes in zip(blocks, grids, strict=True):
        np.testing.assert_array_equal(block_codes(block, V), codes)
    chunks = split_chunks(ids, eoi=V.eoi)
    assert len(chunks) == len(grids) + 1
    assert [token for chunk in chunks for token in chunk] == ids
    assert all(chunk[-1] == V.eoi for chunk in chunks[:-1])


def test_broken_images_are_refused() -> None:
    block = image_block(np.zeros((3, 4), np.int64), tokenizer=TOKENIZER)
    with pytest.raises(SnapshotError, match="not closed"):
        image_blocks(block[:-1], V)
    without_code = [token for i, token in enumerate(block) if i != 6]
    for broken in (without_code, block[:4] + block[-1:], [V.boi, V.eoi], [V.boi, V.img, V.eoi]):
        with pytest.raises(SnapshotError, match="damaged"):
            block_codes(broken, V)
    text_inside = [5 if V.is_visual(token) else token for token in block]
    with pytest.raises(SnapshotError, match="no codes"):
        block_codes(text_inside, V)
