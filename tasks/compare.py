"""Command `compare`: did a model get better? Runs of suites before and after its training, on one page.

The runs are paired by suite (and by agent, on the robot's), then case by case. What may differ between two
runs of a pair is the model and its number of passes a picture; whatever else differs is refused.
"""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from emuworld.files import files_below, write_text
from emuworld.tasks.cells import change, words
from emuworld.tasks.compare_page import write_compare_page
from emuworld.tasks.comparison import (
    LOSS,
    MIN_CASES,
    SCORES,
    check_comparable,
    paired,
    paired_figure,
    verdict,
)
from emuworld.tasks.metrics import Floats, bootstrap_of_groups
from emuworld.tasks.reward_curves import read_reward_log
from emuworld.tasks.run_folder import Record, read_records, read_run

# Of two runs' case settings; dreams under other commands (shuffled) are scored by no figure here.
_MAY_DIFFER = ("model", "weights", "passes", "num_shuffled")
_ASKED = ("seed", "prompt", "instruction", "commands")  # of a record: what its case was
# What counts 0 and 1 where PSNR is averaged with rates: the likeness reward of configs/train/grpo.yaml.
_LOW_DB, _HIGH_DB = 10.0, 30.0


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Did a model get better? Its runs of suites before and after training, paired case by case: every score
    with its difference, rewards along the training, pictures before and after.
    """

    before: str = "outputs/grpo-small/before"  # a run of eval, or a folder with runs in its sub-folders
    after: str = "outputs/grpo-small/after"  # the same suites with the other model
    log: str = ""  # the training's log with its rewards (grpo.log.jsonl of stage=grpo); "" = no curves
    out: str = "outputs/compare"  # folder for index.html and summary.json


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is stored: where, and what its `run.json` says."""

    folder: Path
    told: Mapping[str, Any]

    @property
    def name(self) -> str:
        """What it is paired by: its suite, on the robot's with the agent and what of a plan is used."""
        settings = self.told["settings"]
        who = [settings["agent"]] if "agent" in settings else []
        how = [settings["use"]] if settings.get("use", "both") != "both" else []
        return ", ".join([self.told["suite"], *who, *how])

    def about(self) -> dict[str, Any]:
        """What the page tells of it."""
        return {
            "folder": str(self.folder),
            "model": self.told["settings"]["model"],
            "model_fingerprint": self.told["model_fingerprint"],
            "weights": self.told["case_settings"].get("weights", "bf16"),
            "passes": self.told["case_settings"]["passes"],
            "detector": self.told["case_settings"].get("detector"),
            "date": self.told["date"],
        }


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two runs that ask the same cases, and the worths [cases] of each score before and after."""

    before: Run
    after: Run
    worths: Mapping[str, tuple[Floats, Floats]]

    @property
    def suite(self) -> str:
        return str(self.before.told["suite"])


def run(config: Compare) -> dict[str, Any]:
    """Compare; writes `summary.json` and `index.html` into `config.out` and returns the summary.

    ValueError for folders without runs, runs that do not pair, and a log that is none.
    """
    out = Path(config.out)
    if (out / "run.json").exists():
        raise ValueError(f"out={out} holds a run, whose page would be overwritten; choose another folder")
    log = read_reward_log(Path(config.log)) if config.log else []
    found_before, found_after = (
        find_runs(getattr(config, side), setting=side) for side in ("before", "after")
    )
    pairs = {
        name: _pair(name, own, found_after[name]) for name, own in found_before.items() if name in found_after
    }
    if not pairs:
        raise ValueError(
            f"no suite was run on both sides: before={config.before} holds {', '.join(found_before)}, "
            f"after={config.after} {', '.join(found_after)}; run the same suites with both models"
        )
    summary = {
        **asdict(config),
        "suites": {name: _figures(pair) for name, pair in pairs.items()},
        "mean": _mean_of_suites(pairs),
        "only_before": [name for name in found_before if name not in pairs],
        "only_after": [name for name in found_after if name not in pairs],
    }
    write_text(out / "summary.json", json.dumps(summary, indent=1))
    folders = {name: (pair.before.folder, pair.after.folder) for name, pair in pairs.items()}
    write_compare_page(
        out,
        summary,
        worse=worse(summary),
        folders=folders,
        log=log,
        command=shlex.join(["emuworld", *sys.argv[1:]]),
    )
    _print(summary)
    print(f"see {out / 'index.html'} and {out / 'summary.json'}")
    return summary


# Which runs belong together -------------------------------------------------------------------------------


def find_runs(folder: str, *, setting: str) -> dict[str, Run]:
    """The run in a folder, or else those in its sub-folders, by name. ValueError for none, and for two of one
    name.
    """
    place = Path(folder)
    if (place / "run.json").exists():
        paths = [place]
    else:
        paths = sorted(path.parent for path in files_below(place) if path.name == "run.json")
    if not paths:
        raise ValueError(
            f"{setting}={folder} holds no run (no run.json in it or below it); "
            "give the out= of emuworld eval, or the folder around several of them"
        )
    runs: dict[str, Run] = {}
    for path in paths:
        one = Run(folder=path, told=read_run(path))
        check_comparable(one.told["suite"])
        if one.name in runs:
            raise ValueError(
                f"{setting}={folder} holds two runs of {one.name}: {runs[one.name].folder} and {path}; "
                "give the folder of one of them"
            )
        runs[one.name] = one
    return runs


def _pair(name: str, before: Run, after: Run) -> Pair:
    """ValueError unless the two asked and judged the same, and have cases in common."""
    ours, theirs = before.told["case_settings"], after.told["case_settings"]
    differ = [
        f"{key} was {ours.get(key)!r} before and {theirs.get(key)!r} after"
        for key in dict.fromkeys([*ours, *theirs])
        if key not in _MAY_DIFFER and ours.get(key) != theirs.get(key)
    ]
    if differ:
        raise ValueError(
            f"the runs of {name} in {before.folder} and {after.folder} do not pair: {'; '.join(differ)}; "
            "run one of them again with the settings of the other"
        )
    records = [read_records(one.folder / "records.jsonl") for one in (before, after)]
    _check_same_cases(name, *records)
    worths = {key: paired(score, *records) for key, score in SCORES[before.told["suite"]].items()}
    if not any(len(values) for values, _ in worths.values()):
        raise ValueError(
            f"the runs of {name} have no case in common: {before.folder} holds {len(records[0])} cases, "
            f"{after.folder} {len(records[1])}; let both runs end"
        )
    return Pair(before=before, after=after, worths=worths)


def _check_same_cases(name: str, before: Sequence[Record], after: Sequence[Record]) -> None:
    """ValueError for a case that is another one in the other run: a release in between may build others."""
    others = {(record["kind"], record["index"]): record for record in after}
    for record in before:
        other = others.get((record["kind"], record["index"]), {})
        for key in _ASKED:
            if key in record and key in other and record[key] != other[key]:
                raise ValueError(
                    f"{record['kind']} {record['index']} of {name} is another case in each run: its {key} "
                    f"was {record[key]!r} before and {other[key]!r} after; run both with one release"
                )


# Figures --------------------------------------------------------------------------------------------------


def _figures(pair: Pair) -> dict[str, Any]:
    scores = {
        name: {"unit": SCORES[pair.suite][name].unit, **paired_figure(*worths)}
        for name, worths in pair.worths.items()
        if len(worths[0])
    }
    return {"before": pair.before.about(), "after": pair.after.about(), "scores": scores}


def _mean_of_suites(pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """Mean of the suites' first scores, each suite counting alike, on a scale from 0 to 1; suites of too few
    cases for an interval are left out.
    """
    groups = []
    for pair in pairs.values():
        name, score = next(iter(SCORES[pair.suite].items()))
        before, after = pair.worths[name]
        if score.unit == "psnr":
            before, after = ((one - _LOW_DB) / (_HIGH_DB - _LOW_DB) for one in (before, after))
        groups += [(before, after)] if len(before) >= MIN_CASES else []
    if not groups:
        return {}
    difference = bootstrap_of_groups([after - before for before, after in groups])
    return {
        "scale_db": [_LOW_DB, _HIGH_DB],
        "before": bootstrap_of_groups([before for before, _ in groups]).as_dict(),
        "after": bootstrap_of_groups([after for _, after in groups]).as_dict(),
        "difference": difference.as_dict(),
        "verdict": verdict(difference),
    }


def worse(summary: Mapping[str, Any]) -> list[str]:
    """What got worse, in words: what surely did, and what is lower by no more than chance explains."""
    lower = [
        (figure["verdict"], f"{name}: {score}, {change(figure['difference'], figure['unit'])}")
        for name, suite in summary["suites"].items()
        for score, figure in suite["scores"].items()
        if figure["difference"]["value"] < 0
    ]
    lost = [told for found, told in lower if found == LOSS]
    within = [told for found, told in lower if found != LOSS]
    said = [f"Significantly worse: {'; '.join(lost)}."] if lost else []
    if within:
        said.append(f"Lower, but not significantly (chance may explain it): {'; '.join(within)}.")
    return said or ["No score is lower than before."]


def _print(summary: Mapping[str, Any]) -> None:
    for name, suite in summary["suites"].items():
        for score, figure in suite["scores"].items():
            told, count = change(figure["difference"], figure["unit"]), figure["difference"]["count"]
            values = " -> ".join(words(figure[side], figure["unit"]) for side in ("before", "after"))
            print(f"{name}: {score}: {values}, {told}, {figure['verdict']}, {count} cases")
    if summary["mean"]:
        mean = summary["mean"]
        print(f"mean over suites: {change(mean['difference'], 'rate')}, {mean['verdict']}")
    print("\n".join(worse(summary)))
