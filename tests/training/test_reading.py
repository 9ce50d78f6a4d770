"""Text in pictures: comparisons by hand, truths of no use, and words drawn with PIL that are read back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from emuworld.training import reading
from emuworld.training.reading import (
    Box,
    Line,
    Wanted,
    accuracy,
    distance,
    iou,
    layout,
    plain,
    quoted,
    wanted,
)
from emuworld.training.rewards import Answer, Blend, Scale
from emuworld.training.rollouts import Prompt

CPU = torch.device("cpu")
SIDE = 384
SCALES = (Scale(name="ocr"), Scale(name="layout"))

needs_reader = pytest.mark.skipif(
    bool(reading._MISSING), reason=f"needs the extra rewards: {reading._MISSING or 'installed'}"
)


def _line(text: str, left: float, top: float, right: float, bottom: float) -> Line:
    return Line(text=text, corners=((left, top), (right, top), (right, bottom), (left, bottom)))


def _lines(*texts: str) -> list[Line]:
    return [_line(text, 0.1, 0.1 * n, 0.9, 0.1 * n + 0.08) for n, text in enumerate(texts)]


def test_distances_by_hand() -> None:
    pairs = {("kitten", "sitting"): 3, ("", "abc"): 3, ("open", "open"): 0, ("ab", "ba"): 2}
    assert {pair: distance(*pair) for pair in pairs} == pairs
    assert plain(" ＯＰＥＮ late ") == plain("Open Late") == "openlate"
    assert plain("Don’t") == plain("DON'T") and plain("9–5") == plain("9-5") and plain("Straße") == "strasse"


def test_what_is_read_is_compared_in_any_order() -> None:
    assert accuracy(["OPEN", "9 to 5"], _lines("9 TO 5", "open")) == 1.0
    assert accuracy(["OPEN"], _lines("0PEN")) == pytest.approx(3 / 4)
    assert accuracy(["OPEN"], []) == 0.0
    assert accuracy(["OPEN", "SALE"], _lines("SALE")) == pytest.approx(4 / 8)
    assert accuracy(["OPEN"], _lines("OPEN", "EXIT")) == pytest.approx(4 / 8)  # what is read besides
    assert accuracy(["OPEN", "OPEN"], _lines("OPEN")) == pytest.approx(4 / 8)  # twice is twice
    # LATE is one letter off and EXIT is besides: 5 edits of 4 + 4 + 4.
    assert accuracy(["OPEN LATE"], _lines("OPEN EXIT", "LATF")) == pytest.approx(1 - 5 / 12)


def test_broken_lines_and_missed_spaces_are_forgiven() -> None:
    assert accuracy(["happy new year"], _lines("HAPPY", "NEW YEAR")) == 1.0
    assert accuracy(["happy new year"], _lines("HAPPYNEWYEAR")) == 1.0
    assert accuracy(["left", "right"], _lines("LEFT RIGHT")) == 1.0


def test_boxes_by_hand() -> None:
    assert iou((0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.5, 0.5)) == 1.0
    assert iou((0.0, 0.0, 0.5, 0.5), (0.25, 0.0, 0.75, 0.5)) == pytest.approx(1 / 3)
    assert iou((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5)) == 0.0
    # Four letters, a space and five letters: 0.4, 0.1 and 0.5 of the line.
    words = _line("LEFT RIGHT", 0.0, 0.2, 1.0, 0.3).words()
    assert [word.text for word in words] == ["LEFT", "RIGHT"]
    np.testing.assert_allclose([word.box for word in words], [(0, 0.2, 0.4, 0.3), (0.5, 0.2, 1, 0.3)])
    (word,) = Line(text="UP", corners=((0.1, 0.9), (0.1, 0.5), (0.2, 0.5), (0.2, 0.9))).words()
    np.testing.assert_allclose(word.box, (0.1, 0.5, 0.2, 0.9))  # written upwards


def test_each_string_has_its_place() -> None:
    left, right = (0.0, 0.2, 0.4, 0.3), (0.5, 0.2, 1.0, 0.3)
    target = Wanted(strings=("LEFT", "RIGHT"), boxes=(left, right))
    assert layout(target, [_line("right", *right), _line("left", *left)]) == pytest.approx(1.0)
    assert layout(target, [_line("LEFT RIGHT", 0.0, 0.2, 1.0, 0.3)]) == pytest.approx(1.0)
    assert layout(target, [_line("LEFT", *right), _line("RIGHT", *left)]) == 0.0  # swapped places
    assert layout(target, [_line("LEFT", *left)]) == pytest.approx(0.5)
    assert layout(target, [_line("LOUD", *left), _line("NIGHT", *right)]) == pytest.approx(
        0.5
    )  # 3 of 4 wrong
    assert layout(target, []) == 0.0


def test_broken_and_equal_strings_have_their_places() -> None:
    lines = [_line("HAPPY", 0.1, 0.1, 0.6, 0.2), _line("NEW YEAR", 0.1, 0.2, 0.9, 0.3)]
    assert layout(Wanted(strings=("happy new year",), boxes=((0.1, 0.1, 0.9, 0.3),)), lines) == pytest.approx(
        1
    )
    top, bottom = (0.1, 0.1, 0.5, 0.2), (0.1, 0.7, 0.5, 0.8)
    for boxes in ((top, bottom), (bottom, top)):  # NO of each line is paired by its place
        target = Wanted(strings=("NO ENTRY", "NO WAY"), boxes=boxes)
        read = [_line(text, *box) for text, box in zip(target.strings, boxes, strict=True)]
        assert layout(target, read) == layout(target, read[::-1]) == pytest.approx(1.0)


def test_quotes_are_what_a_t2i_prompt_wants() -> None:
    assert quoted('A sign that says "OPEN," beside “9 to 5.”') == ("OPEN", "9 to 5")
    assert quoted("don't say 'this', a 5\" nail, \"\"") == ()
    for mode, truth, strings in (
        ("t2i", {}, ("OPEN",)),
        ("t2i", {"words": ["SALE"]}, ("SALE",)),
        ("x2i", {"words": ["SALE"]}, ("SALE",)),
    ):
        found = wanted(mode=mode, prompt='a sign that says "OPEN"', truth=truth)
        assert found is not None and found.strings == strings
    assert wanted(mode="x2i", prompt='change "OPEN" to "CLOSED"', truth={}) is None
    assert wanted(mode="t2i", prompt="a red ball", truth={"objects": [["red", "ball"]]}) is None


@pytest.mark.parametrize(
    "truth, why",
    [
        ({"words": "OPEN"}, "truth.words must be a list"),
        ({"words": []}, "leave it out where no text is wanted"),
        ({"words": ["OPEN", 5]}, "truth.words must be a list"),
        ({"words": ["OPEN", " "]}, "truth.words must be a list"),
        ({"words": None}, "truth.words must be a list"),
        ({"boxes": [[0, 0, 1, 1]]}, "truth.boxes needs truth.words"),
        ({"words": ["A", "B"], "boxes": [[0, 0, 1, 1]]}, "one box for each of the 2 strings"),
        ({"words": ["A"], "boxes": {"A": [0, 0, 1, 1]}}, "one box for each of the 1 strings"),
        ({"words": ["A"], "boxes": [[0, 0, 1]]}, r"must be \[left, top, right, bottom\]"),
        ({"words": ["A"], "boxes": [[0, 0, 64, 64]]}, "in shares of the picture"),
        ({"words": ["A"], "boxes": [[0.5, 0, 0.4, 1]]}, "left below right"),
        ({"words": ["A"], "boxes": [[0, 0, math.nan, 1]]}, "in shares of the picture"),
        ({"words": ["A"], "boxes": [["0", "0", "1", "1"]]}, r"must be \[left, top, right, bottom\]"),
    ],
)
def test_truths_of_no_use_are_named(truth: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Prompt(mode="t2i", text="a sign", truth=json.loads(json.dumps(truth)))


def test_a_missing_library_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reading, "_MISSING", "No module named 'rapidocr'")
    reading._reader.cache_clear()
    blend = Blend((*SCALES, Scale(name="preservation")), handed_down={}, device=CPU)
    assert set(blend.left_out) == {"ocr", "layout"}
    said = capsys.readouterr().out
    assert "reward ocr is left out" in said and "No module named 'rapidocr'" in said
    assert "./run --extra rewards" in said


# ---- with the reader -----------------------------------------------------------------------------


def _drawn(*written: tuple[str, int, int, int]) -> tuple[np.ndarray, list[Box]]:
    """A picture of texts (text, x, y, size in pixels) and the boxes of their ink."""
    image = Image.new("RGB", (SIDE, SIDE), (236, 229, 206))
    pen = ImageDraw.Draw(image)
    boxes: list[Box] = []
    for text, x, y, size in written:
        font = ImageFont.load_default(size)
        pen.text((x, y), text, font=font, fill=(150, 20, 30))
        left, top, right, bottom = (edge / SIDE for edge in pen.textbbox((x, y), text, font=font))
        boxes.append((left, top, right, bottom))
    return np.asarray(image), boxes


@needs_reader
def test_words_that_were_drawn_are_read_back(tmp_path: Path) -> None:
    pixels, boxes = _drawn(("OPEN LATE", 30, 40, 48), ("Bakery", 200, 280, 36))
    blank = np.full((SIDE, SIDE, 3), 200, np.uint8)
    truth = {"words": ["open late", "bakery"], "boxes": boxes}
    swapped = {"words": ["bakery", "open late"], "boxes": boxes}
    quoting = 'a shop "Open Late" and "Bakery"'
    blend = Blend([Scale(name="ocr"), Scale(name="layout")], handed_down={}, device=CPU)
    assert not blend.left_out
    scores = blend(
        [
            Answer(mode="t2i", prompt="a shop", pictures=(blank, pixels), truth=truth),
            Answer(mode="t2i", prompt="a shop", pictures=(pixels,), truth=swapped),
            Answer(mode="t2i", prompt=quoting, pictures=(pixels,)),
            Answer(mode="t2i", prompt='a sign "OPEN LATE"', pictures=(pixels,)),
            Answer(mode="t2i", prompt="a shop", pictures=(blank,), truth=truth),
            Answer(mode="t2i", prompt="a red ball", pictures=(pixels,)),
            Answer(mode="t2i", prompt="a shop", truth=truth),
        ]
    )
    raw = {name: (values - 1.0) / 9.0 for name, values in scores.terms.items()}
    nan = math.nan
    np.testing.assert_allclose(raw["ocr"], [1.0, 1.0, 1.0, 8 / 14, 0.0, nan, nan])
    assert raw["layout"][0] > 0.6 and raw["layout"][1] == 0.0 and raw["layout"][4] == 0.0
    assert np.isnan(raw["layout"][[2, 3, 5, 6]]).all()


@needs_reader
def test_boxes_are_where_the_words_are() -> None:
    pixels, boxes = _drawn(("EXIT", 40, 60, 60), ("ENTRY", 150, 250, 60))
    reader = reading.Reader()
    lines = sorted(reader(pixels), key=lambda line: line.corners[0][1])
    assert [line.text for line in lines] == ["EXIT", "ENTRY"]
    for line, box in zip(lines, boxes, strict=True):
        np.testing.assert_allclose(line.whole().box, box, atol=12 / SIDE)
    assert reader(pixels) == tuple(reader(pixels.copy())) and reader(pixels[:8, :8]) == ()


@needs_reader
def test_terms_refuse_a_model_that_they_would_not_use() -> None:
    blend = Blend(
        (Scale(name="ocr", model="somewhere"), Scale(name="preservation")), handed_down={}, device=CPU
    )
    assert "leave out model=" in blend.left_out["ocr"]
