"""A text of any language -> a white card that shows it, as large as it fits.

The words are wrapped between words, or between characters where a script has no spaces or a word is very
long; the letters shrink from 80 to 10 points until all of it fits, and what does not fit then ends in "…".
No font ships with the package: letters come from Pillow's own (Latin), then from the fonts of this machine.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emuworld.tasks.metrics import Frame

LARGEST_PT, SMALLEST_PT, STEP_PT = 80, 10, 2  # the published viewer's
MARGIN_PX = 100  # likewise, on pictures of 700 px and more; a seventh of the shorter side on smaller ones
_INK = (24, 24, 24)
_LINE_HEIGHT = 1.35  # of the letters' size
_LONGEST_WORD = 24  # characters; a longer one (an address, a script without spaces) may be cut anywhere
_CLUSTER = re.compile(r"(?s).[\u0300-\u036f\u200d\ufe00-\ufe0f]*")
# Not at the beginning of a line.
_CLOSING = set(" )]}»”’!?.,:;%、。，．：；！？）］｝〉》」』】〕…ー々っゃゅょぁぃぅぇぉッャュョァィゥェォ")

FontFile = str  # "" is Pillow's own


@dataclass(frozen=True, kw_only=True)
class _Layout:
    lines: tuple[str, ...]
    size_pt: int


def text_card(text: str, *, size: tuple[int, int], font: str = "") -> Frame:
    """The text in the middle of a white card, uint8 [H, W, 3].

    Args:
        text: any Unicode; line breaks are kept.
        size: height and width in pixels.
        font: a font file to take first; "" = the machine's. ValueError where it cannot be opened. Characters
            that no font has become boxes, and a warning says so once.
    """
    height, width = size
    margin = min(MARGIN_PX, min(size) // 7)
    box = (height - 2 * margin, width - 2 * margin)
    text = _printable(text.lstrip()[: _capacity(box)])
    fonts = fonts_for(text, font=font)
    layout = _fitted(text, box=box, fonts=fonts)
    card = Image.new("RGB", (width, height), "white")
    _write(ImageDraw.Draw(card), layout, fonts=fonts, size=size)
    return np.asarray(card)


def _printable(text: str) -> str:
    """Line breaks as they are, every other control character a space, lone surrogates replaced."""
    text = text.encode(errors="replace").decode().expandtabs(4).replace("\r\n", "\n").strip()
    return "".join(c if c == "\n" or unicodedata.category(c) != "Cc" else " " for c in text)


def _capacity(box: tuple[int, int]) -> int:
    """More characters than ever fit at the smallest size: what is behind them need not be measured."""
    per_line = box[1] // (SMALLEST_PT // 5) + 1
    return per_line * (int(box[0] / (SMALLEST_PT * _LINE_HEIGHT)) + 1)


# Layout -----------------------------------------------------------------------------------------------------


def _fitted(text: str, *, box: tuple[int, int], fonts: Fonts) -> _Layout:
    """The largest letters with which the text fits, found by halving."""
    sizes = range(SMALLEST_PT, LARGEST_PT + 1, STEP_PT)
    low, high = 0, len(sizes) - 1
    best = None
    while low <= high:
        middle = (low + high) // 2
        lines = _wrapped(text, width=box[1], size_pt=sizes[middle], fonts=fonts)
        if lines is not None and len(lines) * _LINE_HEIGHT * sizes[middle] <= box[0]:
            best, low = _Layout(lines=tuple(lines), size_pt=sizes[middle]), middle + 1
        else:
            high = middle - 1
    return best or _cut(text, box=box, fonts=fonts)


def _cut(text: str, *, box: tuple[int, int], fonts: Fonts) -> _Layout:
    """As many of the smallest lines as there is room for, the last one with "…"."""
    lines = _wrapped(text, width=box[1], size_pt=SMALLEST_PT, fonts=fonts) or _wrapped(
        text, width=box[1], size_pt=SMALLEST_PT, fonts=fonts, anywhere=True
    )
    room = max(1, int(box[0] / (SMALLEST_PT * _LINE_HEIGHT)))
    if lines is None:
        lines = ["…"]  # not one character is so narrow
    elif len(lines) > room:
        lines = [*lines[: room - 1], lines[room - 1][:-1].rstrip() + "…"]
    return _Layout(lines=tuple(lines), size_pt=SMALLEST_PT)


def _wrapped(
    text: str, *, width: int, size_pt: int, fonts: Fonts, anywhere: bool = False
) -> list[str] | None:
    """Lines no wider than `width` pixels; None where a piece that may not be cut is wider."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line, used = "", 0.0
        for piece in _pieces(paragraph, anywhere=anywhere):
            length = fonts.length(piece, size_pt=size_pt)
            bare = length if not piece.endswith(" ") else fonts.length(piece.rstrip(), size_pt=size_pt)
            if bare > width:
                return None
            if line and used + bare > width:
                lines.append(line.rstrip())
                line, used = "", 0.0
            line, used = line + piece, used + length
        lines.append(line.rstrip())
    return lines


def _pieces(paragraph: str, *, anywhere: bool) -> Iterator[str]:
    """What a line may be broken between: words with the spaces behind them, or characters."""
    for word in re.findall(r"\S+\s*|\s+", paragraph):
        if anywhere:
            yield from _CLUSTER.findall(word)
            continue
        is_long = len(word) > _LONGEST_WORD
        piece = ""
        for cluster in _CLUSTER.findall(word):
            may_break = is_long or _is_wide(cluster) or _is_wide(piece[-1:])
            if piece and may_break and cluster not in _CLOSING:
                yield piece
                piece = ""
            piece += cluster
        yield piece


def _is_wide(cluster: str) -> bool:
    """Whether it is a character of a script that is broken between any two (Korean has words)."""
    return unicodedata.east_asian_width(cluster[:1] or " ") in "WF" and not "\uac00" <= cluster <= "\ud7ff"


def _write(draw: ImageDraw.ImageDraw, layout: _Layout, *, fonts: Fonts, size: tuple[int, int]) -> None:
    line_px = _LINE_HEIGHT * layout.size_pt
    top = (size[0] - line_px * len(layout.lines)) / 2
    for i, line in enumerate(layout.lines):
        x = (size[1] - fonts.length(line, size_pt=layout.size_pt)) / 2
        baseline = top + i * line_px + layout.size_pt
        for font, run in fonts.runs(line, size_pt=layout.size_pt):
            draw.text((x, baseline), run, font=font, fill=_INK, anchor="ls")
            x += font.getlength(run)


# Fonts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fonts:
    """The font file of each character of one text."""

    of: dict[str, FontFile]
    first: FontFile

    def runs(self, line: str, *, size_pt: int) -> Iterator[tuple[ImageFont.FreeTypeFont, str]]:
        """The line in stretches of one font; marks and spaces stay with the letter before them."""
        file = self.first
        files = [file := self.of.get(c, file) for c in line]
        for file, pairs in groupby(zip(files, line, strict=True), key=lambda pair: pair[0]):
            yield _opened(file, size_pt), "".join(c for _, c in pairs)

    def length(self, line: str, *, size_pt: int) -> float:
        """Pixels from the first letter to the end of the last."""
        return sum(font.getlength(run) for font, run in self.runs(line, size_pt=size_pt))


def fonts_for(text: str, *, font: str = "") -> Fonts:
    """A font for each letter: one for all of them where there is such a one, else the first that has it."""
    letters = {c for c in text if unicodedata.category(c)[0] not in "ZCM"}
    if font:
        try:
            _opened(font, SMALLEST_PT)
        except OSError as error:
            raise ValueError(f"font {font} cannot be opened ({error}): give a .ttf, .otf or .ttc") from error
    of: dict[str, FontFile] = {}
    for file in chain([font] if font else [], [""], system_fonts()):
        has = {c for c in letters if _has(file, c)}
        if has == letters:
            return Fonts(of=dict.fromkeys(letters, file), first=file)
        of |= {c: file for c in has if c not in of}
        if len(of) == len(letters):
            break
    missing = "".join(sorted(letters - of.keys()))
    if missing:
        warnings.warn(
            f"no font on this machine has {missing[:20]!r}: install one (Noto Sans CJK has most), or give "
            "font=FILE",
            stacklevel=3,
        )
    first = font or next(iter(of.values()), "")
    return Fonts(of=dict.fromkeys(letters, first) | of, first=first)


@functools.cache
def system_fonts() -> tuple[FontFile, ...]:
    """Font files of this machine, plain upright sans-serif ones first, in an order that stays."""
    home = Path.home()
    folders: Sequence[Path] = (
        home / ".fonts",
        home / ".local/share/fonts",
        Path("/usr/share/fonts"),
        Path("/usr/local/share/fonts"),
    )
    if sys.platform == "darwin":
        folders = (home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts"))
    elif sys.platform == "win32":
        folders = (Path(os.environ.get("WINDIR", "C:/Windows")) / "Fonts",)
    found = {
        str(path)
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix.lower() in (".ttf", ".otf", ".ttc") and path.is_file()
    }
    return tuple(sorted(found, key=_plainness))


def _plainness(file: FontFile) -> tuple[bool, bool, int, str]:
    name = Path(file).stem.lower()
    styled = re.search(r"bold|italic|oblique|light|thin|black|condensed|mono|emoji|symbol|math", name)
    return styled is not None, "sans" not in name, len(name), file


@functools.lru_cache(maxsize=256)
def _opened(file: FontFile, size_pt: int) -> ImageFont.FreeTypeFont:
    if file:
        font = ImageFont.truetype(file, size_pt)
        with contextlib.suppress(OSError):  # no variable font, or one without this name
            font.set_variation_by_name("Regular")
        return font
    own = ImageFont.load_default(size=size_pt)
    assert isinstance(own, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return own


@functools.lru_cache(maxsize=65_536)
def _has(file: FontFile, character: str) -> bool:
    """Whether the font draws the character and not its sign for a missing one."""
    try:
        font = _opened(file, 20)
        drawn, missing = (bytes(font.getmask(c)) for c in (character, "\U0010fffd"))
    except OSError:  # a font of fixed sizes, or a damaged one
        return False
    return drawn != missing and any(drawn)
