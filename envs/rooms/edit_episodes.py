"""Edits of views of a room as stories, in the form of `emuworld.envs.edit_chains`."""

from __future__ import annotations

from collections.abc import Iterator

from emuworld.envs.edit_chains import Edit, edit_chains
from emuworld.envs.episodes import stored_view
from emuworld.envs.render import Renderer
from emuworld.envs.rooms.captions import caption
from emuworld.envs.rooms.combinations import sample_combination
from emuworld.envs.rooms.commands import Outcome
from emuworld.envs.rooms.edits import sample_edit
from emuworld.envs.rooms.scenes import RoomScene, generator
from emuworld.envs.rooms.shots import Shot, sample_shot
from emuworld.story import Story, StoryImage

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

    def image(shot: Shot, edit: Edit[Shot] | None) -> StoryImage:
        return stored_view(
            shot.scene,
            Outcome(pose=shot.pose),
            shot.view,
            caption=caption(shot.view, rng, split=split),
            renderer=renderer,
            size=size,
            format=format,
            truth=None if edit is None else edit.truth,
        )

    yield from edit_chains(
        f"x2i-{split}-{seed}",
        (sample_shot(scene, rng) for _ in range(num_edits)),  # enough where a view allows one edit only
        rng,
        num_edits=num_edits,
        edit=sample_edit,
        combination=sample_combination,
        image=image,
    )
