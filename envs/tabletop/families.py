"""The families of table-top tasks: for each the things on the table, the words, the goal and a plan.

`draft` makes a task that names objects and says nothing about places; `emuworld.envs.tabletop.plans` puts it
on a table. The families are those of the suite `robot-331`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np

from emuworld.envs.tabletop.drafts import (
    HELD_OUT_TABLE_PAIRS,
    MAX_THINGS,
    RELATION_FACTS,
    Cast,
    Draft,
    NoColourLeftError,
    fact,
    place,
    uses_new_composition,
)
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.subtasks import MOVABLE_KINDS, Subtask, phrases

Family = Callable[[Cast], Draft]


def _said(subtask: Subtask) -> tuple[str, ...]:
    """A one-step task in every phrasing, those of the test split last."""
    return phrases(subtask, "test")


def _pick_place(cast: Cast) -> Draft:
    """Pick one thing up (15 %), put it where the picture shows (35 %), on a plate or into a bin."""
    target = cast.movable()
    goal: tuple[Predicate, ...] = ()
    holders: tuple[str, ...] = ()
    draw = cast.rng.random()
    if draw < 0.15:
        step, goal = Subtask(skill="pick", target=target), (fact("Held", target),)
    elif draw < 0.5:
        step = Subtask(skill="place", target=target)
    else:
        step, reached, holders = _into_holder(cast, target)
        goal = (reached,)
    return Draft(
        movables=(target, *cast.distractors()),
        holders=holders,
        mark=step.from_picture,
        oracle=(step,),
        goal=goal,
        instructions=_said(step),
        tags=("goal in picture" if step.from_picture else "in the hand" if not holders else "into a holder",),
    )


def _into_holder(cast: Cast, target: str) -> tuple[Subtask, Predicate, tuple[str, ...]]:
    """The step that puts a thing on a new plate or into a new bin, what holds then, and the holder."""
    if cast.flip():
        plate = cast.holder("plate")
        return place(target, "on", plate), fact("On", target, plate), (plate,)
    holder = cast.holder("bin")
    return place(target, "in", holder), fact("In", target, holder), (holder,)


def _sorting(cast: Cast) -> Draft:
    """By shape: one thing on a plate, one or two into a bin. By colour (three in ten): two into a bin."""
    if cast.flip(0.3):
        return _sorting_by_colour(cast)
    kinds = [str(kind) for kind in cast.rng.permutation(list(MOVABLE_KINDS))]
    on_plate = cast.movable(kinds[0])
    in_bin = tuple(cast.movable(kinds[1]) for _ in range(int(cast.rng.integers(1, 3))))
    plate, holder = cast.holder("plate"), cast.holder("bin")
    others = cast.distractors(kinds[2])[: MAX_THINGS - 2 - len(in_bin)]
    second = f"{kinds[1]}s" if len(in_bin) > 1 else kinds[1]
    return Draft(
        movables=(on_plate, *in_bin, *others),
        holders=(plate, holder),
        oracle=(place(on_plate, "on", plate), *(place(name, "in", holder) for name in in_bin)),
        goal=(fact("On", on_plate, plate), *(fact("In", name, holder) for name in in_bin)),
        instructions=(
            f"put the {kinds[0]} on the {plate} and the {second} in the {holder}",
            f"sort by shape: the {kinds[0]} on the {plate}, the {second} in the {holder}",
            f"tidy up: every {kinds[0]} goes on the {plate} and every {kinds[1]} in the {holder}",
        ),
        tags=("by shape",),
    )


def _sorting_by_colour(cast: Cast) -> Draft:
    first = cast.movable()
    names, holder = (first, cast.twin(first)), "wooden bin"
    colour = first.split()[0]
    return Draft(
        movables=(*names, *cast.distractors()),
        holders=(holder,),
        oracle=tuple(place(name, "in", holder) for name in names),
        goal=tuple(fact("In", name, holder) for name in names),
        instructions=(
            f"put everything {colour} in the {holder}",
            f"sort by colour: the {colour} things go in the {holder}",
            f"gather all {colour} objects in the {holder}",
        ),
        tags=("by colour",),
    )


def _stacking(cast: Cast) -> Draft:
    """A tower of two or three; only cubes carry, the top may be a cylinder."""
    three = cast.flip()
    names = [cast.movable("cube") for _ in range(2 if three else 1)]
    names.append(cast.movable("cube", "cylinder"))
    steps = tuple(
        Subtask(skill="stack", target=upper, destination=lower) for lower, upper in itertools.pairwise(names)
    )
    if three:
        low, middle, top = names
        instructions: tuple[str, ...] = (
            f"stack the {middle} on the {low} and the {top} on the {middle}",
            f"build a tower: the {low} at the bottom, the {middle} in the middle, the {top} on top",
            f"pile up the {low}, the {middle} and the {top}, from bottom to top",
        )
    else:
        instructions = _said(steps[0])
    return Draft(
        movables=(*names, *cast.distractors()),
        oracle=steps,
        goal=tuple(fact("Stack", step.target, str(step.destination)) for step in steps),
        instructions=instructions,
        tags=("tower of three",) if three else ("tower of two",),
    )


def _holders(cast: Cast) -> Draft:
    """Into a bin or onto a plate where other things and the other holder stand around."""
    target = cast.movable()
    step, goal, holders = _into_holder(cast, target)
    other = cast.holder("bin" if step.relation == "on" else "plate")
    few, many = cast.num_distractors
    cast.num_distractors = (few + 1, many + 1)
    return Draft(
        movables=(target, *cast.distractors()),
        holders=(*holders, other),
        oracle=(step,),
        goal=(goal,),
        instructions=_said(step),
        tags=("on a plate" if step.relation == "on" else "in a bin",),
    )


def _relations(cast: Cast) -> Draft:
    """Beside, behind or in front of another thing."""
    target, other = cast.movable(), cast.movable("cube", "cylinder")
    relation = cast.pick("left of", "right of", "behind", "in front of")
    step = place(target, relation, other)
    return Draft(
        movables=(target, other, *cast.distractors()),
        oracle=(step,),
        goal=(fact(RELATION_FACTS[relation], target, other),),
        instructions=_said(step),
        tags=(relation,),
    )


def _pushing(cast: Cast) -> Draft:
    """Push a cube or a cylinder in one of four directions (a ball would roll on)."""
    target = cast.movable("cube", "cylinder")
    step = Subtask(skill="push", target=target, relation=cast.pick("left", "right", "away", "closer"))
    return Draft(
        movables=(target, *cast.distractors()),
        oracle=(step,),
        goal=(fact("Moved", target, str(step.relation)),),
        instructions=_said(step),
        tags=(str(step.relation),),
    )


def _drawers(cast: Cast) -> Draft:
    """Open a closed drawer or close an open one."""
    opens = cast.flip()
    step = Subtask(skill="open" if opens else "close", target="drawer")
    return Draft(
        movables=(cast.movable(), *cast.distractors()),
        drawer="closed" if opens else "open",
        oracle=(step,),
        goal=(fact("Open" if opens else "Closed", "drawer"),),
        instructions=_said(step),
        tags=(step.skill,),
    )


def _buttons(cast: Cast) -> Draft:
    step = Subtask(skill="press", target="button")
    return Draft(
        movables=(cast.movable(), *cast.distractors()),
        button=True,
        oracle=(step,),
        goal=(fact("Pressed", "button"),),
        instructions=_said(step),
    )


def _put_away(cast: Cast) -> Draft:
    """Put a thing into the closed drawer and close it again."""
    target = cast.movable()
    return Draft(
        movables=(target, *cast.distractors()),
        drawer="closed",
        oracle=(
            Subtask(skill="open", target="drawer"),
            place(target, "in", "drawer"),
            Subtask(skill="close", target="drawer"),
        ),
        goal=(fact("In", target, "drawer"), fact("Closed", "drawer")),
        instructions=(
            f"open the drawer, put the {target} in the drawer and close the drawer",
            f"put the {target} into the closed drawer and shut it again",
            f"hide the {target} in the drawer",
        ),
    )


def _plate_part(cast: Cast) -> Draft:
    target = cast.movable()
    plate = cast.holder("plate")
    return Draft(
        movables=(target,),
        holders=(plate,),
        oracle=(place(target, "on", plate),),
        goal=(fact("On", target, plate),),
    )


def _bin_part(cast: Cast) -> Draft:
    target = cast.movable()
    holder = cast.holder("bin")
    return Draft(
        movables=(target,),
        holders=(holder,),
        oracle=(place(target, "in", holder),),
        goal=(fact("In", target, holder),),
    )


def _stack_part(cast: Cast) -> Draft:
    lower, upper = cast.movable("cube"), cast.movable("cube", "cylinder")
    return Draft(
        movables=(lower, upper),
        oracle=(Subtask(skill="stack", target=upper, destination=lower),),
        goal=(fact("Stack", upper, lower),),
    )


def _press_part(cast: Cast) -> Draft:
    step = Subtask(skill="press", target="button")
    return Draft(oracle=(step,), button=True, goal=(fact("Pressed", "button"),))


def _open_part(cast: Cast) -> Draft:
    step = Subtask(skill="open", target="drawer")
    return Draft(oracle=(step,), drawer="closed", goal=(fact("Open", "drawer"),))


# What chains are made of, with the number of their subtasks.
_CHAIN_PARTS: tuple[tuple[Family, int], ...] = (
    (_plate_part, 1),
    (_bin_part, 1),
    (_stack_part, 1),
    (_press_part, 1),
    (_open_part, 1),
    (_put_away, 3),
)


def _chains(cast: Cast) -> Draft:
    """Three to five subtasks of several kinds, one after the other."""
    length = int(cast.rng.integers(3, 6))
    few, many = cast.num_distractors
    cast.num_distractors = (0, 0)
    parts: list[Draft] = []
    for index in cast.rng.permutation(len(_CHAIN_PARTS)):
        maker, num_steps = _CHAIN_PARTS[index]
        room = length - sum(len(part.oracle) for part in parts)
        if num_steps <= room and not (maker in (_open_part, _put_away) and any(p.drawer for p in parts)):
            parts.append(maker(cast))
    steps = tuple(step for part in parts for step in part.oracle)
    needed = tuple(name for part in parts for name in part.movables)
    cast.num_distractors = (few - 1, many - 1)  # the table is full enough
    spoken = [str(step) for step in steps]
    return Draft(
        movables=(needed + cast.distractors())[:MAX_THINGS],
        holders=tuple(name for part in parts for name in part.holders),
        drawer="closed" if any(part.drawer for part in parts) else None,
        button=any(part.button for part in parts),
        oracle=steps,
        goal=tuple(goal for part in parts for goal in part.goal),
        instructions=(
            ", then ".join(spoken),
            f"first {', then '.join(spoken[:-1])}, and at last {spoken[-1]}",
            "do this in order: " + ", ".join(spoken),
        ),
        tags=(f"{len(steps)} subtasks",),
    )


FAMILIES: dict[str, Family] = {
    "pick-place": _pick_place,
    "sorting": _sorting,
    "stacking": _stacking,
    "holders": _holders,
    "relations": _relations,
    "pushing": _pushing,
    "drawers": _drawers,
    "buttons": _buttons,
    "open-put-close": _put_away,
    "chains": _chains,
}


def draft(
    family: str,
    rng: np.random.Generator,
    *,
    new_pairs: bool = False,
    new_composition: bool = False,
    num_distractors: tuple[int, int] = (1, 2),
) -> Draft:
    """A task of a family without places.

    `new_pairs`, `new_composition`: it has a colour and shape, or a use, that training never shows; else it
    has none. `num_distractors`: fewest and most things that the plan does not touch.
    Raises ValueError for an unknown family, or one that has no new composition.
    """
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown; expected one of {', '.join(FAMILIES)}")
    for _ in range(500):
        cast = Cast(rng=rng, new_pairs=new_pairs, num_distractors=num_distractors)
        try:
            made = FAMILIES[family](cast)
        except NoColourLeftError:
            continue
        has_new_pair = any(tuple(name.split()) in HELD_OUT_TABLE_PAIRS for name in made.movables)
        if uses_new_composition(made.oracle) == new_composition and has_new_pair == new_pairs:
            return made
    raise ValueError(f"family {family!r} has no draft with new_composition={new_composition}; leave it out")
