"""Tokenizers that the tests of this folder share: the built-in kind, trained here, and the published one."""

from __future__ import annotations

from pathlib import Path

import pytest

from emuworld.tokens.bpe import train_bpe
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vocabulary import builtin

PUBLISHED_FOLDER = Path(__file__).resolve().parents[3] / "shared" / "data"
COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "white", "black"]
SHAPES = ["ball", "box", "cylinder", "cone", "table", "chair", "door", "lamp"]
CORPUS = [
    line
    for colour in COLOURS
    for shape in SHAPES
    for line in (f"go to the {colour} {shape}", f"turn left 45 degrees, there is a {colour} {shape} behind")
]


@pytest.fixture(scope="session")
def ranks_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "text.tiktoken"
    train_bpe(CORPUS, num_tokens=400, path=path)
    return path


@pytest.fixture(scope="session")
def tokenizer(ranks_path: Path) -> TextTokenizer:
    """Built-in kind: 400 text tokens, 64 codes."""
    return TextTokenizer.builtin(ranks_path, vocabulary=builtin(num_text_tokens=400, num_visual_tokens=64))


@pytest.fixture(scope="session")
def published() -> TextTokenizer:
    if not (PUBLISHED_FOLDER / "emu3.tiktoken").is_file():
        pytest.skip(f"the published tokenizer files are not in {PUBLISHED_FOLDER}")
    return TextTokenizer.published(PUBLISHED_FOLDER)
