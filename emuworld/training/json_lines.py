"""Files with a JSON object a line -> the objects, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with the numbers of their lines; empty lines are passed over. ValueError for a
    line that is no JSON object, and for bytes that are no UTF-8.
    """
    with path.open(encoding="utf-8", newline="") as file:
        lines = enumerate(file, start=1)
        while True:
            try:
                number, text = next(lines)
            except StopIteration:
                return
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 ({error})") from error
            if text.strip():
                yield number, _object(text, where=f"{path}, line {number}")


def _object(text: str, *, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected an object")
    return found
