"""What a planner is compared with: a known plan, words alone, rules of language, chance, nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import gymnasium

from emuworld.agents.agent import Agent, Assignment, Frame, Step


class KnownPlan:
    """Hands out given steps in order: the oracle (a task's own plan), and a plan read from a file."""

    def __init__(self, steps: Sequence[Step | str]) -> None:
        self.steps = tuple(Step(text=step) if isinstance(step, str) else step for step in steps)
        self._next = 0

    def begin(self, assignment: Assignment) -> None:
        """Start at the first step."""
        self._next = 0

    def act(self, frame: Frame, info: Mapping[str, Any]) -> Step | None:
        """The next step, whatever is seen; None behind the last."""
        if self._next >= len(self.steps):
            return None
        self._next += 1
        return self.steps[self._next - 1]


class TextOnly:
    """Another agent's words without its pictures: what the keyframes are worth is what this one lacks."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent

    def begin(self, assignment: Assignment) -> None:
        """As the agent does."""
        self.agent.begin(assignment)

    def act(self, frame: Frame, info: Mapping[str, Any]) -> Step | None:
        """The agent's step without its keyframe."""
        step = self.agent.act(frame, info)
        return None if step is None else replace(step, keyframe=None)


class LanguageRules(KnownPlan):
    """Reads subtasks off the words of the instruction, without a world model and without looking.

    `to_subtasks` turns an instruction into texts (`subtask_clauses`, or one that knows more words).
    """

    def __init__(self, to_subtasks: Callable[[str], Sequence[str]] | None = None) -> None:
        super().__init__(())
        self._to_subtasks = to_subtasks or subtask_clauses

    def begin(self, assignment: Assignment) -> None:
        """Read the instruction."""
        self.steps = tuple(Step(text=text) for text in self._to_subtasks(assignment.instruction))
        super().begin(assignment)


class Random:
    """Commands drawn from an environment's action space, a fixed number of them."""

    def __init__(self, action_space: gymnasium.Space[str], *, num_steps: int) -> None:
        self._space = action_space
        self._num_steps = num_steps
        self._left = 0

    def begin(self, assignment: Assignment) -> None:
        """Seed the space with the assignment's seed, so that equal assignments give equal steps."""
        self._space.seed(assignment.seed)
        self._left = self._num_steps

    def act(self, frame: Frame, info: Mapping[str, Any]) -> Step | None:
        """A sample; None once all are used up."""
        if self._left < 1:
            return None
        self._left -= 1
        return Step(text=self._space.sample())


class NoPlan:
    """Does nothing."""

    def begin(self, assignment: Assignment) -> None:
        """Nothing to prepare."""

    def act(self, frame: Frame, info: Mapping[str, Any]) -> Step | None:
        """None: there is nothing to do."""
        return None


_VERBS = (
    "put", "place", "move", "set", "bring", "drop", "pick", "take", "grasp", "grab", "lift", "stack", "pile",
    "push", "slide", "shove", "open", "pull", "close", "shut", "press", "hit",
)  # fmt: skip
_VERB = rf"(?:{'|'.join(_VERBS)})"
_THEN = "(?:then|afterwards|finally|next|at last)"
# Where one clause ends and the next begins: a stop, "then", or a comma or "and" before another verb.
_CUT = re.compile(
    rf"[.;:!]+\s*|,?\s*(?:and\s+)?\b{_THEN}\b,?\s*|,?\s*\band\s+(?={_VERB}\b)|,\s*(?={_VERB}\b)"
)
_POLITE = re.compile(r"^(?:please|first|now|could you|can you|then|,)+\s+")
_AFTER = re.compile(rf"^(?:after|once)\s+.*?,\s*(?={_VERB}\b)")
_THING, _WHERE = r"the (?:\w+ )?\w+", r"(?:on|in|into|onto|to|behind|left|right)\b"
_BOTH = re.compile(rf"^(\w+) ({_THING}) and ({_THING}) ({_WHERE}.*)$")
_EACH = re.compile(rf"^(\w+) ({_THING} {_WHERE}.*?) and ({_THING} {_WHERE}.*)$")
_IT = re.compile(r"\bit\b")
_NOUN = re.compile(r"\bthe ((?:\w+ )?(?:cube|ball|cylinder))\b")


def subtask_clauses(instruction: str) -> list[str]:
    """The instruction cut into clauses that begin with a verb: "it" is the object named last before, and
    "put A and B in C" is two clauses.

    >>> subtask_clauses("Open the drawer, then put the red cube in it.")
    ['open the drawer', 'put the red cube in the drawer']
    """
    clauses: list[str] = []
    for part in _CUT.split(" ".join(instruction.lower().split())):
        clause = _AFTER.sub("", _POLITE.sub("", part.strip(" ,")))
        if clause.split(" ")[0] in _VERBS:
            clauses += _shared(_resolved(clause, before=clauses))
    return clauses


def _resolved(clause: str, *, before: Sequence[str]) -> str:
    """`it` at the front is the movable thing named last, `it` behind a preposition the place named last."""
    if not _IT.search(clause) or not before:
        return clause
    things = [name for earlier in before for name in re.findall(r"\bthe ((?:\w+ )?\w+)\b", earlier)]
    movable = [name for earlier in before for name in _NOUN.findall(earlier)]
    is_first = re.match(rf"{_VERB}(?: up)? it\b", clause) is not None
    names = movable if is_first and movable else things
    return _IT.sub(f"the {names[-1]}", clause) if names else clause


def _shared(clause: str) -> list[str]:
    """One clause for each of two things that share a verb and a place, or a verb alone."""
    if (match := _BOTH.match(clause)) is not None:
        return [f"{match[1]} {one} {match[4]}" for one in (match[2], match[3])]
    match = _EACH.match(clause)
    return [clause] if match is None else [f"{match[1]} {one}" for one in (match[2], match[3])]
