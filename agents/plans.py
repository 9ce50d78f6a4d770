"""A plan is a file: a folder with `plan.json` and the pictures that it names, read and written here.

It holds what was asked and seen, the subtasks with their keyframes, what should be true in the end, scores,
and where it came from, so that it can be looked at, carried out again and judged again. JSON and PNG only;
nothing a file says is executed, and no path outside its folder is opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emuworld.agents.agent import Frame, Step
from emuworld.files import write_text

FORMAT = 1
PLAN_NAME = "plan.json"
_MAX_JSON_BYTES = 1 << 22
_MAX_STEPS = 256
_MAX_SIDE_PX = 4096


class PlanError(ValueError):
    """A plan's folder does not hold what `save_plan` writes; the message says what is wrong."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What was asked, the steps, and their provenance.

    Attributes:
        instruction: what was asked for.
        frame: what was seen first, uint8 [H, W, 3].
        steps: subtasks with keyframes (or without).
        goal: a picture that was given as the goal, or None.
        predicates: what should hold in the end, as names with their arguments, ("On", "red cube", "plate").
        scores: of the plan, by name.
        task: JSON values that build the scene again; empty where there is no simulated scene.
        provenance: JSON values: agent, model, seed, versions.
        verdict: JSON values: what carrying it out gave; empty before that.
    """

    instruction: str
    frame: Frame
    steps: tuple[Step, ...]
    goal: Frame | None = None
    predicates: tuple[tuple[str, ...], ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    verdict: Mapping[str, Any] = field(default_factory=dict)


def save_plan(folder: Path, plan: Plan) -> Path:
    """Write the plan and its pictures into `folder`; returns the path of `plan.json`, which appears last."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = [
        {
            "text": step.text,
            "keyframe": _save_picture(folder, f"keyframe-{index:02d}", step.keyframe),
            "scores": dict(step.scores),
        }
        for index, step in enumerate(plan.steps, start=1)
    ]
    values = {
        "format": FORMAT,
        "instruction": plan.instruction,
        "frame": _save_picture(folder, "first", plan.frame),
        "goal": _save_picture(folder, "goal", plan.goal),
        "steps": steps,
        "predicates": [list(one) for one in plan.predicates],
        "scores": dict(plan.scores),
        "task": dict(plan.task),
        "provenance": dict(plan.provenance),
        "verdict": dict(plan.verdict),
    }
    path = folder / PLAN_NAME
    write_text(path, json.dumps(values, indent=1, allow_nan=False) + "\n")
    for old in set(folder.glob("keyframe-*.png")) - {folder / str(step["keyframe"]) for step in steps}:
        old.unlink()  # of a longer plan that was here
    return path


def load_plan(folder: Path) -> Plan:
    """Read what `save_plan` wrote; `folder` may be the JSON file itself. PlanError for anything else."""
    path = folder if folder.suffix == ".json" else folder / PLAN_NAME
    if not path.is_file():
        raise PlanError(f"no plan at {path}; make one with: emuworld plan instruction='...'")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise PlanError(f"{path} has {path.stat().st_size} bytes; a plan has at most {_MAX_JSON_BYTES}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(f"{path} is not JSON: {error}") from error
    return _plan(path, values)


def _plan(path: Path, values: Any) -> Plan:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise PlanError(f"{path} is no plan of format {FORMAT}")
    _require(path, values, {"instruction": str, "frame": str, "steps": list, "predicates": list})
    _require(path, values, {"scores": dict, "task": dict, "provenance": dict, "verdict": dict})
    if len(values["steps"]) > _MAX_STEPS:
        raise PlanError(f"{path} has {len(values['steps'])} steps; at most {_MAX_STEPS} are read")
    frame = _load_picture(path.parent, values["frame"])
    assert frame is not None
    return Plan(
        instruction=values["instruction"],
        frame=frame,
        goal=_load_picture(path.parent, values.get("goal")),
        steps=tuple(_step(path, one) for one in values["steps"]),
        predicates=tuple(_words(path, one) for one in values["predicates"]),
        scores=_numbers(path, values["scores"]),
        task=values["task"],
        provenance=values["provenance"],
        verdict=values["verdict"],
    )


def _step(path: Path, values: Any) -> Step:
    if not isinstance(values, dict):
        raise PlanError(f"{path}: a step is {type(values).__name__}, expected an object")
    _require(path, values, {"text": str, "scores": dict})
    keyframe = _load_picture(path.parent, values.get("keyframe"))
    return Step(text=values["text"], keyframe=keyframe, scores=_numbers(path, values["scores"]))


def _words(path: Path, values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not values or not all(isinstance(word, str) for word in values):
        raise PlanError(f"{path}: a predicate is {values!r}, expected a name and its arguments")
    return tuple(values)


def _numbers(path: Path, values: Mapping[str, Any]) -> dict[str, float]:
    if not all(isinstance(number, int | float) for number in values.values()):
        raise PlanError(f"{path}: scores must be numbers, got {values!r}")
    return {str(name): float(number) for name, number in values.items()}


def _require(path: Path, values: Mapping[str, Any], fields: Mapping[str, type]) -> None:
    for name, kind in fields.items():
        if not isinstance(values.get(name), kind):
            raise PlanError(f"{path}: {name!r} is {values.get(name)!r}, expected {kind.__name__}")


def _save_picture(folder: Path, name: str, picture: Frame | None) -> str | None:
    if picture is None:
        return None
    Image.fromarray(picture).save(folder / f"{name}.png")
    return f"{name}.png"


def _load_picture(folder: Path, name: object) -> Frame | None:
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".png"):
        raise PlanError(
            f"{folder}: {name!r} is no picture of this folder; expected a plain name ending in .png"
        )
    try:
        with Image.open(folder / name, formats=("PNG",)) as image:  # reads the header only
            if max(image.size) > _MAX_SIDE_PX:
                raise PlanError(f"{folder / name} has {image.size} pixels; at most {_MAX_SIDE_PX} a side")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise PlanError(f"{folder / name} is no picture: {error}") from error
