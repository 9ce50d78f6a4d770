"""Plan in the dream: imagine several plans, take the best, act on it, look, and plan again where it failed.

The world model writes subtask texts and end-of-subtask keyframes in mode `vla`; objectives score whole plans;
the agent hands out the best plan's steps one by one. When what is seen does not look like the keyframe (or
the step could not be done), the rest is imagined anew from what is seen, until the budget of imagined
pictures is spent. The same seed, frames and model give the same steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from emuworld.agents import search
from emuworld.agents.agent import Assignment, Frame, Step
from emuworld.agents.objectives import (
    ImaginedPlan,
    Objective,
    changed_share,
    completeness,
    consistency,
    goal_picture,
)
from emuworld.world_model import ContextFull, Sampling, Segment, WorldState

REPLAN = ("always", "surprised", "never")
STRATEGIES = ("sample", "beam")
OBJECTIVES: Mapping[str, Objective] = {
    "consistency": consistency,
    "goal_picture": goal_picture,
    "completeness": completeness,
}
_VOTES, _VALID = "votes", "valid"
_BOLDER = 0.25  # by which the temperature of words rises from try to try


class Imagines(Protocol):
    """What the planner needs of `emuworld.world_model.WorldModel`."""

    def begin(
        self, *, mode: str, prompt: str = "", images: Iterable[Frame] = (), seed: int = 0
    ) -> WorldState: ...

    def imagine_batch(
        self,
        states: Sequence[WorldState],
        texts: Sequence[str | None],
        *,
        sampling: Sampling | None = None,
    ) -> list[tuple[WorldState, Segment]]: ...

    def imagine_words(
        self, state: WorldState, *, sampling: Sampling | None = None, temperature: float | None = None
    ) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class PlannerConfig:
    """How much is imagined, and what a good plan is.

    `weights` of objectives not named there are 1.0: what the words ask for counts as much as three others.
    """

    num_plans: int = 4  # side by side; in a beam: plans that are kept
    branches: int = 2  # in a beam: ways in which each kept plan goes on
    depth: int = 8  # subtasks of one plan at most
    max_pictures: int = 64  # imagined in one episode at most
    max_steps: int = 16  # subtasks of one episode at most
    in_words: bool = True  # the plan that the instruction's words spell out stands beside the model's own
    tries: int = 8  # rounds of plans at most until one is found whose first subtask can be begun
    text_tries: int = 8  # texts written for a subtask, until one can be done; only then it is drawn
    strategy: str = "sample"  # sample | beam
    replan: str = "surprised"  # always | surprised | never: when the rest is imagined anew after a subtask
    surprise: float = 0.06  # share of 8 x 8 cells by which what is seen may differ from the keyframe
    weights: Mapping[str, float] = field(default_factory=lambda: {"goal": 3.0})

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES or self.replan not in REPLAN:
            raise ValueError(
                f"strategy={self.strategy!r} and replan={self.replan!r}; expected one of "
                f"{', '.join(STRATEGIES)} and one of {', '.join(REPLAN)}"
            )
        for name in ("num_plans", "branches", "depth", "max_pictures", "max_steps", "tries", "text_tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; {name} must be 1 or more")


class Planner:
    """An agent that plans with a world model.

    Args:
        model: a `WorldModel`.
        question: the prompt for an instruction (`emuworld.questions.vla_question` with a robot's name).
        objectives: functions of a plan, 0 to 1, by name, beside `OBJECTIVES`.
        is_valid: whether a text is a subtask that somebody could carry out.
        can_begin: whether the robot could set out on a plan's first subtask as things are now. Where it
            cannot, others are imagined (`PlannerConfig.tries`), and at last nothing is done.
        is_done: whether what an instruction asks for is there by now; None: nobody can tell. Then the plan's
            own end counts.
        spelled_out: subtasks that an instruction's words name and that are still to be done. They stand
            beside the model's own plans as one more, with pictures that the model imagines for them.
        sampling: settings of the model; None: the checkpoint's for vla.
    """

    def __init__(
        self,
        model: Imagines,
        *,
        question: Callable[[str], str],
        config: PlannerConfig | None = None,
        objectives: Mapping[str, Objective] | None = None,
        is_valid: Callable[[str], bool] = lambda text: bool(text.strip()),
        can_begin: Callable[[ImaginedPlan], bool] = lambda plan: True,
        is_done: Callable[[str], bool | None] = lambda instruction: None,
        spelled_out: Callable[[str], Sequence[str]] = lambda instruction: (),
        sampling: Sampling | None = None,
    ) -> None:
        self.config = config or PlannerConfig()
        self._model = model
        self._question = question
        self._objectives = {**OBJECTIVES, **(objectives or {})}
        self._is_valid = is_valid
        self._can_begin = can_begin
        self._is_done = is_done
        self._spelled_out = spelled_out
        self._sampling = sampling
        self._assignment: Assignment | None = None

    def begin(self, assignment: Assignment) -> None:
        """Start an episode; see `Agent.begin`."""
        self._assignment = assignment
        self._plan: ImaginedPlan | None = None
        self._rest: list[Step] = []
        self._last: Step | None = None
        self._refused: set[str] = set()
        self._round = 0
        self.num_pictures = 0  # imagined so far
        self.num_steps = 0  # handed out so far
        self.considered: list[ImaginedPlan] = []  # plans of the last round, best first

    def act(self, frame: Frame, info: Mapping[str, Any]) -> Step | None:
        """The next subtask of the best plan; None where all is done, or no budget is left to go on."""
        if self._assignment is None:
            raise ValueError("the planner has no assignment: call begin(Assignment(...)) first")
        done = self._is_done(self._assignment.instruction)
        if done or self.num_steps >= self.config.max_steps:
            return None
        failed = bool(info.get("invalid_action", False)) and self._last is not None
        if failed and self._last is not None:
            self._refused.add(self._last.text)
        if self._must_plan(frame, failed=failed, unfinished=done is False):
            self._take_best(frame)
        if not self._rest:
            return None
        self._last = self._rest.pop(0)
        self.num_steps += 1
        return self._last

    def plans(self, frame: Frame) -> list[ImaginedPlan]:
        """Imagine plans from what is seen, scored, best first. Draws on the episode's budget."""
        assert self._assignment is not None
        left = self.config.max_pictures - self.num_pictures
        starts = self._starts(frame, count=min(self.config.num_plans, left))
        self._round += 1
        if not starts:
            return self._words_alone(frame)
        in_words = self._in_words(replace(starts[0], seed=self._seed(len(starts))), frame)
        plans = [] if in_words is None else [in_words]
        left = self.config.max_pictures - self.num_pictures
        if left:
            paths = self._search(starts[:left], frame, max_items=left)
            plans = [*(self._imagined(path, frame) for path in paths), *plans]
        return self._ranked(plans)

    # ---- inside --------------------------------------------------------------------------------

    def _must_plan(self, frame: Frame, *, failed: bool, unfinished: bool) -> bool:
        if self._plan is None:
            return True
        if self.config.replan == "never":
            return False
        if failed or self.config.replan == "always":
            return True
        keyframe = self._last.keyframe if self._last is not None else None
        surprised = keyframe is not None and changed_share(frame, keyframe) > self.config.surprise
        at_end = not self._rest and (unfinished or not self._plan.complete)
        return surprised or at_end

    def _take_best(self, frame: Frame) -> None:
        """Put the best plan's steps in line, up to one that cannot be done; none of a plan that cannot be
        begun. Where nothing can be imagined any more, the old ones stay.
        """
        for _ in range(self.config.tries):
            plans = self.plans(frame)
            if not plans:
                return
            self.considered = plans
            best = self._plan = plans[0]
            usable = not best.steps or self._is_usable(best, 0)
            done = itertools.takewhile(lambda step: self._may_be_said(step.text), best.steps)
            self._rest = [replace(step, scores=best.scores) for step in done] if usable else []
            if usable:
                return

    def _starts(self, frame: Frame, *, count: int) -> list[WorldState]:
        assert self._assignment is not None
        if count < 1:
            return []
        goal = self._assignment.goal
        images = [frame] if goal is None else [frame, goal]
        try:
            first = self._model.begin(
                mode="vla", prompt=self._question(self._assignment.instruction), images=images, seed=0
            )
        except ContextFull:  # instruction and pictures leave no room for a keyframe: there is no plan
            return []
        return [replace(first, seed=self._seed(index)) for index in range(count)]

    def _search(
        self, starts: Sequence[WorldState], frame: Frame, *, max_items: int
    ) -> list[search.Path[WorldState, Step]]:
        config = self.config
        if config.strategy == "sample":
            return search.sample(starts, self._expand, depth=config.depth, max_items=max_items)
        return search.beam(
            starts[:1],
            self._expand,
            fork=lambda state, branch: replace(state, seed=self._seed(branch, state.seed)),
            score=lambda path: self._total(self._scores(self._imagined(path, frame))),
            width=config.num_plans,
            branches=config.branches if len(starts) > 1 else 1,
            depth=config.depth,
            max_items=max_items,
        )

    def _expand(self, states: Sequence[WorldState]) -> list[tuple[WorldState, Step | None, bool]]:
        self.num_pictures += len(states)
        texts = [self._words_to_do(state) for state in states]
        grown = self._model.imagine_batch(states, texts, sampling=self._sampling)
        found = []
        for state, one in grown:
            step = None if one.image is None else Step(text=one.text.strip(), keyframe=one.image)
            # What would follow a subtask that cannot be done is not worth a picture.
            over = one.ended or (step is not None and not self._may_be_said(step.text))
            found.append((state, step, over))
        return found

    def _words_to_do(self, state: WorldState) -> str | None:
        """Words that can be done, where the model's first cannot and others are found, each bolder than the
        one before; None: let it go on by itself.
        """
        if self.config.text_tries == 1:
            return None
        words = self._model.imagine_words(state, sampling=self._sampling)
        if words is None or self._may_be_said(words.strip()):
            return None
        for number in range(1, self.config.text_tries):
            words = self._model.imagine_words(
                replace(state, seed=self._seed(number, state.seed)),
                sampling=self._sampling,
                temperature=1.0 + _BOLDER * (number - 1),
            )
            if words is not None and self._may_be_said(words.strip()):
                return words
        return None

    def _imagined(self, path: search.Path[WorldState, Step], frame: Frame) -> ImaginedPlan:
        assert self._assignment is not None
        complete = path.ended and all(self._may_be_said(step.text) for step in path.items[-1:])
        return ImaginedPlan(assignment=self._assignment, frame=frame, steps=path.items, complete=complete)

    def _in_words(self, state: WorldState, frame: Frame) -> ImaginedPlan | None:
        """The plan that the instruction's own words spell out, its pictures imagined; None where they spell
        out none that could be carried out, or the budget is too small for it.
        """
        assert self._assignment is not None
        texts = self._texts_in_words()
        if not 0 < len(texts) <= self.config.max_pictures - self.num_pictures:
            return None
        steps = []
        for text in texts:
            ((state, one),) = self._model.imagine_batch([state], [text], sampling=self._sampling)
            self.num_pictures += 1
            if one.image is None:
                return None
            steps.append(Step(text=text, keyframe=one.image))
        return ImaginedPlan(assignment=self._assignment, frame=frame, steps=tuple(steps), complete=True)

    def _words_alone(self, frame: Frame) -> list[ImaginedPlan]:
        """Where no picture is left to be imagined: what the words spell out, without pictures."""
        assert self._assignment is not None
        steps = tuple(Step(text=text) for text in self._texts_in_words())
        plan = ImaginedPlan(assignment=self._assignment, frame=frame, steps=steps, complete=True)
        return [plan] if steps else []

    def _texts_in_words(self) -> Sequence[str]:
        """What the instruction's own words spell out; nothing where a part of it cannot be done."""
        assert self._assignment is not None
        if not self.config.in_words:
            return ()
        texts = self._spelled_out(self._assignment.instruction)[: self.config.depth]
        return texts if all(map(self._may_be_said, texts)) else ()

    def _ranked(self, plans: Sequence[ImaginedPlan]) -> list[ImaginedPlan]:
        votes = search.agreement([plan.steps[0].text.lower() if plan.steps else "" for plan in plans])
        scored = [
            replace(plan, scores=self._scores(plan) | {_VOTES: vote})
            for plan, vote in zip(plans, votes, strict=True)
        ]
        return search.ranked(scored, lambda plan: self._total(plan.scores))

    def _scores(self, plan: ImaginedPlan) -> dict[str, float]:
        usable = [self._is_usable(plan, index) for index in range(len(plan.steps))]
        scores = {_VALID: float(np.mean(usable)) if usable else float(plan.complete)}
        return scores | {name: float(of(plan)) for name, of in self._objectives.items()}

    def _is_usable(self, plan: ImaginedPlan, index: int) -> bool:
        """Whether a plan's step is a subtask that is there to be done and, the first, can be begun."""
        return self._may_be_said(plan.steps[index].text) and (index > 0 or self._can_begin(plan))

    def _may_be_said(self, text: str) -> bool:
        return self._is_valid(text) and text not in self._refused

    def _total(self, scores: Mapping[str, float]) -> float:
        """Weighted mean; one unusable step costs more than all the rest can make good."""
        weights = {name: float(self.config.weights.get(name, 1.0)) for name in scores if name != _VALID}
        mean = sum(weights[name] * scores[name] for name in weights) / max(sum(weights.values()), 1e-9)
        return mean + scores[_VALID] - 1.0 if scores[_VALID] >= 1.0 else mean + scores[_VALID] - 2.0

    def _seed(self, *branch: int) -> int:
        assert self._assignment is not None
        words = np.random.SeedSequence([self._assignment.seed, self._round, *branch]).generate_state(
            1, np.uint64
        )
        return int(words[0])
