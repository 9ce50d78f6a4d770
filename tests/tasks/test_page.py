"""Pages: valid, self-contained, and the numbers where they belong."""

import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from emuworld.tasks import page
from emuworld.tasks.metrics import Estimate
from emuworld.tasks.run_folder import PictureRow, Pictures

GREY = np.full((8, 12, 3), 90, dtype=np.uint8)


def _series(name: str, values: list[float]) -> page.Series:
    estimates = [Estimate(value=v, low=v - 1, high=v + 1, count=3) for v in values]
    return page.Series(name=name, x=list(range(1, len(values) + 1)), y=estimates)


def test_curves_are_one_svg_with_higher_values_further_up() -> None:
    svg = page.curves([_series("a & b", [10.0, 20.0, 15.0])], title="PSNR <x>", x_label="step")
    root = ET.fromstring(svg)
    assert root.tag == "svg"
    line = root.find("polyline")
    assert line is not None
    heights = [float(point.split(",")[1]) for point in line.attrib["points"].split()]
    assert heights[1] < heights[2] < heights[0]
    assert "a & b" in "".join(root.itertext()) and "PSNR <x>" in "".join(root.itertext())


def test_curves_leave_out_unknown_values_and_may_be_empty() -> None:
    nothing = Estimate(value=np.nan, low=np.nan, high=np.nan, count=0)
    unknown = page.Series(name="x", x=[1, 2], y=[nothing, nothing])
    assert page.curves([unknown], title="t", x_label="x") == ""
    mixed = page.Series(name="x", x=[1, 2], y=[nothing, Estimate(value=1.0, low=0.5, high=1.5, count=2)])
    assert ET.fromstring(page.curves([mixed], title="t", x_label="x")) is not None


def test_names_at_the_ends_of_equal_curves_do_not_lie_on_each_other() -> None:
    svg = page.curves([_series(name, [5.0, 5.0]) for name in "abcd"], title="t", x_label="x")
    bold = [t for t in ET.fromstring(svg).findall("text") if "style" in t.attrib]
    heights = sorted(float(t.attrib["y"]) for t in bold)
    assert len(heights) == 4 and all(b - a >= 13.9 for a, b in pairwise(heights))


def test_rates_get_no_tick_above_one_hundred_percent() -> None:
    sure = [Estimate(value=v, low=v - 0.01, high=1.0, count=9) for v in (0.97, 1.0)]
    svg = page.curves([page.Series(name="r", x=[0, 1], y=sure)], title="t", x_label="x", percent=True)
    shown = [float(t.removesuffix(" %")) for t in re.findall(r">([\d.]+ %)<", svg)]
    assert max(shown) == 100.0


def test_a_page_is_whole_and_fetches_nothing(tmp_path: Path) -> None:
    rows = Pictures(title="", columns=["one", "two"], rows=[PictureRow(name="sim", frames=[GREY, GREY])])
    parts = [
        page.section("A <b>", page.text("1 < 2"), page.picture_rows(rows)),
        page.video("w.mp4", caption="w"),
    ]
    page.write_page(tmp_path / "sub" / "index.html", title="T & U", lead="l", parts=parts, footer="f")
    text = (tmp_path / "sub" / "index.html").read_text()
    assert "A &lt;b&gt;" in text and "1 &lt; 2" in text and "T &amp; U" in text
    assert not re.search(r"https?://|<script|<link", text)
    assert text.count("data:image/png;base64,") == 2
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["index.html"], "nothing half written is left"


def test_every_picture_says_what_it_shows() -> None:
    rows = Pictures(
        title="", columns=["turn left"], rows=[PictureRow(name="dream", frames=[GREY], notes=["30 dB"])]
    )
    html = page.picture_rows(rows)
    assert 'alt="dream, turn left"' in html and "30 dB" in html


def test_long_rows_go_on_below_and_lose_nothing() -> None:
    rows = [PictureRow(name="dream", frames=[GREY] * 11, notes=[f"{i} dB" for i in range(11)])]
    html = page.picture_rows(Pictures(title="", columns=[f"c{i}" for i in range(11)], rows=rows))
    assert html.count("<table>") == 2 and html.count("<img") == 11
    assert all(f"dream, c{i}" in html and f"{i} dB" in html for i in range(11))


def test_met_and_missed_are_coloured_and_read_as_words() -> None:
    table = page.table(head=["", ""], rows=[["x", "met"], ["y", "missed"]])
    assert '<td class="ok">met' in table and '<td class="miss">missed' in table


def test_png_bytes_lose_nothing(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    (tmp_path / "f.png").write_bytes(page.png_bytes(noise))
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "f.png")), noise)
