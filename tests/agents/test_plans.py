"""A plan's folder: what goes in comes out, and what is damaged is named."""

import json
from pathlib import Path

import numpy as np
import pytest

from emuworld.agents.agent import Step
from emuworld.agents.plans import Plan, PlanError, load_plan, save_plan


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 48, 3)).astype(np.uint8)


PLAN = Plan(
    instruction="Put the red cube on the blue plate.",
    frame=picture(0),
    steps=(Step(text="pick up the red cube", keyframe=picture(1), scores={"goal": 0.5}), Step(text="wait")),
    goal=picture(2),
    predicates=(("On", "red cube", "blue plate"),),
    scores={"votes": 1.0},
    task={"family": "pick_place", "seed": 3},
    provenance={"agent": "planner", "model": "small"},
    verdict={"success": True},
)


def test_round_trip(tmp_path: Path) -> None:
    again = load_plan(save_plan(tmp_path / "plan", PLAN))
    assert (again.instruction, again.predicates, again.scores) == (
        PLAN.instruction,
        PLAN.predicates,
        PLAN.scores,
    )
    assert (again.task, again.provenance, again.verdict) == (PLAN.task, PLAN.provenance, PLAN.verdict)
    assert [step.text for step in again.steps] == ["pick up the red cube", "wait"]
    keyframe = again.steps[0].keyframe
    assert keyframe is not None and np.array_equal(keyframe, picture(1)) and again.steps[1].keyframe is None
    assert again.goal is not None and np.array_equal(again.goal, picture(2))
    assert again.steps[0].scores == {"goal": 0.5}


def test_equal_plans_give_equal_files(tmp_path: Path) -> None:
    one, other = (save_plan(tmp_path / name, PLAN) for name in ("a", "b"))
    names = sorted(path.name for path in one.parent.iterdir())
    assert names == ["first.png", "goal.png", "keyframe-01.png", "plan.json"]
    assert all((one.parent / name).read_bytes() == (other.parent / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"format": 99}, "format"),
        ({"instruction": 5}, "instruction"),
        ({"frame": "../secret.png"}, "no picture of this folder"),
        ({"frame": "/etc/passwd.png"}, "no picture of this folder"),
        ({"frame": "absent.png"}, "no picture"),
        ({"frame": None}, "frame"),
        ({"steps": [{"text": 1, "scores": {}}]}, "text"),
        ({"steps": [3]}, "step"),
        ({"steps": [{"text": "", "scores": {}}] * 300}, "300 steps"),
        ({"predicates": [[1]]}, "predicate"),
        ({"scores": {"a": "b"}}, "numbers"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: dict[str, object], said: str) -> None:
    path = save_plan(tmp_path, PLAN)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PlanError, match=said):
        load_plan(tmp_path)


def test_no_json_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no plan at"):
        load_plan(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(PlanError, match="not JSON"):
        load_plan(tmp_path)
