"""Records of cases -> figures with 95 % intervals, as plain JSON values. No model, no pictures, no page."""

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from emuworld.tasks.metrics import bootstrap, by_step, wilson
from emuworld.tasks.run_folder import Record
from emuworld.tasks.suites import BARS

Figures = dict[str, Any]
CODE_FRAMES = 2000  # over so many frames the codes in use are counted

# The rows of every table and chart of fidelity: key in the records, name on the page.
CONTENDERS = {
    "dream": "dream",
    "tokenizer": "tokenizer alone",
    "copy": "copy of the start",
    "shuffled": "other commands",
}
# Whose frames the detector looks at: the last are the simulator's own and tell the judge's error.
JUDGED = {"dream": "dream", "tokenizer": "tokenizer alone", "truth": "simulator (judge)"}
# What an earlier frame of the true walk showed, the dream was only told of where it was in view at the start.
REGIONS = {"whole": "whole frame", "seen": "pixels in view before", "given": "pixels in view at the start"}
KNOWN_SHARE = 0.1  # a branch's view that the start shows less of is a guess, whoever dreams it
ONE_STEP_REGIONS = ("whole", "seen")  # one step ahead the last two are the same


# Explore twin: figures ------------------------------------------------------------------------------------


def summarise_explore_twin(records: Sequence[Record]) -> Figures:
    """All figures of item 11 from the records of starts, long walks and full turns."""
    starts = [record for record in records if record["kind"] == "start"]
    walks = [record for record in records if record["kind"] == "walk"]
    turns = [record for record in records if record["kind"] == "turn"]
    figures: Figures = {"num_starts": len(starts), "num_walks": len(walks), "num_turns": len(turns)}
    if starts:
        figures |= _fidelity(starts) | _action_figures(starts)
        figures["objects"] = _object_figures(starts)
    if walks:
        figures["walks"] = _walk_figures(walks)
    if turns:
        figures["turns"] = _turn_figures(turns)
    figures["bars"] = _bars(figures)
    seen_by_judge = [case["objects"]["truth"] for case in (*starts, *walks)]
    if seen_by_judge:
        figures["detector"] = _judge_errors(
            [{name: sum(counts) for name, counts in case.items()} for case in seen_by_judge]
        )
    return figures


def _judge_errors(counts: Sequence[Mapping[str, int]]) -> Figures:
    """Precision and recall of the detector on the simulator's own frames, from counts of pairs per case."""
    return {
        name: bootstrap([one[top] for one in counts], weights=[one[bottom] for one in counts]).as_dict()
        for name, top, bottom in (("precision", "right", "found"), ("recall", "recalled", "visible"))
    }


def _fidelity(starts: Sequence[Record]) -> Figures:
    """PSNR and SSIM by step, region and contender, and one step ahead over the commands that move."""
    figures: Figures = {}
    for metric in ("psnr", "ssim"):
        figures[metric] = {
            region: {one: _steps([start[metric][region][one] for start in starts]) for one in CONTENDERS}
            for region in REGIONS
        }
    for share in ("seen_share", "given_share"):
        figures[share] = _steps([start[share] for start in starts])
    moving = [start for start in starts if start["moved"][0]]
    figures["one_step_moves"] = {
        metric: {
            region: {one: _mean([start[metric][region][one][0] for start in moving]) for one in CONTENDERS}
            for region in ONE_STEP_REGIONS
        }
        for metric in ("psnr", "ssim")
    }
    figures["one_step_moves"]["over_copy_db"] = _mean(_gaps(moving, "whole", "dream", "copy", step=0))
    figures["one_step_seen_gap_db"] = _mean(_gaps(starts, "seen", "tokenizer", "dream", step=0))
    return figures | _tokenizer_figures(starts)


def _tokenizer_figures(starts: Sequence[Record]) -> Figures:
    """PSNR of the tokenizer over all true frames, and the share of its codes that the first 2,000 of them
    use.
    """
    frames = len(starts[0]["commands"])
    counted = starts[: max(1, CODE_FRAMES // frames)]
    used = [np.frombuffer(base64.b64decode(start["codes_used"]), np.uint8) for start in counted]
    bits = np.unpackbits(np.bitwise_or.reduce(used))
    share = float(bits.sum() / (starts[0]["num_codes"]))
    return {
        "tokenizer_psnr": _mean([_average(start["psnr"]["whole"]["tokenizer"]) for start in starts]),
        "tokenizer_codes_used": {"value": share, "low": None, "high": None, "count": len(counted) * frames},
    }


def _average(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def _action_figures(starts: Sequence[Record]) -> Figures:
    """Does the world follow the command: shuffle gap by step, retrieval among branches, which commands work
    worst.
    """
    steps = len(starts[0]["commands"])
    gap = [[_minus(one, "whole", "dream", "shuffled", step) for step in range(steps)] for one in starts]
    hits = [sum(start["branches"]["hits"]) for start in starts]
    sizes = [len(start["branches"]["hits"]) for start in starts]
    known = [[share >= KNOWN_SHARE for share in start["branches"]["given_share"]] for start in starts]
    known_hits = [
        sum(hit and of_known for hit, of_known in zip(start["branches"]["hits"], row, strict=True))
        for start, row in zip(starts, known, strict=True)
    ]
    by_command: dict[str, list[tuple[float | None, float | None]]] = {}
    for start in starts:
        kind = "go to the ..." if start["commands"][0].startswith("go to") else start["commands"][0]
        pair = (start["psnr"]["seen"]["dream"][0], start["psnr"]["seen"]["tokenizer"][0])
        by_command.setdefault(kind, []).append(pair)
    return {
        "shuffle_gap_db": _steps(gap),
        "retrieval": bootstrap(hits, weights=sizes).as_dict(),
        "retrieval_known": bootstrap(known_hits, weights=[sum(row) for row in known]).as_dict(),
        "retrieval_chance": 1.0 / sizes[0],
        "first_command_psnr_seen": {
            command: {"dream": _mean([d for d, _ in pairs]), "tokenizer": _mean([t for _, t in pairs])}
            for command, pairs in sorted(by_command.items())
        },
    }


def _object_figures(cases: Sequence[Record]) -> Figures:
    """Agreement of colours and shapes by step: the detector on dreamt frames, and on the simulator's own
    frames.
    """

    def rate(judged: str, top: str, bottom: str, step: int) -> dict[str, Any]:
        tops = [case["objects"][judged][top][step] for case in cases]
        return bootstrap(tops, weights=[case["objects"][judged][bottom][step] for case in cases]).as_dict()

    steps = range(len(cases[0]["objects"]["dream"]["found"]))
    return {
        judged: {
            "precision": [rate(judged, "right", "found", step) for step in steps],
            "recall": [rate(judged, "recalled", "visible", step) for step in steps],
        }
        for judged in JUDGED
    }


def _walk_figures(walks: Sequence[Record]) -> Figures:
    """Object permanence on looking back, by the detector on dreamt frames, on true frames, and by chance."""
    events = [walk["lookback"]["events"] for walk in walks]
    return {
        "psnr": {one: _steps([walk["psnr"][one] for walk in walks]) for one in ("dream", "tokenizer")},
        "permanence": {
            judged: bootstrap([walk["lookback"][judged] for walk in walks], weights=events).as_dict()
            for judged in (*JUDGED, "chance")
        },
        "num_events": sum(events),
        "back_at_start_psnr": {
            one: _mean([walk["psnr"][one][-1] for walk in walks]) for one in ("dream", "tokenizer")
        },
        "objects": _object_figures(walks),
    }


def _turn_figures(turns: Sequence[Record]) -> Figures:
    """How well a full turn closes: against the first frame, and by how many degrees the last view is off."""
    off = [abs(turn["closing_deg"]) for turn in turns]
    return {
        "closing_psnr": {
            one: _mean([turn["closing_psnr"][one] for turn in turns])
            for one in ("dream", "tokenizer", "other")
        },
        "closing_ssim": {
            one: _mean([turn["closing_ssim"][one] for turn in turns])
            for one in ("dream", "tokenizer", "other")
        },
        "closing_abs_deg": _mean(off),
        "closed_within_5_deg": wilson(sum(angle <= 5 for angle in off), len(off)).as_dict(),
        "psnr": _steps([turn["psnr"]["dream"] for turn in turns]),
    }


def _bars(figures: Figures) -> Figures:
    """The bars of the issue that this suite measures: value, bar, met or not."""
    last = "10"
    rows: Figures = {}
    if figures["num_starts"]:
        seen = figures["psnr"]["seen"]["dream"]
        rows["tokenizer, whole frame: dB"] = bar(figures["tokenizer_psnr"], BARS["tokenizer_db"])
        frames = figures["tokenizer_codes_used"]["count"]
        rows[f"tokenizer: share of its codes in use over {frames:,} frames"] = bar(
            figures["tokenizer_codes_used"], BARS["tokenizer_codes_used"]
        )
        rows["one step ahead, in view before: dB under the tokenizer"] = bar(
            figures["one_step_seen_gap_db"], BARS["step_1_seen_gap_db"], at_least=False
        )
        rows["one step ahead, moves, whole frame: dB over copy"] = bar(
            figures["one_step_moves"]["over_copy_db"], BARS["step_1_moves_over_copy_db"]
        )
        rows["counterfactual retrieval"] = bar(figures["retrieval"], BARS["retrieval"])
        rows["the same, of views that the start shows a part of"] = bar(
            figures["retrieval_known"], BARS["retrieval"]
        )
        if len(seen) >= int(last):
            for region, name in (("seen", "before"), ("given", "at the start")):
                rows[f"{last} steps open loop, in view {name}: dB"] = bar(
                    figures["psnr"][region]["dream"][int(last) - 1], BARS["step_10_seen_db"]
                )
    return rows


def bar(estimate: Mapping[str, Any], limit: float, *, at_least: bool = True) -> dict[str, Any]:
    """A figure beside the bar that it has to reach: at least so much, or at most."""
    value = estimate["value"]
    met = value is not None and (value >= limit if at_least else value <= limit)
    return {"estimate": dict(estimate), "bar": limit, "at_least": at_least, "met": met}


def _minus(case: Record, region: str, one: str, other: str, step: int) -> float | None:
    left, right = case["psnr"][region][one][step], case["psnr"][region][other][step]
    return None if left is None or right is None else left - right


def _gaps(cases: Sequence[Record], region: str, one: str, other: str, *, step: int) -> list[float | None]:
    """Paired differences, case by case, so that the interval is that of the difference."""
    return [_minus(case, region, one, other, step) for case in cases]


def _mean(values: Sequence[float | None]) -> dict[str, Any]:
    return bootstrap([math.nan if value is None else value for value in values]).as_dict()


def _steps(episodes: Sequence[Sequence[float | None]]) -> list[dict[str, Any]]:
    return [estimate.as_dict() for estimate in by_step(episodes)]


# Text to image: figures -----------------------------------------------------------------------------------


def summarise_t2i(records: Sequence[Record]) -> Figures:
    """Share of prompts whose objects are all there in the right colour, by number of objects, and single
    errors.
    """
    cases = [record for record in records if record["kind"] == "prompt"]
    figures: Figures = {"num_prompts": len(cases)}
    groups: dict[str, Callable[[Record], bool]] = {
        "all": lambda case: True,
        "one object": lambda case: len(case["asked"]) == 1,
        "two objects": lambda case: len(case["asked"]) == 2,
        "held-out pairs": lambda case: bool(case["held_out"]),
    }
    for judged in JUDGED:
        figures[judged] = {}
        for name, belongs in groups.items():
            chosen = [case["judged"][judged] for case in cases if belongs(case)]
            figures[judged][name] = {
                kind: wilson(sum(one[kind] for one in chosen), len(chosen)).as_dict()
                for kind in ("all_present", "shapes_present", "colours_present", "as_named")
                if all(kind in one for one in chosen)  # records of before 2026-11-29 do not count objects
            }
    figures["detector"] = _judge_errors([case["detector"] for case in cases])
    met = bar(figures["dream"]["all"]["all_present"], BARS["t2i_all_present"])
    figures["bars"] = {"all named objects present, right colour": met}
    return figures
