"""Prompts and commands without a world: what a reset asks for when nobody says what to ask, and what the
action space of each mode samples.

A prompt of t2i, explore and x2i is a caption of an invented view, so that a model trained on captions of real
ones knows its words; the other modes say what is to happen with the objects of such a view.
"""

from collections.abc import Mapping

import numpy as np

from emuworld.envs.palette import (
    FLOOR_COLOURS,
    HELD_OUT_PAIRS,
    OBJECT_COLOURS,
    WALL_COLOURS,
    object_pairs,
    with_article,
)
from emuworld.envs.rooms.captions import LANDMARKS, View, VisibleObject, caption, walk_prompt
from emuworld.envs.tabletop.subtasks import MOVABLE_KINDS

MAX_OBJECTS = 3
NUM_EXAMPLES = 64
_EXAMPLES_SEED = 2026  # any fixed number: an action space samples from the same list everywhere

# {a}, {b}: two objects, "red ball"; {an_a}, {an_b}: with their article; {colour}: of an object; {wall}: of a
# wall. howto and vla are about table-tops, where the objects are cubes, balls and cylinders ({cube}, {base}:
# two cubes, {holder}: a plate or bin with its preposition); they ask for the same tasks, in a question and in
# an order.
_TASKS = (
    "put the {a} {holder}",
    "stack the {cube} on the {base}",
    "put the {a} to the left of the {cube}",
    "put the {a} to the right of the {cube}",
    "open the drawer, put the {a} in the drawer and close the drawer",
)
_STORIES = (
    "The story of {an_a} that looks for {an_b}.",
    "{an_a} and {an_b} meet in a room.",
    "How {an_a} and {an_b} became friends.",
)
_COMMANDS = {
    "x2i": (
        "make the {a} {colour}",
        "remove the {a}",
        "add {an_a}",
        "replace the {a} with {an_b}",
        "paint the wall {wall}",
        "move the {a} to the left",
        "put the {a} in front of the {b}",
        "make the light warm",
        "make it darker",
        "show it from further left",
    ),
    "story": (
        "The {a} rolls towards the {b}.",
        "The {a} hides behind the {b}.",
        "Now the {a} is all alone.",
        "The {a} and the {b} are side by side.",
    ),
    "howto": (
        "Pick up the {a}.",
        "Put the {a} {holder}.",
        "Stack the {cube} on the {base}.",
        "Open the drawer.",
        "Put the {a} in the drawer.",
    ),
    "vla": (
        "pick up the {a}",
        "put the {a} {holder}",
        "stack the {cube} on the {base}",
        "put the {a} to the left of the {cube}",
        "put the {a} to the right of the {cube}",
        "push the {cube} away",
        "push the {cube} to the left",
        "open the drawer",
        "put the {a} in the drawer",
        "close the drawer",
        "press the button",
    ),
}
_ON_TABLES = ("howto", "vla")


def draw_prompt(rng: np.random.Generator, *, mode: str, split: str = "train") -> str:
    """A prompt for `mode` in the words of `split`: the scene in t2i, explore and x2i (there the first
    picture), the story or the task elsewhere."""
    if mode == "story":
        text = _filled(_STORIES, rng, words=_room_words(rng, split))
        return text[0].upper() + text[1:]
    if mode in _ON_TABLES:
        task = _filled(_TASKS, rng, words=_table_words(rng, split))
        return f"How to {task}." if mode == "howto" else f"{task.capitalize()}."
    view = _invented_view(rng, split=split)
    return walk_prompt(view, rng, split=split) if mode == "explore" else caption(view, rng, split=split)


def example_commands(mode: str) -> tuple[str, ...]:
    """`NUM_EXAMPLES` different commands of a mode, the same ones in every process: whole prompts in t2i,
    instructions to edit in x2i, the next line, instruction or subtask in story, howto and vla."""
    rng = np.random.default_rng(_EXAMPLES_SEED)
    draw_words = _table_words if mode in _ON_TABLES else _room_words
    commands: dict[str, None] = {}
    while len(commands) < NUM_EXAMPLES:
        templates = _COMMANDS.get(mode)
        if templates is None:
            commands[draw_prompt(rng, mode=mode)] = None
        else:
            commands[_filled(templates, rng, words=draw_words(rng, "train"))] = None
    return tuple(commands)


def _filled(templates: tuple[str, ...], rng: np.random.Generator, *, words: Mapping[str, str]) -> str:
    """One of the templates with words in it."""
    return _pick(rng, templates).format(**words)


def _room_words(rng: np.random.Generator, split: str) -> dict[str, str]:
    """Two different objects of a room, an object's colour, a wall's."""
    pairs = object_pairs(split)
    first, second = (" ".join(pairs[i]) for i in rng.choice(len(pairs), size=2, replace=False))
    return {
        "a": first,
        "b": second,
        "an_a": with_article(first),
        "an_b": with_article(second),
        "colour": _pick(rng, tuple(OBJECT_COLOURS)),
        "wall": _pick(rng, tuple(WALL_COLOURS)),
    }


def _table_words(rng: np.random.Generator, split: str) -> dict[str, str]:
    """Things of a table-top, each of another colour: an object, two cubes, a plate or bin."""
    colours = [str(colour) for colour in rng.permutation(list(OBJECT_COLOURS))]
    kind = _pick(rng, MOVABLE_KINDS)
    names = []
    for wanted in (kind, "cube", "cube"):
        colour = next(one for one in colours if split == "test" or not _held_out(one, wanted))
        colours.remove(colour)
        names.append(f"{colour} {wanted}")
    holders = (f"on the {colours[0]} plate", "in the wooden bin", f"in the {colours[0]} bin")
    return {"a": names[0], "cube": names[1], "base": names[2], "holder": _pick(rng, holders)}


def _held_out(colour: str, kind: str) -> bool:
    """Whether only test scenes have a thing like this; a cube is a table-top's box."""
    return (colour, "box" if kind == "cube" else kind) in HELD_OUT_PAIRS


def _invented_view(rng: np.random.Generator, *, split: str) -> View:
    """One to three different objects, one wall, a floor and a landmark, all large enough to be named."""
    pairs = object_pairs(split)
    chosen = rng.choice(len(pairs), size=int(rng.integers(1, MAX_OBJECTS + 1)), replace=False)
    objects = tuple(
        VisibleObject(
            colour=pairs[index][0],
            shape=pairs[index][1],
            pixels=1_000 - place,  # by falling size, as views list them
            column=float(rng.random()),
            distance_m=2.0,
        )
        for place, index in enumerate(chosen)
    )
    return View(
        objects=objects,
        walls=((_pick(rng, tuple(WALL_COLOURS)), 0.5),),
        floor=(_pick(rng, tuple(FLOOR_COLOURS)), 0.3),
        landmarks=((_pick(rng, LANDMARKS), 0.05),),
        near_share=0.0,
    )


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]
