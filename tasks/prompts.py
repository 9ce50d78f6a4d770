"""Prompts from files: one a line, a list in JSON, or a folder; with reference pictures and more where wanted.

Nothing in them is run: text, JSON and pictures only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from emuworld.tasks.metrics import Frame

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PICTURE_PIXELS = 64 * 2**20  # four times 4096 x 4096: a large camera's
_FIELDS = ("prompt", "images", "commands", "name", "seed", "mode", "aspect")
_PUBLISHED_IMAGES = "reference_image"  # what the published configurations call `images`


@dataclass(frozen=True, kw_only=True)
class Question:
    """One prompt. `name` is the answer's file name without its suffix; None: the run's setting holds."""

    name: str
    prompt: str
    images: tuple[Path, ...] = ()  # reference pictures
    commands: tuple[str, ...] = ()  # texts of the answer's steps; none: the model writes them
    seed: int | None = None
    mode: str | None = None
    aspect: str | None = None


def read_prompts(source: Path) -> list[Question]:
    """The questions of a file or a folder, in order. ValueError names the file and the entry that is wrong.

    Files: `.txt`, a prompt a line; `.json`, a list or an object name -> entry; `.jsonl`, an entry a line. An
    entry is a text, or an object with `prompt` and optionally `images` (one path or several, relative to the
    file; `reference_image` is the same), `commands`, `name`, `seed`, `mode` and `aspect`. Without a name,
    answers are numbered 000, 001, ... A folder: each `NAME.txt` is one prompt, `NAME.png` (jpg, webp),
    `NAME_1.png`, `NAME_2.png`, ... are its reference pictures.
    """
    if not source.exists():
        raise ValueError(f"{source} does not exist: give prompts=FILE or a folder of NAME.txt files")
    try:
        questions = _read_folder(source) if source.is_dir() else _read_file(source)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{source} cannot be read as text ({error}); save it as UTF-8") from error
    if not questions:
        raise ValueError(f"{source} holds no prompt")
    names = [question.name for question in questions]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{source}: two answers would be called {name!r}; give each a name of its own")
    return questions


def read_picture(path: Path) -> Frame:
    """A picture file as uint8 [H, W, 3], turned upright as its camera noted; ValueError where it is none."""
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:  # reads the header only
            if image.width * image.height > MAX_PICTURE_PIXELS:
                raise ValueError(
                    f"{path}: {image.width} x {image.height} pixels are too many: at most "
                    f"{MAX_PICTURE_PIXELS}, make it smaller"
                )
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no PNG, JPEG or WEBP picture that opens: {error}") from error


def _read_folder(folder: Path) -> list[Question]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    pictures = [path for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    questions = []
    for path in files:
        if path.suffix == ".txt":
            own = [p for p in pictures if re.fullmatch(re.escape(path.stem) + r"(_\d+)?", p.stem)]
            own.sort(key=lambda p: (len(p.stem), p.stem))  # _2 before _10
            prompt = _words(path.read_text("utf-8").strip(), where=str(path))
            questions.append(Question(name=path.stem, prompt=prompt, images=tuple(own)))
    used = {picture for question in questions for picture in question.images}
    stray = [path.name for path in pictures if path not in used]
    if stray:
        raise ValueError(
            f"{folder}: {stray[0]} belongs to no prompt; name it after one, NAME_1.png of NAME.txt"
        )
    return questions


def _read_file(path: Path) -> list[Question]:
    text = path.read_text("utf-8")
    entries: Iterable[tuple[str | None, Any]]
    if path.suffix == ".json":
        content = _from_json(text, where=str(path))
        if not isinstance(content, list | dict):
            raise ValueError(f"{path} must hold a list of prompts, or an object name -> prompt")
        entries = content.items() if isinstance(content, dict) else [(None, entry) for entry in content]
    elif path.suffix == ".jsonl":
        lines = [(i, line) for i, line in enumerate(text.splitlines(), start=1) if line.strip()]
        entries = [(None, _from_json(line, where=f"{path}, line {i}")) for i, line in lines]
    elif path.suffix == ".txt":
        entries = [(None, line.strip()) for line in text.splitlines() if line.strip()]
    else:
        raise ValueError(f"{path} is not read: give a .txt, .json or .jsonl file, or a folder")
    return [
        _question(entry, name=name, index=index, folder=path.parent, where=f"{path}, prompt {index}")
        for index, (name, entry) in enumerate(entries)
    ]


def _from_json(text: str, *, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON: {error}") from error


def _question(entry: Any, *, name: str | None, index: int, folder: Path, where: str) -> Question:
    fields: Mapping[str, Any] = {"prompt": entry} if isinstance(entry, str) else entry
    if not isinstance(fields, Mapping) or not isinstance(fields.get("prompt"), str):
        raise ValueError(f'{where} must be a text, or an object with "prompt"; got {str(entry)[:60]!r}')
    unknown = fields.keys() - {*_FIELDS, _PUBLISHED_IMAGES}
    if unknown:
        raise ValueError(
            f"{where} has {sorted(unknown)}, which nothing reads; known are {', '.join(_FIELDS)}"
        )
    seed = fields.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64):
        raise ValueError(f"{where}: seed must be an integer in 0..2**64 - 1, got {seed!r}")
    paths = _texts(fields, "images", where) or _texts(fields, _PUBLISHED_IMAGES, where)
    chosen = {key: _text(fields, key, where) for key in ("mode", "aspect")}
    return Question(
        name=_file_name(_text(fields, "name", where) or name or f"{index:03d}", where=where),
        prompt=_words(fields["prompt"], where=where),
        images=tuple(folder / path for path in paths),
        commands=_texts(fields, "commands", where),
        seed=seed,
        **chosen,
    )


def _texts(fields: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = fields.get(key) or []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise ValueError(f"{where}: {key} must be a text or a list of texts, got {value!r}")
    return tuple(_words(one, where=where) for one in values)


def _text(fields: Mapping[str, Any], key: str, where: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a text, got {value!r}")
    return value


def _words(text: str, *, where: str) -> str:
    """The text; ValueError where UTF-8 cannot write it (JSON can name half a character)."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{where} holds half a surrogate pair, which is no character; take it out")
    return text


def _file_name(name: str, *, where: str) -> str:
    if not re.fullmatch(r"[^/\\\0:*?\"<>|\s.][^/\\\0:*?\"<>|\n]{0,99}", name):
        raise ValueError(f"{where}: {name!r} is no file name; take letters, digits, '-' and '_'")
    return name
