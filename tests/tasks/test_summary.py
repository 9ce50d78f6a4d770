"""Figures out of records whose values are known, and the bars that they meet or miss."""

import base64
from typing import Any

import pytest

from emuworld.tasks.suites import ExploreTwin, TextToImage, case_seed
from emuworld.tasks.summary import summarise_explore_twin, summarise_t2i


def _start(index: int, *, dream: float, moved: bool = True, hits: int = 4) -> dict[str, Any]:
    rows = {"dream": dream, "tokenizer": 33.0, "copy": 20.0, "shuffled": 15.0}
    both = {
        region: {one: [value] * 10 for one, value in rows.items()} for region in ("whole", "seen", "given")
    }
    counts = {name: [2] * 11 for name in ("found", "right", "visible", "recalled")}
    return {
        "kind": "start",
        "index": index,
        "commands": ["turn left" if index % 2 else "go to the red ball"] * 10,
        "moved": [moved] * 10,
        "seen_share": [0.5] * 10,
        "given_share": [0.4] * 10,
        "codes_used": base64.b64encode(bytes([255 if index < 3 else 0, 0, 240, 0])).decode(),
        "num_codes": 16 if index < 3 else 32,
        "branches": {
            "commands": list("abcd"),
            "given_share": [0.6, 0.5, 0.1, 0.0],
            "hits": [i < hits for i in range(4)],
        },
        "objects": {"dream": {**counts, "recalled": [1] * 11}, "tokenizer": counts, "truth": counts},
        "psnr": both,
        "ssim": both,
    }


def test_differences_are_paired_and_moves_are_apart() -> None:
    records = [_start(0, dream=32.0), _start(1, dream=30.0), _start(2, dream=20.0, moved=False)]
    figures = summarise_explore_twin(records)
    assert figures["psnr"]["whole"]["dream"][9]["value"] == pytest.approx(82 / 3)
    assert figures["one_step_moves"]["over_copy_db"]["value"] == pytest.approx((12 + 10) / 2)
    assert figures["one_step_moves"]["over_copy_db"]["count"] == 2
    assert figures["one_step_seen_gap_db"]["value"] == pytest.approx((1 + 3 + 13) / 3)
    assert figures["shuffle_gap_db"][0]["value"] == pytest.approx((17 + 15 + 5) / 3)
    assert set(figures["first_command_psnr_seen"]) == {"go to the ...", "turn left"}
    assert figures["objects"]["dream"]["recall"][0]["value"] == 0.5
    assert figures["objects"]["truth"]["recall"][0]["value"] == 1.0
    assert figures["detector"]["recall"]["value"] == figures["detector"]["precision"]["value"] == 1.0
    assert figures["tokenizer_psnr"]["value"] == 33.0
    assert (
        figures["tokenizer_codes_used"]["value"] == 12 / 16 and figures["tokenizer_codes_used"]["count"] == 30
    )


def test_bars_are_met_exactly_where_the_figures_reach_them() -> None:
    good = summarise_explore_twin([_start(i, dream=32.0) for i in range(4)])
    assert all(bar["met"] for bar in good["bars"].values()) and len(good["bars"]) == 8
    poor = summarise_explore_twin([_start(i, dream=23.0, hits=3) for i in range(4)])
    assert [bar["met"] for bar in poor["bars"].values()] == [
        True,
        True,
        False,
        False,
        False,
        True,
        False,
        False,
    ]
    assert poor["retrieval"]["value"] == 0.75 and poor["retrieval_chance"] == 0.25
    assert poor["retrieval_known"]["value"] == 1.0 and poor["retrieval_known"]["count"] == 4


def test_permanence_is_a_rate_over_events_not_over_walks() -> None:
    def walk(index: int, events: int, found: int) -> dict[str, Any]:
        counts = {name: [1, 1] for name in ("found", "right", "visible", "recalled")}
        return {
            "kind": "walk",
            "index": index,
            "psnr": {"dream": [30.0], "tokenizer": [33.0]},
            "lookback": {
                "events": events,
                "dream": found,
                "tokenizer": events,
                "truth": events,
                "chance": None if index else 0,
            },
            "objects": {"dream": counts, "tokenizer": counts, "truth": counts},
        }

    walks = summarise_explore_twin([walk(0, 9, 9), walk(1, 1, 0)])["walks"]
    assert walks["permanence"]["dream"]["value"] == pytest.approx(0.9)
    assert walks["permanence"]["chance"] == {"value": 0.0, "low": 0.0, "high": 0.0, "count": 1}
    assert walks["num_events"] == 10


def test_turns_report_how_far_they_are_off_in_either_direction() -> None:
    def turn(index: int, off: float) -> dict[str, Any]:
        views = {"dream": 28.0, "tokenizer": 33.0, "other": 12.0}
        return {
            "kind": "turn",
            "index": index,
            "closing_psnr": views,
            "closing_ssim": views,
            "closing_deg": off,
            "psnr": {"dream": [30.0] * 12},
        }

    turns = summarise_explore_twin([turn(0, -3.0), turn(1, 9.0)])["turns"]
    assert turns["closing_abs_deg"]["value"] == pytest.approx(6.0)
    assert turns["closed_within_5_deg"]["value"] == 0.5


def test_t2i_counts_prompts_by_number_of_objects_and_states_the_judges_error() -> None:
    def prompt(index: int, pairs: int, present: bool, held_out: bool = False) -> dict[str, Any]:
        one = {"all_present": present, "shapes_present": True, "colours_present": present}
        return {
            "kind": "prompt",
            "index": index,
            "asked": [["red", "ball"]] * pairs,
            "held_out": held_out,
            "judged": {"dream": one, "tokenizer": one, "truth": one},
            "detector": {"found": 4, "right": 3, "visible": 2, "recalled": 2},
        }

    figures = summarise_t2i([prompt(0, 1, True), prompt(1, 2, False, held_out=True), prompt(2, 2, True)])
    assert figures["dream"]["all"]["all_present"]["value"] == pytest.approx(2 / 3)
    assert figures["dream"]["two objects"]["all_present"]["value"] == 0.5
    assert figures["dream"]["held-out pairs"]["all_present"]["value"] == 0.0
    assert figures["detector"]["precision"]["value"] == 0.75
    assert not figures["bars"]["all named objects present, right colour"]["met"]


def test_cases_keep_their_seeds_when_a_suite_grows() -> None:
    small, large = ExploreTwin(num_starts=2), ExploreTwin(num_starts=500, device="cuda", batch=256)
    assert case_seed(small, "start", 1) == case_seed(large, "start", 1)
    seeds = {case_seed(small, kind, i) for kind in ("start", "walk") for i in range(50)}
    assert len(seeds) == 100 and all(0 <= seed < 2**31 for seed in seeds)
    assert case_seed(small, "start", 1) != case_seed(ExploreTwin(seed=1), "start", 1)
    assert TextToImage().temperature is None and ExploreTwin().temperature == 0.0
