"""Scenes -> stories: the training data of the small model, with captions, commands and truth.

`generate_episode` is a walk through a room (question = a prompt, then one segment a step: the command's
words and the view it leads to), `generate_pictures` a set of single views of a room for text-to-image. Both
depend on nothing but their arguments. `build_shards` writes many of both from several processes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from emuworld.envs.captions import View, caption, walk_prompt
from emuworld.envs.commands import PITCH_STEP_RAD, Outcome, Pose, phrase
from emuworld.envs.render import Renderer, make_renderer
from emuworld.envs.scenes import SPLITS, RoomScene, generator
from emuworld.envs.walks import walk
from emuworld.story import Shard, ShardError, Story, StoryImage, StorySegment, write_shard

TRUTH = "truth"  # name of the feature that holds a frame's truth as JSON
_WALK_STREAM, _PICTURE_STREAM = 10, 11


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Training data to render: rooms, each with one walk and a set of single views."""

    out: str = "outputs/data/train"  # folder for the shards; finished ones there are kept
    split: str = "train"  # train | validation | test: rooms and phrasings of which split
    num_episodes: int = 512  # rooms, each with one walk
    num_frames: int = 24  # views in a walk
    num_pictures: int = 8  # single views of each room besides its walk; 0 for none
    first_seed: int = 0  # seed of the first room
    episodes_per_shard: int = 32  # rooms in one file
    size: int = 256  # picture side in pixels
    format: str = "JPEG"  # JPEG (quality 95, full colour resolution) | PNG (lossless)
    renderer: str = "auto"  # auto | gl | rays
    workers: int = 0  # processes; 0 = one for each core, at most eight

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r} is unknown; expected one of {', '.join(SPLITS)}")
        for name in ("num_episodes", "num_frames", "episodes_per_shard", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if self.num_pictures < 0 or self.first_seed < 0 or self.workers < 0:
            raise ValueError("num_pictures, first_seed and workers must not be negative")


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
    segments = []
    for step in steps:
        text = "" if step.command is None else phrase(step.command, rng, split)
        picture = _picture(scene, step.outcome.pose, renderer=renderer, size=size)
        image = StoryImage.from_array(
            picture,
            format=format,
            caption=caption(step.view, rng, split=split),
            features={TRUTH: _truth(step.view, step.outcome)},
        )
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
    segments = []
    for pose, view in _picture_poses(scene, rng, num_pictures):
        image = StoryImage.from_array(
            _picture(scene, pose, renderer=renderer, size=size),
            format=format,
            caption=caption(view, rng, split=split),
            features={TRUTH: _truth(view, Outcome(pose=pose))},
        )
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
            seen = len(view.objects)
            keep = (0.06, 1.0, 1.0, 0.55, 0.35)[min(seen, 4)]
            if seen and view.objects[0].pixels < 250:
                keep *= 0.4
            if view.near_share < 0.25 and rng.random() < keep:
                break
        yield pose, view


def _picture(scene: RoomScene, pose: Pose, *, renderer: Renderer, size: int) -> NDArray[np.uint8]:
    return renderer.render(scene.model, scene.data, scene.camera(pose), height=size, width=size)


def _truth(view: View, outcome: Outcome) -> bytes:
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
    }
    return json.dumps(truth, separators=(",", ":")).encode()


def shard_path(config: ShardsConfig, first_seed: int) -> Path:
    """The file that holds the rooms from `first_seed` on: split and seed range are in its name."""
    last = min(first_seed + config.episodes_per_shard, config.first_seed + config.num_episodes)
    return Path(config.out) / f"{config.split}-{first_seed:08d}-{last:08d}.stories"


def build_shards(config: ShardsConfig) -> int:
    """Write all shards of a configuration that are not there yet; returns how many were written.

    A shard appears whole or not at all, so a killed run is resumed by the same call. Progress goes to the
    terminal. Raises ValueError for a folder that holds shards made with other settings, or a renderer that
    does not work here.
    """
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder, config)
    end = config.first_seed + config.num_episodes
    firsts = list(range(config.first_seed, end, config.episodes_per_shard))
    missing = [first for first in firsts if not _complete(shard_path(config, first))]
    workers = min(len(missing), config.workers or min(8, os.cpu_count() or 1))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(f"{config.split} shards", total=len(firsts), completed=len(firsts) - len(missing))
        if workers <= 1:
            for first in missing:
                _write(config, first)
                bar.advance(task)
            return len(missing)
        # Spawned, not forked: a parent that holds a GPU or threads cannot be forked safely.
        with ProcessPoolExecutor(max_workers=workers, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(_write, config, first) for first in missing]
            for job in as_completed(jobs):
                job.result()
                bar.advance(task)
    return len(missing)


def _check_settings(folder: Path, config: ShardsConfig) -> None:
    """Keep what decides a shard's contents beside the shards, and refuse to mix."""
    kept = {
        name: getattr(config, name)
        for name in ("num_frames", "num_pictures", "episodes_per_shard", "size", "format")
    }
    path = folder / f"{config.split}.json"
    if path.exists():
        before = json.loads(path.read_text())
        if before != kept:
            raise ValueError(
                f"{folder} holds {config.split} shards made with {before}, not {kept}; choose another out"
            )
        return
    path.write_text(json.dumps(kept))


def _complete(path: Path) -> bool:
    try:
        return path.exists() and len(Shard.open(path)) > 0
    except ShardError:
        return False


_renderers: dict[str, Renderer] = {}


def _write(config: ShardsConfig, first_seed: int) -> str:
    """Render one shard in this process, with the process's one renderer."""
    renderer = _renderers.get(config.renderer)
    if renderer is None:
        renderer = _renderers[config.renderer] = make_renderer(config.renderer)
    path = shard_path(config, first_seed)
    write_shard(path, _stories(config, first_seed, renderer))
    return str(path)


def _stories(config: ShardsConfig, first_seed: int, renderer: Renderer) -> Iterator[Story]:
    last = min(first_seed + config.episodes_per_shard, config.first_seed + config.num_episodes)
    for seed in range(first_seed, last):
        scene = RoomScene.sample(config.split, seed)
        yield generate_episode(
            config.split,
            seed,
            num_frames=config.num_frames,
            renderer=renderer,
            size=config.size,
            format=config.format,
            scene=scene,
        )
        if config.num_pictures:
            yield generate_pictures(
                config.split,
                seed,
                num_pictures=config.num_pictures,
                renderer=renderer,
                size=config.size,
                format=config.format,
                scene=scene,
            )
