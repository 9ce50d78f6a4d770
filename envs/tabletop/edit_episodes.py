"""Edits of table-tops as stories, in the form of `emuworld.envs.rooms.edit_episodes`.

Reference pictures, then instructions and their answers, each an edit of the picture before; some combine two
reference pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from emuworld.envs.episodes import TRUTH
from emuworld.envs.render import Renderer
from emuworld.envs.rooms.edit_episodes import CHAIN_EDITS, COMBINATION_SHARE
from emuworld.envs.rooms.floorplan import choice
from emuworld.envs.rooms.scenes import generator
from emuworld.envs.tabletop.captions import table_caption
from emuworld.envs.tabletop.edit_words import table_edit_phrase
from emuworld.envs.tabletop.edits import TableEdit, sample_table_edit
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
from emuworld.story import Story, StoryImage, StorySegment

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

    def image(shot: TableShot, edit: TableEdit | None = None) -> StoryImage:
        return stored_shot(shot, edit, rng, renderer=renderer, size=size, format=format)

    left, index = num_edits, 0
    while left > 0:
        first = sample_table_shot(split, rng)
        chain = _chain(first, rng, min(left, CHAIN_EDITS))
        if not chain:
            continue
        before = image(first)
        yield _story(
            f"x2i-table-{split}-{seed}-{index}", (before,), [(one, image(one.answer, one)) for one in chain]
        )
        left, index = left - len(chain), index + 1
        both = sample_table_combination(first, rng) if left and rng.random() < COMBINATION_SHARE else None
        if both is not None:
            pictures = (before, image(both.references[1]))
            yield _story(f"x2i-table-{split}-{seed}-{index}", pictures, [(both, image(both.answer, both))])
            left, index = left - 1, index + 1


def stored_shot(
    shot: TableShot,
    edit: TableEdit | None,
    rng: np.random.Generator,
    *,
    renderer: Renderer,
    size: int,
    format: str,
) -> StoryImage:
    """A shot drawn, with its caption and its truth."""
    scene = shot.scene
    pixels = renderer.render(scene.model, scene.data, scene.camera(), height=size, width=size)
    more = {}
    if edit is not None:
        more = {"edit": {"kind": edit.kind, "target": edit.target, "result": edit.result}}
    return StoryImage.from_array(
        pixels,
        format=format,
        caption=table_caption(scene, shot.sights, rng, split=shot.split),
        features={TRUTH: frame_truth(scene, None, shot.sights, more)},
    )


def sample_table_combination(shot: TableShot, rng: np.random.Generator) -> TableEdit | None:
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
        return TableEdit(
            kind="combine",
            instruction=table_edit_phrase(phrasing, rng, shot.split, a=thing.name),
            references=(shot, base),
            answer=answer,
            target=thing.name,
            result=thing.name,
        )
    return None


def _chain(shot: TableShot, rng: np.random.Generator, count: int) -> list[TableEdit]:
    """Up to `count` edits, each of the one before."""
    edits: list[TableEdit] = []
    while len(edits) < count:
        edit = sample_table_edit(shot, rng)
        if edit is None:
            break
        edits.append(edit)
        shot = edit.answer
    return edits


def _story(
    story_id: str, references: tuple[StoryImage, ...], steps: list[tuple[TableEdit, StoryImage]]
) -> Story:
    segments = tuple(StorySegment(text=edit.instruction, images=(image,)) for edit, image in steps)
    return Story(reference_images=references, segments=segments, story_id=story_id)
