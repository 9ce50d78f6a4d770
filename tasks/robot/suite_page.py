"""The robot suite's figures as a plain table for the terminal and as parts of a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emuworld.tasks import page
from emuworld.tasks.cells import bar_table, kept_pictures, words
from emuworld.tasks.robot.suite_summary import LADDER
from emuworld.tasks.summary import Figures

_FAULT_NAMES = {
    "missing": "an object is missing",
    "duplicated": "an object is there twice",
    "moved": "a bystander has moved",
    "unsupported": "the moved object would fall",
    "hovering": "the moved object hovers (asked of the same judge)",
}
_DRIFT_NAMES = {
    "photometric": "background: change of a middle grey, levels of 255",
    "camera_px": "background: shift, pixels",
    "residual": "background: what is left, levels of 255",
    "ssim": "background: SSIM",
}
_USE_NAMES = {"text": "words alone", "keyframe": "pictures alone", "both": "both"}


def robot_table(figures: Figures) -> str:
    """The ladder as lines of text: all scenes, then by family, split, phrasing and kind of goal place."""
    rows = [["", "scenes", *LADDER.values()], _plain_row("all", figures["ladder"])]
    for group, parts in figures["by"].items():
        rows.append([f"by {group}"])
        rows += [_plain_row(f"  {name}", rungs) for name, rungs in parts.items()]
    if figures["uses"] is not None:
        rows.append(["goal place only in the picture, success with"])
        rows += [_plain_row(f"  {_USE_NAMES[name]}", {"": rate}) for name, rate in figures["uses"].items()]
    first = max(len(row[0]) for row in rows if len(row) > 1)
    return "\n".join(f"{row[0]:<{first}}" + "".join(f"{cell:>20}" for cell in row[1:]) for row in rows)


def _plain_row(name: str, rungs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    count = next(iter(rungs.values()))["count"]
    return [name, str(count), *(_short(rate) for rate in rungs.values())]


def _short(rate: Mapping[str, Any]) -> str:
    """'93.1 % (90 to 95)'."""
    if rate["value"] is None:
        return "-"
    return f"{rate['value'] * 100:.1f} % ({rate['low'] * 100:.0f} to {rate['high'] * 100:.0f})"


def robot_page(figures: Figures, folder: Path) -> list[str]:
    """The parts of the page."""
    parts = [
        page.section("Against the bars", bar_table(figures["bars"])),
        page.section(
            "How far plans get",
            page.text(
                "Valid: every step is a subtask in words. Executable: the arm could begin each. Every "
                "subgoal: each step reached what it is for. Success: all goals hold, bystanders in place; "
                "once: what the task is about held after some step. Intervals are Wilson's, 95 %."
            ),
            _ladder_table("", {"all scenes": figures["ladder"]}),
            *(
                page.subsection(f"By {name}", _ladder_table(name, rows))
                for name, rows in figures["by"].items()
            ),
            _progress(figures),
        ),
    ]
    if figures["comparisons"]:
        parts.append(_comparisons(figures["comparisons"]))
    if figures["uses"] is not None:
        parts.append(_uses(figures["uses"]))
    if figures["failures"]["count"]:
        parts.append(_failures(figures["failures"], folder))
    if figures["keyframes"] is not None:
        parts.append(_keyframes(figures["keyframes"]))
    if figures["judges"] is not None:
        parts.append(_judges(figures["judges"]))
    parts.append(page.section("What success looks like", *kept_pictures(folder, "success")))
    return parts


def _ladder_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    return page.table(
        head=[title, *LADDER.values(), "scenes"],
        rows=[
            [name, *(words(rate, "rate") for rate in rungs.values()), str(rungs["success"]["count"])]
            for name, rungs in rows.items()
        ],
    )


def _progress(figures: Figures) -> str:
    row = figures["in_a_row"]
    rows = [
        ["share of what a task is about that holds at the end", words(figures["share_of_goals"], "rate")],
        ["share of steps that reached what they are for", words(figures["subgoals"], "rate")],
        ["the task's own subtasks in a row, mean", words(row["mean"], "psnr")],
        *(
            [f"at least {count} in a row, of {rate['count']} tasks that have so many", words(rate, "rate")]
            for count, rate in row["at_least"].items()
        ),
    ]
    if figures["num_imagined"]["value"]:
        rows.append(["pictures imagined for a scene, mean", words(figures["num_imagined"], "psnr")])
    return page.subsection("Part of the way", page.table(head=["", ""], rows=rows))


def _comparisons(comparisons: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            f"{name}, {scenes}",
            words(one["difference"], "rate"),
            f"{one['both']} / {one['only_mine']} / {one['only_other']} / {one['neither']}",
            f"{one['p']:.2g}",
        ]
        for name, parts in comparisons.items()
        for scenes, one in parts.items()
    ]
    return page.section(
        "Against other agents, scene by scene",
        page.text("p: McNemar's exact two-sided test on the scenes that only one of the two solves."),
        page.table(
            head=["against", "difference of success", "both / only this / only that / neither", "p"],
            rows=rows,
        ),
    )


def _uses(uses: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [[_USE_NAMES[name], words(rate, "rate"), str(rate["count"])] for name, rate in uses.items()]
    return page.section(
        "Does the keyframe matter?",
        page.text("Success on the scenes whose goal place is only in the picture, by what is believed."),
        page.table(head=["believed", "success at the end", "scenes"], rows=rows),
    )


def _failures(failures: Figures, folder: Path) -> str:
    rows = [[f"to blame: {name}", words(rate, "rate")] for name, rate in failures["blame"].items()]
    rows.append(["stopped short of the goal", words(failures["stopped_short"], "rate")])
    steps = ", ".join(f"{step}: {count}" for step, count in failures["first_failing_step"].items())
    reasons = [[reason, str(count)] for reason, count in failures["reasons"].items()]
    return page.section(
        "Where and why it failed",
        page.text(
            f"{failures['count']} scenes failed. The failing step is the first after which the simulator's "
            "own plan can no longer reach the goal. The plan is to blame where that step was not to be done "
            "or its picture shows another place, else the execution. First failing step (and how often): "
            f"{steps or 'none'}."
        ),
        page.table(head=["failed scenes", ""], rows=rows),
        page.table(head=["why a step was not done", "steps"], rows=reasons) if reasons else "",
        *kept_pictures(folder, "failure"),
    )


def _keyframes(keyframes: Figures) -> str:
    rows = [
        ["number of objects right", words(keyframes["object_count_right"], "rate")],
        ["no fault found", words(keyframes["clean"], "rate")],
        *([_FAULT_NAMES[name], words(keyframes[name], "rate")] for name in _FAULT_NAMES if name in keyframes),
        *([name, words(keyframes["drift"][part], "psnr")] for part, name in _DRIFT_NAMES.items()),
    ]
    return page.section(
        "The plans' pictures",
        page.text(
            f"{keyframes['num_pictures']} keyframes, read against the known scene. How often these judges "
            "err is in the next table."
        ),
        page.table(head=["", "of the pictures"], rows=rows),
    )


def _judges(judges: Figures) -> str:
    rows = [
        [
            _FAULT_NAMES[fault],
            "" if one["false_positive"] is None else words(one["false_positive"], "rate"),
            words(one["false_negative"], "rate"),
            str(one["false_negative"]["count"]),
        ]
        for fault, one in judges["faults"].items()
    ]
    return page.section(
        "How often the judges of pictures err",
        page.text(
            f"On {judges['num_scenes']} scenes: false positives on the simulator's own frames after a "
            "subtask, false negatives on frames with one planted fault. Where an object was put is read off "
            f"the true frame {words(judges['place_error_mm'], 'psnr')} mm from the truth."
        ),
        page.table(head=["judged", "false positives", "false negatives", "planted"], rows=rows),
    )
