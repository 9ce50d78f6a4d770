"""Suite `explore-twin`: dream and simulator from the same start under the same commands, scored case by
case.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emuworld.envs.dream import Dream
from emuworld.tasks.bench import Bench, Frames, begin, chunks, reconstruct, step_all, walk
from emuworld.tasks.detector import VISIBLE_SHARE, true_shares
from emuworld.tasks.metrics import Frame, Mask, mean_inside, mse, psnr, ssim, ssim_map
from emuworld.tasks.run_folder import PictureRow, Pictures, Record, save_pictures
from emuworld.tasks.suites import ExploreTwin, case_seed
from emuworld.tasks.summary import REGIONS
from emuworld.tasks.truth import Labels, StartTruth, WalkTruth, make_start, make_turn, make_walk


@dataclass(frozen=True, kw_only=True, eq=False)
class Dreamt:
    """What the model made of one start."""

    frames: Frames  # [K + 1, H, W, 3], the first as the model holds the simulator's
    shuffled: Frames | None  # [K, H, W, 3] under the other commands; None where that was not dreamt
    rebuilt: Sequence[Frame]  # the K true frames through the tokenizer and back
    codes_used: str  # by them: one bit a code, base64
    branches: Sequence[Frame]  # one a branch command


def measure(bench: Bench, suite: ExploreTwin) -> None:
    dream = bench.dream("explore")
    if suite.num_starts:
        make, more = make_start, {"num_steps": suite.num_steps, "num_branches": suite.num_branches}
        words = {"phrasing": suite.phrasing}
        for starts in chunks(bench, "start", suite.num_starts, make, rows=2, **more, **words):
            bench.append(_score_starts(bench, suite, dream, starts))
    for walks in chunks(
        bench, "walk", suite.num_walks, make_walk, rows=1, num_steps=suite.walk_steps, phrasing=suite.phrasing
    ):
        bench.append(_score_walks(bench, dream, walks))
    for turns in chunks(bench, "turn", suite.num_turns, make_turn, rows=1):
        bench.append(_score_turns(bench, dream, turns))


def _score_starts(
    bench: Bench, suite: ExploreTwin, dream: Dream, truths: Sequence[StartTruth]
) -> list[Record]:
    """Dream the walks, some of them under other commands too, and the branches of some starts, and score
    them.
    """
    begun = begin(dream, bench, "start", truths)
    again = [row for row, truth in enumerate(truths) if truth.index < suite.num_shuffled]
    commands = [truth.commands for truth in truths] + [truths[row].other_commands for row in again]
    walked = walk(dream, bench, [*begun, *(begun[row] for row in again)], commands)
    shuffled = dict(zip(again, walked[len(truths) :], strict=True))
    owners = [row for row, truth in enumerate(truths) for _ in truth.branch_commands]
    branch_commands = [command for truth in truths for command in truth.branch_commands]
    branched = [e.frame for e in step_all(dream, bench, [begun[row] for row in owners], branch_commands)]
    cases = []
    for row, truth in enumerate(truths):
        rebuilt, codes_used = reconstruct(bench.model, list(truth.frames[1:]))
        dreamt = Dreamt(
            frames=np.concatenate([begun[row].frame[None], walked[row]]),
            shuffled=shuffled.get(row),
            rebuilt=rebuilt,
            codes_used=codes_used,
            branches=[frame for owner, frame in zip(owners, branched, strict=True) if owner == row],
        )
        cases.append((truth, dreamt))
    records = list(bench.threads.map(lambda case: score_start(bench, *case), cases))
    for record, (truth, dreamt) in zip(records, cases, strict=True):
        all_rebuilt = np.stack([dreamt.frames[0], *dreamt.rebuilt])
        record["objects"] = _objects(bench, dreamt.frames, all_rebuilt, truth.frames, truth.labels)
    return records


def score_start(bench: Bench, truth: StartTruth, dreamt: Dreamt) -> Record:
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
        for frame, reference, mask in zip(frames, true, truth.seen, strict=True):
            for metric, whole, seen in _frame_figures(frame, reference, mask):
                figures[metric]["whole"][one].append(whole)
                figures[metric]["seen"][one].append(seen)
    distances = [[mse(frame, reference) for reference in truth.branch_frames] for frame in dreamt.branches]
    if truth.index < bench.suite.num_pictures:
        _keep_start(bench, truth, dreamt, figures["psnr"])
    return {
        "kind": "start",
        "index": truth.index,
        "seed": case_seed(bench.suite, "start", truth.index),
        "prompt": truth.prompt,
        "commands": truth.commands,
        "other_commands": truth.other_commands,
        "moved": truth.moved,
        "seen_share": [float(mask.mean()) for mask in truth.seen],
        "branches": {
            "commands": truth.branch_commands,
            "hits": [
                row.count(min(row)) == 1 and row.index(min(row)) == i for i, row in enumerate(distances)
            ],
        },
        "codes_used": dreamt.codes_used,
        "num_codes": bench.model.manifest.vocabulary.num_visual_tokens,
        **figures,
    }


def _frame_figures(
    frame: Frame, reference: Frame, mask: Mask
) -> list[tuple[str, float | None, float | None]]:
    """(metric, over the whole frame, over the mask) for PSNR and SSIM."""
    similarity = ssim_map(frame, reference)
    return [
        ("psnr", _known(psnr(frame, reference)), _known(psnr(frame, reference, mask=mask))),
        ("ssim", _known(mean_inside(similarity)), _known(mean_inside(similarity, mask=mask))),
    ]


def _known(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


def _objects(bench: Bench, dreamt: Frames, rebuilt: Frames, true: Frames, labels: Labels) -> Record:
    """Per frame, for the dream, the tokenizer alone and the simulator: pairs found, of these there, pairs
    visible, of these found.
    """
    detector = bench.detector
    there = true_shares(labels, config=detector.config)
    counts: Record = {}
    for judged, frames in (("dream", dreamt), ("tokenizer", rebuilt), ("truth", true)):
        found = detector.shares(frames) >= detector.config.min_share
        visible = there >= VISIBLE_SHARE
        rows = {"found": found, "right": found & (there > 0), "visible": visible, "recalled": found & visible}
        counts[judged] = {name: row.sum((1, 2)).tolist() for name, row in rows.items()}
    return counts


def _keep_start(bench: Bench, truth: StartTruth, dreamt: Dreamt, psnrs: dict[str, Any]) -> None:
    notes = ["", *(f"{value:.1f} dB" for value in psnrs["whole"]["dream"])]
    walked = Pictures(
        title=f"{truth.prompt} (PSNR over the whole frame)",
        columns=["start", *truth.commands],
        rows=[
            PictureRow(name="MuJoCo", frames=truth.frames),
            PictureRow(name="dream", frames=dreamt.frames, notes=notes),
        ],
    )
    save_pictures(bench.folder / "pictures" / f"start_{truth.index:05d}.npz", walked)
    if truth.index == 0 and dreamt.branches:
        branched = Pictures(
            title="Branches from that start",
            columns=truth.branch_commands,
            rows=[
                PictureRow(name="MuJoCo", frames=truth.branch_frames),
                PictureRow(name="dream", frames=dreamt.branches),
            ],
        )
        save_pictures(bench.folder / "pictures" / f"start_{truth.index:05d}_branches.npz", branched)


# Long walks and full turns --------------------------------------------------------------------------------


def _score_walks(bench: Bench, dream: Dream, truths: Sequence[WalkTruth]) -> list[Record]:
    """Dream long walks and score them; each is looked up in the next one's dream too, to know what chance
    finds.
    """
    begun = begin(dream, bench, "walk", truths)
    walked = walk(dream, bench, begun, [truth.commands for truth in truths])
    strangers = [*walked[1:], walked[0]] if len(truths) > 1 else [None]
    return [
        _score_walk(bench, truth, np.concatenate([first.frame[None], frames]), stranger)
        for truth, first, frames, stranger in zip(truths, begun, walked, strangers, strict=True)
    ]


def _score_walk(bench: Bench, truth: WalkTruth, dreamt: Frames, stranger: Frames | None) -> Record:
    """PSNR by step, and looking back: objects seen, gone and in view again, by whom they are found again."""
    rebuilt = np.stack([dreamt[0], *reconstruct(bench.model, list(truth.frames[1:]))[0]])
    psnrs = {
        one: [_known(psnr(frame, true)) for frame, true in zip(frames[1:], truth.frames[1:], strict=True)]
        for one, frames in (("dream", dreamt), ("tokenizer", rebuilt))
    }
    if truth.index < max(1, bench.suite.num_pictures // 3):
        _keep_walk(bench, "walk", truth, dreamt, psnrs["dream"], every=4)
    events = lookback_events(true_shares(truth.labels, config=bench.detector.config))
    return {
        "kind": "walk",
        "index": truth.index,
        "seed": case_seed(bench.suite, "walk", truth.index),
        "prompt": truth.prompt,
        "commands": truth.commands,
        "psnr": psnrs,
        "lookback": {
            "events": len(events),
            "dream": _found_again(bench, dreamt[1:], events),
            "tokenizer": _found_again(bench, rebuilt[1:], events),
            "truth": _found_again(bench, truth.frames[1:], events),
            "chance": None if stranger is None else _found_again(bench, stranger, events),
        },
        "objects": _objects(bench, dreamt, rebuilt, truth.frames, truth.labels),
    }


def _found_again(bench: Bench, frames: Frames, events: Sequence[tuple[int, int, int]]) -> int:
    """How many of the (step, colour, shape) the judge finds in the frames after the start, [steps, H, W,
    3].
    """
    found = bench.detector.shares(frames) >= bench.detector.config.min_share
    return sum(bool(found[step - 1, colour, shape]) for step, colour, shape in events)


def lookback_events(there: NDArray[np.float32]) -> list[tuple[int, int, int]]:
    """(step, colour, shape) of every return: an object was visible, was wholly gone, and is visible again
    at `step`.

    `there` [steps + 1, colours, shapes] holds true shares of the frame. Only the first visible frame of
    each return counts, and only after the object was seen and lost within the walk.
    """
    events = []
    for colour, shape in np.argwhere((there >= VISIBLE_SHARE).any(0)):
        was_seen = was_lost = False
        for step, share in enumerate(there[:, colour, shape]):
            if share >= VISIBLE_SHARE:
                if was_seen and was_lost:
                    events.append((step, int(colour), int(shape)))
                was_seen, was_lost = True, False
            elif share == 0.0:
                was_lost = was_seen
    return sorted(events)


def _score_turns(bench: Bench, dream: Dream, truths: Sequence[WalkTruth]) -> list[Record]:
    """Dream full turns: the last view against the first, and by how many degrees it is off."""
    begun = begin(dream, bench, "turn", truths)
    walked = walk(dream, bench, begun, [truth.commands for truth in truths])
    records = []
    for row, truth in enumerate(truths):
        first, opposite = truth.frames[0], truth.frames[len(truth.commands) // 2]
        views = {
            "dream": walked[row][-1],
            "tokenizer": reconstruct(bench.model, [first])[0][0],
            "other": opposite,
        }
        by_step = [_known(psnr(f, t)) for f, t in zip(walked[row], truth.frames[1:], strict=True)]
        if truth.index < max(1, bench.suite.num_pictures // 3):
            dreamt = np.concatenate([begun[row].frame[None], walked[row]])
            _keep_walk(bench, "turn", truth, dreamt, by_step, every=1)
        records.append(
            {
                "kind": "turn",
                "index": truth.index,
                "seed": case_seed(bench.suite, "turn", truth.index),
                "prompt": truth.prompt,
                "closing_psnr": {one: psnr(frame, first) for one, frame in views.items()},
                "closing_ssim": {one: ssim(frame, first) for one, frame in views.items()},
                "closing_deg": closing_degrees(walked[row][-1], truth),
                "psnr": {"dream": by_step},
            }
        )
    return records


def closing_degrees(frame: Frame, truth: WalkTruth) -> float:
    """By how many degrees the last view is off: the yaw around the start whose true view is nearest (MSE at
    64 px).
    """
    assert truth.around is not None
    height, width = truth.around.shape[1:3]
    small = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BOX), dtype=np.float64)
    distances = np.square(truth.around.astype(np.float64) - small).mean((1, 2, 3))
    return truth.around_deg[int(np.argmin(distances))]


def _keep_walk(
    bench: Bench, kind: str, truth: WalkTruth, dreamt: Frames, psnrs: Sequence[float | None], *, every: int
) -> None:
    shown = list(range(0, len(truth.frames), every))
    columns = ["start" if step == 0 else f"{step}: {truth.commands[step - 1]}" for step in shown]
    notes = ["" if step == 0 else f"{psnrs[step - 1]:.1f} dB" for step in shown]
    rows = [
        PictureRow(name="MuJoCo", frames=truth.frames[shown]),
        PictureRow(name="dream", frames=dreamt[shown], notes=notes),
    ]
    title = truth.prompt if every == 1 else f"{truth.prompt} (every {every}th frame)"
    path = bench.folder / "pictures" / f"{kind}_{truth.index:05d}.npz"
    save_pictures(path, Pictures(title=title, columns=columns, rows=rows))
