"""Which task an environment or a training story begins with: drawn over all families, or made of a prompt.

A prompt is one subtask in words, "Put the red cube on the blue plate."; its table holds what it names and a
few other things, its goal is what it asks for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from emuworld.envs.palette import OBJECT_COLOURS
from emuworld.envs.rooms.scenes import generator
from emuworld.envs.tabletop.drafts import HELD_OUT_TABLE_PAIRS, RELATION_FACTS, Draft
from emuworld.envs.tabletop.layout import TablePlan
from emuworld.envs.tabletop.looks import sample_camera, sample_look
from emuworld.envs.tabletop.places import LAYOUTS, NoPlaceError, find_places
from emuworld.envs.tabletop.plans import Task, sample_task
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.subtasks import MOVABLE_KINDS, Subtask, parse

# Tasks of each family in the suite `robot-331`; families are drawn by the same numbers.
FAMILY_COUNTS = {
    "pick-place": 60,
    "sorting": 40,
    "stacking": 40,
    "holders": 40,
    "relations": 30,
    "pushing": 25,
    "drawers": 25,
    "buttons": 15,
    "open-put-close": 26,
    "chains": 30,
}
_FAMILY_STREAM, _ORDER_STREAM = 42, 43
_MAX_OTHERS = 2

_GOALS: dict[str, Callable[[Subtask], Predicate]] = {
    "pick": lambda step: Predicate("Held", (step.target,)),
    "place": lambda step: Predicate(_place_fact(step), (step.target, str(step.destination))),
    "stack": lambda step: Predicate("Stack", (step.target, str(step.destination))),
    "push": lambda step: Predicate("Moved", (step.target, str(step.relation))),
    "open": lambda step: Predicate("Open", (step.target,)),
    "close": lambda step: Predicate("Closed", (step.target,)),
    "press": lambda step: Predicate("Pressed", (step.target,)),
}


def draw_task(split: str, seed: int) -> Task:
    """A task of a split: the family drawn from the seed by `FAMILY_COUNTS`."""
    weights = np.array(list(FAMILY_COUNTS.values()), np.float64)
    rng = generator(split, seed, _FAMILY_STREAM)
    return sample_task(str(rng.choice(list(FAMILY_COUNTS), p=weights / weights.sum())), split, seed)


def task_of_prompt(prompt: str, split: str, seed: int) -> Task:
    """A table where the subtask that `prompt` says can be done, and that subtask as its task.

    Raises ValueError for words that are no subtask, or that do not name a colour of each thing.
    """
    step = parse(prompt)
    if step is None or step.from_picture:
        raise ValueError(
            f"no table can be set for the prompt {prompt!r}; expected one subtask that names its place, such "
            'as "Put the red cube on the blue plate.", or give options["task"]'
        )
    names = [name for name in (step.target, step.destination) if name is not None]
    for name in names:
        if " " not in name and name not in ("drawer", "button"):
            raise ValueError(
                f"{name!r} in the prompt {prompt!r} has no colour; write, for example, 'red {name}'"
            )
    rng = generator(split, seed, _ORDER_STREAM)
    for _ in range(50):
        draft = _draft(step, names, prompt, rng)
        try:
            places = find_places(draft, rng, layout=str(rng.choice(LAYOUTS)))
        except NoPlaceError:
            continue
        plan = TablePlan(
            objects=places.objects,
            furniture=places.furniture,
            look=sample_look(rng),
            camera=sample_camera(rng),
            origin={"prompt": prompt, "split": split, "seed": seed},
        )
        return Task(
            family="prompt",
            seed=seed,
            variation="seen",
            scene=plan.to_dict(),
            instruction=prompt,
            instructions=(prompt,),
            goal=draft.goal,
            oracle=draft.oracle,
        )
    raise ValueError(f"the things of the prompt {prompt!r} found no place on a table; try another seed")


def _draft(step: Subtask, names: list[str], prompt: str, rng: np.random.Generator) -> Draft:
    """What the subtask needs, and up to `_MAX_OTHERS` things of colours that it does not name."""
    used = {name.split()[0] for name in names}
    pairs = [
        (colour, kind)
        for colour in OBJECT_COLOURS
        for kind in MOVABLE_KINDS
        if colour not in used and (colour, kind) not in HELD_OUT_TABLE_PAIRS
    ]
    drawn = rng.choice(len(pairs), size=int(rng.integers(_MAX_OTHERS + 1)), replace=False)
    others = [" ".join(pairs[index]) for index in drawn]
    drawer = None
    if "drawer" in names:
        drawer = "closed" if step.skill == "open" else "open"
    return Draft(
        movables=(*(name for name in names if name.split()[-1] in MOVABLE_KINDS), *others),
        holders=tuple(name for name in names if name.split()[-1] in ("plate", "bin")),
        drawer=drawer,
        button="button" in names,
        oracle=(step,),
        goal=(_GOALS[step.skill](step),),
        instructions=(prompt,),
    )


def _place_fact(step: Subtask) -> str:
    relation = str(step.relation)
    return RELATION_FACTS.get(relation, relation.capitalize())
