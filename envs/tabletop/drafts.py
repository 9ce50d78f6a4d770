"""What a task of the table-top is before it has places: its things, words, goal and plan, and who draws them.

What training never shows stands here: pairs of colour and kind, uses of a kind, skills together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from emuworld.envs.palette import HELD_OUT_PAIRS, OBJECT_COLOURS
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.subtasks import MOVABLE_KINDS, Subtask

# Test only, as in the rooms: one colour of each kind.
HELD_OUT_TABLE_PAIRS = frozenset(
    (colour, "cube" if shape == "box" else shape)
    for colour, shape in HELD_OUT_PAIRS
    if shape in ("box", "ball", "cylinder")
)
# Test only: what is done with a kind of object (kind, relation, kind of destination or None for any), and
# two skills in one task.
HELD_OUT_USES = frozenset(
    {
        ("cylinder", "on", "plate"),
        ("cylinder", "on", "cube"),
        ("ball", "in", "drawer"),
        ("ball", "behind", None),
        ("cylinder", "closer", None),
    }
)
HELD_OUT_SKILL_PAIR = frozenset({"press", "stack"})

MAX_THINGS = 7  # movable things on one table
RELATION_FACTS = {"left of": "LeftOf", "right of": "RightOf", "behind": "Behind", "in front of": "InFrontOf"}


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A task before it has places.

    `movables`, `holders`: what stands on the table ("red cube", "blue plate"); `drawer`: "open" or "closed"
    at the start, None without one; `mark`: a painted mark shows the goal place; `goal`: without what must
    stay, and without what a mark's place adds; `instructions`: the plainest first, the last
    one for the test split alone.
    """

    movables: tuple[str, ...] = ()
    holders: tuple[str, ...] = ()
    drawer: str | None = None
    button: bool = False
    mark: bool = False
    oracle: tuple[Subtask, ...]
    goal: tuple[Predicate, ...]
    instructions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    @property
    def bystanders(self) -> tuple[str, ...]:
        """Objects that the plan neither moves nor builds on."""
        touched = {step.target for step in self.oracle}
        touched |= {str(step.destination) for step in self.oracle if step.skill == "stack"}
        return tuple(name for name in self.movables if name not in touched)


class NoColourLeftError(ValueError):
    """A draft wanted more things than there are colours."""


@dataclass(kw_only=True)
class Cast:
    """Draws the things of one task: every colour once, so that a colour names a thing.

    `new_pairs`: the first movable is of a pair that training never shows (else none is). `num_distractors`:
    fewest and most. Draw movables before holders and distractors last, so that the colours suffice.
    """

    rng: np.random.Generator
    new_pairs: bool = False
    num_distractors: tuple[int, int] = (1, 2)

    def __post_init__(self) -> None:
        self._colours = [str(name) for name in self.rng.permutation(list(OBJECT_COLOURS))]
        self._fresh = self.new_pairs

    def movable(self, *kinds: str) -> str:
        """An object of one of the kinds (all of `MOVABLE_KINDS` without any)."""
        kind = str(self.rng.choice(kinds or MOVABLE_KINDS))
        wanted = self._fresh
        for colour in self._colours:
            if ((colour, kind) in HELD_OUT_TABLE_PAIRS) == wanted:
                self._colours.remove(colour)
                self._fresh = False
                return f"{colour} {kind}"
        raise NoColourLeftError(kind)

    def twin(self, name: str) -> str:
        """A thing of the same colour and another kind."""
        colour, kind = name.split()
        kinds = [
            other for other in MOVABLE_KINDS if other != kind and (colour, other) not in HELD_OUT_TABLE_PAIRS
        ]
        return f"{colour} {self.pick(*kinds)}"

    def holder(self, kind: str) -> str:
        if kind == "bin" and self.flip():
            return "wooden bin"
        if not self._colours:
            raise NoColourLeftError(kind)
        return f"{self._colours.pop()} {kind}"

    def distractors(self, *kinds: str) -> tuple[str, ...]:
        low, high = self.num_distractors
        return tuple(self.movable(*kinds) for _ in range(int(self.rng.integers(low, high + 1))))

    def flip(self, share: float = 0.5) -> bool:
        return bool(self.rng.random() < share)

    def pick(self, *values: str) -> str:
        return str(self.rng.choice(values))


def uses_new_composition(oracle: tuple[Subtask, ...]) -> bool:
    """True where a plan does with a kind of object, or puts together, what training never shows."""
    for step in oracle:
        kind = step.target.split()[-1]
        onto = None if step.destination is None else step.destination.split()[-1]
        if {(kind, step.relation, onto), (kind, step.relation, None)} & HELD_OUT_USES:
            return True
    return {step.skill for step in oracle} >= HELD_OUT_SKILL_PAIR


def place(target: str, relation: str, destination: str) -> Subtask:
    return Subtask(skill="place", target=target, relation=relation, destination=destination)


def fact(name: str, *args: str) -> Predicate:
    return Predicate(name, args)
