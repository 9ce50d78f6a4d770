"""Subtasks of the table-top: what the arm is told, in words and as a value, and back.

A `Subtask` names a skill and the things it is about; `phrase` says it in the words of a split and `parse`
reads what a user or a model wrote. Every phrasing stands once, in `WORDINGS`. Not here: what a skill does in
physics (`emuworld.envs.tabletop.skills`) and which subtasks a task needs (`emuworld.envs.tabletop.plans`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from emuworld.envs.palette import OBJECT_COLOURS

SKILLS = ("pick", "place", "stack", "push", "open", "close", "press")
PLACE_RELATIONS = ("on", "in", "left of", "right of", "behind", "in front of")
DIRECTIONS = ("left", "right", "away", "closer")  # as the camera in front of the table sees them

# The nouns of the table-top: what the arm moves, what takes things, what it works.
MOVABLE_KINDS = ("cube", "ball", "cylinder")
HOLDER_KINDS = ("plate", "bin", "drawer")
FURNITURE_KINDS = ("drawer", "button")
KINDS = ("cube", "ball", "cylinder", "plate", "bin", "drawer", "button")
TABLE_COLOURS = (*OBJECT_COLOURS, "wooden")


@dataclass(frozen=True, kw_only=True)
class Subtask:
    """One thing that the arm is to do; names are those of the scene's objects ("red cube", "drawer").

    "place" puts `target` into `relation` to `destination`, and picks it up first where the hand does not
    hold it; without either the goal place is only in the picture. "stack" is on `destination`, "push" moves
    `target` in the direction `relation`, "pick" leaves it held.

    Raises ValueError where skill, destination and relation do not fit together.
    """

    skill: str
    target: str
    destination: str | None = None
    relation: str | None = None

    def __post_init__(self) -> None:
        if self.skill not in SKILLS:
            raise ValueError(f"skill={self.skill!r} is unknown; expected one of {', '.join(SKILLS)}")
        if self.skill == "stack" and self.relation is None:
            object.__setattr__(self, "relation", "on")  # a stack is never anything else
        expected: tuple[str | None, ...] = (None,)
        if self.skill == "stack":
            expected = ("on",)
        elif self.skill == "push":
            expected = DIRECTIONS
        elif self.skill == "place" and self.destination is not None:
            expected = PLACE_RELATIONS
        if self.relation not in expected:
            raise ValueError(
                f"relation={self.relation!r} does not go with skill {self.skill!r} and destination "
                f"{self.destination!r}; expected one of {', '.join(map(str, expected))}"
            )
        if self.destination is None and self.skill == "stack":
            raise ValueError("stack needs a destination: name what the target is stacked on")
        if self.destination is not None and self.skill not in ("place", "stack"):
            raise ValueError(f"skill {self.skill!r} takes no destination, got {self.destination!r}")
        if self.destination == self.target:
            raise ValueError(f"the {self.target} cannot be its own destination; name another object")

    @property
    def from_picture(self) -> bool:
        """True where the goal place is only in the picture."""
        return self.skill == "place" and self.destination is None

    def to_dict(self) -> dict[str, str]:
        """JSON values; what is None is left out."""
        values = {
            "skill": self.skill,
            "target": self.target,
            "destination": self.destination,
            "relation": self.relation,
        }
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Subtask:
        """What `to_dict` gave. ValueError for anything else."""
        unknown = set(values) - {"skill", "target", "destination", "relation"}
        if unknown or "skill" not in values or "target" not in values:
            raise ValueError(
                f"a subtask has skill and target, and may have destination and relation; got {sorted(values)}"
            )
        return cls(**{name: str(value) for name, value in values.items()})

    def __str__(self) -> str:
        return canonical(self)


@dataclass(frozen=True, kw_only=True)
class Wording:
    """Phrasings of one kind of subtask: the canonical one, more, and those of the test split alone.

    {t} and {d} stand for target and destination; `skill` and `relation` are what they mean.
    """

    skill: str
    relation: str | None
    plain: str
    more: tuple[str, ...]
    held_out: tuple[str, ...]

    def phrases(self, split: str) -> tuple[str, ...]:
        """All phrasings that texts of a split may use, the canonical one first."""
        return (self.plain, *self.more, *(self.held_out if split == "test" else ()))


def _wording(
    skill: str, relation: str | None, plain: str, more: tuple[str, ...], held_out: tuple[str, ...]
) -> Wording:
    return Wording(skill=skill, relation=relation, plain=plain, more=more, held_out=held_out)


def _beside(relation: str, words: str, short: str) -> Wording:
    return _wording(
        "place",
        relation,
        f"put the {{t}} {words} the {{d}}",
        (f"place the {{t}} {words} the {{d}}", f"move the {{t}} {short} the {{d}}"),
        (f"set the {{t}} down {words} the {{d}}",),
    )


def _push(direction: str, words: str) -> Wording:
    return _wording(
        "push",
        direction,
        f"push the {{t}} {words}",
        (f"slide the {{t}} {words}",),
        (f"shove the {{t}} {words}",),
    )


WORDINGS: tuple[Wording, ...] = (
    _wording(
        "pick", None, "pick up the {t}", ("grasp the {t}", "take the {t}", "lift the {t}"), ("grab the {t}",)
    ),
    _wording(
        "place",
        "on",
        "put the {t} on the {d}",
        ("place the {t} on the {d}", "put the {t} onto the {d}", "move the {t} onto the {d}"),
        ("set the {t} down on the {d}",),
    ),
    _wording(
        "place",
        "in",
        "put the {t} in the {d}",
        ("place the {t} in the {d}", "put the {t} into the {d}", "move the {t} into the {d}"),
        ("drop the {t} into the {d}",),
    ),
    _beside("left of", "to the left of", "left of"),
    _beside("right of", "to the right of", "right of"),
    _beside("behind", "behind", "behind"),
    _beside("in front of", "in front of", "in front of"),
    _wording(
        "place",
        None,
        "put the {t} where the picture shows",
        ("place the {t} where the picture shows", "move the {t} to the place in the picture"),
        ("bring the {t} to the spot in the picture",),
    ),
    _wording(
        "stack",
        "on",
        "stack the {t} on the {d}",
        ("stack the {t} on top of the {d}", "put the {t} on top of the {d}"),
        ("pile the {t} on the {d}",),
    ),
    _push("left", "to the left"),
    _push("right", "to the right"),
    _push("away", "away"),
    _push("closer", "closer"),
    _wording(
        "open", None, "open the {t}", ("pull the {t} open", "pull open the {t}"), ("slide the {t} open",)
    ),
    _wording(
        "close", None, "close the {t}", ("push the {t} closed", "shut the {t}"), ("slide the {t} shut",)
    ),
    _wording("press", None, "press the {t}", ("push the {t}", "push down the {t}"), ("hit the {t}",)),
)

_BY_MEANING = {(wording.skill, wording.relation): wording for wording in WORDINGS}
_NAME = rf"((?:(?:{'|'.join(TABLE_COLOURS)}) )?(?:{'|'.join(KINDS)}))"


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"the \{[td]\}", lambda _: f"(?:the |an |a )?{_NAME}", template))


_PATTERNS = tuple(
    (_pattern(template), wording) for wording in WORDINGS for template in wording.phrases("test")
)

_NEEDED = re.compile(rf"you need (?:an? )?{_NAME}(?:(?:, and|,| and) (?:an? )?{_NAME})*")


def canonical(subtask: Subtask) -> str:
    """The plain phrase of a subtask: "put the red cube on the blue plate"."""
    return _filled(_BY_MEANING[subtask.skill, subtask.relation].plain, subtask)


def phrases(subtask: Subtask, split: str) -> tuple[str, ...]:
    """Every way to say a subtask in a split, the plain one first."""
    wording = _BY_MEANING[subtask.skill, subtask.relation]
    return tuple(_filled(template, subtask) for template in wording.phrases(split))


def phrase(subtask: Subtask, rng: np.random.Generator, split: str) -> str:
    """Words for a subtask: the plain phrase three times in five, else any of the split's."""
    every = phrases(subtask, split)
    return every[0] if rng.random() < 0.6 else every[int(rng.integers(len(every)))]


def parse(text: str) -> Subtask | None:
    """The subtask that a text means, or None. Case, extra spaces, "Current step:" and a last dot do not
    matter; every phrasing of every split is read."""
    words = " ".join(text.lower().split()).removeprefix("current step:").strip().rstrip(".! ")
    for pattern, wording in _PATTERNS:
        match = pattern.fullmatch(words)
        if match is None:
            continue
        target, destination = match[1], match[2] if pattern.groups == 2 else None
        if destination == target or _is_nonsense(wording.skill, target):
            return None
        return Subtask(skill=wording.skill, target=target, destination=destination, relation=wording.relation)
    return None


def only_names_things(text: str) -> bool:
    """Whether a text says what is needed and nothing that is to be done: "You need a red cube and a blue
    plate.", with which a guide begins that was told without a picture."""
    return _NEEDED.fullmatch(" ".join(text.lower().split()).rstrip(".! ")) is not None


def _is_nonsense(skill: str, target: str) -> bool:
    """True for a skill on a thing that nobody would say it of: pressing a cube, opening a plate."""
    kind = target.split()[-1]
    if skill in ("open", "close"):
        return kind != "drawer"
    if skill == "press":
        return kind != "button"
    return kind in FURNITURE_KINDS


def _filled(template: str, subtask: Subtask) -> str:
    return template.format(t=subtask.target, d=subtask.destination)
