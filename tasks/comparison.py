"""Runs of one suite with other numbers of passes side by side: each figure, and its paired difference.

Equal settings ask equal cases, so two runs are compared case by case: rooms that are hard for both cancel.
Reads only what the runs have stored.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emuworld.tasks import page
from emuworld.tasks.metrics import Estimate, bootstrap
from emuworld.tasks.run_folder import Record, read_records

Score = Callable[[Record], float]


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


# What a case of a suite is worth, higher is better: name -> kind of case, score.
SCORES: dict[str, dict[str, tuple[str, Score]]] = {
    "explore-twin": {
        "one step ahead, dB": ("start", lambda r: _mean(r["psnr"]["whole"]["dream"][:1])),
        "one step ahead, in view before, dB": ("start", lambda r: _mean(r["psnr"]["seen"]["dream"][:1])),
        "all steps, dB": ("start", lambda r: _mean(r["psnr"]["whole"]["dream"])),
        "retrieval": ("start", lambda r: _mean(r["branches"]["hits"])),
        "long walks, dB": ("walk", lambda r: _mean(r["psnr"]["dream"])),
        "full turns, closing dB": ("turn", lambda r: _mean([r["closing_psnr"]["dream"]])),
    },
    "t2i": {
        "all named objects there": ("prompt", lambda r: float(r["judged"]["dream"]["all_present"])),
        "all colours there": ("prompt", lambda r: float(r["judged"]["dream"]["colours_present"])),
        "all shapes there": ("prompt", lambda r: float(r["judged"]["dream"]["shapes_present"])),
    },
}


def check_comparable(suite: str) -> None:
    """ValueError for a suite that has no scores here."""
    if suite not in SCORES:
        raise ValueError(
            f"runs of {suite} cannot be compared yet, those of {' and '.join(SCORES)} can; give one number "
            "of passes"
        )


def write_comparison(folder: Path, runs: Mapping[int, Path]) -> dict[str, Any]:
    """Compare runs, by their numbers of passes, with the first; writes `summary.json` and `index.html` into
    `folder` and returns the figures.

    ValueError for a suite that has no scores here.
    """
    told = {passes: json.loads((own / "run.json").read_text()) for passes, own in runs.items()}
    suite = next(iter(told.values()))["suite"]
    check_comparable(suite)
    records = {passes: read_records(own / "records.jsonl") for passes, own in runs.items()}
    first = next(iter(runs))
    figures = {
        name: {str(passes): _figure(kind, score, records[first], records[passes]) for passes in runs}
        for name, (kind, score) in SCORES[suite].items()
    }
    summary = {
        "suite": suite,
        "compared_with_passes": first,
        "wall_s": {str(passes): run["wall_s"] for passes, run in told.items()},
        "figures": figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    page.replace_file(folder / "summary.json", json.dumps(summary, indent=1).encode())
    _write_page(folder, summary, command=told[first]["command"])
    for name, by_passes in figures.items():
        for passes, figure in by_passes.items():
            if passes != str(first):
                print(f"{name}, {passes} passes: {_difference(figure)}")
    print(f"see {folder / 'index.html'} and {folder / 'summary.json'}")
    return summary


def _figure(kind: str, score: Score, base: Sequence[Record], own: Sequence[Record]) -> dict[str, Any]:
    """Mean over the cases that both runs have, and the mean of the differences, case by case."""
    scores = [
        {record["index"]: score(record) for record in records if record["kind"] == kind}
        for records in (base, own)
    ]
    common = sorted(scores[0].keys() & scores[1].keys())
    before, after = (np.array([one[index] for index in common]) for one in scores)
    difference = bootstrap(after - before)
    return {
        "value": bootstrap(after).as_dict(),
        "difference": difference.as_dict(),
        # The interval lies below 0 as a whole: worse, and not by chance.
        "significant_loss": bool(difference.high < 0),
    }


def _difference(figure: Mapping[str, Any]) -> str:
    estimate = Estimate.from_dict(figure["difference"])
    if not estimate.count:
        return "no cases"
    verdict = "significant loss" if figure["significant_loss"] else "no significant loss"
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f}), {verdict}"


def _write_page(folder: Path, summary: Mapping[str, Any], *, command: str) -> None:
    first = str(summary["compared_with_passes"])
    parts = []
    for name, by_passes in summary["figures"].items():
        rows = []
        for passes, figure in by_passes.items():
            value = Estimate.from_dict(figure["value"])
            shown = f"{value.value:.3f} ({value.low:.3f} to {value.high:.3f})" if value.count else "no cases"
            against = "compared with" if passes == first else _difference(figure)
            rows.append(["token by token" if passes == "0" else passes, shown, against, str(value.count)])
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
