"""Prompts that GRPO only measures: how their answers score and look, before, on the way and after.

A reward can rise while pictures get worse (docs/log.md has two such runs), so a sheet of pictures lies beside
the figures: OUT/pictures/step-000020.png, the same prompts and random numbers each time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from emuworld.files import write_text, written
from emuworld.pictures import contact_sheet
from emuworld.training import rewards
from emuworld.training.rollouts import Prompt, Rollout

_FIRST_S = 5.0  # that a measurement is taken to need before there was one
_STREAM = 1 << 20  # seeds of measurements: no step of training has so many
_SHOWN, _COLUMNS = 24, 8


class Answers(Protocol):
    """`GrpoTrainer.answers`."""

    def __call__(
        self, prompts: Sequence[Prompt], *, stream: int, group: int
    ) -> tuple[list[Rollout], rewards.Scores]: ...


class HeldOut:
    """See the module.

    Args:
        answers: draws and scores answers with the weights as they are.
        prompts: may be none; then nothing is measured.
        group: answers to each.
        out: the folder of the run.
    """

    def __init__(self, answers: Answers, prompts: Sequence[Prompt], *, group: int, out: Path) -> None:
        self._answers, self._prompts, self._out = answers, list(prompts), out
        self._group = group
        self.took_s = _FIRST_S if prompts else 0.0  # the last measurement

    def measure(self, step: int | None = None) -> dict[str, float]:
        """Mean scores, and the sheet of a step (None: the last)."""
        if not self._prompts:
            return {}
        begun = time.monotonic()
        rollouts, scores = self._answers(self._prompts, stream=_STREAM, group=self._group)
        self._show("end" if step is None else f"step-{step:06d}", rollouts[:: self._group])
        self.took_s = time.monotonic() - begun
        return {f"held_out_{name}": value for name, value in means_of(scores).items()}

    def before(self, *, resume: bool) -> dict[str, float]:
        """Scores of the model that it begins from, in OUT/before.json; a resumed run reads them."""
        path = self._out / "before.json"
        if resume and path.is_file():
            return {str(name): float(value) for name, value in json.loads(path.read_text()).items()}
        figures = self.measure(0)
        write_text(path, json.dumps(figures))
        return figures

    def _show(self, name: str, rollouts: Sequence[Rollout]) -> None:
        """Some of the answers, evenly taken: the last picture of each."""
        drawn = [one.answer.pictures[-1] for one in rollouts if one.answer.pictures]
        if not drawn:
            return
        chosen = np.unique(np.linspace(0, len(drawn) - 1, min(_SHOWN, len(drawn))).round().astype(int))
        sheet = Image.fromarray(contact_sheet([drawn[i] for i in chosen], columns=_COLUMNS))
        with written(self._out / "pictures" / f"{name}.png") as beside:
            sheet.save(beside, format="PNG")


def means_of(scores: rewards.Scores) -> dict[str, float]:
    """Mean of the whole reward, and of each term over the answers to which it applies."""
    applied = {name: values[~np.isnan(values)] for name, values in scores.terms.items()}
    terms = {f"reward_{name}": float(values.mean()) for name, values in applied.items() if len(values)}
    return {"reward": float(scores.total.mean()), **terms}
