"""Scoring against a perfect and a useless dream, where every figure is known beforehand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emuworld.tasks import explore_twin
from emuworld.tasks.detector import VISIBLE_SHARE
from emuworld.tasks.metrics import psnr_from_mse
from emuworld.tasks.start_scores import Dreamt, score_start
from emuworld.tasks.suites import ExploreTwin
from emuworld.tasks.truth import Labels, StartTruth, WalkTruth

EQUAL_DB = pytest.approx(psnr_from_mse(0.0), abs=1e-3)


def _noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def _truth() -> StartTruth:
    seen = np.zeros((3, 32, 32), bool)
    seen[:, :, :16] = True
    given = seen.copy()
    given[1:, :, 8:] = False
    return StartTruth(
        index=0,
        prompt="a room",
        commands=("turn left", "look up", "move back"),
        other_commands=("turn right", "look down", "move forward"),
        frames=_noise(4, 32, 32),
        seen=seen,
        given=given,
        moved=(True, True, False),
        labels=Labels(shapes=np.zeros((4, 8, 8), np.uint8), colours=np.zeros((4, 8, 8), np.uint8)),
        branch_commands=("a", "b"),
        branch_frames=_noise(2, 32, 32, seed=5),
        branch_given=(0.5, 0.0),
    )


def _perfect(truth: StartTruth) -> Dreamt:
    return Dreamt(
        frames=truth.frames,
        shuffled=None,
        rebuilt=list(truth.frames[1:]),
        codes_used="",
        num_codes=8,
        branches=list(truth.branch_frames),
    )


def test_a_perfect_dream_scores_as_equal_and_brings_every_branch_home(tmp_path: Path) -> None:
    record = score_start(ExploreTwin(num_pictures=0), tmp_path, _truth(), _perfect(_truth()))
    assert record["psnr"]["whole"]["dream"] == [EQUAL_DB] * 3
    assert record["ssim"]["seen"]["dream"] == [pytest.approx(1.0, abs=1e-3)] * 3
    assert record["branches"]["hits"] == [True, True] and record["branches"]["given_share"] == (0.5, 0.0)
    assert record["seen_share"] == [0.5] * 3 and record["given_share"] == [0.5, 0.25, 0.25]
    assert record["psnr"]["whole"]["copy"][0] < 10
    assert record["psnr"]["whole"]["shuffled"] == record["ssim"]["seen"]["shuffled"] == [None] * 3


def test_the_mask_decides_what_counts_as_seen(tmp_path: Path) -> None:
    truth = _truth()
    frames = truth.frames.copy()
    frames[1:, :, 16:] = 0  # right where it was seen, wrong where nobody could know
    frames[2:, :, 8:16] = 0  # and later where the dream itself made up what came into view
    swapped = list(truth.branch_frames[::-1])
    dreamt = replace(_perfect(truth), frames=frames, shuffled=truth.frames[1:], branches=swapped)
    record = score_start(ExploreTwin(num_pictures=0), tmp_path, truth, dreamt)
    assert record["psnr"]["given"]["dream"] == [EQUAL_DB] * 3
    assert record["psnr"]["seen"]["dream"][0] == EQUAL_DB and max(record["psnr"]["seen"]["dream"][1:]) < 12
    assert max(record["psnr"]["whole"]["dream"]) < 12
    assert record["psnr"]["whole"]["shuffled"] == [EQUAL_DB] * 3
    assert record["branches"]["hits"] == [False, False], "swapped branches are nearer to the other's truth"


def test_pictures_are_kept_for_the_first_cases_only(tmp_path: Path) -> None:
    score_start(ExploreTwin(num_pictures=0), tmp_path, _truth(), _perfect(_truth()))
    assert not (tmp_path / "pictures").exists()
    score_start(ExploreTwin(num_pictures=1), tmp_path, _truth(), _perfect(_truth()))
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["start_00000.npz", "start_00000_branches.npz"]


def test_looking_back_counts_the_first_frame_of_each_return() -> None:
    big, small = VISIBLE_SHARE * 2, VISIBLE_SHARE / 2
    there = np.zeros((8, 1, 2), np.float32)
    there[:, 0, 0] = [big, 0, big, big, small, big, 0, big]  # two returns; the small sighting is no loss
    there[:, 0, 1] = [0, 0, big, small, small, small, big, big]  # never wholly gone after it was seen
    assert explore_twin.lookback_events(there) == [(2, 0, 0), (7, 0, 0)]


def test_closing_degrees_names_the_view_that_fits() -> None:
    around = _noise(5, 64, 64, seed=2)
    truth = WalkTruth(
        index=0,
        prompt="",
        commands=(),
        frames=_noise(1, 128, 128),
        labels=_truth().labels,
        around_deg=(-6.0, -3.0, 0.0, 3.0, 6.0),
        around=around,
    )
    twice_as_large = around[3].repeat(2, axis=0).repeat(2, axis=1)
    assert explore_twin.closing_degrees(twice_as_large, truth) == 3.0
