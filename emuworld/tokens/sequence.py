"""Segments <-> ids: prompt templates, image blocks, answers with their loss mask, and reading an answer back.

To the letter of the Emu3.5 release (fact sheet, sections 4.1 to 4.3), with the release's own order for x2i,
where the reference images come before the question. What vla, explore and howto put into the question is in
`emuworld.questions`. Unlike the release, words are never parsed for control tokens (unless asked for), and a
broken answer is read as far as it goes and says what was wrong with it.

Codes are 0-based indices of the vision tokenizer, int [h, w]; ids are what the transformer sees.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

from emuworld.tokens.text import TextTokenizer

MODES = ("t2i", "x2i", "howto", "story", "explore", "vla")
ImageTokens = npt.NDArray[np.integer]  # [h, w] codes, 0-based

_EXTRA_INSTRUCTION = {"howto": " Please generate a response with interleaved text and images."}
_SIZE = re.compile(r"([1-9]\d{0,3})\*([1-9]\d{0,3})")


@dataclass(frozen=True, kw_only=True, eq=False)
class AnswerSegment:
    """One step of an answer: text, then a thought about the picture, then its codes (int [h, w])."""

    text: str = ""
    codes: ImageTokens | None = None
    thought: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class ParsedSegment(AnswerSegment):
    """A step that was read back; `problems` says what was missing or broken in it."""

    problems: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class ParsedAnswer(Sequence[ParsedSegment]):
    """An answer that was read back; iterates over its segments.

    `thought` is the thought before the whole answer. `ended`: the end of the answer was there (ESS or EOS).
    `problems` are those of the answer as a whole; each segment has its own.
    """

    segments: tuple[ParsedSegment, ...]
    thought: str | None = None
    ended: bool = False
    problems: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.segments)

    def __getitem__(self, index: int) -> ParsedSegment:  # type: ignore[override]  # no slices
        return self.segments[index]

    def with_last_codes(self, codes: ImageTokens) -> ParsedAnswer:
        """The same with another picture at its end: what is read of the same ids with those `last_codes`."""
        *before, last = self.segments
        segment = ParsedSegment(text=last.text, codes=codes, thought=last.thought, problems=last.problems)
        return ParsedAnswer(
            segments=(*before, segment), thought=self.thought, ended=self.ended, problems=self.problems
        )


def image_prefix(size: tuple[int, int], *, tokenizer: TextTokenizer) -> list[int]:
    """`BOI h*w IMG` for an image of `size` = (h, w) tokens: what is forced to fix an image's size."""
    h, w = size
    if not (1 <= h <= 9999 and 1 <= w <= 9999):
        raise ValueError(f"an image of {h} by {w} tokens cannot be written: each side is 1 to 9999")
    vocabulary = tokenizer.vocabulary
    return [vocabulary.boi, *tokenizer.encode(f"{h}*{w}"), vocabulary.img]


def image_block(codes: ImageTokens, *, tokenizer: TextTokenizer) -> list[int]:
    """`BOI h*w IMG row EOL row … row EOI` for codes [h, w]; no EOL after the last row."""
    codes = np.asarray(codes)
    vocabulary = tokenizer.vocabulary
    if codes.ndim != 2 or codes.size == 0 or not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(f"an image must be integer codes [h, w], got {codes.dtype} {list(codes.shape)}")
    if codes.min() < 0 or codes.max() >= vocabulary.num_visual_tokens:
        raise ValueError(
            f"codes {codes.min()}..{codes.max()} leave 0..{vocabulary.num_visual_tokens - 1}: "
            "encode the image with the vision tokenizer that belongs to this vocabulary"
        )
    h, w = codes.shape
    rows = np.full((h, w + 1), vocabulary.eol, dtype=np.int64)
    rows[:, :w] = codes.astype(np.int64) + vocabulary.visual_start
    rows[-1, -1] = vocabulary.eoi
    return image_prefix((h, w), tokenizer=tokenizer) + rows.ravel().tolist()


@cache
def image_length(size: tuple[int, int]) -> int:
    """Number of ids of an image block of `size` = (h, w) tokens."""
    h, w = size
    return len(f"{h}*{w}") + h * (w + 1) + 2


def prompt_ids(
    mode: str,
    *,
    question: str,
    images: Iterable[ImageTokens] = (),
    tokenizer: TextTokenizer,
    allow_control: bool = False,
) -> list[int]:
    """The conditional prompt, BOS to BSS. Images stand before the question in x2i, after it elsewhere.

    `allow_control` parses control tokens in the question as the release does; keep it False for users' words.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is unknown: choose one of {', '.join(MODES)}")
    before, after = _template(mode)
    blocks = [image_block(codes, tokenizer=tokenizer) for codes in images]
    texts = (before, question + after) if mode == "x2i" else (before + question, after)
    return _prompt(texts, blocks, tokenizer=tokenizer, allow_control=allow_control)


def unconditional_ids(images: Iterable[ImageTokens] = (), *, tokenizer: TextTokenizer) -> list[int]:
    """The prompt of the unguided row, BOS to BSS: the images without task and question.

    Without images it is also the prompt of the third row of guidance by text and images, whose answer holds
    the drawn images but which never sees the reference images.
    """
    blocks = [image_block(codes, tokenizer=tokenizer) for codes in images]
    return _prompt(_template(None), blocks, tokenizer=tokenizer, allow_control=False)


def template_texts() -> list[str]:
    """What all prompts say apart from question and images, one line a mode: for training the built-in BPE."""
    return ["".join(_template(mode)) for mode in (None, *MODES)]


def _template(mode: str | None) -> tuple[str, str]:
    task = "" if mode is None else f" for {mode} task"
    extra = _EXTRA_INSTRUCTION.get(mode or "", "")
    return f"You are a helpful assistant{task}.{extra} USER: ", " ASSISTANT: "


def _prompt(
    texts: tuple[str, str], blocks: list[list[int]], *, tokenizer: TextTokenizer, allow_control: bool
) -> list[int]:
    """BOS text images text BSS; without images the two texts are one, so tokens may span the joint."""
    parts = list(texts) if blocks else ["".join(texts)]
    encoded = [tokenizer.encode(part, allow_control=allow_control) for part in parts]
    images = [token for block in blocks for token in block]
    tail = encoded[1] if blocks else []
    return [tokenizer.vocabulary.bos, *encoded[0], *images, *tail, tokenizer.vocabulary.bss]


def answer(
    segments: Iterable[AnswerSegment],
    *,
    tokenizer: TextTokenizer,
    thought: str | None = None,
    ended: bool = True,
    train_text: bool = True,
) -> tuple[list[int], list[bool]]:
    """An answer after BSS: ids and their loss mask (True = trained).

    Args:
        thought: reasoning before the whole answer.
        ended: close with ESS EOS; False for the beginning of a longer answer.
        train_text: False leaves the segments' own text out of the loss, for text that a user always gives.
    """
    vocabulary = tokenizer.vocabulary
    ids: list[int] = []
    mask: list[bool] = []

    def add(tokens: list[int], *, trained: bool = True) -> None:
        ids.extend(tokens)
        mask.extend([trained] * len(tokens))

    if thought is not None:
        add([vocabulary.bog, *tokenizer.encode(thought), vocabulary.eog])
    for segment in segments:
        add(tokenizer.encode(segment.text), trained=train_text)
        if segment.thought is not None:
            add([vocabulary.boc, *tokenizer.encode(segment.thought), vocabulary.eoc])
        if segment.codes is not None:
            add(image_block(segment.codes, tokenizer=tokenizer))
    if ended:
        add([vocabulary.ess, vocabulary.eos])
    return ids, mask


def parse_answer(
    ids: Iterable[int], *, tokenizer: TextTokenizer, last_codes: ImageTokens | None = None
) -> ParsedAnswer:
    """Read what followed BSS, up to ESS or EOS. Never raises, whatever the ids.

    Each image ends a segment. A broken or cut-off image leaves `codes` None; stray tokens are left out; both
    are named in `problems`. A last segment of white space alone is dropped, as the release does.

    `last_codes`: codes [h, w] of one more image, which follows the ids: whoever has them need not have them
    read.
    """
    return _AnswerReader(ids, tokenizer=tokenizer).read(last_codes)


class _AnswerReader:
    """One pass over the ids; `_next` is the token in hand, None after the last."""

    def __init__(self, ids: Iterable[int], *, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = tokenizer.vocabulary
        self._ids: list[int] = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        self._at = 0
        self._next = self._ids[0] if self._ids else None
        self._segments: list[ParsedSegment] = []
        self._answer_thought: str | None = None
        self._text = ""
        self._thought: str | None = None
        self._problems: list[str] = []

    def read(self, last_codes: ImageTokens | None = None) -> ParsedAnswer:
        vocabulary = self._vocabulary
        while self._next is not None and self._next not in (vocabulary.ess, vocabulary.eos):
            token = self._next
            if vocabulary.is_text(token):
                self._text += self._take_text()
            elif token == vocabulary.boi:
                self._read_image()
            elif token == vocabulary.boc:
                self._thought = _joined(self._thought, self._read_thought(vocabulary.eoc))
            elif token == vocabulary.bog:
                self._answer_thought = _joined(self._answer_thought, self._read_thought(vocabulary.eog))
            else:
                self._skip_stray()
        ended = self._next is not None
        if last_codes is not None and not ended:
            self._close_segment(last_codes)
        if self._text.strip() or self._thought is not None or self._problems:
            self._close_segment(None)
        return ParsedAnswer(
            segments=tuple(self._segments),
            thought=self._answer_thought,
            ended=ended,
            problems=() if ended else ("the answer was cut off: neither ESS nor EOS was there",),
        )

    def _advance(self, count: int = 1) -> None:
        self._at += count
        self._next = self._ids[self._at] if self._at < len(self._ids) else None

    def _take_text(self) -> str:
        """Text of the run of text ids that begins with the token in hand."""
        begin, end, stop = self._at, self._at, self._vocabulary.num_text_tokens
        while end < len(self._ids) and 0 <= self._ids[end] < stop:
            end += 1
        self._advance(end - begin)
        return self._tokenizer.decode(self._ids[begin:end])

    def _close_segment(self, codes: ImageTokens | None) -> None:
        self._segments.append(
            ParsedSegment(text=self._text, codes=codes, thought=self._thought, problems=tuple(self._problems))
        )
        self._text, self._thought, self._problems = "", None, []

    def _skip_stray(self) -> None:
        """Leave out a token that has no place here, and its equals that follow, as one problem."""
        kind, count = self._kind(self._next), 0
        while self._next is not None and self._kind(self._next) == kind:
            count += 1
            self._advance()
        self._problems.append(f"{count} stray {kind} token{'s' * (count > 1)}")

    def _kind(self, token: int | None) -> str:
        if token is None:
            return "end"
        if self._vocabulary.is_text(token):
            return "text"
        if self._vocabulary.is_visual(token):
            return "visual"
        names = (name.upper() for name, control in self._vocabulary.controls.items() if control == token)
        return next(names, "unknown")

    def _read_thought(self, end: int) -> str:
        name = self._kind(self._next)
        self._advance()
        text = self._take_text()
        if self._next == end:
            self._advance()
        else:
            self._problems.append(f"the thought after {name} was not closed")
        return text

    def _read_image(self) -> None:
        """From BOI to EOI, or to the first token that cannot belong to an image; closes the segment."""
        vocabulary = self._vocabulary
        self._advance()
        header = self._take_text()
        size = _SIZE.fullmatch(header)
        if self._next == vocabulary.img:
            self._advance()
        else:
            size = None
        body = self._take_body()
        closed = self._next == vocabulary.eoi
        if closed:
            self._advance()
        codes = body[body != vocabulary.eol]
        if not closed:
            self._problems.append(f"the image was cut off after {len(codes)} codes")
        ends = np.flatnonzero(body == vocabulary.eol).tolist()
        height, width = (int(size[1]), int(size[2])) if size is not None else (0, 0)
        fits = height > 0 and len(body) == height * (width + 1) - 1
        fits = fits and ends == list(range(width, len(body), width + 1))
        if closed and not fits:
            widths = np.diff([-1, *ends, len(body)]) - 1
            found = f"{len(widths)} rows of {np.unique(widths)[:8].tolist()} codes"
            self._problems.append(f"the image says {header[:20]!r} but has {found}")
        # All codes of the named size are there: the picture is whole even where EOI was cut off.
        self._close_segment(codes.reshape(height, width) - vocabulary.visual_start if fits else None)

    def _take_body(self) -> ImageTokens:
        """The run of visual ids and separators that begins with the token in hand."""
        begin = self._at
        behind = self._no_body_N[np.searchsorted(self._no_body_N, begin) :][:1]
        self._advance((int(behind[0]) if len(behind) else len(self._ids)) - begin)
        return self._ids_N[begin : self._at]

    @cached_property
    def _ids_N(self) -> npt.NDArray[np.int64]:
        """[ids]; what has more than 64 bits is no id, nor is -1."""
        try:
            return np.array(array("q", self._ids), dtype=np.int64)
        except (TypeError, OverflowError):
            ids = map(int, self._ids)
            return np.array([token if -1 < token < 1 << 63 else -1 for token in ids], dtype=np.int64)

    @cached_property
    def _no_body_N(self) -> npt.NDArray[np.int64]:
        """Where neither visual ids nor separators stand."""
        ids_N, vocabulary = self._ids_N, self._vocabulary
        is_visual = (ids_N >= vocabulary.visual_start) & (ids_N < vocabulary.visual_stop)
        return np.flatnonzero(~is_visual & (ids_N != vocabulary.eol))


def _joined(first: str | None, second: str) -> str:
    return second if first is None else f"{first}\n{second}"
