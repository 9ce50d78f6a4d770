"""Rewards along a training: the log of stage `grpo` (one JSON object a step) -> charts, a term each."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from emuworld.tasks import page
from emuworld.tasks.metrics import bootstrap

_MOST_POINTS = 40  # of a curve over training steps: with more, the steps are put together
_HELD_OUT = "held_out_"
_MOVES = {"kl": "KL to the start", "gradient_norm": "gradient norm"}


def read_reward_log(path: Path) -> list[dict[str, Any]]:
    """The steps of a log, and in front of them, as step 0, what was measured before (`before.json` beside the
    log) where that is kept. A last line that a kill cut short is left out.

    ValueError for a file that is no such log.
    """
    expected = "expected grpo.log.jsonl as emuworld train stage=grpo writes it"
    if not path.is_file():
        raise ValueError(f"log={path} is no file; {expected}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"log={path} is not UTF-8 ({error}); {expected}") from error
    whole = text[: text.rfind("\n") + 1]
    steps = [
        _object(line, where=f"log={path}, line {number}", expected=expected)
        for number, line in enumerate(whole.splitlines(), start=1)
    ]
    for number, step in enumerate(steps, start=1):
        if not all(isinstance(step.get(key), int | float) for key in ("step", "reward")):
            raise ValueError(f"log={path}, line {number} has no step with its reward; {expected}")
    if not steps:
        raise ValueError(f"log={path} holds no whole line; {expected}")
    start = path.with_name("before.json")
    if start.is_file():
        steps.insert(0, {"step": 0, **_object(start.read_text(), where=str(start), expected=expected)})
    return steps


def _object(text: str, *, where: str, expected: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}); {expected}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{where}: no JSON object; {expected}")
    return found


def reward_section(steps: Sequence[dict[str, Any]]) -> str:
    """The curves: rewards on training prompts, rewards on held-out prompts, and how far the model moved."""
    keys = dict.fromkeys(key for step in steps for key in step)
    terms = [key for key in keys if key == "reward" or key.startswith("reward_")]
    held = [key for key in keys if key.startswith(_HELD_OUT)]
    parts = [
        page.subsection(
            "On training prompts",
            page.text(
                f"Other prompts each step. With more than {_MOST_POINTS} steps a point is the mean of "
                "several in a row, the band its 95 % interval over them. A term has points where it applied.",
                soft=True,
            ),
            page.side_by_side([_chart(steps, key, title=_title(key)) for key in terms]),
        )
    ]
    if held:
        told = "Never learnt from; the same prompts and random numbers each time. Step 0 is the model before."
        charts = [_chart(steps, key, title=_title(key.removeprefix(_HELD_OUT))) for key in held]
        parts.append(
            page.subsection("On held-out prompts", page.text(told, soft=True), page.side_by_side(charts))
        )
    moves = [_chart(steps, key, title=title) for key, title in _MOVES.items() if key in keys]
    if moves:
        parts.append(page.subsection("How far the model moved", page.side_by_side(moves)))
    lead = page.text(
        "Rewards go from 1 to 10; the whole is the weighted mean of its terms. A reward that rises while the "
        "suites above do not has learnt to please its judge."
    )
    return page.section("Rewards along the training", lead, *parts)


def _title(key: str) -> str:
    return "reward, whole" if key == "reward" else f"reward: {key.removeprefix('reward_')}"


def _chart(steps: Sequence[dict[str, Any]], key: str, *, title: str) -> str:
    points = np.array([(one["step"], one[key]) for one in steps if key in one], dtype=np.float64)
    parts = np.array_split(points, min(len(points), _MOST_POINTS))
    series = page.Series(
        name="held out" if key.startswith(_HELD_OUT) else "training",
        x=[float(part[:, 0].mean()) for part in parts],
        y=[bootstrap(part[:, 1]) for part in parts],
    )
    return page.curves([series], title=title, x_label="step")
