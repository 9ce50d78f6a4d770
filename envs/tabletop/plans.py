"""Tasks on the table-top: a scene, an instruction, what has to hold at the end, and a plan that gets there.

`sample_task` makes one from nothing but its arguments: `emuworld.envs.tabletop.families` says what is asked,
`emuworld.envs.tabletop.scene` where things stand. The suite `robot-331` (`emuworld.tasks.robot.suite`)
freezes 331 of them. Nothing here runs physics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from emuworld.envs.rooms.scenes import generator
from emuworld.envs.tabletop.drafts import Draft, fact
from emuworld.envs.tabletop.families import FAMILIES, draft
from emuworld.envs.tabletop.layout import TablePlan
from emuworld.envs.tabletop.looks import sample_camera, sample_look
from emuworld.envs.tabletop.places import HELD_OUT_LAYOUTS, LAYOUTS, SIDES, NoPlaceError, Places, find_places
from emuworld.envs.tabletop.predicates import DIRECTIONS as DIRECTION_AXES
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.subtasks import DIRECTIONS, HOLDER_KINDS, MOVABLE_KINDS, PLACE_RELATIONS, Subtask

# What a task of the test split has that training has not; "seen" has nothing new but its seed.
VARIATIONS = ("seen", "pairs", "layout", "background", "camera", "distractors", "composition")
NUM_DISTRACTORS, MORE_DISTRACTORS = (1, 2), (4, 5)
_TASK_STREAM, _RANDOM_STREAM = 40, 41


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task.

    `scene`: what `TableScene.from_dict` takes; `instruction`: the plainest of `instructions`, which in the
    test split end with one that training never says; `goal`: all have to hold at the end (the `NotMoved` ones
    guard the bystanders); `oracle`: a plan that gets there; `goal_position`: world coordinates (metres) of
    the goal place of a task whose words do not name it; `variation`: of `VARIATIONS`; `tags`: more of what
    it is.
    """

    family: str
    seed: int
    variation: str
    scene: Mapping[str, Any]
    instruction: str
    instructions: tuple[str, ...]
    goal: tuple[Predicate, ...]
    oracle: tuple[Subtask, ...]
    goal_position: tuple[float, float, float] | None = None
    tags: tuple[str, ...] = ()

    @property
    def aims(self) -> tuple[Predicate, ...]:
        """The goal without the guards: what the task is about."""
        return tuple(one for one in self.goal if one.name != "NotMoved")

    @property
    def goal_in_picture(self) -> bool:
        """True where the words do not say the goal place."""
        return self.goal_position is not None

    @property
    def names(self) -> tuple[str, ...]:
        """What stands on the table and has a name in words."""
        things = (*self.scene["objects"], *self.scene["furniture"])
        return tuple(str(one["name"]) for one in things if one["kind"] != "mark")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "family": self.family,
            "seed": self.seed,
            "variation": self.variation,
            "tags": list(self.tags),
            "instruction": self.instruction,
            "instructions": list(self.instructions),
            "goal": [one.to_dict() for one in self.goal],
            "oracle": [one.to_dict() for one in self.oracle],
            "goal_position": None if self.goal_position is None else list(self.goal_position),
            "scene": dict(self.scene),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Task:
        """What `to_dict` gave."""
        position = values["goal_position"]
        return cls(
            family=str(values["family"]),
            seed=int(values["seed"]),
            variation=str(values["variation"]),
            scene=dict(values["scene"]),
            instruction=str(values["instruction"]),
            instructions=tuple(map(str, values["instructions"])),
            goal=tuple(Predicate.from_dict(one) for one in values["goal"]),
            oracle=tuple(Subtask.from_dict(one) for one in values["oracle"]),
            goal_position=None if position is None else (position[0], position[1], position[2]),
            tags=tuple(map(str, values["tags"])),
        )


def sample_task(family: str, split: str, seed: int, *, variation: str | None = None) -> Task:
    """The task of a family, a split and a seed.

    `variation` (default: "seen", in the test split any that the family has) says what of it training never
    shows. Raises ValueError for an unknown family, split or variation, and for something new outside "test".
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown; expected one of {', '.join(FAMILIES)}")
    if variation not in (None, *variations_of(family)):
        raise ValueError(
            f"variation={variation!r} is none of {family}; expected one of {', '.join(variations_of(family))}"
        )
    rng = generator(split, seed, _TASK_STREAM, list(FAMILIES).index(family))
    if variation is None:
        variation = str(rng.choice(variations_of(family))) if split == "test" else "seen"
    if variation != "seen" and split != "test":
        raise ValueError(f"variation={variation!r} is for the test split; got split={split!r}")
    for _ in range(100):
        made = draft(
            family,
            rng,
            new_pairs=variation == "pairs",
            new_composition=variation == "composition",
            num_distractors=MORE_DISTRACTORS if variation == "distractors" else NUM_DISTRACTORS,
        )
        layouts = HELD_OUT_LAYOUTS if variation == "layout" else LAYOUTS
        try:
            places = find_places(made, rng, layout=str(rng.choice(layouts)))
        except NoPlaceError:
            continue
        if _is_done(made, places):
            continue
        return _task(made, places, rng, family=family, split=split, seed=seed, variation=variation)
    raise AssertionError(f"no draft of {family!r} found places on the table in 100 attempts")


def variations_of(family: str) -> tuple[str, ...]:
    """What can be new in a family: nothing new is composed of a drawer or a button alone."""
    alone = family in ("drawers", "buttons")
    return tuple(one for one in VARIATIONS if not (alone and one in ("composition", "pairs")))


def _is_done(made: Draft, places: Places) -> bool:
    """True where a thing stands on the asked side of another already: the task would be to do nothing."""
    points = {item.name: item.position for item in places.objects}
    for step in made.oracle:
        if step.relation in SIDES:
            (x, y, _), (other_x, other_y, _) = points[step.target], points[str(step.destination)]
            dx, dy = DIRECTION_AXES[SIDES[step.relation]]
            if (x - other_x) * dx + (y - other_y) * dy > 0:
                return True
    return False


def _task(
    made: Draft,
    places: Places,
    rng: np.random.Generator,
    *,
    family: str,
    split: str,
    seed: int,
    variation: str,
) -> Task:
    plan = TablePlan(
        objects=places.objects,
        furniture=places.furniture,
        look=sample_look(rng, novel=variation == "background"),
        camera=sample_camera(rng, novel=variation == "camera"),
        origin={"family": family, "split": split, "seed": seed, "variation": variation},
    )
    goal, position = made.goal, None
    if places.mark is not None:
        target = next(item for item in places.objects if item.name == made.oracle[-1].target)
        position = (*places.mark, target.half_height_m)
        goal += (fact("At", target.name, *(f"{value:.4f}" for value in places.mark)),)
    guards = tuple(fact("NotMoved", name) for name in made.bystanders)
    return Task(
        family=family,
        seed=seed,
        variation=variation,
        scene=plan.to_dict(),
        instruction=made.instructions[0],
        instructions=made.instructions if split == "test" else made.instructions[:-1],
        goal=goal + guards,
        oracle=made.oracle,
        goal_position=position,
        tags=made.tags,
    )


def possible_subtasks(names: tuple[str, ...]) -> dict[str, list[Subtask]]:
    """Every subtask that one could say of things with these names, by skill."""
    by_kind: dict[str, list[str]] = {}
    for name in names:
        by_kind.setdefault(name.split()[-1], []).append(name)
    movables = [name for kind in MOVABLE_KINDS for name in by_kind.get(kind, [])]
    others = [(one, other) for one in movables for other in names if one != other]
    found = {
        "pick": [Subtask(skill="pick", target=name) for name in movables],
        "place": [
            Subtask(skill="place", target=one, destination=other, relation=relation)
            for one, other in others
            for relation in _relations_to(other)
        ],
        "stack": [
            Subtask(skill="stack", target=one, destination=other)
            for one, other in others
            if other.endswith("cube")
        ],
        "push": [
            Subtask(skill="push", target=name, relation=direction)
            for name in movables
            for direction in DIRECTIONS
        ],
        "open": [Subtask(skill="open", target=name) for name in by_kind.get("drawer", [])],
        "close": [Subtask(skill="close", target=name) for name in by_kind.get("drawer", [])],
        "press": [Subtask(skill="press", target=name) for name in by_kind.get("button", [])],
    }
    return {skill: subtasks for skill, subtasks in found.items() if subtasks}


def random_plan(names: tuple[str, ...], num_steps: int, *, seed: int) -> tuple[Subtask, ...]:
    """Subtasks drawn at random, a skill first and then what it is done with."""
    rng = generator("test", seed, _RANDOM_STREAM)
    possible = possible_subtasks(names)
    plan = []
    for _ in range(num_steps):
        subtasks = possible[str(rng.choice(sorted(possible)))]
        plan.append(subtasks[int(rng.integers(len(subtasks)))])
    return tuple(plan)


def _relations_to(destination: str) -> tuple[str, ...]:
    kind = destination.split()[-1]
    if kind in HOLDER_KINDS:
        return ("on",) if kind == "plate" else ("in",)
    return tuple(relation for relation in PLACE_RELATIONS if relation not in ("on", "in"))
