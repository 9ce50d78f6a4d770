"""The page of `compare`: what got worse, every score, rewards along the training, pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from emuworld.tasks import page
from emuworld.tasks.cells import change, words
from emuworld.tasks.comparison import MIN_CASES
from emuworld.tasks.metrics import Frame
from emuworld.tasks.reward_curves import reward_section
from emuworld.tasks.run_folder import PictureRow, Pictures, load_pictures

_JUDGED = ("t2i", "x2i", "story")  # whose scores are a detector's
Folders = Mapping[str, tuple[Path, Path]]  # of the runs before and after, by the pair's name


def write_compare_page(
    out: Path,
    summary: Mapping[str, Any],
    *,
    worse: Sequence[str],
    folders: Folders,
    log: Sequence[dict[str, Any]],
    command: str,
) -> None:
    """Write `index.html` into `out`. `worse`: what got worse, in words; `log`: the steps of the training."""
    parts = [
        page.section("What got worse", *(page.text(one) for one in worse), _by_chance(summary)),
        page.section("Every score", _table(summary), *(page.text(one) for one in notes(summary))),
        *([reward_section(log)] if log else []),
        *_pictures(folders),
    ]
    sides = [
        sorted({one[side]["model"] for one in summary["suites"].values()}) for side in ("before", "after")
    ]
    lead = (
        f"Before: {summary['before']} (model {', '.join(sides[0])}). "
        f"After: {summary['after']} (model {', '.join(sides[1])}). "
        "The same cases, compared case by case; 95 % intervals by bootstrap over cases."
    )
    page.write_page(
        out / "index.html", title="Before and after", lead=lead, parts=parts, footer=f"Made by: {command}"
    )


# Scores ---------------------------------------------------------------------------------------------------


def _by_chance(summary: Mapping[str, Any]) -> str:
    count = sum(len(suite["scores"]) for suite in summary["suites"].values())
    return page.text(
        f"{count} scores were compared, each by itself: where nothing changed, about one in 40 still shows a "
        "significant loss, and one in 40 a significant gain.",
        soft=True,
    )


def _table(summary: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{name}: {score}",
            words(figure["before"], figure["unit"]),
            words(figure["after"], figure["unit"]),
            change(figure["difference"], figure["unit"]),
            figure["verdict"],
            str(figure["difference"]["count"]),
        ]
        for name, suite in summary["suites"].items()
        for score, figure in suite["scores"].items()
    ]
    mean, told = summary["mean"], ""
    if mean:
        rows.append(
            [
                "mean of the suites' first scores",
                words(mean["before"], "rate"),
                words(mean["after"], "rate"),
                change(mean["difference"], "rate"),
                mean["verdict"],
                str(mean["difference"]["count"]),
            ]
        )
        low, high = mean["scale_db"]
        told = page.text(
            f"In the mean each suite of {MIN_CASES} cases or more counts alike; where its first score is in "
            f"dB, {low:g} dB count 0 % and {high:g} dB 100 %.",
            soft=True,
        )
    head = ["", "before (95 %)", "after (95 %)", "difference, case by case (95 %)", "", "cases"]
    return page.table(head=head, rows=rows) + told


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader should know of the runs before believing the table."""
    told = []
    for name, suite in summary["suites"].items():
        before, after = suite["before"], suite["after"]
        if before["passes"] != after["passes"]:
            told.append(
                f"{name}: pictures were drawn in other numbers of passes, {_passes(before)} before and "
                f"{_passes(after)} after; the difference is that of the model and of the passes together."
            )
        if before["weights"] != after["weights"]:
            told.append(
                f"{name}: the transformer computed in {before['weights']} before and in {after['weights']} "
                "after."
            )
        if before["model_fingerprint"] and before["model_fingerprint"] == after["model_fingerprint"]:
            told.append(f"{name}: both runs are of one model ({before['model_fingerprint']}).")
        if name in _JUDGED and before["detector"] == "" and before["model"] != after["model"]:
            told.append(
                f"{name}: each run was judged by the detector in its own model's folder; the figures compare "
                "only where the two are one file (detector=FILE makes sure)."
            )
    for side, names in (("before", summary["only_before"]), ("after", summary["only_after"])):
        if names:
            told.append(f"Run {side} only, and left out: {', '.join(names)}.")
    return told


def _passes(run: Mapping[str, Any]) -> str:
    names = ["token by token" if one == 0 else str(one) for one in run["passes"]]
    return " and ".join(names) or "the model's own"


# Pictures -------------------------------------------------------------------------------------------------


def _pictures(folders: Folders) -> list[str]:
    parts = []
    for name, (before, after) in folders.items():
        kept, kept_after = _kept(before), _kept(after)
        rows = []
        for case in sorted(kept.keys() & kept_after.keys()):
            pair = load_pictures(kept[case]), load_pictures(kept_after[case])
            for pictures in beside(*pair):
                rows += [page.text(pictures.title, soft=True), page.picture_rows(pictures)]
        if rows:
            lead = page.text("A picture that is the same in both runs stands once.")
            parts.append(page.section(f"What it looks like: {name}", lead, *rows))
    return parts


def _kept(folder: Path) -> dict[str, Path]:
    """Stored pictures by case; the robot's files say in front whether the case was a success."""
    paths = folder.glob("pictures/*.npz")
    return {path.stem.removeprefix("success_").removeprefix("failure_"): path for path in paths}


def beside(before: Pictures, after: Pictures) -> list[Pictures]:
    """Pictures of one case in two runs: beside each other where there is one row, several rows below each
    other, and in two blocks where the runs differ in what they show (plans of other lengths).
    """
    sides = [(" before", before), (" after", after)]
    names = [[row.name for row in one.rows] for one in (before, after)]
    if list(before.columns) != list(after.columns) or names[0] != names[1]:
        return [
            replace(one, title=f"{side.strip().capitalize()}: {one.title}", rows=_named(one.rows, side))
            for side, one in sides
        ]
    title = before.title if before.title == after.title else f"Before: {before.title} After: {after.title}"
    if len(before.rows) == 1:
        return [_one_row(title, before, after)]
    rows: list[PictureRow] = []
    for own, other in zip(before.rows, after.rows, strict=True):
        same = np.array_equal(np.stack(list(own.frames)), np.stack(list(other.frames)))
        rows += [own] if same else [*_named([own], " before"), *_named([other], " after")]
    return [Pictures(title=title, columns=before.columns, rows=rows)]


def _named(rows: Sequence[PictureRow], side: str) -> list[PictureRow]:
    return [replace(row, name=f"{row.name}{side}") for row in rows]


def _one_row(title: str, before: Pictures, after: Pictures) -> Pictures:
    cells: list[tuple[str, Frame, str]] = []
    rows = before.rows[0], after.rows[0]
    notes_of = [row.notes or [""] * len(before.columns) for row in rows]
    for at, column in enumerate(before.columns):
        own, other = rows[0].frames[at], rows[1].frames[at]
        if np.array_equal(own, other):
            cells.append((column, own, notes_of[0][at]))
        else:
            cells.append((f"{column}, before", own, notes_of[0][at]))
            cells.append((f"{column}, after", other, notes_of[1][at]))
    columns, frames, under = zip(*cells, strict=True)
    return Pictures(
        title=title, columns=columns, rows=[PictureRow(name=rows[0].name, frames=frames, notes=under)]
    )
