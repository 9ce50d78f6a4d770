"""Suite `story`: tales told panel by panel, judged by the detector, beside the judge's own error.

The dream gets the question and then each panel's line, through the same rules as `EmuWorld/Story-v0`, but for
the panel that a reset there draws by itself: here the first line is told like the others. A record keeps the
truth and what the detector saw, so that `tale_summary` can judge again without a model.
"""

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from emuworld.envs.dream import Dream
from emuworld.tasks.bench import Bench, Frames, chunks, reconstruct, step_all
from emuworld.tasks.detector import Sighting
from emuworld.tasks.metrics import Frame
from emuworld.tasks.run_folder import PictureRow, Pictures, Record, save_pictures
from emuworld.tasks.suites import TellTales, case_seed
from emuworld.tasks.summary import JUDGED
from emuworld.tasks.tale_judge import Look, Thing, Verdict, judge_all
from emuworld.tasks.tale_truth import TaleTruth, make_tale


def measure(bench: Bench, suite: TellTales) -> None:
    dream = bench.dream("story")
    for truths in chunks(bench, "tale", suite.num_tales, make_tale, rows=1):
        dreamt = _told(dream, bench, truths)
        rebuilt = [np.stack(frames) for frames, _ in reconstruct(bench.model, [one.frames for one in truths])]
        # in the order of JUDGED
        looked = [(*frames, truth.frames) for *frames, truth in zip(dreamt, rebuilt, truths, strict=True)]
        seen = iter(bench.detector.sightings(np.concatenate([one for some in looked for one in some])))
        records = []
        for truth, frames in zip(truths, looked, strict=True):
            looks = {
                who: [look_at(frame, found) for frame, found in zip(some, seen, strict=False)]
                for who, some in zip(JUDGED, frames, strict=True)
            }
            if truth.index < suite.num_pictures:
                _keep_pictures(bench, truth, frames[0], looks)
            records.append(_record(bench, truth, looks))
        bench.append(records)


def _told(dream: Dream, bench: Bench, truths: Sequence[TaleTruth]) -> list[Frames]:
    """The dreamt panels of each tale, [panels, H, W, 3]."""
    current = [
        dream.reset_turn(
            np.random.default_rng(case_seed(bench.suite, "dream tale", truth.index)),
            {"prompt": truth.question},
        ).episode
        for truth in truths
    ]
    frames: list[list[Frame]] = [[] for _ in truths]
    longest = max(len(truth.lines) for truth in truths)
    for panel in range(longest):
        rows = [row for row, truth in enumerate(truths) if panel < len(truth.lines)]
        lines = [truths[row].lines[panel] for row in rows]
        after = step_all(dream, bench, [current[row] for row in rows], lines)
        for row, episode in zip(rows, after, strict=True):
            if episode.frame_index != panel + 1:
                raise ValueError(
                    f"the model's answer ended before it had drawn panel {panel + 1}; its limits "
                    "(max_new_tokens, the context) are too small for tales of this size_px"
                )
            current[row] = episode
            frames[row].append(episode.frame)
        bench.on_progress(f"{bench.suite.name}: panels of {len(truths)} together", panel + 1, longest)
    return [np.stack(one) for one in frames]


def look_at(frame: Frame, seen: Sequence[Sighting]) -> Look:
    """What the detector has found in a frame, as numbers."""
    return Look(grey=round(float(frame.mean()), 2), things=tuple(_thing(one) for one in seen))


def _thing(seen: Sighting) -> Thing:
    height, width = seen.cells.shape
    rows, columns = (np.flatnonzero(seen.cells.any(axis)) for axis in (1, 0))
    return Thing(
        name=" ".join(seen.pair),
        share=round(seen.share, 5),
        left=int(columns[0]) / width,
        right=int(columns[-1] + 1) / width,
        top=int(rows[0]) / height,
        bottom=int(rows[-1] + 1) / height,
    )


def _record(bench: Bench, truth: TaleTruth, looks: dict[str, list[Look]]) -> Record:
    return {
        "kind": "tale",
        "index": truth.index,
        "seed": case_seed(bench.suite, "tale", truth.index),
        "prompt": truth.question,
        "commands": truth.lines,
        "cast": truth.cast,
        "is_plot": truth.is_plot,
        "is_named": truth.is_named,
        "held_out": truth.held_out,
        "panels": [asdict(panel) for panel in truth.panels],
        "seen": {who: [asdict(look) for look in some] for who, some in looks.items()},
    }


def _keep_pictures(bench: Bench, truth: TaleTruth, dreamt: Frames, looks: dict[str, list[Look]]) -> None:
    rows = [
        PictureRow(
            name=name,
            frames=frames,
            notes=[
                _note(verdict, look)
                for verdict, look in zip(judge_all(truth.panels, looks[who]), looks[who], strict=True)
            ],
        )
        for name, who, frames in (("MuJoCo", "truth", truth.frames), ("dream", "dream", dreamt))
    ]
    pictures = Pictures(title=truth.question, columns=truth.lines, rows=rows)
    save_pictures(bench.folder / "pictures" / f"tale_{truth.index:05d}.npz", pictures)


def _note(verdict: Verdict, look: Look) -> str:
    """What the judge has against a panel, and what it sees."""
    faults = {
        "somebody is missing": not verdict.cast,
        "one who is away is there": verdict.away is False,
        "somebody is there twice": not verdict.once,
        "it does not happen": verdict.plot is False,
    }
    told = ", ".join(fault for fault, is_so in faults.items() if is_so) or "right"
    return f"{told}; judge sees: {', '.join(one.name for one in look.things) or 'nothing'}"
