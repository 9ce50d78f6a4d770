"""Follow a guide: the world model explains how something is done, and its steps are handed out as they stand.

The model is asked once, in mode `howto`, with the first view, and writes the whole guide open loop: no look
at what happened in between, no second guide, no step left out or put right. So an agent gets as far as
somebody who follows the guide to the letter. Who wants a plan that is chosen and mended takes
`emuworld.agents.planner`. The same seed, frame and model give the same guide.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from emuworld.agents.agent import Assignment, Step
from emuworld.agents.baselines import KnownPlan
from emuworld.agents.planner import Imagines
from emuworld.world_model import ContextFull, Sampling

_HOW_TO = re.compile(r"how to\b ?", re.IGNORECASE)


def how_to(instruction: str) -> str:
    """An instruction as the question of a guide; ValueError where it has no words.

    >>> how_to("Put the red cube on the blue plate.")
    'How to put the red cube on the blue plate.'
    """
    words = " ".join(instruction.split()).rstrip(".!? ")
    asked = _HOW_TO.match(words)
    words = words[asked.end() if asked else 0 :]
    if not words:
        raise ValueError(f"a guide needs words that say what is to be done, got {instruction!r}")
    return f"How to {words[0].lower()}{words[1:]}."


class Guide(KnownPlan):
    """An agent that follows the world model's illustrated guide step by step; where it ends, the agent is
    done.

    Args:
        model: a `WorldModel`.
        question: the prompt for an instruction.
        is_opening: whether a guide's first words only name what is needed ("You need a red cube and a blue
            plate."). That is no step of work: it is not handed out.
        max_steps: handed out at most.
        max_pictures: imagined at most, that of an opening included.
        sampling: settings of the model; None: the checkpoint's for howto.
    """

    def __init__(
        self,
        model: Imagines,
        *,
        question: Callable[[str], str] = how_to,
        is_opening: Callable[[str], bool] = lambda text: False,
        max_steps: int = 16,
        max_pictures: int = 64,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(())
        self._model = model
        self._question = question
        self._is_opening = is_opening
        self._max_steps, self._max_pictures = max_steps, max_pictures
        self._sampling = sampling
        self.num_pictures = 0  # imagined in this episode

    def begin(self, assignment: Assignment) -> None:
        """Have the guide written; see `Agent.begin`."""
        self.num_pictures = 0
        self.steps = self._written(assignment)
        super().begin(assignment)

    def _written(self, assignment: Assignment) -> tuple[Step, ...]:
        """The guide's steps of work; none where the question and its pictures leave no room for one."""
        goal = assignment.goal
        images = [assignment.frame] if goal is None else [assignment.frame, goal]
        question = self._question(assignment.instruction)
        try:
            state = self._model.begin(mode="howto", prompt=question, images=images, seed=assignment.seed)
        except ContextFull:
            return ()
        steps: list[Step] = []
        while not state.ended and len(steps) < self._max_steps and self.num_pictures < self._max_pictures:
            ((state, segment),) = self._model.imagine_batch([state], [None], sampling=self._sampling)
            if segment.image is None:  # the guide's end, or the context's
                break
            self.num_pictures += 1
            text = segment.text.strip()
            if self.num_pictures > 1 or not self._is_opening(text):
                steps.append(Step(text=text, keyframe=segment.image))
        return tuple(steps)
