"""A JSON object a line: what is read, and what is refused by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emuworld.training.json_lines import json_lines


def test_objects_come_with_the_numbers_of_their_lines(tmp_path: Path) -> None:
    """A separator that Unicode counts as the end of a line is none here: it may stand in a text."""
    path = tmp_path / "lines.jsonl"
    said = {"text": "first\u2028second"}
    path.write_text(f'{{"a": 1}}\n\n{json.dumps(said, ensure_ascii=False)}\n', encoding="utf-8")
    assert list(json_lines(path)) == [(1, {"a": 1}), (3, said)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a"', "lines.jsonl, line 2: not valid JSON"),
        (b"[1]", "lines.jsonl, line 1: expected an object"),
        (b"[" * 100_000, "lines.jsonl, line 1: not valid JSON"),
        (b'{"a": "\xff"}', "lines.jsonl: not UTF-8"),
    ],
)
def test_what_is_no_object_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(json_lines(path))
