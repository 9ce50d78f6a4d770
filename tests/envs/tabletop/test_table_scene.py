"""Table-tops as data: drawn from their arguments alone, JSON both ways, what tests keep from training."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from emuworld.envs.render import make_renderer
from emuworld.envs.tabletop.drafts import HELD_OUT_TABLE_PAIRS
from emuworld.envs.tabletop.layout import ObjectPlan, TablePlan
from emuworld.envs.tabletop.looks import NOVEL_TABLES, NOVEL_WALLS, TABLES, WALLS
from emuworld.envs.tabletop.sampling import sample_plan
from emuworld.envs.tabletop.scene import TableScene


def test_a_scene_depends_on_split_and_seed_alone() -> None:
    first, again = TableScene.sample("train", 5), TableScene.sample("train", 5)
    assert first.to_dict() == again.to_dict() and first.state_hash() == again.state_hash()
    hashes = {TableScene.sample(split, seed).scene_hash() for split in ("train", "test") for seed in range(4)}
    assert len(hashes) == 8


def test_json_gives_the_same_scene_and_state() -> None:
    scene = TableScene.sample("test", 3, kinds=("cube", "ball", "plate", "open drawer", "button"))
    twin = TableScene.from_dict(json.loads(json.dumps(scene.to_dict())))
    assert twin.scene_hash() == scene.scene_hash() and twin.to_dict() == scene.to_dict()
    assert twin.state_hash() == scene.state_hash()
    other = scene.to_dict()
    other["objects"][0]["yaw_rad"] = other["objects"][0]["yaw_rad"] + 0.1
    assert TableScene.from_dict(other).scene_hash() != scene.scene_hash()


def test_pinned_hash() -> None:
    """Frozen suites name scenes by this hash: a change here breaks them."""
    plan = TablePlan(
        objects=(ObjectPlan(kind="cube", colour="red", size_m=(0.03,), position=(0.5, 0.0, 0.03)),)
    )
    assert TableScene(plan).scene_hash() == "dc49e6119593155a"


def test_things_stand_still_and_apart_at_the_start() -> None:
    for seed in range(12):
        scene = TableScene.sample("train", seed)
        settled = {item.name: np.array(item.position) for item in scene.objects}
        for item in scene.plan.objects:
            assert np.linalg.norm(settled[item.name] - item.position) < 2e-3
        scene.settle(1.0)
        for item in scene.objects:
            assert np.linalg.norm(settled[item.name] - item.position) < 2e-4
        pairs = [pair for pair in scene.contacts() if not pair & {"table", "drawer", "button", "robot"}]
        assert pairs == []


def test_kinds_and_names_are_what_stands_there() -> None:
    scene = TableScene.sample(
        "train", 1, kinds=("red cube", "ball", "wooden bin", "drawer"), num_distractors=2
    )
    assert scene.objects[0].name == "red cube" and scene.objects[1].kind == "ball" and len(scene.objects) == 4
    assert set(scene.furniture) == {"drawer", "wooden bin"}
    measured = scene.measure()
    assert set(measured["objects"]) == {item.name for item in scene.objects}
    assert measured["drawers"] == {"drawer": pytest.approx(0.0, abs=0.02)} and measured["held"] is None
    json.dumps(measured)


def test_training_never_has_what_is_kept_for_tests() -> None:
    for seed in range(40):
        plan = sample_plan("train", seed)
        assert not {(item.colour, item.kind) for item in plan.objects} & HELD_OUT_TABLE_PAIRS
        assert plan.look.table in TABLES and plan.look.wall in WALLS
        assert abs(plan.camera.position[1]) < 0.1
        novel = sample_plan(
            "test", seed, kinds=("cube", "ball"), novel=("pairs", "layout", "background", "camera")
        )
        assert {(item.colour, item.kind) for item in novel.objects} & HELD_OUT_TABLE_PAIRS
        assert novel.look.table in NOVEL_TABLES and novel.look.wall in NOVEL_WALLS
        assert abs(novel.camera.position[1]) > 0.1


def test_every_thing_is_in_the_picture() -> None:
    renderer = make_renderer("rays")
    for split, novel in (("train", ()), ("test", ("camera",))):
        for seed in range(3):
            scene = TableScene.sample(
                split, seed, kinds=("cube", "ball", "plate", "open drawer"), novel=novel
            )
            ids = renderer.segmentation(scene.model, scene.data, scene.camera(), height=96, width=96)
            names, counts = np.unique(
                [scene.identity_of_geom(geom) or "" for geom in ids.ravel()], return_counts=True
            )
            seen = dict(zip(names.tolist(), counts.tolist(), strict=True))
            for item in scene.objects:
                assert seen.get(item.name, 0) > 10
            assert seen["drawer"] > 10 and seen["robot"] > 100


def test_left_is_left_in_the_picture() -> None:
    scene = TableScene(
        TablePlan(
            objects=(
                ObjectPlan(kind="cube", colour="red", size_m=(0.03,), position=(0.5, -0.2, 0.03)),
                ObjectPlan(kind="cube", colour="blue", size_m=(0.03,), position=(0.5, 0.2, 0.03)),
                ObjectPlan(kind="cube", colour="green", size_m=(0.03,), position=(0.65, 0.0, 0.03)),
            )
        )
    )
    ids = make_renderer("rays").segmentation(scene.model, scene.data, scene.camera(), height=96, width=96)
    middle = {
        name: np.argwhere(ids == scene.model.geom(f"object/{name}").id).mean(axis=0)
        for name in ("red cube", "blue cube", "green cube")
    }
    assert middle["red cube"][1] < 40 < 56 < middle["blue cube"][1]  # columns
    assert middle["green cube"][0] > middle["red cube"][0] + 5  # rows: closer is lower


def test_a_copy_lives_its_own_life() -> None:
    scene = TableScene.sample("train", 2, kinds=("cube",))
    twin = copy.deepcopy(scene)
    assert twin.state_hash() == scene.state_hash()
    twin.place_object(twin.objects[0].name, (0.5, 0.3, 0.1))
    assert twin.state_hash() != scene.state_hash()


def test_errors_name_what_came() -> None:
    with pytest.raises(ValueError, match="'sphere' is no thing"):
        TableScene.sample("train", 0, kinds=("sphere",))
    with pytest.raises(ValueError, match="for the test split"):
        TableScene.sample("train", 0, novel=("camera",))
    with pytest.raises(ValueError, match="fewer"):
        TableScene.sample("train", 0, kinds=("bin",) * 9)
    with pytest.raises(ValueError, match="state of 3 numbers"):
        TableScene.sample("train", 0, kinds=("cube",)).restore(np.zeros(3).tobytes())
    scene = TableScene.sample("train", 0, kinds=("cube",))
    with pytest.raises(ValueError, match="not finite"):
        scene.restore(np.full_like(np.frombuffer(scene.save()), np.inf).tobytes())
    spec = TableScene.sample("train", 0, kinds=("red cube",)).to_dict()
    with pytest.raises(ValueError, match="change colour and kind with the name"):
        TableScene.from_dict({**spec, "objects": [{**spec["objects"][0], "colour": "blue"}]})
    with pytest.raises(ValueError, match="twice"):
        TableScene.from_dict({**spec, "objects": spec["objects"] * 2})
    with pytest.raises(ValueError, match="no walls"):
        TableScene.from_dict({**spec, "walls": 1})
