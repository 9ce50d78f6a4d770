"""Suite `t2i`: pictures from captions, judged by the detector, beside the judge's own error."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from emuworld.envs.requests import request
from emuworld.tasks.bench import Bench, chunks, reconstruct, step_all
from emuworld.tasks.detector import VISIBLE_SHARE, Pair, pairs_of, true_shares
from emuworld.tasks.metrics import Frame
from emuworld.tasks.run_folder import PictureRow, Pictures, Record, save_pictures
from emuworld.tasks.suites import TextToImage, case_seed
from emuworld.tasks.summary import JUDGED
from emuworld.tasks.truth import PromptTruth, make_prompt


def measure(bench: Bench, suite: TextToImage) -> None:
    dream = bench.dream("t2i")
    for prompts in chunks(bench, "prompt", suite.num_prompts, make_prompt, rows=1):
        prompts = [replace(truth, prompt=_asked(suite, truth)) for truth in prompts]
        begun = [
            dream.reset_turn(np.random.default_rng(case_seed(suite, "dream prompt", truth.index)), {}).episode
            for truth in prompts
        ]
        painted = [e.frame for e in step_all(dream, bench, begun, [truth.prompt for truth in prompts])]
        rebuilt = [one[0] for one, _ in reconstruct(bench.model, [truth.frame[None] for truth in prompts])]
        true = [truth.frame for truth in prompts]
        judged = [one for three in zip(painted, rebuilt, true, strict=True) for one in three]
        # in the order of JUDGED
        seen = [[one.pair for one in found] for found in bench.detector.sightings(np.stack(judged))]
        rows = [slice(3 * row, 3 * row + 3) for row in range(len(prompts))]
        bench.append(
            [
                _score_prompt(bench, truth, frame, seen[three])
                for truth, frame, three in zip(prompts, painted, rows, strict=True)
            ]
        )


def _asked(suite: TextToImage, truth: PromptTruth) -> str:
    """The prompt in the suite's words."""
    if suite.phrasing == "split":
        return truth.prompt
    rng = np.random.default_rng(case_seed(suite, "words of a request", truth.index))
    return request([" ".join(pair) for pair in truth.pairs], rng, place="room", split=suite.split)


def _score_prompt(bench: Bench, truth: PromptTruth, painted: Frame, seen: Sequence[Sequence[Pair]]) -> Record:
    """Which named objects the detector finds, on the picture and on the simulator's own view of the
    caption. `seen`: every object that it finds on these, one pair as often as it is there.
    """
    config, asked = bench.detector.config, set(truth.pairs)
    shares = true_shares(truth.labels, config=config)[0]
    visible = pairs_of(shares, config=config, at_least=VISIBLE_SHARE)
    there = pairs_of(shares, config=config, at_least=np.finfo(shares.dtype).tiny)
    judged: Record = {}
    for who, objects in zip(JUDGED, seen, strict=True):
        found = set(objects)
        judged[who] = {
            "found": sorted(found),
            "all_present": asked <= found,
            "shapes_present": {s for _, s in asked} <= {s for _, s in found},
            "colours_present": {c for c, _ in asked} <= {c for c, _ in found},
            "as_named": sorted(objects) == sorted(asked),  # each once, and nothing besides
        }
    found_true = set(seen[2])
    if truth.index < 2 * bench.suite.num_pictures:
        told = ", ".join(" ".join(pair) for pair in seen[0]) or "nothing"
        pictures = Pictures(
            title=truth.prompt,
            columns=["painted", "a simulated view with this caption"],
            rows=[PictureRow(name="", frames=[painted, truth.frame], notes=[f"judge: {told}", ""])],
        )
        save_pictures(bench.folder / "pictures" / f"prompt_{truth.index:05d}.npz", pictures)
    return {
        "kind": "prompt",
        "index": truth.index,
        "seed": case_seed(bench.suite, "prompt", truth.index),
        "prompt": truth.prompt,
        "asked": truth.pairs,
        "held_out": truth.held_out,
        "judged": judged,
        "detector": {
            "found": len(found_true),
            "right": len(found_true & there),
            "visible": len(visible),
            "recalled": len(found_true & visible),
        },
    }
