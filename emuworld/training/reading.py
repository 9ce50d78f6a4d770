"""Text in pictures: what is read there against what should stand there, and where.

What is wanted stands in a prompt's `truth`: `words`, a list of strings, and `boxes`, for each string [left,
top, right, bottom] as shares of the picture. A t2i prompt without `words` wants what it quotes. An answer's
last picture is read, by RapidOCR on the CPU with the weights of its wheel; it errs, and by how much is
measured in docs/performance.md (`scripts/measure_reading.py`). The paper names the two rewards (OCR, layout)
and gives no definition; these are ours.

Strings are compared by characters: Unicode NFKC, curly quotes and long dashes as the plain ones, without
case and without spaces: many letters differ from their capitals by nothing but size, and what a sign says is
the same in capitals.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

try:  # imports neither OpenCV nor onnxruntime before an engine is made
    import rapidocr
except ImportError as error:
    _MISSING = str(error)
else:
    _MISSING = "" if find_spec("onnxruntime") else "No module named 'onnxruntime'"

if TYPE_CHECKING:
    from emuworld.training.rewards import Answer, Scale

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as shares of the picture's width and height."""

_QUOTED = re.compile(r'(?<!\w)"([^"]+)"|“([^“”]+)”')
_ALIKE = str.maketrans("‘’“”‐‑–—", "''\"\"----")
_REMEMBERED = 1024  # pictures
# The detector's boxes are widened before they are read; 1.3 instead of 1.6 lies closer to the ink (mean IoU
# 0.77 instead of 0.67 over 60 pictures of measure_reading.py) and reads as well.
_SETTINGS = {"Global.log_level": "error", "Det.unclip_ratio": 1.3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """The strings that should stand in a picture, and where: a box for each, or none for all."""

    strings: tuple[str, ...]
    boxes: tuple[Box, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """Some text that was read, a line or a word, and the upright box around it."""

    text: str
    box: Box


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A line of text that was read; corners (x, y) in shares, clockwise from above its first letter."""

    text: str
    corners: tuple[tuple[float, float], ...]

    def whole(self) -> Piece:
        return Piece(text=self.text, box=_upright(np.array(self.corners)))

    def words(self) -> list[Piece]:
        """Its words, each with the share of the line that its letters are of the line's letters."""
        start, end, below_end, below_start = np.array(self.corners)
        pieces = []
        for match in re.finditer(r"\S+", self.text):
            shares = np.array(match.span()) / len(self.text)
            above, below = (
                [a + (b - a) * s for s in shares] for a, b in ((start, end), (below_start, below_end))
            )
            pieces.append(Piece(text=match.group(), box=_upright(np.array([*above, *below]))))
        return pieces


def wanted(*, mode: str, prompt: str, truth: Mapping[str, Any]) -> Wanted | None:
    """What should stand in the picture; None where nothing says so. ValueError for a truth of no use."""
    strings = _strings(truth["words"]) if "words" in truth else quoted(prompt) if mode == "t2i" else ()
    if "boxes" not in truth:
        return Wanted(strings=strings) if strings else None
    boxes = truth["boxes"]
    if not strings:
        raise ValueError("truth.boxes needs truth.words, or a t2i prompt that quotes what should stand there")
    if not _is_list(boxes) or len(boxes) != len(strings):
        raise ValueError(
            f"truth.boxes must be a list of one box for each of the {len(strings)} strings {list(strings)}, "
            f"got {boxes!r}"
        )
    return Wanted(strings=strings, boxes=tuple(_box(box) for box in boxes))


def quoted(prompt: str) -> tuple[str, ...]:
    """Strings between straight or curly double quotes, less a comma or full stop at their end, which is the
    sentence's: 'a sign that says "OPEN," at night' quotes OPEN.
    """
    found = (straight or curly for straight, curly in _QUOTED.findall(prompt))
    return tuple(text for text in (one.strip().rstrip(",.").rstrip() for one in found) if text)


def accuracy(strings: Sequence[str], lines: Sequence[Line]) -> float:
    """1 - normalised edit distance between what is wanted and what is read, in any order; 0 to 1.

    Wanted and read pieces are paired one to one so that the edit distance is least; a piece without a partner
    costs its length, so that what is read besides lowers the figure as what is missing does. The sum is
    divided by what it would be if no letter agreed. Pieces are words or, if that is kinder, whole strings and
    whole lines: a string may be broken over lines, and the reader may miss a space.
    """
    return max(_agreement(*cut) for cut in _cuts(strings, lines))


def layout(asked: Wanted, lines: Sequence[Line]) -> float:
    """Mean over the strings of the IoU of the box where each should stand and the box around the pieces that
    are read as it; 0 to 1. Pieces are paired as `accuracy` pairs them, of equal ones the one that lies in the
    string's box; a pair counts if no more than half of its letters are wrong. A string that is not read is 0.
    """
    return max(_placed(asked, *cut) for cut in _cuts(asked.strings, lines))


def distance(one: str, other: str) -> int:
    """Levenshtein: the fewest insertions, deletions and substitutions of characters."""
    before = list(range(len(other) + 1))
    for i, left in enumerate(one, start=1):
        now = [i]
        for j, right in enumerate(other, start=1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (left != right)))
        before = now
    return before[-1]


def plain(text: str) -> str:
    """The form in which texts are compared: see the module."""
    return "".join(unicodedata.normalize("NFKC", text).translate(_ALIKE).casefold().split())


def iou(one: Box, other: Box) -> float:
    """Intersection over union."""
    common = _common(one, other)
    return common / (_area(one) + _area(other) - common) if common > 0 else 0.0


class Reader:
    """Reads pictures; remembers the last ones, which several terms look at.

    Raises:
        ValueError: RapidOCR or onnxruntime is not installed.
    """

    def __init__(self) -> None:
        if _MISSING:
            raise ValueError(
                f"rewards: reading text in pictures needs RapidOCR and onnxruntime ({_MISSING}): start with "
                "./run --extra rewards, or pip install 'emuworld[rewards]'"
            )
        self._engine = rapidocr.RapidOCR(params=_SETTINGS)
        self._remembered: dict[bytes, tuple[Line, ...]] = {}

    def __call__(self, picture: np.ndarray) -> tuple[Line, ...]:
        """Lines of text in a picture, uint8 [H, W, 3] RGB; none is no error."""
        key = hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).digest()
        if key not in self._remembered:
            if len(self._remembered) >= _REMEMBERED:
                self._remembered.clear()
            self._remembered[key] = self._read(picture)
        return self._remembered[key]

    def _read(self, picture: np.ndarray) -> tuple[Line, ...]:
        found: Any = self._engine(np.ascontiguousarray(picture[:, :, ::-1]))  # OpenCV's order of colours
        texts = getattr(found, "txts", None)  # another class, or None, where nothing is found
        if texts is None:
            return ()
        corners = np.asarray(found.boxes, dtype=np.float64) / (picture.shape[1], picture.shape[0])
        return tuple(
            Line(text=text, corners=tuple((float(x), float(y)) for x, y in quad))
            for text, quad in zip(texts, corners, strict=True)
        )


class _Term:
    """A term that reads an answer's last picture."""

    def __init__(self, scale: Scale, device: torch.device) -> None:
        if scale.model or scale.head:
            raise ValueError(
                f"rewards: {scale.name} reads with RapidOCR's own weights; leave out model= and head="
            )
        self._reader = _reader()

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [self._one(answer) for answer in answers]

    def _one(self, answer: Answer) -> float:
        asked = wanted(mode=answer.mode, prompt=answer.prompt, truth=answer.truth)
        if asked is None or not answer.pictures:
            return math.nan
        return self.figure(asked, self._reader(answer.pictures[-1]))

    def figure(self, asked: Wanted, lines: Sequence[Line]) -> float:
        raise NotImplementedError


class Ocr(_Term):
    """`accuracy`; NaN where no text is wanted, or without a picture."""

    def figure(self, asked: Wanted, lines: Sequence[Line]) -> float:
        return accuracy(asked.strings, lines)


class Layout(_Term):
    """`layout`; NaN where no boxes are given, or without a picture."""

    def figure(self, asked: Wanted, lines: Sequence[Line]) -> float:
        return layout(asked, lines) if asked.boxes else math.nan


@functools.cache
def _reader() -> Reader:
    """One for all terms: they look at the same pictures."""
    return Reader()


# ---- how pieces are paired -----------------------------------------------------------------------

_Wanted = list[tuple[int, str]]  # the number of a string, and the string or a word of it


def _cuts(strings: Sequence[str], lines: Sequence[Line]) -> Iterator[tuple[_Wanted, list[Piece]]]:
    """Wanted and read pieces: words, and whole strings and lines."""
    words = [(number, word) for number, string in enumerate(strings) for word in string.split()]
    yield words, [word for line in lines for word in line.words()]
    yield list(enumerate(strings)), [line.whole() for line in lines]


def _pairs(asked: list[str], read: list[str], favours: np.ndarray) -> list[tuple[int, int, int]]:
    """(wanted, read, edit distance) of the pairs whose distance, less what both would cost alone, is least.
    `favours` [wanted, read], 0 to 1, decides between equal ones.
    """
    distances = np.array([[distance(one, other) for other in read] for one in asked]).reshape(favours.shape)
    alone = np.array([[len(one) + len(other) for other in read] for one in asked]).reshape(favours.shape)
    found = linear_sum_assignment(distances - alone - 1e-3 * favours)
    return [(int(i), int(j), int(distances[i, j])) for i, j in zip(*found, strict=True)]


def _agreement(asked: _Wanted, read: list[Piece]) -> float:
    wants, finds = [plain(text) for _, text in asked], [plain(piece.text) for piece in read]
    cost = most = sum(map(len, wants)) + sum(map(len, finds))
    for i, j, edits in _pairs(wants, finds, np.zeros((len(wants), len(finds)))):
        cost += edits - len(wants[i]) - len(finds[j])
        most -= min(len(wants[i]), len(finds[j]))
    return 1.0 - cost / most


def _placed(target: Wanted, asked: _Wanted, read: list[Piece]) -> float:
    wants, finds = [plain(text) for _, text in asked], [plain(piece.text) for piece in read]
    favours = np.zeros((len(wants), len(finds)))
    for i, (number, _) in enumerate(asked):
        favours[i] = [
            _common(piece.box, target.boxes[number]) / max(_area(piece.box), 1e-9) for piece in read
        ]
    around: dict[int, list[Box]] = {}
    for i, j, edits in _pairs(wants, finds, favours):
        if 2 * edits <= max(len(wants[i]), len(finds[j])):
            around.setdefault(asked[i][0], []).append(read[j].box)
    hulls = {
        number: (*np.min(boxes, axis=0)[:2], *np.max(boxes, axis=0)[2:]) for number, boxes in around.items()
    }
    return sum(float(iou(hull, target.boxes[number])) for number, hull in hulls.items()) / len(target.boxes)


# ---- shapes --------------------------------------------------------------------------------------


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _strings(words: Any) -> tuple[str, ...]:
    if not _is_list(words) or not words or not all(isinstance(one, str) and one.strip() for one in words):
        raise ValueError(
            f'truth.words must be a list of one or more texts such as ["OPEN", "9 to 5"], got {words!r}; '
            "leave it out where no text is wanted"
        )
    return tuple(words)


def _box(box: Any) -> Box:
    numbers = _is_list(box) and len(box) == 4 and all(isinstance(one, int | float) for one in box)
    if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise ValueError(
            "a box of truth.boxes must be [left, top, right, bottom] in shares of the picture, 0 to 1, left "
            f"below right and top below bottom, got {box!r}"
        )
    left, top, right, bottom = box
    return float(left), float(top), float(right), float(bottom)


def _upright(points: np.ndarray) -> Box:
    (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
    return float(left), float(top), float(right), float(bottom)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _common(one: Box, other: Box) -> float:
    width, height = (min(one[k + 2], other[k + 2]) - max(one[k], other[k]) for k in (0, 1))
    return max(width, 0.0) * max(height, 0.0)
