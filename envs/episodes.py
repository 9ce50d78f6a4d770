"""Scenes -> stories: the training data of the small model, with captions, commands and truth.

`generate_episode` is a walk through a room (question = a prompt, then one segment a step: the command's
words and the view it leads to), `generate_pictures` a set of single views of a room for text-to-image. Both
depend on nothing but their arguments. `emuworld.envs.shards` writes many of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from emuworld.envs.render import Renderer
from emuworld.envs.rooms.captions import View, asked_caption, caption, walk_prompt
from emuworld.envs.rooms.commands import PITCH_STEP_RAD, Outcome, Pose, phrase
from emuworld.envs.rooms.scenes import RoomScene, generator
from emuworld.envs.rooms.walks import walk
from emuworld.questions import explore_question
from emuworld.story import Story, StoryImage, StorySegment

TRUTH = "truth"  # name of the feature that holds a frame's truth as JSON
PUBLISHED_SHARE = 0.12  # of questions in the form of the published model (`emuworld.questions`)
_WALK_STREAM, _PICTURE_STREAM, _QUESTION_STREAM = 10, 11, 13


def generate_episode(
    split: str,
    seed: int,
    *,
    num_frames: int,
    renderer: Renderer,
    size: int = 256,
    format: str = "JPEG",
    scene: RoomScene | None = None,
) -> Story:
    """A walk of `num_frames` views through the room of a split and a seed.

    `scene` may hand in that room where it is compiled already. Every image has its caption and, in feature
    "truth", JSON with pose, objects in view with pixel counts at 256 px, and what the command did.
    """
    scene = RoomScene.sample(split, seed) if scene is None else scene
    rng = generator(split, seed, _WALK_STREAM)
    steps = walk(scene, scene.start_pose(0), rng, num_frames=num_frames)
    question = walk_prompt(steps[0].view, rng, split=split)
    if generator(split, seed, _QUESTION_STREAM).random() < PUBLISHED_SHARE:
        question = explore_question(caption(steps[0].view))
    draw = partial(stored_view, scene, renderer=renderer, size=size, format=format)
    segments = []
    for step in steps:
        text = "" if step.command is None else phrase(step.command, rng, split)
        image = draw(step.outcome, step.view, caption=asked_caption(step.view, rng, split=split))
        segments.append(StorySegment(text=text, images=(image,)))
    return Story(question=question, segments=tuple(segments), story_id=f"walk-{split}-{seed}")


def generate_pictures(
    split: str,
    seed: int,
    *,
    num_pictures: int,
    renderer: Renderer,
    size: int = 256,
    format: str = "JPEG",
    scene: RoomScene | None = None,
) -> Story:
    """Single views of a room as one story without commands, most of them with one or two objects."""
    scene = RoomScene.sample(split, seed) if scene is None else scene
    rng = generator(split, seed, _PICTURE_STREAM)
    draw = partial(stored_view, scene, renderer=renderer, size=size, format=format)
    segments = []
    for pose, view in _picture_poses(scene, rng, num_pictures):
        image = draw(Outcome(pose=pose), view, caption=asked_caption(view, rng, split=split))
        segments.append(StorySegment(images=(image,)))
    return Story(segments=tuple(segments), story_id=f"pictures-{split}-{seed}")


def _picture_poses(scene: RoomScene, rng: np.random.Generator, count: int) -> Iterator[tuple[Pose, View]]:
    """Poses over the room, redrawn towards one or two objects in view and away from walls before the nose."""
    for _ in range(count):
        for _ in range(4):
            pose = scene.random_pose(rng)
            if rng.random() < 0.12:
                pose = replace(
                    pose, pitch_rad=pose.pitch_rad + PITCH_STEP_RAD * (1 if rng.random() < 0.4 else -1)
                )
            view = scene.view(pose)
            seen = len(view.named)
            keep = (0.06, 1.0, 1.0, 0.55, 0.35)[min(seen, 4)]
            if seen and view.named[0].pixels < 250:
                keep *= 0.4
            if view.near_share < 0.25 and rng.random() < keep:
                break
        yield pose, view


def stored_view(
    scene: RoomScene,
    outcome: Outcome,
    view: View,
    *,
    caption: str,
    renderer: Renderer,
    size: int,
    format: str,
    truth: Mapping[str, Any] | None = None,
) -> StoryImage:
    """What is seen from a pose, drawn, with its caption and its truth; `truth` adds values of JSON types."""
    pixels = renderer.render(scene.model, scene.data, scene.camera(outcome.pose), height=size, width=size)
    features = {TRUTH: _truth(view, outcome, truth or {})}
    return StoryImage.from_array(pixels, format=format, caption=caption, features=features)


def _truth(view: View, outcome: Outcome, more: Mapping[str, Any]) -> bytes:
    """A frame's truth as compact JSON."""
    pose = outcome.pose
    truth = {
        "pose": [
            pose.x_m,
            pose.y_m,
            round(math.degrees(pose.yaw_rad), 6),
            round(math.degrees(pose.pitch_rad), 6),
        ],
        "objects": [[item.identity, item.pixels, item.column, item.distance_m] for item in view.objects],
        "landmarks": [list(item) for item in view.landmarks],
        "walls": [[name, round(share, 3)] for name, share in view.walls],
        "near": round(view.near_share, 3),
        "moved_m": round(outcome.moved_m, 6),
        "blocked": outcome.blocked,
        "possible": outcome.possible,
        **more,
    }
    return json.dumps(truth, separators=(",", ":")).encode()
