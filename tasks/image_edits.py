"""Suite `x2i`: pictures edited as they are told, in rooms and on table-tops, beside the judge's own errors.

A true picture of the split and an instruction go in, through the same rules as `EmuWorld/X2I-v0`; the answer
is judged (`edit_judge`). The same judge looks at pictures whose worth the simulator knows: the true answer,
the picture left as it was, another edit, and the asked edit with one too many.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from emuworld.envs.dream import Dream
from emuworld.envs.rooms.edit_phrases import by_shape, unheard
from emuworld.tasks.bench import Bench, chunks, step_all
from emuworld.tasks.detector import Sighting
from emuworld.tasks.edit_judge import Verdict, judge
from emuworld.tasks.edit_summary import EXPECTED
from emuworld.tasks.edit_truth import EditTruth, make_edit
from emuworld.tasks.metrics import BLOCK_PX, Frame
from emuworld.tasks.run_folder import PictureRow, Pictures, Record, save_pictures
from emuworld.tasks.suites import EditPictures, case_seed

_PLAIN = ("after", "before", "wrong", "spoilt")  # of an `EditTruth`: what the simulator knows


def measure(bench: Bench, suite: EditPictures) -> None:
    dream = bench.dream("x2i")
    for truths in chunks(bench, "edit", suite.num_edits, make_edit, rows=1):
        truths = [replace(truth, instruction=_asked(bench, suite, truth)) for truth in truths]
        frames = _edited(dream, bench, truths)
        looked = [{"dream": frame, **more} for frame, more in zip(frames, _known(bench, truths), strict=True)]
        seen = bench.detector.sightings(np.stack([one for some in looked for one in some.values()]))
        count = len(looked[0])
        cases = [
            (truth, some, seen[count * row : count * (row + 1)])
            for row, (truth, some) in enumerate(zip(truths, looked, strict=True))
        ]
        bench.append(list(bench.threads.map(lambda case: _score(bench, *case), cases)))


def _asked(bench: Bench, suite: EditPictures, truth: EditTruth) -> str:
    """The instruction in the suite's words."""
    if suite.phrasing == "made-up":
        rng = np.random.default_rng(case_seed(bench.suite, "made-up words", truth.index))
        return unheard(truth.instruction, rng)
    return by_shape(truth.instruction, truth.in_view) if suite.phrasing == "by-shape" else truth.instruction


def _edited(dream: Dream, bench: Bench, truths: Sequence[EditTruth]) -> list[Frame]:
    """The model's answers."""
    opened = dream.open_pictures([truth.references for truth in truths])
    turns = [
        dream.reset_turn(
            np.random.default_rng(case_seed(bench.suite, "dream edit", truth.index)),
            {"images": list(truth.references)},
            opened=one,
        )
        for truth, one in zip(truths, opened, strict=True)
    ]
    begun = [outcome.episode for outcome in dream.resolve(turns)]
    return [e.frame for e in step_all(dream, bench, begun, [truth.instruction for truth in truths])]


def _score(
    bench: Bench, truth: EditTruth, frames: dict[str, Frame], seen: Sequence[Sequence[Sighting]]
) -> Record:
    """What the judge says of the answer ("dream") and of every picture whose worth is known. `seen`: what the
    detector finds in each.
    """
    verdicts = {
        who: judge(truth, frame, seen=found, rebuilt=frames["after, tokenizer"])
        for (who, frame), found in zip(frames.items(), seen, strict=True)
    }
    if truth.index < 8 * bench.suite.num_pictures:
        _keep_pictures(bench, truth, frames["dream"], verdicts["dream"], seen[0])
    return {
        "kind": "edit",
        "index": truth.index,
        "seed": case_seed(bench.suite, "edit", truth.index),
        "world": truth.world,
        "group": truth.group,
        "edit": truth.kind,
        "instruction": truth.instruction,
        "target": truth.target,
        "result": truth.result,
        "judged": {who: {"done": one.done, "kept": one.kept} for who, one in verdicts.items()},
    }


def _known(bench: Bench, truths: Sequence[EditTruth]) -> list[dict[str, Frame]]:
    """For each edit, pictures that a perfect judge would tell apart (`edit_summary.EXPECTED`), plain and
    through the vision tokenizer; "copied": the codes of the picture before, but for those where the edit
    shows.
    """
    plain = [{name: getattr(truth, name) for name in _PLAIN} for truth in truths]
    encoded = iter(bench.model.encode(frame for frames in plain for frame in frames.values()))
    codes = []
    for truth in truths:
        mine = {name: next(encoded) for name in _PLAIN}
        height, width = truth.changed.shape
        blocks = truth.changed.reshape(height // BLOCK_PX, BLOCK_PX, width // BLOCK_PX, BLOCK_PX).any((1, 3))
        codes.append(mine | {"copied": np.where(blocks, mine["after"], mine["before"])})
    decoded = iter(bench.model.decode(grid for mine in codes for grid in mine.values()))
    known = [
        frames | {f"{name}, tokenizer": next(decoded) for name in mine}
        for frames, mine in zip(plain, codes, strict=True)
    ]
    assert all(frames.keys() == EXPECTED.keys() for frames in known)
    return known


def _keep_pictures(
    bench: Bench, truth: EditTruth, dreamt: Frame, verdict: Verdict, seen: Sequence[Sighting]
) -> None:
    found = ", ".join(" ".join(one.pair) for one in seen) or "nothing"
    said = f"{'done' if verdict.done else 'not done'}, rest {'kept' if verdict.kept else 'not kept'}"
    given = [f"given {place}" for place, _ in enumerate(truth.references, start=1)]
    row = PictureRow(
        name=truth.kind,
        frames=[*truth.references, dreamt, truth.after],
        notes=[*("" for _ in given), f"{said}; judge sees: {found}", ""],
    )
    pictures = Pictures(
        title=truth.instruction, columns=[*given, "edited by the model", "the simulator's edit"], rows=[row]
    )
    save_pictures(bench.folder / "pictures" / f"edit_{truth.index:05d}.npz", pictures)
