"""A run's folder -> `summary.json` and a page, `index.html`. Runs no model: it can be repeated on stored
cases.

Whatever a detector judged stands beside the detector's own error on the simulator's frames of the same cases.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emuworld.files import write_text
from emuworld.tasks import page
from emuworld.tasks.cells import bar_table, kept_pictures, words
from emuworld.tasks.edit_summary import EXPECTED, VERDICTS, summarise_x2i
from emuworld.tasks.film import side_by_side
from emuworld.tasks.metrics import Estimate
from emuworld.tasks.robot.suite_page import robot_page, robot_table
from emuworld.tasks.robot.suite_summary import summarise_robot
from emuworld.tasks.run_folder import Record, load_pictures, read_records
from emuworld.tasks.summary import (
    CONTENDERS,
    JUDGED,
    ONE_STEP_REGIONS,
    REGIONS,
    Figures,
    summarise_explore_twin,
    summarise_t2i,
)
from emuworld.tasks.tale_page import tale_page, tale_table
from emuworld.tasks.tale_summary import summarise_story

__all__ = ["robot_table", "tale_table", "write_report"]

_TITLES = {
    "explore-twin": "A dream beside its twin",
    "t2i": "Pictures from words",
    "x2i": "Pictures edited as told",
    "story": "Tales told panel by panel",
    "robot-331": "Plans carried out in physics",
}


def write_report(folder: Path, *, against: str = "") -> Figures:
    """Summarise a run's records and write `summary.json` and `index.html` into its folder; returns the
    summary.

    `against`: folders of other runs of the robot suite to compare with, commas between them. Raises
    ValueError for one that is none, or of other scenes.
    """
    run = json.loads((folder / "run.json").read_text())
    records = read_records(folder / "records.jsonl")
    if run["suite"] == "robot-331":
        figures, render = summarise_robot(records, run, other_runs(run, against)), robot_page
    elif run["suite"] == "t2i":
        figures, render = summarise_t2i(records), _t2i_page
    elif run["suite"] == "x2i":
        figures, render = summarise_x2i(records), _x2i_page
    elif run["suite"] == "story":
        figures, render = summarise_story(records), tale_page
    else:
        figures, render = summarise_explore_twin(records), _explore_twin_page
    summary = {"run": run, "figures": figures}
    write_text(folder / "summary.json", json.dumps(summary, indent=1))
    page.write_page(
        folder / "index.html",
        title=_TITLES[run["suite"]],
        lead=_lead(run),
        parts=[*render(figures, folder), _how_made(run)],
        footer=f"Made by: {run['command']}",
    )
    return figures


def other_runs(run: Mapping[str, Any], against: str) -> dict[str, list[Record]]:
    """Records of the runs in these folders, by agent and use. ValueError for one that does not pair."""
    found: dict[str, list[Record]] = {}
    for folder in (Path(one.strip()) for one in against.split(",") if one.strip()):
        if not (folder / "run.json").exists():
            raise ValueError(f"against={folder} holds no run; give the out= of an earlier one")
        other = json.loads((folder / "run.json").read_text())
        same = ("tasks", "phrasing")
        if other["suite"] != run["suite"] or any(
            other["case_settings"].get(key) != run["case_settings"].get(key) for key in same
        ):
            raise ValueError(f"against={folder} is a run of other scenes or phrasings; they do not pair")
        settings = other["settings"]
        name = settings["agent"] if settings["use"] == "both" else f"{settings['agent']}, {settings['use']}"
        found[name if name not in found else f"{name} ({folder})"] = read_records(folder / "records.jsonl")
    return found


# Pages ----------------------------------------------------------------------------------------------------


def _explore_twin_page(figures: Figures, folder: Path) -> list[str]:
    parts = [page.section("Against the bars", bar_table(figures["bars"]))]
    if figures["num_starts"]:
        parts += [
            page.section("What it looks like", *kept_pictures(folder, "start")),
            _fidelity_section(figures),
            _action_section(figures),
            _object_section(figures["objects"], title="Are the right things there?"),
        ]
    if figures["num_walks"]:
        parts.append(_walk_section(figures["walks"], num_walks=figures["num_walks"], folder=folder))
    if figures["num_turns"]:
        parts.append(_turn_section(figures["turns"], num_turns=figures["num_turns"], folder=folder))
    return parts


def _fidelity_section(figures: Figures) -> str:
    charts = [
        page.curves(
            [_series(CONTENDERS[one], figures[metric][region][one]) for one in CONTENDERS],
            title=f"{metric.upper()}, {REGIONS[region]}",
            x_label="commands since the start",
            y_label="dB" if metric == "psnr" else "",
        )
        for metric in ("psnr", "ssim")
        for region in REGIONS
    ]
    moves = figures["one_step_moves"]
    rows = [
        [
            name,
            *(
                words(moves[metric][region][one], metric)
                for metric in ("psnr", "ssim")
                for region in ONE_STEP_REGIONS
            ),
        ]
        for one, name in CONTENDERS.items()
    ]
    heads = [f"{metric.upper()}, {REGIONS[r]}" for metric in ("psnr", "ssim") for r in ONE_STEP_REGIONS]
    return page.section(
        "How far from the simulator, step by step",
        page.text(
            "Open loop: the dream starts from the simulator's first frame and never sees another. 'In view "
            "before' counts the pixels whose surface point an earlier true frame showed (from the "
            "simulator's depth); what a turn newly reveals nobody can know. 'In view at the start' counts "
            "those that the first frame showed: what came into view later the dream had to make up. "
            "'Tokenizer alone' is the true frame through the vision tokenizer and back, the best the dream "
            "could do; 'copy of the start' repeats the "
            "first frame; 'other commands' is the dream under other ones. Bands: 95 % intervals over rooms."
        ),
        page.side_by_side(charts),
        page.subsection("One step ahead, commands that move", page.table(head=["", *heads], rows=rows)),
    )


def _action_section(figures: Figures) -> str:
    gap = page.curves(
        [_series("right minus other", figures["shuffle_gap_db"])],
        title="Shuffle gap, whole frame",
        x_label="commands since the start",
        y_label="dB",
    )
    rows = [
        [
            command,
            words(pair["dream"], "psnr"),
            words(pair["tokenizer"], "psnr"),
            str(pair["dream"]["count"]),
        ]
        for command, pair in figures["first_command_psnr_seen"].items()
    ]
    retrieval = words(figures["retrieval"], "rate")
    return page.section(
        "Does it follow the command?",
        page.text(
            f"Counterfactual retrieval: {retrieval} of the imagined branches are nearer to their own true "
            f"frame than to those of other commands (chance {figures['retrieval_chance']:.0%}); of those "
            f"whose view the start shows a tenth of or more, {words(figures['retrieval_known'], 'rate')}. "
            "The shuffle gap is how much nearer the dream is to the truth than the same dream under other "
            "commands."
        ),
        gap,
        page.subsection(
            "First command, pixels in view before",
            page.table(head=["command", "dream, dB", "tokenizer, dB", "rooms"], rows=rows),
        ),
    )


def _object_section(objects: Figures, *, title: str) -> str:
    names = JUDGED
    charts = [
        page.curves(
            [_series(names[judged], objects[judged][figure], first=0) for judged in names],
            title=f"{figure.capitalize()} of colour and shape pairs",
            x_label="commands since the start",
            y_label="",
            percent=True,
        )
        for figure in ("precision", "recall")
    ]
    return page.section(
        title,
        page.text(
            "A small detector reads colours and shapes off the frames, and the simulator says what is there. "
            "Its own precision and recall on the simulator's frames of the same steps stand beside, as they "
            "are and through the vision tokenizer: the judge's error, without and with what the tokenizer "
            "blurs."
        ),
        page.side_by_side(charts),
    )


def _walk_section(walks: Figures, *, num_walks: int, folder: Path) -> str:
    names = {
        "dream": "found in the dream",
        "tokenizer": "found in the simulator's frame through the tokenizer",
        "truth": "found in the simulator's frame (judge's own)",
        "chance": "chance: found in the dream of another room",
    }
    rows = [[name, words(walks["permanence"][judged], "rate")] for judged, name in names.items()]
    chart = page.curves(
        [_series(CONTENDERS[one], walks["psnr"][one]) for one in ("dream", "tokenizer")],
        title="PSNR along the walk, whole frame",
        x_label="commands since the start",
        y_label="dB",
    )
    return page.section(
        "Long walks, out and back",
        page.text(
            f"{num_walks} walks; the second half undoes the first. {walks['num_events']} times an object "
            "that had been seen and had left the view came back into it: is it there again?"
        ),
        page.table(head=["looked back at", "share (95 % interval)"], rows=rows),
        chart,
        *kept_pictures(folder, "walk"),
    )


def _turn_section(turns: Figures, *, num_turns: int, folder: Path) -> str:
    names = {
        "dream": "dream",
        "tokenizer": "tokenizer's own reconstruction",
        "other": "another view of the room",
    }
    rows = [
        [name, words(turns["closing_psnr"][one], "psnr"), words(turns["closing_ssim"][one], "ssim")]
        for one, name in names.items()
    ]
    return page.section(
        "A full turn, 12 times 30 degrees",
        page.text(
            f"{num_turns} rooms. After the turn the view should be the first one again. Matched against the "
            f"simulator's views around the start, the last dreamt view is off by "
            f"{words(turns['closing_abs_deg'], 'deg')}; "
            f"{words(turns['closed_within_5_deg'], 'rate')} close within 5 degrees."
        ),
        page.table(head=["last frame against the first", "PSNR, dB", "SSIM"], rows=rows),
        *kept_pictures(folder, "turn"),
    )


def _t2i_page(figures: Figures, folder: Path) -> list[str]:
    kinds = {
        "all_present": "all, right colour",
        "shapes_present": "shapes, any colour",
        "colours_present": "colours, any shape",
        "as_named": "each named once, nothing else",
    }
    rows = []
    whose = {"dream": "", "tokenizer": "simulator through the tokenizer: ", "truth": "simulator: "}
    for judged, who in whose.items():
        for group, rates in figures[judged].items():
            rows.append(
                [
                    f"{who}{group}",
                    *(words(rates[kind], "rate") if kind in rates else "" for kind in kinds),
                    str(rates["all_present"]["count"]),
                ]
            )
    detector = figures["detector"]
    error = (
        f"The judge is a small detector. On the simulator's own frames behind these prompts its precision is "
        f"{words(detector['precision'], 'rate')} and its recall {words(detector['recall'], 'rate')}."
    )
    return [
        page.section("Against the bars", bar_table(figures["bars"])),
        page.section(
            "Are the named objects there?",
            page.text(error),
            page.table(head=["prompts", *kinds.values(), "count"], rows=rows),
        ),
        page.section("What it looks like", _painted(folder)),
    ]


def _x2i_page(figures: Figures, folder: Path) -> list[str]:
    ways = ("plain", "tokenizer")
    errors = [f"{error}, {way}" for way in ways for error in ("false successes", "missed successes")]
    heads = ["done and rest kept", "done", "rest kept", *(f"judge: {error}" for error in errors)]
    rows = [
        [
            group,
            *(words(one["dream"][verdict], "rate") for verdict in VERDICTS),
            *(words(one["judge"][error], "rate") for error in errors),
            str(one["dream"]["success"]["count"]),
        ]
        for group, one in figures["groups"].items()
    ]
    kept_words = {True: ", kept", False: ", not kept", None: ""}
    known = [
        [
            who,
            *(words(figures["judged"][who][verdict], "rate") for verdict in VERDICTS),
            f"{'done' if done else 'not done'}{kept_words[kept]}",
        ]
        for who, (done, kept) in EXPECTED.items()
    ]
    return [
        page.section("Against the bars", bar_table(figures["bars"])),
        page.section(
            "Is the edit done, and is the rest kept?",
            page.text(
                "The judge compares pixels with the simulator's edit where that is known to the pixel, and "
                "asks a detector where the words leave a place open. It also judged pictures whose worth is "
                "known: false successes are pictures left as they were, edited otherwise, or with one edit "
                "too many, taken for right; missed successes are right pictures not taken for right."
            ),
            page.table(head=["edits", *heads, "count"], rows=rows),
            page.subsection(
                "The judge on pictures whose worth is known",
                page.table(head=["picture", "done and kept", "done", "kept", "should be"], rows=known),
            ),
        ),
        page.section("What it looks like", *kept_pictures(folder, "edit")),
    ]


def _painted(folder: Path) -> str:
    """Painted pictures and the simulator's views of the same captions, pair by pair."""
    figures = []
    for path in sorted((folder / "pictures").glob("prompt_*.npz")):
        pictures = load_pictures(path)
        row = pictures.rows[0]
        pair = side_by_side(list(row.frames))
        figures.append(page.figure(pair, caption=pictures.title, note=row.notes[0]))
    lead = page.text("Left painted, right a simulated view with the same caption.", soft=True)
    return lead + page.strip(figures, cell_rem=20)


def _series(name: str, stored: Sequence[Mapping[str, Any]], *, first: int = 1) -> page.Series:
    estimates = [Estimate.from_dict(dict(one)) for one in stored]
    return page.Series(name=name, x=list(range(first, first + len(estimates))), y=estimates)


def _lead(run: Mapping[str, Any]) -> str:
    settings = run["settings"]
    model = (
        f"model {settings['model']} ({run['model_fingerprint']})" if run["model_fingerprint"] else "no model"
    )
    if "agent" in settings:
        model = f"agent {settings['agent']}, use={settings['use']}, {model}"
    return (
        f"{settings.get('split', 'test')} split, {settings['size_px']} px, {model}, {run['date']}, "
        f"{run['hardware']}, {run['wall_s'] / 60:.1f} minutes"
    )


def _how_made(run: Mapping[str, Any]) -> str:
    return page.section(
        "How this was made", page.details("settings, versions, hardware", json.dumps(run, indent=1))
    )
