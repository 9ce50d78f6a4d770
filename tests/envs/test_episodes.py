"""Training stories of rooms: equal seeds, truth beside every frame."""

import json

import numpy as np

from emuworld.envs.episodes import TRUTH, generate_episode, generate_pictures
from emuworld.envs.palette import object_pairs
from emuworld.envs.render import make_renderer
from emuworld.envs.rooms.captions import parse_caption
from emuworld.envs.rooms.commands import Pose, parse
from emuworld.envs.rooms.scenes import RoomScene
from emuworld.envs.rooms.walks import walk

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
        named = {identity for pair in object_pairs("test") if (identity := " ".join(pair)) in image.caption}
        named |= {identity for identity in in_view if identity in image.caption.lower()}  # "Red ball, …"
        assert named <= in_view and bool(named) == bool(in_view)


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
