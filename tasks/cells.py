"""Figures as cells of tables, and the pictures that a run has kept: what the pages of all suites share."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emuworld.tasks import page
from emuworld.tasks.run_folder import load_pictures
from emuworld.tasks.summary import Figures

_UNITS = {"psnr": "dB", "minutes": "minutes", "p": ""}


def words(stored: Mapping[str, Any], metric: str) -> str:
    """'31.2 (30.9 to 31.5)' in the unit of the metric."""
    value, low, high = stored["value"], stored["low"], stored["high"]
    if value is None:
        return "unknown"
    form: Callable[[float], str] = {
        "rate": lambda v: f"{v * 100:.1f} %",
        "ssim": lambda v: f"{v:.3f}",
        "psnr": lambda v: f"{v:.2f}",
        "deg": lambda v: f"{v:.1f} degrees",
        "minutes": lambda v: f"{v:.1f}",
        "p": lambda v: f"{v:.2g}",
    }[metric]
    return form(value) if low is None else f"{form(value)} ({form(low)} to {form(high)})"


def change(stored: Mapping[str, Any], metric: str) -> str:
    """'+3.5 points (-1.0 to +8.0)': a difference of rates, in percentage points, or of PSNR."""
    factor, form, unit = {"rate": (100, "+.1f", "points"), "psnr": (1, "+.2f", "dB")}[metric]
    value, low, high = (f"{factor * stored[key]:{form}}" for key in ("value", "low", "high"))
    return f"{value} {unit} ({low} to {high})"


def bar_table(bars: Figures) -> str:
    """Each bar with what was measured, and whether it is met."""
    rows = []
    for name, row in bars.items():
        unit = row.get("unit") or ("rate" if row["bar"] <= 1 and row["at_least"] else "psnr")
        limit = f"{row['bar']:.0%}" if unit == "rate" else f"{row['bar']:g} {_UNITS[unit]}".rstrip()
        rows.append(
            [name, words(row["estimate"], unit), f"{'at least' if row['at_least'] else 'at most'} {limit}",
             "met" if row["met"] else "missed"]
        )  # fmt: skip
    return page.table(head=["", "measured (95 % interval)", "bar", ""], rows=rows)


def kept_pictures(folder: Path, kind: str) -> list[str]:
    """The pictures kept of a kind of case."""
    parts = []
    for path in sorted((folder / "pictures").glob(f"{kind}_*.npz")):
        pictures = load_pictures(path)
        parts.append(page.text(pictures.title, soft=True))
        parts.append(page.picture_rows(pictures))
    return parts
