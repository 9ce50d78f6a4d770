"""Edits as stories: reference pictures, then an instruction and its answer, chained as x2i edits on.

A segment's text is the instruction and its image the answer, which the next segment edits; the first edits
the reference pictures. That is an episode of `EmuWorld/X2I-v0`, and costs one frame more than it has edits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from emuworld.envs.episodes import stored_view
from emuworld.envs.render import Renderer
from emuworld.envs.rooms.captions import caption
from emuworld.envs.rooms.combinations import sample_combination
from emuworld.envs.rooms.commands import Outcome
from emuworld.envs.rooms.edits import Edit, sample_edit
from emuworld.envs.rooms.scenes import RoomScene, generator
from emuworld.envs.rooms.shots import Shot, sample_shot
from emuworld.story import Story, StoryImage, StorySegment

CHAIN_EDITS = 3
COMBINATION_SHARE = 0.3  # of chains that are followed by a story with two reference pictures
_STREAM = 12


def edit_stories(
    split: str,
    seed: int,
    *,
    num_edits: int,
    renderer: Renderer,
    size: int = 256,
    format: str = "JPEG",
    scene: RoomScene | None = None,
) -> Iterator[Story]:
    """`num_edits` edits of views of one room: chains of up to `CHAIN_EDITS`, and combinations of two views.

    Each answer's feature "truth" names the edit besides: kind, target, result. A room where nothing can be
    edited gives fewer.
    """
    scene = RoomScene.sample(split, seed) if scene is None else scene
    rng = generator(split, seed, _STREAM)

    def image(shot: Shot, edit: Edit | None = None) -> StoryImage:
        return stored_view(
            shot.scene,
            Outcome(pose=shot.pose),
            shot.view,
            caption=caption(shot.view, rng, split=split),
            renderer=renderer,
            size=size,
            format=format,
            truth=None if edit is None else _edit_truth(edit),
        )

    left, index = num_edits, 0
    for _ in range(num_edits):  # at most a chain for each edit, where a view allows only one
        if left <= 0:
            return
        first = sample_shot(scene, rng)
        chain = _chain(first, rng, min(left, CHAIN_EDITS))
        if not chain:
            continue
        before = image(first)
        yield _story(
            f"x2i-{split}-{seed}-{index}", (before,), [(one, image(one.answer, one)) for one in chain]
        )
        left, index = left - len(chain), index + 1
        both = sample_combination(first, rng) if left > 0 and rng.random() < COMBINATION_SHARE else None
        if both is not None:
            pictures = (before, image(both.references[1]))
            yield _story(f"x2i-{split}-{seed}-{index}", pictures, [(both, image(both.answer, both))])
            left, index = left - 1, index + 1


def _chain(shot: Shot, rng: np.random.Generator, count: int) -> list[Edit]:
    """Up to `count` edits, each of the one before."""
    edits: list[Edit] = []
    while len(edits) < count:
        edit = sample_edit(shot, rng)
        if edit is None:
            break
        edits.append(edit)
        shot = edit.answer
    return edits


def _story(story_id: str, references: tuple[StoryImage, ...], steps: list[tuple[Edit, StoryImage]]) -> Story:
    segments = tuple(StorySegment(text=edit.instruction, images=(image,)) for edit, image in steps)
    return Story(reference_images=references, segments=segments, story_id=story_id)


def _edit_truth(edit: Edit) -> dict[str, dict[str, str]]:
    return {"edit": {"kind": edit.kind, "target": edit.target, "result": edit.result}}
