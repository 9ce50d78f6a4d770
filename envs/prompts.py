"""Prompts out of the worlds' caption grammar without a world: what a reset asks for when nobody says what to
ask.

A prompt is a caption of an invented view, so that a model trained on captions of real ones knows its words.
"""

import numpy as np

from emuworld.envs.captions import LANDMARKS, View, VisibleObject, caption, walk_prompt
from emuworld.envs.palette import FLOOR_COLOURS, WALL_COLOURS, object_pairs

MAX_OBJECTS = 3
NUM_EXAMPLES = 64
_EXAMPLES_SEED = 2026  # any fixed number: the action space of t2i samples from the same list everywhere


def draw_prompt(rng: np.random.Generator, *, mode: str, split: str = "train") -> str:
    """A prompt for `mode` in the words of `split`: a way to start a walk in explore, a caption elsewhere."""
    view = _invented_view(rng, split=split)
    return walk_prompt(view, rng, split=split) if mode == "explore" else caption(view, rng, split=split)


def example_prompts(mode: str) -> tuple[str, ...]:
    """`NUM_EXAMPLES` different prompts, the same ones in every process."""
    rng = np.random.default_rng(_EXAMPLES_SEED)
    prompts: dict[str, None] = {}
    while len(prompts) < NUM_EXAMPLES:
        prompts[draw_prompt(rng, mode=mode)] = None
    return tuple(prompts)


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
