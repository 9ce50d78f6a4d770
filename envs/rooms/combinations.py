"""Edits of two reference pictures: the object of one is put into the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from emuworld.envs.edit_chains import Edit
from emuworld.envs.palette import WALL_COLOURS
from emuworld.envs.rooms.edit_phrases import edit_phrase
from emuworld.envs.rooms.edits import appeared, painted
from emuworld.envs.rooms.floorplan import choice
from emuworld.envs.rooms.shots import CLEAR_PX, Shot, free_spot, item_of, others


def sample_combination(shot: Shot, rng: np.random.Generator) -> Edit[Shot] | None:
    """Two reference pictures and one answer: the object of the first view is put into the second.

    The second view is of the same room, painted anew and without that object; None where none is found.
    """
    clear = shot.clear(least_px=2 * CLEAR_PX)
    if not clear:
        return None
    name = choice(rng, tuple(clear))
    item = item_of(shot, name)
    room = replace(
        painted(shot.scene.plan, choice(rng, tuple(WALL_COLOURS)), rng),
        objects=others(shot.scene.plan, name),
    )
    for _ in range(8):
        base = Shot(scene=shot.scene.edited(room), pose=shot.scene.random_pose(rng))
        spot = free_spot(base, rng, item.radius_m)
        if spot is None or base.view.near_share > 0.25:
            continue
        moved = replace(item, x_m=spot[0], y_m=spot[1], base_m=0.0)
        answer = Shot(scene=shot.scene.edited(replace(room, objects=(*room.objects, moved))), pose=base.pose)
        if not appeared(name)(base, answer):
            continue
        alone = len(shot.view.objects) == 1
        words = edit_phrase(
            "combine one" if alone and rng.random() < 0.5 else "combine", rng, shot.scene.split, a=name
        )
        return Edit(
            kind="combine",
            instruction=words,
            references=(shot, base),
            answer=answer,
            target=name,
            result=name,
        )
    return None
