"""Edits of table-tops: the second picture shows what was asked, and nothing else changed; by segmentation."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from emuworld.envs.edit_chains import CHAIN_EDITS, Edit
from emuworld.envs.episodes import TRUTH
from emuworld.envs.rendering.rays import RayRenderer
from emuworld.envs.rooms.scenes import generator
from emuworld.envs.tabletop.drafts import HELD_OUT_TABLE_PAIRS
from emuworld.envs.tabletop.edit_episodes import sample_table_combination, table_edit_stories
from emuworld.envs.tabletop.edit_words import TABLE_PHRASINGS
from emuworld.envs.tabletop.edits import TABLE_EDIT_KINDS, sample_table_edit
from emuworld.envs.tabletop.looks import sample_camera
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.shots import TableShot, sample_table_shot

SIZE = 64
RAYS = RayRenderer()


def _edits(kind: str, *, split: str = "train", tables: int = 10) -> list[Edit[TableShot]]:
    found = []
    for seed in range(tables):
        rng = generator(split, seed, 99)
        edit = sample_table_edit(sample_table_shot(split, rng), rng, kind=kind)
        found += [] if edit is None else [edit]
    assert len(found) >= tables // 2
    return found


def _names(shot: TableShot) -> np.ndarray:
    """What each pixel belongs to, [SIZE, SIZE] str."""
    scene = shot.scene
    geoms = RAYS.segmentation(scene.model, scene.data, scene.camera(), height=SIZE, width=SIZE)
    names = {int(geom): scene.identity_of_geom(int(geom)) or "" for geom in np.unique(geoms)}
    return np.vectorize(names.__getitem__, otypes=[object])(geoms)


def _frame(shot: TableShot) -> np.ndarray:
    scene = shot.scene
    return RAYS.render(scene.model, scene.data, scene.camera(), height=SIZE, width=SIZE).astype(int)


def _rest_is_kept(before: np.ndarray, after: np.ndarray, about: set[str]) -> bool:
    rest = ~np.isin(before, list(about)) & ~np.isin(after, list(about))
    return bool((before == after)[rest].mean() > 0.998)  # a rim may fall to the other side


@pytest.mark.parametrize("kind", ["add", "remove", "recolour", "replace"])
def test_things_come_go_and_change(kind: str) -> None:
    for edit in _edits(kind):
        before, after = _names(edit.references[0]), _names(edit.answer)
        assert edit.target.split()[-1] in edit.instruction  # "the ball", where there is one
        old, new = (before == edit.target).sum(), (after == edit.result).sum()
        assert (old == 0) == (kind == "add") and (new == 0) == (kind == "remove")
        assert min(n for n in (old, new) if n) >= 4
        if kind != "add":
            assert not (after == edit.target).any()
        if kind == "recolour":
            np.testing.assert_array_equal(before == edit.target, after == edit.result)
            assert edit.result.split()[0] in edit.instruction
        assert _rest_is_kept(before, after, {edit.target, edit.result})


def test_objects_move_where_they_are_asked_to() -> None:
    relations = Counter()
    facts = {"to the left of": "LeftOf", "to the right of": "RightOf", "in front of": "InFrontOf",
             "behind": "Behind", "on": "On", "in": "In"}  # fmt: skip
    for edit in _edits("move", tables=40):
        before, after = _names(edit.references[0]), _names(edit.answer)
        assert _rest_is_kept(before, after, {edit.target})
        relation = next((one for one in facts if edit.result.startswith(f"{one} the ")), edit.result)
        other = edit.result.removeprefix(f"{relation} the ")
        relations[relation] += 1
        if relation in facts:
            assert edit.answer.scene.holds(Predicate(facts[relation], (edit.target, other))), edit.instruction
            assert not edit.references[0].scene.holds(Predicate("On", (edit.target, other)))
            continue
        old, new = (np.argwhere(p == edit.target).mean(0) for p in (before, after))
        shift = {"to the left": old[1] - new[1], "to the right": new[1] - old[1], "closer": new[0] - old[0],
                 "further away": old[0] - new[0]}[relation]  # fmt: skip
        assert shift > 3, edit.instruction
    assert len(relations) >= 6, relations


def test_backgrounds_and_light_change_alone() -> None:
    seen = Counter()
    for kind in ("wall", "table", "light"):
        for edit in _edits(kind):
            before, after = _frame(edit.references[0]), _frame(edit.answer)
            names = _names(edit.references[0])
            np.testing.assert_array_equal(names, _names(edit.answer))
            changed = np.abs(before - after).max(2) > 6
            seen[edit.result] += 1
            if kind == "light":
                brightness = after.mean() / before.mean()
                warmth = (after[..., 0].mean() / after[..., 2].mean()) / (
                    before[..., 0].mean() / before[..., 2].mean()
                )
                as_called = {"darker": brightness < 0.8, "brighter": brightness > 1.1, "warm": warmth > 1.15,
                             "cold": warmth < 0.87}  # fmt: skip
                assert as_called[edit.result]
                continue
            assert changed[names == edit.target].mean() > 0.5
            assert changed[names != edit.target].mean() < 0.1
            assert edit.result in edit.instruction
    assert {"darker", "brighter", "warm", "cold", "wooden", "gray"} <= set(seen)


def test_a_viewpoint_moves_the_camera_and_never_where_tests_look_from() -> None:
    novel = [sample_camera(np.random.default_rng(seed), novel=True) for seed in range(200)]
    own = [sample_camera(np.random.default_rng(seed)) for seed in range(200)]
    for edit in _edits("viewpoint", tables=16):
        before, after = edit.references[0].plan, edit.answer.plan
        assert after.camera != before.camera and after.objects == before.objects
        assert (_names(edit.references[0]) != _names(edit.answer)).mean() > 0.02
        assert sample_table_edit(edit.answer, np.random.default_rng(0), kind="viewpoint") is None
        place = np.array(after.camera.position)
        far = [np.linalg.norm(place - one.position) for one in novel]
        assert min(far) > 0.03, "as far as the planner's tests look from"
        assert min(np.linalg.norm(place - one.position) for one in own) > 0.15


def test_two_pictures_are_combined() -> None:
    found = 0
    for seed in range(8):
        rng = generator("train", seed, 98)
        edit = sample_table_combination(sample_table_shot("train", rng), rng)
        if edit is None:
            continue
        found += 1
        first, second = (_names(shot) for shot in edit.references)
        answer = _names(edit.answer)
        assert (first == edit.target).any() and not (second == edit.target).any()
        assert (answer == edit.target).sum() >= 4
        assert _rest_is_kept(second, answer, {edit.target})
        if "object" in edit.instruction:
            assert len(edit.references[0].plan.objects) == 1
    assert found >= 5


def test_training_has_no_colours_uses_and_words_of_tests() -> None:
    held_out = {"insert", "recolour", "shift", "set", "view", "use warm", "use cold", "get rid", "turn down"}
    for kind in TABLE_EDIT_KINDS:
        for edit in _edits(kind, tables=16):
            assert not any(edit.instruction.startswith(words) for words in held_out), edit.instruction
            pairs = {(item.colour, item.kind) for item in edit.answer.plan.objects}
            assert not pairs & HELD_OUT_TABLE_PAIRS
            if edit.kind == "move" and edit.target.endswith("cylinder"):
                assert edit.result != "closer" and not edit.result.startswith("on the")
    assert {t.split()[0] for p in TABLE_PHRASINGS.values() for t in p.held_out} >= {"insert", "set", "view"}
    tested = {tuple(edit.result.split()) for edit in _edits("add", split="test", tables=30)}
    assert tested & HELD_OUT_TABLE_PAIRS


def test_an_unknown_kind_is_named() -> None:
    shot = sample_table_shot("train", np.random.default_rng(0))
    with pytest.raises(ValueError, match="'paint' is unknown; expected one of add"):
        sample_table_edit(shot, np.random.default_rng(0), kind="paint")


def test_stories_chain_edits_and_are_the_same_again() -> None:
    kinds = Counter()
    for seed in range(6):
        stories = list(table_edit_stories("train", seed, num_edits=6, renderer=RAYS, size=16))
        assert sum(len(story.segments) for story in stories) == 6
        for index, story in enumerate(stories):
            assert story.story_id == f"x2i-table-train-{seed}-{index}"
            combined = len(story.reference_images) == 2
            assert len(story.segments) == 1 if combined else 1 <= len(story.segments) <= CHAIN_EDITS
            for segment in story.segments:
                truth = json.loads(segment.images[0].features[TRUTH])
                edit, seen = truth["edit"], {name for name, *_ in truth["seen"]}
                assert (edit["kind"] == "combine") == combined
                assert edit["kind"] not in ("add", "recolour", "combine") or edit["result"] in seen
                kinds[edit["kind"]] += 1
    assert len(kinds) >= 8, kinds
    again = table_edit_stories("train", 5, num_edits=6, renderer=RAYS, size=16)
    assert [story.to_bytes() for story in again] == [story.to_bytes() for story in stories]


def test_a_shot_looks_like_the_settled_scene() -> None:
    """A few physics steps are enough: nothing stands elsewhere than after many."""
    shot = next(e.answer for e in _edits("move", tables=40) if e.result.startswith(("on", "in")))
    settled = TableScene(shot.plan)
    for quick, slow in zip(shot.scene.objects, settled.objects, strict=True):
        np.testing.assert_allclose(quick.position, slow.position, atol=2e-3)
