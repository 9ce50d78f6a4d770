"""The figures of suite `story` as a plain table for the terminal and as parts of a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emuworld.tasks import page
from emuworld.tasks.cells import kept_pictures, words
from emuworld.tasks.metrics import Estimate
from emuworld.tasks.summary import JUDGED, Figures
from emuworld.tasks.tale_summary import ASKED, CONTENDERS

_CHARTS = ("cast", "colours", "nobody_else", "plot")
_SHORT = {
    "dream": "dream", "tokenizer": "tokenizer", "truth": "simulator", "copy": "dream kept",
    "true_copy": "simulator kept", "shuffled": "other tale",
}  # fmt: skip


def tale_table(figures: Figures) -> str:
    """Every rate beside the judge's own error and what chance gives, as lines of text."""
    rows = [["all panels", "panels", *_SHORT.values()]]
    rows += [
        _plain_row(said, {who: figures["overall"][who][name] for who in CONTENDERS}, counted="panels")
        for name, said in ASKED.items()
    ]
    rows.append([f"{ASKED['plot']}, by event"])
    rows += [_plain_row(event, rates) for event, rates in figures["by_event"].items()]
    for name in ("cast", "nobody_else", "plot"):
        rows.append([f"{ASKED[name]}, by number of the panel"])
        rows += [
            _plain_row(number, {who: rates[name] for who, rates in one.items()})
            for number, one in figures["by_panel"].items()
        ]
    first = max(len(row[0]) for row in rows if len(row) > 1)
    return "\n".join(
        f"{row[0]:<{first}}" + "".join(f"{cell:>8}" for cell in row[1:2])
        + "".join(f"{cell:>18}" for cell in row[2:])
        for row in rows
    )  # fmt: skip


def _plain_row(name: str, rates: Mapping[str, Mapping[str, Any]], *, counted: str = "count") -> list[str]:
    return [f"  {name}", str(rates["dream"][counted]), *(_short(rate) for rate in rates.values())]


def _short(rate: Mapping[str, Any]) -> str:
    """'93 % (90 to 95)'."""
    if rate["value"] is None:
        return "-"
    return f"{rate['value'] * 100:.0f} % ({rate['low'] * 100:.0f} to {rate['high'] * 100:.0f})"


def tale_page(figures: Figures, folder: Path) -> list[str]:
    """The parts of the page."""
    detector = figures["detector"]
    return [
        page.section(
            "Is everybody there, and does it happen?",
            page.text(
                f"{figures['num_tales']} tales, {figures['num_panels']} panels. The dream got the question "
                "and then each panel's line. Who is in a true panel, and what happens there, the simulator "
                "knows; a small detector looks at the dreamt panel. 'Nobody else': who is away is not there, "
                "and nobody is there twice. The detector judged the simulator's own panels too, as they are "
                "and through the vision tokenizer: a perfect dream would score no more. Beside them stands "
                "what pictures get that know nothing of the line: the panel before, kept as it is, and the "
                "dream of another tale. The simulator's panel before, kept, tells how often the judge sees "
                "what does not happen."
            ),
            page.table(head=["", *CONTENDERS.values()], rows=_overall(figures)),
            page.text(
                "The detector's precision on the simulator's panels is "
                f"{words(detector['precision'], 'rate')}, its recall {words(detector['recall'], 'rate')}.",
                soft=True,
            ),
        ),
        page.section(
            "Panel by panel",
            page.side_by_side(_chart(figures, name) for name in _CHARTS),
            page.subsection("Whole tales, true in every panel", _whole_tales(figures)),
        ),
        page.section("What happens", _by_event(figures)),
        page.section("By kind of tale", *(_group(name, one) for name, one in figures["groups"].items())),
        page.section("What it looks like", *kept_pictures(folder, "tale")),
    ]


def _overall(figures: Figures) -> list[list[str]]:
    return [
        [said, *(_of(figures["overall"][who][name]) for who in CONTENDERS)] for name, said in ASKED.items()
    ]


def _of(rate: Mapping[str, Any]) -> str:
    count = f", {rate['hits']} of {rate['panels']}"
    return words(rate, "rate") + count if rate["panels"] else ""


def _chart(figures: Figures, name: str) -> str:
    series = [
        page.Series(
            name=_SHORT[who],
            x=[int(number) for number in figures["by_panel"]],
            y=[Estimate.from_dict(one[who][name]) for one in figures["by_panel"].values()],
        )
        for who in (*JUDGED, "copy")
    ]
    return page.curves(series, title=ASKED[name].capitalize(), x_label="panel", percent=True)


def _whole_tales(figures: Figures) -> str:
    rows = [
        [said, *(words(figures["whole_tales"][who][name], "rate") for who in JUDGED)]
        for name, said in ASKED.items()
    ]
    return page.table(head=["", *JUDGED.values()], rows=rows)


def _by_event(figures: Figures) -> str:
    rows = [
        [event, *(words(one[who], "rate") for who in CONTENDERS), str(one["dream"]["count"])]
        for event, one in figures["by_event"].items()
    ]
    return page.table(head=["", *CONTENDERS.values(), "panels"], rows=rows)


def _group(name: str, rates: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [[said, *(_of(rates[who][asked]) for who in JUDGED)] for asked, said in ASKED.items()]
    tales = rates["dream"]["cast"]["count"]
    return page.subsection(
        f"{name.capitalize()}: {tales} tales", page.table(head=["", *JUDGED.values()], rows=rows)
    )
