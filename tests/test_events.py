"""Ids -> events: pieces join to what `parse_answer` reads, however the ids are cut into portions."""

from __future__ import annotations

import random

import numpy as np
import pytest

from emuworld.events import Event, EventReader, ImageRow, TextPiece, ThoughtPiece
from emuworld.tokens.sequence import AnswerSegment, answer, parse_answer
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vocabulary import builtin

# One token a byte: every character beyond ASCII is spread over several.
TOKENIZER = TextTokenizer(
    {bytes([i]): i for i in range(256)}, vocabulary=builtin(num_text_tokens=256, num_visual_tokens=16)
)
V = TOKENIZER.vocabulary
CODES = np.arange(12).reshape(3, 4)
TEXTS = ("", " ", "\n \t", "turn left", " ein Würfel ", "积木放在盘子上", "🤖🧱", "a\u0301 e\u0301", "  x  ")


def events(ids: list[int], *, rng: random.Random | None = None) -> list[Event]:
    """Read in portions of random lengths; without `rng` all at once."""
    reader, told, start = EventReader(TOKENIZER), [], 0
    while start < len(ids):
        stop = len(ids) if rng is None else start + rng.randint(0, 5)
        told += list(reader.read(ids[start:stop]))
        start = stop
    return told


def text_of(told: list[Event]) -> str:
    return "".join(event.text for event in told if isinstance(event, TextPiece))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("thought", [None, "", "wo? 🤖", "想"])
@pytest.mark.parametrize("shows", ["image", "end"])
def test_pieces_join_to_what_the_parser_reads(text: str, thought: str | None, shows: str) -> None:
    segment = AnswerSegment(text=text, thought=thought, codes=CODES if shows == "image" else None)
    ids, _ = answer([segment], tokenizer=TOKENIZER, thought="plan: é", ended=shows == "end")
    parsed = parse_answer(ids, tokenizer=TOKENIZER)
    expected = parsed[-1] if parsed.segments else AnswerSegment()
    rng = random.Random(text)
    for told in (events(ids), events(ids, rng=rng), events(ids, rng=rng)):
        assert text_of(told) == expected.text
        thoughts = [event for event in told if isinstance(event, ThoughtPiece)]
        assert "".join(event.text for event in thoughts if event.about == "answer") == "plan: é"
        image_thought = "".join(event.text for event in thoughts if event.about == "image")
        assert image_thought == (expected.thought or "")
        assert all(piece.text and "\ufffd" not in piece.text for piece in thoughts)
        rows = [event for event in told if isinstance(event, ImageRow)]
        assert [(row.row, row.num_rows) for row in rows] == ([(i, 3) for i in range(3)] if rows else [])
        if shows == "image":
            np.testing.assert_array_equal(np.stack([row.codes for row in rows]), CODES)
            assert told[-3:] == rows


def test_a_character_comes_whole_with_its_last_byte() -> None:
    reader = EventReader(TOKENIZER)
    told = [list(reader.read([token])) for token in TOKENIZER.encode("é🤖x")]
    assert [[piece.text for piece in pieces] for pieces in told] == [[], ["é"], [], [], [], ["🤖"], ["x"]]


def test_broken_bytes_are_told_as_the_parser_reads_them() -> None:
    """Random bytes, thoughts and an image between them: half characters at every joint."""
    rng = random.Random(3)
    for _ in range(200):
        words = [[rng.choice([65, 32, *range(128, 256)]) for _ in range(rng.randint(0, 6))] for _ in range(3)]
        ids = [*words[0], V.boc, *words[1], V.eoc, *words[2]]
        ids += answer([AnswerSegment(codes=CODES)], tokenizer=TOKENIZER, ended=False)[0]
        parsed = parse_answer(ids, tokenizer=TOKENIZER)[0]
        told = events(ids, rng=rng)
        assert text_of(told) == parsed.text
        thought = "".join(event.text for event in told if isinstance(event, ThoughtPiece))
        assert thought == parsed.thought
