"""Edits as they should come out: pictures before and after from the simulator, and pictures that are wrong.

Every case is made with two counter-examples that tell how far a judge is right: `wrong` has another edit in
place of the asked one, `spoilt` the asked one and another besides. As `truth.py`: worker processes, no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emuworld.envs.edit_chains import Edit
from emuworld.envs.rooms.combinations import sample_combination
from emuworld.envs.rooms.edits import EDIT_KINDS, sample_edit
from emuworld.envs.rooms.scenes import RoomScene
from emuworld.envs.rooms.shots import Shot, sample_shot
from emuworld.envs.tabletop.edit_episodes import sample_table_combination
from emuworld.envs.tabletop.edits import TABLE_EDIT_KINDS, sample_table_edit
from emuworld.envs.tabletop.shots import TableShot, sample_table_shot
from emuworld.tasks.metrics import Frame, Mask, differ, seen_before_mask
from emuworld.tasks.truth import LABEL_STRIDE, Request, shared_renderer

ROOM_KINDS, TABLE_KINDS = (*EDIT_KINDS, "combine"), (*TABLE_EDIT_KINDS, "combine")
_GROUPS = {"walls": "background", "floor": "background", "wall": "background", "table": "background"}
_OBJECT_KINDS = ("add", "remove", "recolour", "move", "replace")  # there are such in both worlds

AnyShot = Shot | TableShot
AnyEdit = Edit[Shot] | Edit[TableShot]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a thing is in a picture: middle (0 to 1) and share of the picture."""

    column: float
    row: float
    share: float


@dataclass(frozen=True, kw_only=True, eq=False)
class EditTruth:
    """An edit with its pictures [H, W, 3] and what is known about them."""

    index: int
    world: str  # rooms | tables
    kind: str  # one of ROOM_KINDS or TABLE_KINDS
    instruction: str
    target: str
    result: str
    references: tuple[Frame, ...]  # the last is the one that is edited
    after: Frame
    wrong: Frame
    spoilt: Frame
    changed: Mask  # [H, W], True = the edit shows here
    vacated: Mask  # [H, W], True = showed the target before, and does not afterwards
    occupied: Mask  # [H, W], True = shows the result (or the moved target) afterwards, and did not before
    in_view: tuple[str, ...]  # things in the picture before
    given: Mask  # [H, W], True = what the true answer shows here is in view in the picture before
    place_before: Place | None  # of the target, where it was in view
    place_after: Place | None  # of the result, or of a moved target

    @property
    def before(self) -> Frame:
        return self.references[-1]

    @property
    def group(self) -> str:
        """The kind, all backgrounds as one."""
        return _GROUPS.get(self.kind, self.kind)

    @property
    def is_everywhere(self) -> bool:
        """Whether the edit changes the looks of everything and takes nothing away."""
        return self.group in ("background", "light", "viewpoint")


@dataclass(frozen=True, kw_only=True, eq=False)
class _World:
    """What rooms and table-tops have in common: shots, edits of a kind, cameras."""

    kinds: tuple[str, ...]
    shot: Callable[[str, np.random.Generator], Any]
    edit: Callable[..., Any]
    combination: Callable[[Any, np.random.Generator], Any]


def _room_shot(split: str, rng: np.random.Generator) -> Shot:
    return sample_shot(RoomScene.sample(split, int(rng.integers(2**31))), rng)


_WORLDS = {
    "rooms": _World(kinds=ROOM_KINDS, shot=_room_shot, edit=sample_edit, combination=sample_combination),
    "tables": _World(
        kinds=TABLE_KINDS, shot=sample_table_shot, edit=sample_table_edit,
        combination=sample_table_combination,
    ),
}  # fmt: skip


def make_edit(request: Request) -> EditTruth:
    """The edit of a case: rooms and table-tops in turn, the kinds in turn within each."""
    worlds = tuple(_WORLDS)
    name = worlds[request.index % len(worlds)]
    world = _WORLDS[name]
    kind = world.kinds[request.index // len(worlds) % len(world.kinds)]
    for attempt in range(200):
        rng = np.random.default_rng([request.seed, attempt])
        shot = world.shot(request.split, rng)
        edit = world.combination(shot, rng) if kind == "combine" else world.edit(shot, rng, kind=kind)
        if edit is None or "wooden" in f"{edit.target} {edit.result}":  # the judge knows named colours alone
            continue
        wrong, spoilt = _wrong(world, edit, rng), _spoilt(world, edit, rng)
        if wrong is not None and spoilt is not None:
            return _drawn(request, name, edit, wrong=wrong, spoilt=spoilt)
    raise ValueError(f"no edit of kind {kind} in 200 draws of the {request.split} split; use another seed")


def _wrong(world: _World, edit: AnyEdit, rng: np.random.Generator) -> AnyShot | None:
    """Another edit of the same picture: of the same kind where there is another."""
    base = edit.references[-1]
    kind = "add" if edit.kind == "combine" else edit.kind
    for attempt in range(12):
        other = world.edit(base, rng, kind=kind if attempt < 8 else None)
        if other is None or (other.target, other.result) == (edit.target, edit.result):
            continue
        if edit.kind in ("remove", "replace", "move") and other.target == edit.target and attempt >= 8:
            continue
        if edit.kind in ("add", "combine") and other.result == edit.result:
            continue
        shot: AnyShot = other.answer
        return shot
    return None


def _spoilt(world: _World, edit: AnyEdit, rng: np.random.Generator) -> AnyShot | None:
    """The asked edit, and one more about something else."""
    about = {edit.target, edit.result}
    for _ in range(12):
        kind = _OBJECT_KINDS[int(rng.integers(len(_OBJECT_KINDS)))]
        other = world.edit(edit.answer, rng, kind=kind)
        if other is not None and not {other.target, other.result} & about:
            shot: AnyShot = other.answer
            return shot
    return None


def _drawn(request: Request, world: str, edit: AnyEdit, *, wrong: AnyShot, spoilt: AnyShot) -> EditTruth:
    base = edit.references[-1]
    before, after = _frame(base, request), _frame(edit.answer, request)
    old, new = _names(base, request), _names(edit.answer, request)
    differs = differ(before, after)
    about = _enlarged(np.isin(old, _about(edit)) | np.isin(new, _about(edit)))
    shown = edit.target if edit.kind == "move" else edit.result
    return EditTruth(
        index=request.index,
        world=world,
        kind=edit.kind,
        instruction=edit.instruction,
        target=edit.target,
        result=edit.result,
        references=(*(_frame(shot, request) for shot in edit.references[:-1]), before),
        after=after,
        wrong=_frame(wrong, request),
        spoilt=_frame(spoilt, request),
        changed=differs | about,
        vacated=_enlarged((old == edit.target) & (new != edit.target)),
        occupied=_enlarged((new == shown) & (old != shown)),
        in_view=tuple(sorted({str(name) for name in old.flat} - {""})),
        given=_given(base, edit.answer, request) if edit.kind == "viewpoint" else np.ones_like(differs),
        place_before=_place(old == edit.target),
        place_after=_place(new == shown),
    )


def _about(edit: AnyEdit) -> list[str]:
    return [edit.target] if edit.kind == "move" else [edit.target, edit.result]


def _camera(shot: AnyShot) -> Any:
    return shot.scene.camera(shot.pose) if isinstance(shot, Shot) else shot.scene.camera()


def _frame(shot: AnyShot, request: Request) -> Frame:
    renderer, side = shared_renderer(request.renderer), request.size_px
    return renderer.render(shot.scene.model, shot.scene.data, _camera(shot), height=side, width=side)


def _given(before: AnyShot, after: AnyShot, request: Request) -> Mask:
    """What of the view after the camera has moved was in view before."""
    renderer, side = shared_renderer(request.renderer), request.size_px
    old, new = (
        (
            renderer.depth(shot.scene.model, shot.scene.data, _camera(shot), height=side, width=side),
            _camera(shot),
        )
        for shot in (before, after)
    )
    return seen_before_mask(*new, [old])


def _names(shot: AnyShot, request: Request) -> NDArray[np.object_]:
    """What each cell of LABEL_STRIDE x LABEL_STRIDE pixels belongs to."""
    cells = request.size_px // LABEL_STRIDE
    geoms = shared_renderer(request.renderer).segmentation(
        shot.scene.model, shot.scene.data, _camera(shot), height=cells, width=cells
    )
    names = {int(geom): shot.scene.identity_of_geom(int(geom)) or "" for geom in np.unique(geoms)}
    return np.vectorize(names.__getitem__, otypes=[object])(geoms)


def _enlarged(cells: NDArray[np.bool_]) -> Mask:
    """A mask of cells as one of pixels."""
    return cells.repeat(LABEL_STRIDE, axis=0).repeat(LABEL_STRIDE, axis=1)


def _place(cells: NDArray[np.bool_]) -> Place | None:
    if not cells.any():
        return None
    row, column = (np.argwhere(cells).mean(0) + 0.5) / len(cells)
    return Place(column=float(column), row=float(row), share=float(cells.mean()))
