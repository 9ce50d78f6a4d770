"""Suite `explore-twin`: dream and simulator from the same start under the same commands, scored case by
case.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from emuworld.envs.dream import Dream
from emuworld.tasks.bench import Bench, Frames, begin, chunks, reconstruct, step_all, walk
from emuworld.tasks.detector import VISIBLE_SHARE, true_shares
from emuworld.tasks.metrics import Frame, psnr, ssim
from emuworld.tasks.run_folder import PictureRow, Pictures, Record, save_pictures
from emuworld.tasks.start_scores import Dreamt, known, score_start
from emuworld.tasks.suites import ExploreTwin, case_seed
from emuworld.tasks.truth import Labels, StartTruth, WalkTruth, make_start, make_turn, make_walk

_WALKS_AT_ONCE = 64  # whose frames lie beside each other for the judge


def measure(bench: Bench, suite: ExploreTwin) -> None:
    dream = bench.dream("explore")
    if suite.num_starts:
        make, more = make_start, {"num_steps": suite.num_steps, "num_branches": suite.num_branches}
        words = {"phrasing": suite.phrasing}
        for starts in chunks(bench, "start", suite.num_starts, make, rows=2, **more, **words):
            _score_starts(bench, suite, dream, starts)
    bench.model.caches.clear()  # few rows come now, and long ones: not in a cache that is as wide as the last
    for walks in chunks(
        bench, "walk", suite.num_walks, make_walk, rows=1, num_steps=suite.walk_steps, phrasing=suite.phrasing
    ):
        bench.append(_score_walks(bench, dream, walks))
    for turns in chunks(bench, "turn", suite.num_turns, make_turn, rows=1):
        bench.append(_score_turns(bench, dream, turns))


def _score_starts(bench: Bench, suite: ExploreTwin, dream: Dream, truths: Sequence[StartTruth]) -> None:
    """Dream the walks, some of them under other commands too, and the branches of some starts, and have them
    scored.
    """
    begun = begin(dream, bench, "start", truths)
    again = [row for row, truth in enumerate(truths) if truth.index < suite.num_shuffled]
    commands = [truth.commands for truth in truths] + [truths[row].other_commands for row in again]
    walked = walk(dream, bench, [*begun, *(begun[row] for row in again)], commands)
    shuffled = dict(zip(again, walked[len(truths) :], strict=True))
    owners = [row for row, truth in enumerate(truths) for _ in truth.branch_commands]
    branch_commands = [command for truth in truths for command in truth.branch_commands]
    branched = [e.frame for e in step_all(dream, bench, [begun[row] for row in owners], branch_commands)]
    rebuilt = reconstruct(bench.model, [truth.frames[1:] for truth in truths])
    looks = []
    for row, truth in enumerate(truths):
        frames = np.concatenate([begun[row].frame[None], walked[row]])
        looks.append((frames, np.stack([frames[0], *rebuilt[row][0]]), truth.frames, truth.labels))
    for row, (truth, objects) in enumerate(zip(truths, _objects(bench, looks), strict=True)):
        dreamt = Dreamt(
            frames=looks[row][0],
            shuffled=shuffled.get(row),
            rebuilt=rebuilt[row][0],
            codes_used=rebuilt[row][1],
            num_codes=bench.model.manifest.vocabulary.num_visual_tokens,
            branches=[frame for owner, frame in zip(owners, branched, strict=True) if owner == row],
        )
        bench.score(score_start, suite, bench.folder, truth, dreamt, more={"objects": objects})


def _objects(bench: Bench, looks: Sequence[tuple[Frames, Frames, Frames, Labels]]) -> list[Record]:
    """For each case, per frame, for the dream, the tokenizer alone and the simulator: pairs found, of these
    there, pairs visible, of these found. A look: their frames, and the labels.
    """
    detector = bench.detector
    found_in = _found(bench, [frames for *parts, _ in looks for frames in parts])
    records = []
    for case, (*_, labels) in enumerate(looks):
        there = true_shares(labels, config=detector.config)
        visible = there >= VISIBLE_SHARE
        counts: Record = {}
        for judged, found in zip(("dream", "tokenizer", "truth"), found_in[3 * case :], strict=False):
            rows = {
                "found": found,
                "right": found & (there > 0),
                "visible": visible,
                "recalled": found & visible,
            }
            counts[judged] = {name: row.sum((1, 2)).tolist() for name, row in rows.items()}
        records.append(counts)
    return records


def _found(bench: Bench, walks: Sequence[Frames]) -> list[NDArray[np.bool_]]:
    """Which pairs the judge finds in each frame of each walk, [N, colours, shapes]; several walks at once."""
    found: list[NDArray[np.bool_]] = []
    for start in range(0, len(walks), _WALKS_AT_ONCE):
        part = walks[start : start + _WALKS_AT_ONCE]
        shares = bench.detector.shares(np.concatenate(part))
        stops = np.cumsum([len(frames) for frames in part])[:-1]
        found += np.split(shares >= bench.detector.config.min_share, stops)
    return found


# Long walks and full turns --------------------------------------------------------------------------------


def _score_walks(bench: Bench, dream: Dream, truths: Sequence[WalkTruth]) -> list[Record]:
    """Dream long walks and score them; each is looked up in the next one's dream too, to know what chance
    finds.
    """
    begun = begin(dream, bench, "walk", truths)
    walked = walk(dream, bench, begun, [truth.commands for truth in truths])
    strangers = [*walked[1:], walked[0]] if len(truths) > 1 else [None]
    rebuilt = reconstruct(bench.model, [truth.frames[1:] for truth in truths])
    return [
        _score_walk(bench, truth, np.concatenate([first.frame[None], frames]), own, stranger)
        for truth, first, frames, (own, _), stranger in zip(
            truths, begun, walked, rebuilt, strangers, strict=True
        )
    ]


def _score_walk(
    bench: Bench, truth: WalkTruth, dreamt: Frames, own: Sequence[Frame], stranger: Frames | None
) -> Record:
    """PSNR by step, and looking back: objects seen, gone and in view again, by whom they are found again."""
    rebuilt = np.stack([dreamt[0], *own])
    psnrs = {
        one: [known(psnr(frame, true)) for frame, true in zip(frames[1:], truth.frames[1:], strict=True)]
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
        "objects": _objects(bench, [(dreamt, rebuilt, truth.frames, truth.labels)])[0],
    }


def _found_again(bench: Bench, frames: Frames, events: Sequence[tuple[int, int, int]]) -> int:
    """How many of the (step, colour, shape) the judge finds in the frames after the start, [steps, H, W,
    3].
    """
    (found,) = _found(bench, [frames])
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
    records, rebuilt = [], reconstruct(bench.model, [truth.frames[:1] for truth in truths])
    for row, truth in enumerate(truths):
        first, opposite = truth.frames[0], truth.frames[len(truth.commands) // 2]
        views = {
            "dream": walked[row][-1],
            "tokenizer": rebuilt[row][0][0],
            "other": opposite,
        }
        by_step = [known(psnr(f, t)) for f, t in zip(walked[row], truth.frames[1:], strict=True)]
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
