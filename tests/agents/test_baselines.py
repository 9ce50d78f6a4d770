"""Baselines: what they say, and that they say nothing more."""

import numpy as np
import pytest

from emuworld.agents.agent import Agent, Assignment, Step
from emuworld.agents.baselines import KnownPlan, LanguageRules, NoPlan, Random, TextOnly, subtask_clauses
from emuworld.envs.spaces import CommandText
from emuworld.envs.tabletop.subtasks import parse

FRAME = np.zeros((16, 16, 3), dtype=np.uint8)


def said(agent: Agent, instruction: str = "", *, seed: int = 0, limit: int = 9) -> list[str]:
    agent.begin(Assignment(instruction=instruction, frame=FRAME, seed=seed))
    texts: list[str] = []
    while len(texts) < limit and (step := agent.act(FRAME, {})) is not None:
        texts.append(step.text)
    return texts


def test_known_plan_in_order_and_again() -> None:
    agent = KnownPlan(["open the drawer", Step(text="press the button")])
    assert said(agent) == said(agent) == ["open the drawer", "press the button"]


def test_text_only_drops_the_picture() -> None:
    agent = TextOnly(KnownPlan([Step(text="pick up the red cube", keyframe=FRAME)]))
    agent.begin(Assignment(instruction="", frame=FRAME))
    step = agent.act(FRAME, {})
    assert step is not None and (step.text, step.keyframe) == ("pick up the red cube", None)


def test_random_is_seeded_and_bounded() -> None:
    agent = Random(CommandText([f"press {index}" for index in range(50)]), num_steps=5)
    assert said(agent, seed=1) == said(agent, seed=1) != said(agent, seed=2)
    assert len(said(agent)) == 5


def test_no_plan() -> None:
    assert said(NoPlan()) == []


@pytest.mark.parametrize(
    "instruction, clauses",
    [
        ("Put the red cube on the blue plate.", ["put the red cube on the blue plate"]),
        (
            "Open the drawer, then put the red cube in it, and close the drawer.",
            ["open the drawer", "put the red cube in the drawer", "close the drawer"],
        ),
        ("Pick up the red ball and put it in the wooden bin.",
         ["pick up the red ball", "put the red ball in the wooden bin"]),
        ("Put the red cube and the green ball in the wooden bin.",
         ["put the red cube in the wooden bin", "put the green ball in the wooden bin"]),
        ("First press the button. Then push the pink cylinder to the left!",
         ["press the button", "push the pink cylinder to the left"]),
        ("Stack the red cube on the blue cube and the green cube on the red cube.",
         ["stack the red cube on the blue cube", "stack the green cube on the red cube"]),
        ("Do this in order: open the drawer, press the button, and at last close the drawer",
         ["open the drawer", "press the button", "close the drawer"]),
        ("Tidy up!", []),
        ("", []),
    ],
)  # fmt: skip
def test_language_rules(instruction: str, clauses: list[str]) -> None:
    assert subtask_clauses(instruction) == clauses
    assert said(LanguageRules(), instruction) == clauses
    assert all(parse(clause) is not None for clause in clauses)
