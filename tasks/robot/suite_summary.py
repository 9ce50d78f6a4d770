"""Records of the robot suite -> figures with 95 % intervals, as plain JSON values. No model, no physics."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emuworld.tasks.metrics import bootstrap, wilson
from emuworld.tasks.robot.keyframe_faults import FAULTS
from emuworld.tasks.run_folder import Record
from emuworld.tasks.suites import ROBOT_BARS
from emuworld.tasks.summary import Figures, bar

# The rungs, each a yes or no of a scene: key in the records, name in tables.
LADDER = {
    "valid": "valid",
    "executable": "executable",
    "all_reached": "every subgoal",
    "once": "success once",
    "success": "success at the end",
}
GROUPS: dict[str, Callable[[Record], str]] = {
    "family": lambda one: str(one["family"]),
    "split": lambda one: str(one["variation"]),
    "phrasing": lambda one: str(one["phrasing"]),
    "goal place": lambda one: "only in the picture" if one["goal_in_picture"] else "in the words",
}
_NUM_REASONS = 8


def summarise_robot(
    records: Sequence[Record], run: Mapping[str, Any], others: Mapping[str, Sequence[Record]] | None = None
) -> Figures:
    """All figures of a run. `others`: records of other runs on the same scenes, by name, to compare with."""
    scenes = [_with_rungs(one) for one in records if one["kind"] == "scene"]
    figures: Figures = {"num_scenes": len(scenes), "agent": run["settings"]["agent"]}
    figures["ladder"] = ladder(scenes)
    figures["by"] = {name: _grouped(scenes, key) for name, key in GROUPS.items()}
    figures["share_of_goals"] = bootstrap([share_of_aims(one) for one in scenes]).as_dict()
    figures["subgoals"] = bootstrap(
        [sum(step["reached"] for step in one["steps"]) for one in scenes],
        weights=[len(one["steps"]) for one in scenes],
    ).as_dict()
    figures["in_a_row"] = _in_a_row(scenes)
    figures["num_imagined"] = bootstrap([one["num_imagined"] for one in scenes]).as_dict()
    figures["failures"] = _failures(scenes)
    figures["same"] = _same(scenes)
    figures["keyframes"] = _keyframes(scenes)
    figures["uses"] = _uses(records, run["settings"]["use"])
    figures["judges"] = _judges([one for one in records if one["kind"] == "judges"])
    figures["comparisons"] = {
        name: {
            "all scenes": compare(scenes, other),
            "goal place only in the picture": compare(_picture_only(scenes), _picture_only(other)),
        }
        for name, other in (others or {}).items()
    }
    figures["bars"] = _bars(figures, run)
    return figures


def ladder(scenes: Sequence[Record]) -> Figures:
    """Each rung's rate over scenes."""
    return {rung: wilson(sum(bool(one[rung]) for one in scenes), len(scenes)).as_dict() for rung in LADDER}


def share_of_aims(scene: Record) -> float:
    """Of what the task is about (bystanders apart), the share that holds at the end."""
    aims = scene["aims"]
    return sum(scene["facts"][aim] for aim in aims) / len(aims) if aims else math.nan


def compare(mine: Sequence[Record], other: Sequence[Record]) -> Figures:
    """Success of two runs on the scenes that both have, pair by pair.

    `difference`: mine less the other's, with a bootstrap interval over scenes; `p`: McNemar's exact
    two-sided test, the chance of scenes that only one of them solves to fall so unevenly between equals.
    """
    theirs = {one["index"]: one for one in other if one["kind"] == "scene"}
    pairs = [
        (bool(one["success"]), bool(theirs[one["index"]]["success"]))
        for one in mine
        if one["index"] in theirs
    ]
    counts = Counter(pairs)
    only_mine, only_other = counts[True, False], counts[False, True]
    return {
        "num_scenes": len(pairs),
        "both": counts[True, True],
        "only_mine": only_mine,
        "only_other": only_other,
        "neither": counts[False, False],
        "difference": bootstrap([int(one) - int(two) for one, two in pairs]).as_dict(),
        "p": mcnemar(only_mine, only_other),
    }


def mcnemar(only_one: int, only_other: int) -> float:
    """Exact two-sided p of the binomial with a half, over the pairs that differ; 1.0 where none does."""
    total, least = only_one + only_other, min(only_one, only_other)
    tail = sum(math.comb(total, count) for count in range(least + 1))
    return float(min(1.0, 2.0 * tail / 2.0**total))


def _with_rungs(scene: Record) -> Record:
    steps = scene["steps"]
    return {**scene, "all_reached": bool(steps) and all(one["reached"] for one in steps)}


def _grouped(scenes: Sequence[Record], key: Callable[[Record], str]) -> Figures:
    names = dict.fromkeys(key(one) for one in scenes)
    return {name: ladder([one for one in scenes if key(one) == name]) for name in names}


def _picture_only(records: Sequence[Record]) -> list[Record]:
    return [one for one in records if one["kind"] == "scene" and one["goal_in_picture"]]


def _in_a_row(scenes: Sequence[Record]) -> Figures:
    """How many of a task's own subtasks came true in their order: the mean, and the rate of k by tasks that
    have so many."""
    longest = max((one["num_subtasks"] for one in scenes), default=0)
    rates = {}
    for length in range(1, longest + 1):
        able = [one for one in scenes if one["num_subtasks"] >= length]
        rates[str(length)] = wilson(sum(one["in_a_row"] >= length for one in able), len(able)).as_dict()
    return {"mean": bootstrap([one["in_a_row"] for one in scenes]).as_dict(), "at_least": rates}


def _failures(scenes: Sequence[Record]) -> Figures:
    """Where failed scenes were lost (steps from 1), who is to blame, and why steps could not be done."""
    failed = [one for one in scenes if not one["success"]]
    blames = Counter(str(one["blame"] or "unknown") for one in failed)
    steps = Counter(one["failing_step"] + 1 for one in failed if one["failing_step"] is not None)
    short = sum(one["failing_step"] == len(one["steps"]) for one in failed)
    reasons = Counter(
        _without_names(step["reason"]) for one in scenes for step in one["steps"] if not step["done"]
    )
    return {
        "count": len(failed),
        "blame": {
            name: wilson(blames[name], len(failed)).as_dict()
            for name in ("plan", "execution", "unknown")
            if blames[name] or name != "unknown"
        },
        "stopped_short": wilson(short, len(failed)).as_dict(),
        "first_failing_step": {str(step): steps[step] for step in sorted(steps)},
        "reasons": dict(reasons.most_common(_NUM_REASONS)),
    }


def _without_names(reason: str) -> str:
    """A reason without colours and numbers, so that equal ones count together."""
    colours = ("red", "green", "blue", "yellow", "cyan", "purple", "orange", "pink", "white", "black")
    words = [word for word in reason.split() if word not in (*colours, "brown", "gray", "wooden")]
    return " ".join("N" if word.isdigit() else word for word in words[:12])


def _same(scenes: Sequence[Record]) -> Figures | None:
    repeated = [one["same"] for one in scenes if "same" in one]
    return wilson(sum(repeated), len(repeated)).as_dict() if repeated else None


def _keyframes(scenes: Sequence[Record]) -> Figures | None:
    """What the judges say of the plans' pictures; rates are over pictures, intervals over scenes."""
    by_scene = [[step["keyframe"] for step in one["steps"] if step["keyframe"]] for one in scenes]
    by_scene = [pictures for pictures in by_scene if pictures]
    if not by_scene:
        return None
    keys = {
        "missing": "missing",
        "duplicated": "duplicated",
        "moved": "moved_bystanders",
        "unsupported": "unsupported",
    }

    def rate(holds: Callable[[Record], bool]) -> dict[str, Any]:
        counts = [sum(holds(one) for one in pictures) for pictures in by_scene]
        return bootstrap(counts, weights=[len(pictures) for pictures in by_scene]).as_dict()

    def mean(value: Callable[[Record], float]) -> dict[str, Any]:
        every = [[value(one) for one in pictures] for pictures in by_scene]
        sums = [sum(known for known in some if math.isfinite(known)) for some in every]
        return bootstrap(sums, weights=[len(some) for some in every]).as_dict()

    return {
        "num_pictures": sum(len(pictures) for pictures in by_scene),
        "object_count_right": rate(lambda one: one["num_seen"] == one["num_expected"]),
        "clean": rate(lambda one: one["is_clean"] and not one["unsupported"]),
        **{fault: rate(lambda one, key=keys[fault]: bool(one[key])) for fault in FAULTS},  # type: ignore[misc]
        "drift": {
            part: mean(lambda one, part=part: float(one["drift"][part]))  # type: ignore[misc]
            for part in ("photometric", "camera_px", "residual", "ssim")
        },
    }


def _uses(records: Sequence[Record], use: str) -> Figures | None:
    """Success with words, pictures or both, over the scenes whose goal place is only in the picture."""
    runs = {use: _picture_only(records)}
    for kind in sorted({one["kind"] for one in records if one["kind"].startswith("use ")}):
        runs[kind.removeprefix("use ")] = [one for one in records if one["kind"] == kind]
    if len(runs) < 2 or not runs[use]:
        return None
    return {
        name: wilson(sum(one["success"] for one in runs[name]), len(runs[name])).as_dict()
        for name in ("text", "keyframe", "both")
        if name in runs
    }


def _judges(cases: Sequence[Record]) -> Figures | None:
    """How often each judge is wrong about things whose truth is known: false alarms over the things that
    have not the fault, misses over the planted ones."""
    if not cases:
        return None
    errors = [one["place_error_m"] for one in cases if one["place_error_m"] is not None]
    figures: Figures = {"num_scenes": len(cases), "faults": {}}
    for fault in (*FAULTS, "hovering"):
        judged = "unsupported" if fault == "hovering" else fault
        missed = [
            one["there"][judged][-1] not in one["found"][judged]
            for case in cases
            for one in case["pictures"]
            if one["name"] == fault
        ]
        true = [one for case in cases for one in case["pictures"] if one["name"] == "true frame"]
        wrong = sum(bool(set(one["found"][judged]) - set(one["there"][judged])) for one in true)
        figures["faults"][fault] = {
            "false_negative": wilson(sum(missed), len(missed)).as_dict(),
            "false_positive": wilson(wrong, len(true)).as_dict() if fault != "hovering" else None,
        }
    figures["place_error_mm"] = bootstrap([1000 * one for one in errors]).as_dict()
    return figures


# Bars -----------------------------------------------------------------------------------------------------


def _bars(figures: Figures, run: Mapping[str, Any]) -> Figures:
    """The bars of the issue that this run measures: value, bar, met or not."""
    agent, count = figures["agent"], figures["num_scenes"]
    rungs = figures["ladder"]
    rows: Figures = {}
    if not count:
        return rows
    if agent in ("oracle", "planner"):
        rows[f"{agent}: success at the end, {count} scenes"] = bar(rungs["success"], ROBOT_BARS[agent])
    if agent in ("none", "random"):
        found = bar(rungs["success"], ROBOT_BARS[agent], at_least=False)
        rows[f"{agent}: success at the end, {count} scenes"] = found | {"unit": "rate"}
    if figures["same"] is not None:
        rows["the same end in every run of a scene"] = bar(figures["same"], 1.0)
    if agent == "oracle":
        minutes = {"value": run["wall_s"] / 60, "low": None, "high": None, "count": count}
        found = bar(minutes, ROBOT_BARS["oracle_minutes"], at_least=False)
        rows[f"wall time of the suite, {count} scenes: minutes"] = found | {"unit": "minutes"}
    if agent == "planner":
        for rung in ("valid", "executable"):
            rows[f"{rung} plans"] = bar(rungs[rung], ROBOT_BARS[rung])
        for name, parts in figures["comparisons"].items():
            part = parts["goal place only in the picture"]
            p = {"value": part["p"], "low": None, "high": None, "count": part["num_scenes"]}
            found = bar(p, ROBOT_BARS["significance"], at_least=False)
            found["met"] = found["met"] and part["only_mine"] > part["only_other"]
            rows[f"above {name} where the goal place is only in the picture: p"] = found | {"unit": "p"}
    return rows
