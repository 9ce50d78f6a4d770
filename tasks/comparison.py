"""Runs of one suite side by side: what a case is worth, and the paired differences between two runs.

Equal settings ask equal cases, so two runs are compared case by case: rooms that are hard for both cancel.
Reads only what the runs have stored. Also the page over runs with other numbers of passes; that over a model
before and after its training is in `compare.py`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emuworld.files import write_text
from emuworld.tasks import page
from emuworld.tasks.cells import change, words
from emuworld.tasks.metrics import Estimate, Floats, bootstrap
from emuworld.tasks.run_folder import Record, read_records, read_run
from emuworld.tasks.tale_summary import share_of_panels

GAIN, NO_DIFFERENCE, LOSS = "significant gain", "no significant difference", "significant loss"
# Fewer differences of one sign happen by chance more often than one time in 20 (sign test: 2 / 2^5), and
# bootstrap intervals of so few are too narrow.
MIN_CASES = 6


@dataclass(frozen=True, kw_only=True)
class Score:
    """What a case of a suite is worth, higher is better; NaN where it says nothing."""

    kind: str  # of the cases that it applies to
    worth: Callable[[Record], float]
    unit: str = "rate"  # rate | psnr


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def _psnr(kind: str, worth: Callable[[Record], float]) -> Score:
    return Score(kind=kind, worth=worth, unit="psnr")


# The first of a suite stands for it where suites are averaged.
SCORES: dict[str, dict[str, Score]] = {
    "explore-twin": {
        "one step ahead, dB": _psnr("start", lambda r: _mean(r["psnr"]["whole"]["dream"][:1])),
        "one step ahead, in view before, dB": _psnr("start", lambda r: _mean(r["psnr"]["seen"]["dream"][:1])),
        "all steps, dB": _psnr("start", lambda r: _mean(r["psnr"]["whole"]["dream"])),
        "retrieval": Score(kind="start", worth=lambda r: _mean(r["branches"]["hits"])),
        "long walks, dB": _psnr("walk", lambda r: _mean(r["psnr"]["dream"])),
        "full turns, closing dB": _psnr("turn", lambda r: _mean([r["closing_psnr"]["dream"]])),
    },
    "t2i": {
        "all named objects there": Score(
            kind="prompt", worth=lambda r: float(r["judged"]["dream"]["all_present"])
        ),
        "all colours there": Score(
            kind="prompt", worth=lambda r: float(r["judged"]["dream"]["colours_present"])
        ),
        "all shapes there": Score(
            kind="prompt", worth=lambda r: float(r["judged"]["dream"]["shapes_present"])
        ),
        "each named once, nothing else": Score(  # records of before 2026-11-29 do not count objects
            kind="prompt", worth=lambda r: float(r["judged"]["dream"].get("as_named", "nan"))
        ),
    },
    "x2i": {
        "done and rest kept": Score(kind="edit", worth=lambda r: float(all(r["judged"]["dream"].values()))),
        "done": Score(kind="edit", worth=lambda r: float(r["judged"]["dream"]["done"])),
        "rest kept": Score(kind="edit", worth=lambda r: float(r["judged"]["dream"]["kept"])),
    },
    "story": {
        "panels with all of it": Score(kind="tale", worth=lambda r: share_of_panels(r, "right")),
        "panels with everybody there": Score(kind="tale", worth=lambda r: share_of_panels(r, "cast")),
        "panels with nobody else": Score(kind="tale", worth=lambda r: share_of_panels(r, "nobody_else")),
        "panels that show what happens": Score(kind="tale", worth=lambda r: share_of_panels(r, "plot")),
    },
    "robot-331": {
        "success at the end": Score(kind="scene", worth=lambda r: float(r["success"])),
        "fraction of goals": Score(kind="scene", worth=lambda r: _mean(list(r["facts"].values()))),
    },
}


def check_comparable(suite: str) -> None:
    """ValueError for a suite that has no scores here."""
    if suite not in SCORES:
        raise ValueError(
            f"runs of {suite} cannot be compared yet, those of {' and '.join(SCORES)} can; "
            "leave it out, or give one number of passes"
        )


def paired(score: Score, before: Sequence[Record], after: Sequence[Record]) -> tuple[Floats, Floats]:
    """What the cases of two runs are worth, [cases] each: those cases for which both runs have a value."""
    worths = [
        {record["index"]: score.worth(record) for record in records if record["kind"] == score.kind}
        for records in (before, after)
    ]
    common = sorted(worths[0].keys() & worths[1].keys())
    pairs = np.array([[one[index] for index in common] for one in worths], dtype=np.float64)  # [2, cases]
    known_before, known_after = pairs[:, np.isfinite(pairs).all(axis=0)]
    return known_before, known_after


def verdict(difference: Estimate) -> str:
    """What an interval of paired differences says: it lies on one side of 0 as a whole, or it does not."""
    if difference.count < MIN_CASES or difference.low <= 0 <= difference.high:
        return NO_DIFFERENCE
    return GAIN if difference.low > 0 else LOSS


def paired_figure(before: Floats, after: Floats) -> dict[str, Any]:
    """Both means, and the mean of the differences case by case, with 95 % intervals; for JSON."""
    difference = bootstrap(after - before)
    return {
        "before": bootstrap(before).as_dict(),
        "after": bootstrap(after).as_dict(),
        "difference": difference.as_dict(),
        "verdict": verdict(difference),
    }


# Other numbers of passes ----------------------------------------------------------------------------------


def write_comparison(folder: Path, runs: Mapping[int, Path]) -> dict[str, Any]:
    """Compare runs, by their numbers of passes, with the first; writes `summary.json` and `index.html` into
    `folder` and returns the figures.

    ValueError for a suite that has no scores here.
    """
    told = {passes: read_run(own) for passes, own in runs.items()}
    suite = next(iter(told.values()))["suite"]
    check_comparable(suite)
    records = {passes: read_records(own / "records.jsonl") for passes, own in runs.items()}
    first = next(iter(runs))
    figures = {
        name: {str(passes): paired_figure(*paired(score, records[first], records[passes])) for passes in runs}
        for name, score in SCORES[suite].items()
    }
    summary = {
        "suite": suite,
        "compared_with_passes": first,
        "wall_s": {str(passes): run["wall_s"] for passes, run in told.items()},
        "figures": figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "summary.json", json.dumps(summary, indent=1))
    _write_page(folder, summary, command=told[first]["command"])
    for name, by_passes in figures.items():
        for passes, figure in by_passes.items():
            if passes != str(first):
                print(f"{name}, {passes} passes: {_difference(figure, SCORES[suite][name].unit)}")
    print(f"see {folder / 'index.html'} and {folder / 'summary.json'}")
    return summary


def _difference(figure: Mapping[str, Any], unit: str) -> str:
    if not figure["difference"]["count"]:
        return "no cases"
    return f"{change(figure['difference'], unit)}, {figure['verdict']}"


def _write_page(folder: Path, summary: Mapping[str, Any], *, command: str) -> None:
    first = str(summary["compared_with_passes"])
    parts = []
    for name, by_passes in summary["figures"].items():
        unit = SCORES[summary["suite"]][name].unit
        rows = []
        for passes, figure in by_passes.items():
            against = "compared with" if passes == first else _difference(figure, unit)
            count = str(figure["difference"]["count"])
            way = "token by token" if passes == "0" else passes
            rows.append([way, words(figure["after"], unit), against, count])
        head = ["passes", "mean (95 %)", "difference, case by case (95 %)", "cases"]
        parts.append(page.section(name, page.table(head=head, rows=rows)))
    page.write_page(
        folder / "index.html",
        title=f"Passes a picture: {summary['suite']}",
        lead="The same cases, their pictures drawn in other numbers of passes; 95 % intervals by bootstrap "
        "over cases.",
        parts=parts,
        footer=f"Made by: {command}",
    )
