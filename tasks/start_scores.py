"""A dreamt start against its twin: PSNR and SSIM by step and region, and which branches came home.

It runs in the simulator's processes, beside the dreaming of the next starts: no model, and no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emuworld.tasks.metrics import Frame, Mask, mean_inside, mse, psnr, ssim_map
from emuworld.tasks.run_folder import PictureRow, Pictures, Record, save_pictures
from emuworld.tasks.suites import ExploreTwin, case_seed
from emuworld.tasks.summary import REGIONS
from emuworld.tasks.truth import StartTruth

Frames = NDArray[np.uint8]  # [N, H, W, 3]


@dataclass(frozen=True, kw_only=True, eq=False)
class Dreamt:
    """What the model made of one start."""

    frames: Frames  # [K + 1, H, W, 3], the first as the model holds the simulator's
    shuffled: Frames | None  # [K, H, W, 3] under the other commands; None where that was not dreamt
    rebuilt: Sequence[Frame]  # the K true frames through the tokenizer and back
    codes_used: str  # by them: one bit a code, base64
    num_codes: int  # that there are
    branches: Sequence[Frame]  # one a branch command


def score_start(suite: ExploreTwin, folder: Path, truth: StartTruth, dreamt: Dreamt) -> Record:
    """PSNR and SSIM of the dream and the baselines, by step and region, and which branches came home."""
    true, steps = truth.frames[1:], len(truth.commands)
    rows: dict[str, Sequence[Frame] | Frames | None] = {
        "dream": dreamt.frames[1:],
        "tokenizer": dreamt.rebuilt,
        "copy": [truth.frames[0]] * steps,
        "shuffled": dreamt.shuffled,
    }
    figures: dict[str, dict[str, dict[str, list[float | None]]]] = {
        metric: {region: {one: [] for one in rows} for region in REGIONS} for metric in ("psnr", "ssim")
    }
    for one, frames in rows.items():
        if frames is None:
            for metric, region in product(figures, REGIONS):
                figures[metric][region][one] = [None] * steps
            continue
        for frame, reference, *masks in zip(frames, true, truth.seen, truth.given, strict=True):
            for metric, by_region in _frame_figures(frame, reference, masks).items():
                for region, value in zip(REGIONS, by_region, strict=True):
                    figures[metric][region][one].append(value)
    distances = [[mse(frame, reference) for reference in truth.branch_frames] for frame in dreamt.branches]
    if truth.index < suite.num_pictures:
        _keep_start(folder, truth, dreamt, figures["psnr"])
    return {
        "kind": "start",
        "index": truth.index,
        "seed": case_seed(suite, "start", truth.index),
        "prompt": truth.prompt,
        "commands": truth.commands,
        "other_commands": truth.other_commands,
        "moved": truth.moved,
        "seen_share": [float(mask.mean()) for mask in truth.seen],
        "given_share": [float(mask.mean()) for mask in truth.given],
        "branches": {
            "commands": truth.branch_commands,
            "given_share": truth.branch_given,
            "hits": [
                row.count(min(row)) == 1 and row.index(min(row)) == i for i, row in enumerate(distances)
            ],
        },
        "codes_used": dreamt.codes_used,
        "num_codes": dreamt.num_codes,
        **figures,
    }


def _frame_figures(frame: Frame, reference: Frame, masks: Sequence[Mask]) -> dict[str, list[float | None]]:
    """PSNR and SSIM over the whole frame and over each mask."""
    similarity = ssim_map(frame, reference)
    return {
        "psnr": [known(psnr(frame, reference, mask=mask)) for mask in (None, *masks)],
        "ssim": [known(mean_inside(similarity, mask=mask)) for mask in (None, *masks)],
    }


def known(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


def _keep_start(folder: Path, truth: StartTruth, dreamt: Dreamt, psnrs: dict[str, Any]) -> None:
    notes = ["", *(f"{value:.1f} dB" for value in psnrs["whole"]["dream"])]
    walked = Pictures(
        title=f"{truth.prompt} (PSNR over the whole frame)",
        columns=["start", *truth.commands],
        rows=[
            PictureRow(name="MuJoCo", frames=truth.frames),
            PictureRow(name="dream", frames=dreamt.frames, notes=notes),
        ],
    )
    save_pictures(folder / "pictures" / f"start_{truth.index:05d}.npz", walked)
    if truth.index == 0 and dreamt.branches:
        branched = Pictures(
            title="Branches from that start",
            columns=truth.branch_commands,
            rows=[
                PictureRow(name="MuJoCo", frames=truth.branch_frames),
                PictureRow(name="dream", frames=dreamt.branches),
            ],
        )
        save_pictures(folder / "pictures" / f"start_{truth.index:05d}_branches.npz", branched)
