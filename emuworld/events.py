"""What a world tells while it imagines: text and thoughts in pieces, an image's rows or drafts, the image.

`EventReader` turns ids into events as they come, in any portions; the facade adds the pixels and the end. The
pieces of a segment, joined, are its text: a character whose bytes are spread over several tokens comes whole,
with its last token.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from emuworld.state import Segment, WorldState
from emuworld.tokens.text import TextTokenizer

About = Literal["answer", "image"]


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """The next words of the segment's text; a text that the caller gave comes as one piece."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ThoughtPiece:
    """The next words of a thought `about` the whole "answer" (BOG to EOG) or the next "image" (BOC to
    EOC)."""

    text: str
    about: About


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageRow:
    """One row of codes, int64 [w]; `row` counts from 0 at the top to `num_rows` - 1."""

    row: int
    num_rows: int
    codes: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDraft:
    """A picture that is drawn at once, as the model draws it in pass `done` of `num_passes`: codes, int64
    [h, w]."""

    codes: NDArray[np.int64]
    done: int
    num_passes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDone:
    """The finished picture, uint8 [H, W, 3], the same as the segment's."""

    image: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentDone:
    """Always the last event: what `imagine` would have given. `segment.stop_reason` says why it is over."""

    state: WorldState
    segment: Segment


Event = TextPiece | ThoughtPiece | ImageDraft | ImageRow | ImageDone | SegmentDone


class EventReader:
    """Reads the ids of one segment, as the grammar of answers allows them, from its beginning."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = tokenizer.vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._about: About | None = None  # the thought that is open
        self._blank: str | None = ""  # white space that the segment begins with; None behind it
        self._size: list[int] | None = None  # digits between BOI and IMG
        self._num_rows = 0
        self._row = 0
        self._codes: list[int] = []

    def read(self, ids: Sequence[int]) -> Iterator[TextPiece | ThoughtPiece | ImageRow]:
        """The events that these further ids complete."""
        words = b""
        for token in ids:
            if self._vocabulary.is_visual(token):
                self._codes.append(self._vocabulary.code(token))
            elif self._size is not None and token != self._vocabulary.img:
                self._size.append(token)
            elif self._vocabulary.is_text(token):
                words += self._tokenizer.token_bytes(token)
            else:
                yield from self._say(words, final=True)
                words = b""
                yield from self._control(token)
        yield from self._say(words, final=False)

    def _control(self, token: int) -> Iterator[TextPiece | ImageRow]:
        v = self._vocabulary
        if token in (v.eol, v.eoi):
            codes = np.array(self._codes, dtype=np.int64)
            yield ImageRow(row=self._row, num_rows=self._num_rows, codes=codes)
            self._row, self._codes = self._row + 1, []
        elif token == v.img:
            self._num_rows = int(self._tokenizer.decode(self._size or []).split("*")[0])
            self._size, self._row = None, 0
        elif token == v.boi:
            yield from self._release()
            self._size = []
        elif token == v.boc:
            yield from self._release()
            self._about = "image"
        elif token == v.bog:
            self._about = "answer"
        elif token in (v.eoc, v.eog):
            self._about = None

    def _say(self, words: bytes, *, final: bool) -> Iterator[TextPiece | ThoughtPiece]:
        """The characters that are whole; `final`: what is left of a broken one too."""
        text = self._utf8.decode(words, final)
        if self._about is not None:
            if text:
                yield ThoughtPiece(text=text, about=self._about)
            return
        if self._blank is not None:  # before the end of an answer white space alone is no text
            self._blank += text
            if self._blank.strip():
                yield from self._release()
        elif text:
            yield TextPiece(text=text)

    def _release(self) -> Iterator[TextPiece]:
        blank, self._blank = self._blank, None
        if blank:
            yield TextPiece(text=blank)
