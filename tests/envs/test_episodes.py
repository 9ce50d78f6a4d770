"""Training stories: equal seeds, truth beside every frame, shards that resume."""

import json
from pathlib import Path

import numpy as np
import pytest

from emuworld.envs.captions import parse_caption
from emuworld.envs.commands import Pose, parse
from emuworld.envs.episodes import (
    TRUTH,
    ShardsConfig,
    build_shards,
    generate_episode,
    generate_pictures,
    shard_path,
)
from emuworld.envs.render import make_renderer
from emuworld.envs.scenes import RoomScene
from emuworld.envs.walks import walk
from emuworld.story import read_shard

RAYS = make_renderer("rays")
SIZE = 32


def test_equal_seeds_give_equal_stories() -> None:
    one = generate_episode("train", 4, num_frames=5, renderer=RAYS, size=SIZE)
    scene = RoomScene.sample("train", 4)
    assert (
        generate_episode("train", 4, num_frames=5, renderer=RAYS, size=SIZE, scene=scene).to_bytes()
        == one.to_bytes()
    )
    assert generate_episode("validation", 4, num_frames=5, renderer=RAYS, size=SIZE) != one
    pictures = generate_pictures("train", 4, num_pictures=3, renderer=RAYS, size=SIZE)
    assert generate_pictures("train", 4, num_pictures=3, renderer=RAYS, size=SIZE, scene=scene) == pictures


def test_a_walk_can_be_replayed_from_its_words() -> None:
    """The commands' words alone lead from the first pose through the poses that the truth names."""
    story = generate_episode("train", 11, num_frames=14, renderer=RAYS, size=SIZE, format="PNG")
    scene = RoomScene.sample("train", 11)
    pose = scene.start_pose(0)
    assert parse_caption(story.question) is not None
    assert [len(segment.images) for segment in story.segments] == [1] * 14
    for index, segment in enumerate(story.segments):
        image = segment.images[0]
        truth = json.loads(image.features[TRUTH])
        if index == 0:
            assert segment.text == ""
        else:
            command = parse(segment.text)
            assert command is not None, segment.text
            outcome = scene.execute(pose, command)
            pose = outcome.pose
            assert (truth["blocked"], truth["possible"]) == (outcome.blocked, outcome.possible)
        x, y, yaw_deg, pitch_deg = truth["pose"]
        there = Pose(x_m=x, y_m=y, yaw_rad=np.radians(yaw_deg), pitch_rad=np.radians(pitch_deg))
        assert there.rounded() == pose
        frame = RAYS.render(scene.model, scene.data, scene.camera(pose), height=SIZE, width=SIZE)
        np.testing.assert_array_equal(image.to_array(), frame)
        in_view = {identity for identity, *_ in truth["objects"]}
        named = parse_caption(image.caption)
        assert named is not None and {" ".join(pair) for pair in named} <= in_view
        assert bool(named) == bool(in_view)


def test_walks_move_look_back_and_rarely_stare_at_walls() -> None:
    rng = np.random.Generator(np.random.Philox(6))
    steps, revisits, targets = [], 0, 0
    for seed in range(30):
        scene = RoomScene.sample("train", seed)
        walked = walk(scene, scene.start_pose(0), rng, num_frames=24)
        poses = [step.outcome.pose for step in walked]
        revisits += sum(pose in poses[: max(0, index - 1)] for index, pose in enumerate(poses))
        targets += sum(step.command is not None and step.command.target is not None for step in walked)
        steps += walked
    share = len(steps)
    assert sum(step.outcome.blocked for step in steps) / share < 0.10
    assert sum(step.view.near_share > 0.3 for step in steps) / share < 0.10
    assert sum(step.view.bare for step in steps) / share < 0.15
    assert revisits / share > 0.08, "memory is trained by coming back to where one was"
    assert targets / share > 0.02
    assert sum(bool(step.view.objects) for step in steps) / share > 0.5


def test_pictures_mostly_show_one_or_two_objects() -> None:
    counts = []
    for seed in range(25):
        story = generate_pictures("train", seed, num_pictures=4, renderer=RAYS, size=16)
        assert all(segment.text == "" for segment in story.segments)
        counts += [len(json.loads(s.images[0].features[TRUTH])["objects"]) for s in story.segments]
    assert np.isin(counts, (1, 2)).mean() > 0.6


def test_shards_are_written_resumed_and_never_mixed(tmp_path: Path) -> None:
    config = ShardsConfig(
        out=str(tmp_path),
        num_episodes=5,
        num_frames=2,
        num_pictures=1,
        episodes_per_shard=2,
        size=16,
        workers=1,
        renderer="rays",
    )
    assert build_shards(config) == 3
    assert build_shards(config) == 0
    names = sorted(path.name for path in tmp_path.glob("*.stories"))
    assert names == [f"train-0000000{a}-0000000{b}.stories" for a, b in ((0, 2), (2, 4), (4, 5))]
    stories = [story for path in sorted(tmp_path.glob("*.stories")) for story in read_shard(path)]
    assert [story.story_id for story in stories[:4]] == [
        "walk-train-0",
        "pictures-train-0",
        "walk-train-1",
        "pictures-train-1",
    ]
    assert len(stories) == 10
    # A file cut short by a kill is written again, the others are left alone.
    cut = shard_path(config, 2)
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    before = shard_path(config, 0).stat().st_mtime_ns
    assert build_shards(config) == 1
    assert cut.read_bytes() == whole and shard_path(config, 0).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="choose another out"):
        build_shards(ShardsConfig(out=str(tmp_path), num_frames=3, size=16))


def test_processes_write_the_same_bytes(tmp_path: Path) -> None:
    common = {
        "num_episodes": 2,
        "num_frames": 2,
        "num_pictures": 0,
        "episodes_per_shard": 1,
        "size": 16,
        "renderer": "rays",
    }
    configs = [
        ShardsConfig(out=str(tmp_path / str(workers)), workers=workers, **common) for workers in (1, 2)
    ]
    for config in configs:
        assert build_shards(config) == 2
    for first in (0, 1):
        assert shard_path(configs[0], first).read_bytes() == shard_path(configs[1], first).read_bytes()


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match="split='dev'"):
        ShardsConfig(split="dev")
    with pytest.raises(ValueError, match="num_frames=0"):
        ShardsConfig(num_frames=0)
