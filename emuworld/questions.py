"""What the published model has learnt to be asked, in its own words: questions of vla, explore and howto.

Each function gives a prompt for `WorldModel.begin` or for `reset(options={"prompt": ...})`; t2i, x2i and
story take free text. Source: the examples of the Emu3.5 release and figure 19 of its paper (fact sheet,
section 4.1). The release has no configuration for vla and withdrew that of explore, so these two are
reconstructions.
"""

from __future__ import annotations

ROBOTS = ("Widow X", "Google Everyday", "Songling Aloha", "AgiBot Dual-Arm")
"""Robot arm types that the published model knows."""


def vla_question(instruction: str, *, robot: str, num_steps: int | None = None) -> str:
    """The question of vla: "Robot Arm Type: … Instruction: … Finish the task with … steps."

    Args:
        instruction: what is to be done, "Put the red cube on the blue plate."
        robot: one of `ROBOTS`, or another name in words.
        num_steps: how many subtasks the answer is to have; None leaves it to the model.
    """
    parts = [f"Robot Arm Type: {_sentence(robot)}", f"Instruction: {_sentence(instruction)}"]
    if num_steps is not None:
        parts.append(f"Finish the task with {_count(num_steps)} steps.")
    return " ".join(parts)


def explore_question(place: str, *, details: str = "") -> str:
    """The question of explore: "Under my instructions to explore … in first-person view, where …"

    Args:
        place: "a modern living room".
        details: a clause about it, "bright sunlight filters through sheer curtains"; "" leaves it out.
    """
    place, details = _sentence(place)[:-1], details.strip().removesuffix(".")
    where = f", where {details}" if details else ""
    return f"Under my instructions to explore {place} in first-person view{where}."


def howto_question(question: str, *, num_steps: int) -> str:
    """A question, "How to cook dumplings.", with the number of steps that the answer is to have."""
    return f"{_sentence(question)} Please provide {_count(num_steps)} steps for the task."


def _sentence(words: str) -> str:
    words = words.strip()
    if not words:
        raise ValueError("a question needs words here, got an empty text")
    return words if words[-1] in ".!?。！？" else f"{words}."


def _count(number: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"the number of steps must be an integer of at least 1, got {number!r}")
    return number
