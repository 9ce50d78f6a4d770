"""Views of table-tops with the detector's labels, as `truth.make_views` gives them of rooms."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from emuworld.envs.tabletop.edits import sample_table_edit
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.shots import TableShot, sample_table_shot
from emuworld.tasks.truth import (
    COLOUR_NAMES,
    DETECTED_SHAPES,
    LABEL_STRIDE,
    Labels,
    Request,
    shared_renderer,
)

MAX_EDITS = 3  # to a table before it is looked at again: other lights, cameras, things on plates
_SHAPE_OF_KIND = {"cube": "box"}


def make_table_views(request: Request) -> tuple[NDArray[np.uint8], Labels]:
    """`num_steps` views of table-tops with their labels: tables as drawn, and edited up to three times."""
    rng = np.random.default_rng(request.seed)
    shots: list[TableShot] = []
    while len(shots) < request.num_steps:
        shot = sample_table_shot(request.split, rng)
        shots.append(shot)
        for _ in range(int(rng.integers(MAX_EDITS + 1))):
            edit = sample_table_edit(shot, rng)
            if edit is None:
                break
            shot = edit.answer
            shots.append(shot)
    return _look(shots[: request.num_steps], request)


def _look(shots: list[TableShot], request: Request) -> tuple[NDArray[np.uint8], Labels]:
    renderer, side = shared_renderer(request.renderer), request.size_px
    cells = side // LABEL_STRIDE
    frames, shapes, colours = [], [], []
    for shot in shots:
        scene, camera = shot.scene, shot.scene.camera()
        frames.append(renderer.render(scene.model, scene.data, camera, height=side, width=side))
        geoms = renderer.segmentation(scene.model, scene.data, camera, height=cells, width=cells)
        shape_of, colour_of = _label_tables(scene)
        shapes.append(shape_of[geoms])
        colours.append(colour_of[geoms])
    return np.stack(frames), Labels(shapes=np.stack(shapes), colours=np.stack(colours))


def _label_tables(scene: TableScene) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Shape label and colour index of each geom; the last entry answers for -1, nothing. A wooden bin, a
    drawer and a button have no colour in their name and are background.
    """
    tables = np.zeros((2, scene.model.ngeom + 1), np.uint8)
    for geom in range(scene.model.ngeom):
        colour, _, kind = (scene.identity_of_geom(geom) or "").rpartition(" ")
        shape = _SHAPE_OF_KIND.get(kind, kind)
        if colour in COLOUR_NAMES and shape in DETECTED_SHAPES:
            tables[:, geom] = 1 + DETECTED_SHAPES.index(shape), COLOUR_NAMES.index(colour)
    return tables[0], tables[1]
