"""One self-contained HTML page: pictures as data URIs, tables, curves drawn as SVG; no script and nothing
to fetch.

Every function returns a piece of HTML as a string; words that come from outside are escaped here and
nowhere else.
"""

import base64
import html
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from emuworld.files import write_bytes
from emuworld.tasks.metrics import Estimate, Frame
from emuworld.tasks.run_folder import Pictures

# Okabe and Ito's palette, in an order that keeps neighbours apart for every kind of colour vision.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#7a7a7a")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5d6670; --line: #d9dde2; --paper: #fff;
  --panel: #f6f7f9; --ok: #0b7a4b; --miss: #c2410c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #a0a9b4; --line: #363c44;
  --paper: #15181c; --panel: #1d2127; --ok: #4ade9b; --miss: #fb923c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 2.5rem 1.5rem 4rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .25rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { max-width: 48rem; margin: .4rem 0 .8rem; }
p.lead { max-width: 60rem; }
p.lead, .soft, figcaption small, .rows small { color: var(--soft); }
.strip { display: grid; gap: 1.1rem .9rem; margin: 1rem 0; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(var(--cell, 10rem), 1fr)); }
.rows { overflow-x: auto; margin: .6rem 0 1.2rem; padding-bottom: .2rem; }
.rows table { border-collapse: separate; border-spacing: .3rem; font-size: .82rem; line-height: 1.3; }
.rows th, .rows td { padding: 0; text-align: center; vertical-align: top; font-weight: 400; }
.rows thead th { vertical-align: bottom; max-width: 8.6rem; padding: 0 .2rem .1rem; }
.rows th[scope=row] { text-align: right; padding: 3.6rem .6rem 0 0; color: var(--soft); }
.rows img { width: 8.6rem; max-width: none; }
.rows small { display: block; max-width: 8.6rem; font-variant-numeric: tabular-nums; padding-top: .15rem; }
figure { margin: 0; }
figcaption { font-size: .85rem; line-height: 1.35; margin-top: .35rem; }
figcaption small { display: block; font-variant-numeric: tabular-nums; }
img, video { display: block; max-width: 100%; border-radius: 5px; background: var(--panel); }
figure img { width: 100%; }
video { width: 34rem; }
.scroll { overflow-x: auto; }
table.figures { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums;
  margin: .8rem 0; }
table.figures th, table.figures td { padding: .35rem .8rem; border-bottom: 1px solid var(--line);
  text-align: right; }
table.figures th:first-child, table.figures td:first-child { text-align: left; padding-left: 0; }
table.figures thead th { color: var(--soft); font-weight: 500; }
.ok { color: var(--ok); } .miss { color: var(--miss); }
svg { width: 100%; max-width: 36rem; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .axis { stroke: var(--line); } svg .tick { fill: var(--soft); }
.charts { display: grid; gap: 1.5rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
pre { background: var(--panel); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto;
  font-size: .82rem; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--soft); }
footer { margin-top: 3.5rem; border-top: 1px solid var(--line); padding-top: 1rem; font-size: .85rem;
  color: var(--soft); }
"""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve: a name, and at each x an estimate whose interval is drawn as a band."""

    name: str
    x: Sequence[float]
    y: Sequence[Estimate]


def text(words: str, *, soft: bool = False) -> str:
    """A paragraph."""
    return f'<p class="soft">{html.escape(words)}</p>' if soft else f"<p>{html.escape(words)}</p>"


def section(title: str, *parts: str) -> str:
    """A headed part of the page."""
    return f"<section><h2>{html.escape(title)}</h2>{''.join(parts)}</section>"


def subsection(title: str, *parts: str) -> str:
    """A headed part of a section."""
    return f"<h3>{html.escape(title)}</h3>{''.join(parts)}"


def image(frame: Frame, *, alt: str) -> str:
    """A picture inside the page, as PNG so that what is looked at is what was measured."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    height, width = frame.shape[:2]
    size = f'width="{width}" height="{height}" style="height:auto"'
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}" {size}>'


def figure(frame: Frame, *, caption: str, note: str = "") -> str:
    """A picture with words and, smaller, numbers under it."""
    small = f"<small>{html.escape(note)}</small>" if note else ""
    return (
        f"<figure>{image(frame, alt=caption)}<figcaption>{html.escape(caption)}{small}</figcaption></figure>"
    )


def strip(figures: Iterable[str], *, cell_rem: float = 10.0) -> str:
    """Figures side by side that wrap with the width of the window."""
    return f'<div class="strip" style="--cell:{cell_rem}rem">{"".join(figures)}</div>'


def picture_rows(pictures: Pictures, *, most_columns: int = 7) -> str:
    """Rows of pictures under common column heads; long ones go on below, in lines of equal length."""
    num_lines = math.ceil(len(pictures.columns) / most_columns)
    length = math.ceil(len(pictures.columns) / max(num_lines, 1))
    return "".join(_picture_line(pictures, slice(i * length, (i + 1) * length)) for i in range(num_lines))


def _picture_line(pictures: Pictures, line: slice) -> str:
    columns = pictures.columns[line]
    head = "".join(f"<th scope=col>{html.escape(column)}</th>" for column in columns)
    body = []
    for row in pictures.rows:
        notes = row.notes[line] if row.notes else [""] * len(columns)
        cells = []
        for column, frame, note in zip(columns, row.frames[line], notes, strict=True):
            small = f"<small>{html.escape(note)}</small>" if note else ""
            cells.append(f"<td>{image(frame, alt=f'{row.name}, {column}')}{small}</td>")
        body.append(f"<tr><th scope=row>{html.escape(row.name)}</th>{''.join(cells)}</tr>")
    rows = f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="rows" tabindex=0><table>{rows}</table></div>'


def table(*, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Figures in columns; a cell that starts with 'met' or 'missed', 'significant gain' or 'significant
    loss' is coloured.
    """
    top = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    whole = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="figures">{whole}</table></div>'


def _cell(words: str) -> str:
    good, bad = (
        words.startswith(("met", "significant gain")),
        words.startswith(("missed", "significant loss")),
    )
    kind = ' class="ok"' if good else ' class="miss"' if bad else ""
    return f"<td{kind}>{html.escape(words)}</td>"


def details(summary: str, preformatted: str) -> str:
    """Something long, folded away."""
    return (
        f"<details><summary>{html.escape(summary)}</summary><pre>{html.escape(preformatted)}</pre></details>"
    )


def video(path: str, *, caption: str) -> str:
    """A film that lies beside the page (films are too long for a data URI)."""
    return (
        f'<figure><video src="{html.escape(path)}" controls loop muted playsinline></video>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def side_by_side(parts: Iterable[str]) -> str:
    """Charts beside each other where the window is wide enough."""
    return f'<div class="charts">{"".join(parts)}</div>'


_CHART = (560, 300)  # width and height of a chart, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 132, 44, 42  # room around the curves: ticks, names, title, axis label


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """Where a value lies on a chart."""

    x_low: float
    x_high: float
    y_ticks: Sequence[float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Across and down, in the chart's units."""
        (width, height), low, high = _CHART, self.y_ticks[0], self.y_ticks[-1]
        across = _LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (width - _LEFT - _RIGHT)
        down = height - _BOTTOM - (y - low) / (high - low) * (height - _TOP - _BOTTOM)
        return across, down


def curves(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str = "", percent: bool = False
) -> str:
    """Curves with 95 % bands and their names at the right end, as one SVG; "" when there is nothing to
    draw.
    """
    known = [one for one in series if any(math.isfinite(e.value) for e in one.y)]
    if not known:
        return ""
    edges = [v for one in known for e in one.y for v in (e.value, e.low, e.high) if math.isfinite(v)]
    xs = [x for one in known for x in one.x]
    axes = _Axes(
        x_low=min(xs), x_high=max(*xs, min(xs) + 1), y_ticks=_ticks(min(edges), max(edges), percent=percent)
    )
    words = f"{title} ({y_label})" if y_label else title
    parts = [f'<text x="0" y="16" font-weight="600">{html.escape(words)}</text>']
    parts += _grid(axes, x_label=x_label, percent=percent)
    ends = []
    for one, colour in zip(known, itertools.cycle(PALETTE), strict=False):
        points = [(x, e) for x, e in zip(one.x, one.y, strict=True) if math.isfinite(e.value)]
        parts += [_band(points, axes=axes, colour=colour), *_line(points, axes=axes, colour=colour)]
        ends.append((axes.at(points[-1][0], points[-1][1].value)[1], one.name, colour))
    parts += _end_labels(ends)
    described = html.escape(f"{title}: {', '.join(one.name for one in known)}")
    width, height = _CHART
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{described}">{"".join(parts)}</svg>'


def _grid(axes: _Axes, *, x_label: str, percent: bool) -> list[str]:
    """Horizontal lines with their values, the steps along x, and what x is."""
    width, height = _CHART
    parts = []
    for tick in axes.y_ticks:
        _, down = axes.at(axes.x_low, tick)
        label = f"{tick * 100:g} %" if percent else f"{tick:g}"
        parts.append(
            f'<line class="axis" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{_LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{label}</text>'
        )
    below = f'y="{height - _BOTTOM + 17}" text-anchor="middle"'
    for x in _whole_ticks(axes.x_low, axes.x_high):
        across, _ = axes.at(x, axes.y_ticks[0])
        parts.append(f'<text class="tick" x="{across:.1f}" {below}>{x}</text>')
    middle = f'x="{(_LEFT + width - _RIGHT) / 2}" y="{height - 6}" text-anchor="middle"'
    return [*parts, f'<text class="tick" {middle}>{html.escape(x_label)}</text>']


def _band(points: Sequence[tuple[float, Estimate]], *, axes: _Axes, colour: str) -> str:
    bounded = [(x, e) for x, e in points if math.isfinite(e.low) and math.isfinite(e.high)]
    if len(bounded) < 2:
        return ""
    outline = [axes.at(x, e.high) for x, e in bounded] + [axes.at(x, e.low) for x, e in reversed(bounded)]
    path = " ".join(f"{across:.1f},{down:.1f}" for across, down in outline)
    return f'<polygon points="{path}" fill="{colour}" opacity="0.16"/>'


def _line(points: Sequence[tuple[float, Estimate]], *, axes: _Axes, colour: str) -> list[str]:
    places = [axes.at(x, e.value) for x, e in points]
    path = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
    dots = [f'<circle cx="{across:.1f}" cy="{down:.1f}" r="2.2" fill="{colour}"/>' for across, down in places]
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>', *dots]


def _end_labels(labels: list[tuple[float, str, str]]) -> list[str]:
    """Names at the ends of the curves, pushed apart where they would overlap."""
    width, height = _CHART
    placed, previous, line = [], float(_TOP) - 14.0, 14.0
    ordered = sorted(labels)
    for index, (down, name, colour) in enumerate(ordered):
        room_below = height - _BOTTOM - line * (len(ordered) - 1 - index)
        previous = max(previous + line, min(down, room_below))
        style = f'style="fill:{colour}" font-weight="600"'
        placed.append(
            f'<text x="{width - _RIGHT + 8}" y="{previous + 4:.1f}" {style}>{html.escape(name)}</text>'
        )
    return placed


def _ticks(low: float, high: float, *, percent: bool) -> list[float]:
    """Four to seven round numbers that enclose [low, high]; of rates none beyond 100 %."""
    span = max(high - low, 1e-6)
    step = 10.0 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= 5.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]
    return [tick for tick in ticks if tick <= 1.0] if percent and high <= 1.0 and ticks[0] < 1.0 else ticks


def _whole_ticks(low: float, high: float) -> list[int]:
    step = max(1, math.ceil((high - low) / 10))
    return list(range(math.ceil(low), math.floor(high) + 1, step))


def write_page(path: Path, *, title: str, lead: str, parts: Iterable[str], footer: str = "") -> None:
    """Write the page beside its place, then rename, so that a reader never meets half a page."""
    closing = f"<footer>{html.escape(footer)}</footer>" if footer else ""
    document = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>'
        f"{''.join(parts)}{closing}</body></html>"
    )
    write_bytes(path, document.encode())


def png_bytes(frame: Frame) -> bytes:
    """A frame as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()
