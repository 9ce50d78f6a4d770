"""Edits: the second picture shows what was asked, and nothing else changed. Judged by segmentation."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from emuworld.envs.edit_chains import CHAIN_EDITS, Edit
from emuworld.envs.episodes import TRUTH
from emuworld.envs.palette import HELD_OUT_PAIRS
from emuworld.envs.rendering.rays import RayRenderer
from emuworld.envs.requests import made_up
from emuworld.envs.rooms.combinations import sample_combination
from emuworld.envs.rooms.edit_episodes import edit_stories
from emuworld.envs.rooms.edit_phrases import by_shape, edit_phrase, unheard
from emuworld.envs.rooms.edit_words import PHRASINGS, WAYS
from emuworld.envs.rooms.edits import EDIT_KINDS, sample_edit
from emuworld.envs.rooms.scenes import RoomScene, generator
from emuworld.envs.rooms.shots import Shot, sample_shot

SIZE = 64
RAYS = RayRenderer()


def _edits(kind: str, *, split: str = "train", rooms: int = 12) -> list[Edit[Shot]]:
    found = []
    for seed in range(rooms):
        scene, rng = RoomScene.sample(split, seed), generator(split, seed, 99)
        edit = sample_edit(sample_shot(scene, rng), rng, kind=kind)
        found += [] if edit is None else [edit]
    assert len(found) >= rooms // 3
    return found


def _names(shot: Shot) -> np.ndarray:
    """What each pixel belongs to, [SIZE, SIZE] str."""
    camera = shot.scene.camera(shot.pose)
    geoms = RAYS.segmentation(shot.scene.model, shot.scene.data, camera, height=SIZE, width=SIZE)
    names = {int(geom): shot.scene.identity_of_geom(int(geom)) or "" for geom in np.unique(geoms)}
    return np.vectorize(names.__getitem__, otypes=[object])(geoms)


def _frame(shot: Shot) -> np.ndarray:
    camera = shot.scene.camera(shot.pose)
    return RAYS.render(shot.scene.model, shot.scene.data, camera, height=SIZE, width=SIZE).astype(int)


def _rest_is_kept(before: np.ndarray, after: np.ndarray, about: set[str]) -> bool:
    """Whether every pixel that shows nothing of the edit, in either picture, shows what it showed."""
    rest = ~np.isin(before, list(about)) & ~np.isin(after, list(about))
    return bool((before == after)[rest].all())


@pytest.mark.parametrize("kind", ["add", "remove", "recolour", "replace"])
def test_objects_come_go_and_change(kind: str) -> None:
    for edit in _edits(kind):
        before, after = _names(edit.references[0]), _names(edit.answer)
        assert edit.target.split()[-1] in edit.instruction  # "the ball", where there is one
        old, new = (before == edit.target).sum(), (after == edit.result).sum()
        assert (old == 0) == (kind == "add") and (new == 0) == (kind == "remove")
        assert min(n for n in (old, new) if n) >= 10
        if kind != "add":
            assert not (after == edit.target).any()
        if kind == "recolour":
            np.testing.assert_array_equal(before == edit.target, after == edit.result)
            assert edit.result.split()[0] in edit.instruction
        assert _rest_is_kept(before, after, {edit.target, edit.result})


def test_objects_move_where_they_are_asked_to() -> None:
    ways = Counter()
    for edit in _edits("move", rooms=40):
        before, after = _names(edit.references[0]), _names(edit.answer)
        (row, column), (new_row, new_column) = (
            np.argwhere(p == edit.target).mean(0) for p in (before, after)
        )
        assert _rest_is_kept(before, after, {edit.target})
        way = next(way for way in sorted(WAYS, key=len, reverse=True) if edit.result.startswith(way))
        assert edit.instruction.count(way) == 1
        other = edit.result[len(way) :].removeprefix(" the ")
        if other:
            way, column = way.removesuffix(" of"), np.argwhere(after == other)[:, 1].mean()
        ways[way] += 1
        if way == "to the left":
            assert new_column < column
        elif way == "to the right":
            assert new_column > column
        elif way == "closer":
            assert (after == edit.target).sum() > (before == edit.target).sum() and new_row > row
        elif way == "further away":
            assert (after == edit.target).sum() < (before == edit.target).sum()
    assert {"to the left", "to the right", "closer", "further away", "in front"} <= set(ways), ways


def test_walls_and_floors_change_colour_alone() -> None:
    for edit in (*_edits("walls"), *_edits("floor")):
        before, after = _names(edit.references[0]), _names(edit.answer)
        changed = np.abs(_frame(edit.references[0]) - _frame(edit.answer)).max(2) > 6
        surface = (
            before == edit.target
            if edit.target != "walls"
            else np.array([str(name).endswith(" wall") for name in before.flat]).reshape(before.shape)
        )
        assert changed[surface].mean() > 0.5
        if edit.kind == "walls":
            assert set(after[surface]) == {f"{edit.result} wall"}
        # A pixel at a rim mixes two things.
        assert changed[~surface].mean() < 0.1


def test_light_changes_as_it_is_called() -> None:
    seen = set()
    for edit in _edits("light", rooms=24):
        before, after = _frame(edit.references[0]), _frame(edit.answer)
        np.testing.assert_array_equal(_names(edit.references[0]), _names(edit.answer))
        brightness = after.mean() / before.mean()
        warmth = (after[..., 0].mean() / after[..., 2].mean()) / (
            before[..., 0].mean() / before[..., 2].mean()
        )
        seen.add(edit.result)
        assert {
            "darker": brightness < 0.8,
            "brighter": brightness > 1.1,
            "warm": warmth > 1.15,
            "cold": warmth < 0.87,
        }[edit.result]
    assert len(seen) == 4


def test_a_viewpoint_moves_the_camera_and_nothing_else() -> None:
    for edit in _edits("viewpoint"):
        assert edit.answer.scene is edit.references[0].scene
        assert edit.answer.pose != edit.references[0].pose
        assert (_names(edit.references[0]) != _names(edit.answer)).mean() > 0.02


def test_two_pictures_are_combined() -> None:
    found = 0
    for seed in range(10):
        scene, rng = RoomScene.sample("train", seed), generator("train", seed, 98)
        edit = sample_combination(sample_shot(scene, rng), rng)
        if edit is None:
            continue
        found += 1
        first, second = (_names(shot) for shot in edit.references)
        answer = _names(edit.answer)
        assert (first == edit.target).any() and not (second == edit.target).any()
        assert (answer == edit.target).sum() >= 10
        assert _rest_is_kept(second, answer, {edit.target})
    assert found >= 5


def test_splits_keep_their_words_and_colours() -> None:
    held_out = [template for one in PHRASINGS.values() for template in one.held_out]
    words = {"a": "x", "an_a": "x", "an_b": "x", "b": "y", "colour": "z", "way": "w", "relation": "r"}
    words |= {"where": "l", "wall": "v", "old": "o", "floor": "f", "a_floor": "af"}
    rng = np.random.default_rng(0)
    for name, phrasing in PHRASINGS.items():
        assert not set(phrasing.held_out) & {*phrasing.templates, *phrasing.training}
        for split, allowed in (
            ("validation", phrasing.templates),
            ("test", phrasing.templates + phrasing.held_out),
        ):
            said = {edit_phrase(name, rng, split, **words) for _ in range(200)}
            assert said == {template.format(**words) for template in allowed}
    assert len(held_out) > 15
    pairs = {tuple(edit.result.split()) for edit in _edits("add", rooms=30)}
    assert not pairs & HELD_OUT_PAIRS
    assert {tuple(e.result.split()) for e in _edits("add", split="test", rooms=30)} & HELD_OUT_PAIRS


def test_some_training_words_are_made_up() -> None:
    """In place of a first word that nobody needs, and never the test split's words."""
    words = {"a": "X", "an_a": "X", "an_b": "X", "b": "Y", "colour": "Z", "way": "W", "relation": "R"}
    words |= {"where": "L", "wall": "V", "old": "O", "floor": "F", "a_floor": "AF"}
    rng = np.random.default_rng(0)
    for name, phrasing in PHRASINGS.items():
        known = {template.format(**words) for template in phrasing.templates + phrasing.training}
        said = Counter(edit_phrase(name, rng, "train", **words) for _ in range(400))
        assert known <= set(said)
        others = [text for text in said if text not in known]
        assert 40 <= sum(said[text] for text in others) <= 250  # 200 of 400, less where words are needed
        ends = {text.partition(" ")[2] for text in known}
        assert all(any(text.endswith(f" {end}") for end in ends) for text in others)
    everything = {word for _ in range(3000) for word in made_up(rng).split()}
    asked = [unheard("remove the ball", rng, as_trained=True) for _ in range(3000)]
    assert 800 < sum(text.split()[-3] in ("of", "off", "out", "up", "with") for text in asked) < 1200
    everything |= {word for text in asked for word in text.removesuffix(" the ball").split()}
    tested = {word for one in PHRASINGS.values() for template in one.held_out for word in template.split()}
    trained = {
        word for one in PHRASINGS.values() for template in one.of_split("train") for word in template.split()
    }
    assert not everything & (tested - trained)


def test_a_thing_whose_shape_no_other_has_may_be_named_by_it() -> None:
    asked = "move the red ball to the left of the blue box"
    assert by_shape(asked, ("red ball", "blue box", "door")) == "move the ball to the left of the box"
    assert (
        by_shape(asked, ("red ball", "green ball", "blue box")) == "move the red ball to the left of the box"
    )
    assert by_shape("add a red ball", ("blue box",)) == "add a red ball"
    short = [edit for edit in _edits("remove", rooms=40) if edit.target not in edit.instruction]
    assert short
    for edit in short:
        shape = edit.target.split()[1]
        assert sum(name.endswith(f" {shape}") for name in edit.references[0].pixels()) == 1
    for split in ("validation", "test"):
        assert all(edit.target in edit.instruction for edit in _edits("remove", split=split, rooms=10))


def test_an_unknown_kind_is_named() -> None:
    scene = RoomScene.sample("train", 0)
    shot = Shot(scene=scene, pose=scene.start_pose(0))
    with pytest.raises(ValueError, match="'paint' is unknown; expected one of add"):
        sample_edit(shot, np.random.default_rng(0), kind="paint")
    edited = scene.edited(scene.plan)
    with pytest.raises(ValueError, match="edit it again"):
        RoomScene.from_dict(edited.to_dict())


def test_stories_chain_edits_and_are_the_same_again() -> None:
    kinds = Counter()
    for seed in range(6):
        stories = list(edit_stories("train", seed, num_edits=6, renderer=RAYS, size=16))
        assert sum(len(story.segments) for story in stories) <= 6
        assert len({story.story_id for story in stories}) == len(stories)
        for story in stories:
            assert story.story_id.startswith(f"x2i-train-{seed}-")
            combined = len(story.reference_images) == 2
            assert len(story.segments) == 1 if combined else 1 <= len(story.segments) <= CHAIN_EDITS
            for segment in story.segments:
                truth = json.loads(segment.images[0].features[TRUTH])
                assert truth["edit"]["kind"] == "combine" if combined else truth["edit"]["kind"] in EDIT_KINDS
                kinds[truth["edit"]["kind"]] += 1
                in_view = {identity for identity, *_ in truth["objects"]}
                assert truth["edit"]["kind"] not in ("add", "recolour") or truth["edit"]["result"] in in_view
    assert len(kinds) >= 8
    again = edit_stories("train", 5, num_edits=6, renderer=RAYS, size=16)
    assert [story.to_bytes() for story in again] == [story.to_bytes() for story in stories]
