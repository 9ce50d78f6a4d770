"""A user's folder of pictures and texts -> pairs to learn from.

What is read, first found first: `metadata.jsonl` or `captions.jsonl` (an object a line), `metadata.csv` or
`captions.csv` (with a header), else a text file beside each picture (`dog.png`, `dog.txt`), in folders inside
too. A line names the picture (`file_name`, `image` or `file`) and its words (`text`, `caption` or `prompt`);
with `source`, another picture, the words are an instruction that turns the source into the picture.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from emuworld.pictures import middle
from emuworld.training.json_lines import json_lines

_TABLES = ("metadata.jsonl", "captions.jsonl", "metadata.csv", "captions.csv")
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_NAMES = {"picture": ("file_name", "image", "file"), "text": ("text", "caption", "prompt")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A picture and its words, or with `source` an edit: that picture, an instruction, the result."""

    picture: Path
    text: str
    source: Path | None = None


def read_pairs(folder: str | Path) -> list[Pair]:
    """All pairs of a folder, in a fixed order. ValueError that names what is missing or not understood."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give one with pictures and texts")
    table = next((folder / name for name in _TABLES if (folder / name).is_file()), None)
    pairs = list(_beside(folder)) if table is None else list(_listed(table))
    if not pairs:
        raise ValueError(
            f"{folder} holds no pictures with texts: put dog.txt beside dog.png, or write metadata.jsonl "
            'with lines as {"file_name": "dog.png", "text": "a dog"}'
        )
    return pairs


def picture(path: Path, *, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] of height and width `size` px: the middle of a file's picture."""
    return middle(opened(path), size)


def opened(path: Path) -> Image.Image:
    """A picture in RGB. ValueError where the file is none."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise ValueError(f"{path} is no picture that can be read ({error})") from error


def _beside(folder: Path) -> Iterator[Pair]:
    for path in sorted(folder.rglob("*")):
        words = path.with_suffix(".txt")
        if path.suffix.lower() in _ENDINGS and words.is_file():
            yield Pair(picture=path, text=words.read_text(encoding="utf-8").strip())


def _listed(table: Path) -> Iterator[Pair]:
    for number, line in _lines(table):
        where = f"{table}, line {number}"
        found = {kind: [line[n] for n in names if line.get(n)] for kind, names in _NAMES.items()}
        for kind, values in found.items():
            if not values or not isinstance(values[0], str):
                raise ValueError(f"{where}: no {kind}; expected one of {', '.join(_NAMES[kind])}")
        paths = [found["picture"][0], *([line["source"]] if line.get("source") else [])]
        files = [_inside(table.parent, str(name), where=where) for name in paths]
        source = files[1] if len(files) > 1 else None
        yield Pair(picture=files[0], text=str(found["text"][0]).strip(), source=source)


def _lines(table: Path) -> Iterator[tuple[int, Mapping[str, object]]]:
    if table.suffix != ".csv":
        yield from json_lines(table)
        return
    with table.open(encoding="utf-8", newline="") as file:
        for row in (reader := csv.DictReader(file)):
            yield reader.line_num, row


def _inside(folder: Path, name: str, *, where: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise ValueError(f"{where}: {name[:200]!r} is no file in {folder}")
    return path
