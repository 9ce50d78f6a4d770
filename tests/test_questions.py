"""Questions to the letter of the fact sheet, section 4.1."""

from __future__ import annotations

import pytest

from emuworld.questions import ROBOTS, explore_question, howto_question, vla_question


@pytest.mark.parametrize("robot", ROBOTS)
def test_vla(robot: str) -> None:
    expected = (
        f"Robot Arm Type: {robot}. Instruction: Put the red cube on the blue plate. "
        "Finish the task with 6 steps."
    )
    for instruction in ("Put the red cube on the blue plate.", "Put the red cube on the blue plate "):
        assert vla_question(instruction, robot=robot, num_steps=6) == expected
    assert vla_question("Tidy up!", robot=robot) == f"Robot Arm Type: {robot}. Instruction: Tidy up!"


def test_explore() -> None:
    details = (
        "bright sunlight filters through sheer curtains onto a beige sofa and wooden coffee table, creating "
        "a serene and inviting atmosphere"
    )
    assert explore_question("a modern living room", details=details) == (
        "Under my instructions to explore a modern living room in first-person view, where bright sunlight "
        "filters through sheer curtains onto a beige sofa and wooden coffee table, creating a serene and "
        "inviting atmosphere."
    )
    assert explore_question("a cave.") == "Under my instructions to explore a cave in first-person view."


def test_howto() -> None:
    question = "How to cook Shrimp, Celery, and Pork Dumplings."
    assert howto_question(question, num_steps=7) == f"{question} Please provide 7 steps for the task."


@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True, "7"])
def test_steps_are_counted_from_one(num_steps: object) -> None:
    with pytest.raises(ValueError, match="number of steps"):
        howto_question("How to cook?", num_steps=num_steps)  # type: ignore[arg-type]


def test_words_are_needed() -> None:
    with pytest.raises(ValueError, match="needs words"):
        vla_question("Tidy up.", robot=" ")
    with pytest.raises(ValueError, match="needs words"):
        explore_question(" ")
