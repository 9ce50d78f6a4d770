"""What an agent is: something that is shown an instruction and frames, and answers with the next subtask.

An agent knows no environment. Whoever runs it (a suite, the command line, a loop over `env.step`) shows it
what is seen and carries out what it says: the text alone through `env.step(step.text)`, or text and keyframe
together (`emuworld.tasks.robot.keyframe_execution`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]  # [H, W, 3]


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """What is asked at the start of an episode.

    Attributes:
        instruction: "Put the red cube on the blue plate."
        frame: the first view, uint8 [H, W, 3].
        goal: how it should look in the end, where the instruction points to a picture; uint8 [H, W, 3].
        seed: of everything that the agent draws.
        info: what the environment's `reset` said about the first view.
    """

    instruction: str
    frame: Frame
    goal: Frame | None = None
    seed: int = 0
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One subtask: its words, the picture at its end where the agent has imagined one, and why it was chosen.

    `scores` are those of the plan that it was taken from, by name.
    """

    text: str
    keyframe: Frame | None = None
    scores: Mapping[str, float] = field(default_factory=dict)


class Agent(Protocol):
    """Chooses subtasks one after another."""

    def begin(self, assignment: Assignment) -> None:
        """Start an episode; forgets the one before."""
        ...

    def act(self, frame: Frame, info: Mapping[str, Any]) -> Step | None:
        """The next subtask, from what is seen now and what was said about the last step (`invalid_action`:
        it could not be done); None where the agent holds the task for done or has no more to say.
        """
        ...
