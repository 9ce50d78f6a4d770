"""Edits of table-tops as stories, in the form of `emuworld.envs.edit_chains`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from emuworld.envs.edit_chains import Edit, edit_chains
from emuworld.envs.episodes import TRUTH
from emuworld.envs.render import Renderer
from emuworld.envs.rooms.floorplan import choice
from emuworld.envs.rooms.scenes import generator
from emuworld.envs.tabletop.captions import table_caption
from emuworld.envs.tabletop.edit_words import table_edit_phrase
from emuworld.envs.tabletop.edits import sample_table_edit
from emuworld.envs.tabletop.episodes import frame_truth
from emuworld.envs.tabletop.layout import OBJECT_KINDS, ObjectPlan
from emuworld.envs.tabletop.shots import (
    CLEAR_PX,
    TableShot,
    clear_things,
    exchanged,
    free_colours,
    free_spot,
    sample_table_shot,
    stands_alone,
)
from emuworld.story import Story, StoryImage

_STREAM = 53


def table_edit_stories(
    split: str,
    seed: int,
    *,
    num_edits: int,
    renderer: Renderer,
    size: int = 256,
    format: str = "JPEG",
) -> Iterator[Story]:
    """`num_edits` edits of table-tops, a new one for each chain of up to `CHAIN_EDITS`; some combinations.

    Each answer's feature "truth" names the edit besides: kind, target, result.
    """
    rng = generator(split, seed, _STREAM)

    def image(shot: TableShot, edit: Edit[TableShot] | None) -> StoryImage:
        scene = shot.scene
        pixels = renderer.render(scene.model, scene.data, scene.camera(), height=size, width=size)
        return StoryImage.from_array(
            pixels,
            format=format,
            caption=table_caption(scene, shot.sights, rng, split=shot.split),
            features={TRUTH: frame_truth(scene, None, shot.sights, None if edit is None else edit.truth)},
        )

    yield from edit_chains(
        f"x2i-table-{split}-{seed}",
        (sample_table_shot(split, rng) for _ in itertools.count()),
        rng,
        num_edits=num_edits,
        edit=sample_table_edit,
        combination=sample_table_combination,
        image=image,
    )


def sample_table_combination(shot: TableShot, rng: np.random.Generator) -> Edit[TableShot] | None:
    """Two reference pictures and one answer: a loose object of the first is put on the table of the second,
    which has no thing of its colour. None where none is found.
    """
    things = [shot.thing(name) for name in clear_things(shot, OBJECT_KINDS)]
    things = [thing for thing in things if stands_alone(shot.plan, thing)]
    if not things:
        return None
    thing = choice(rng, tuple(things))
    assert isinstance(thing, ObjectPlan)
    for _ in range(8):
        base = sample_table_shot(shot.split, rng)
        spot = free_spot(base.plan, rng, thing.radius_m)
        if spot is None or thing.colour not in free_colours(base.plan):
            continue
        moved = replace(thing, position=(*spot, thing.half_height_m), distractor=False)
        answer = base.with_plan(exchanged(base.plan, thing.name, moved))
        pixels, after = base.pixels(), answer.pixels()
        if after.get(thing.name, 0) < CLEAR_PX or any(after.get(n, 0) < c / 2 for n, c in pixels.items()):
            continue
        alone = len(shot.plan.objects) == 1 and not shot.plan.furniture
        phrasing = "combine one" if alone and rng.random() < 0.5 else "combine"
        return Edit(
            kind="combine",
            instruction=table_edit_phrase(phrasing, rng, shot.split, a=thing.name),
            references=(shot, base),
            answer=answer,
            target=thing.name,
            result=thing.name,
        )
    return None
