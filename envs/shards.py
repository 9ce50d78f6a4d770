"""Shards of training stories: every kind that the simulated worlds give, written by several processes.

A shard holds, for each seed of its range, what the settings ask for: a walk and single views of a room,
edits, tales, and tasks on table-tops. The kind of a story is the first word of its `story_id`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import TypedDict

from emuworld.envs.episodes import generate_episode, generate_pictures
from emuworld.envs.render import Renderer, make_renderer
from emuworld.envs.rooms.edit_episodes import edit_stories
from emuworld.envs.rooms.scenes import SPLITS, RoomScene
from emuworld.envs.rooms.tale_episodes import tale_story
from emuworld.envs.tabletop.edit_episodes import table_edit_stories
from emuworld.envs.tabletop.episodes import table_stories
from emuworld.files import write_text
from emuworld.story import Shard, ShardError, Story, write_shard

# How much of each kind a seed gives; with what else decides what a shard holds.
_AMOUNTS = (
    "num_frames", "num_pictures", "num_edits", "num_tales", "num_tasks", "num_tables", "num_table_edits",
)  # fmt: skip
_DECIDING = (*_AMOUNTS, "num_views", "episodes_per_shard", "size", "format")
_FORMATS = ("JPEG", "PNG")
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class ShardsConfig:
    """Training data to render: rooms with walks, single views, edits and tales, and tasks on table-tops."""

    out: str = "outputs/data/train"  # folder for the shards; finished ones there are kept
    split: str = "train"  # train | validation | test: rooms and phrasings of which split
    num_episodes: int = 512  # rooms, each with one walk and what the next settings ask for
    num_frames: int = 24  # views in a walk; 0 for no walks
    num_pictures: int = 8  # single views of each room besides its walk; 0 for none
    num_edits: int = 0  # edits of views of each room (x2i), in chains of up to three
    num_tales: int = 0  # stories of two characters in each room (story), four to six panels each
    num_tasks: int = 0  # tasks on a table-top for each room (vla, howto), carried out by the arm
    num_views: int = 1  # how often each of these is told, in other colours and another look after the first
    num_tables: int = 0  # pictures of other table-tops for each of these tasks (t2i)
    num_table_edits: int = 0  # edits of table-tops for each room (x2i), in chains of up to three
    first_seed: int = 0  # seed of the first room
    episodes_per_shard: int = 32  # rooms in one file
    size: int = 256  # picture side in pixels
    format: str = "JPEG"  # JPEG (quality 95, full colour resolution) | PNG (lossless)
    renderer: str = "auto"  # auto | gl | rays | cuda
    workers: int = 0  # processes; 0 = one for each core, at most eight

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r} is unknown; expected one of {', '.join(SPLITS)}")
        for name in ("num_episodes", "num_views", "episodes_per_shard", "size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        for name in (*_AMOUNTS, "first_seed", "workers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected 0 or more")
        if self.format not in _FORMATS:
            raise ValueError(f"format={self.format!r} is unknown; expected one of {', '.join(_FORMATS)}")
        if not self.num_tasks and (self.num_tables or self.num_views > 1):
            raise ValueError("num_tables and num_views go with tasks on table-tops; set num_tasks as well")
        if not any(getattr(self, name) for name in _AMOUNTS):
            raise ValueError(f"nothing to render: set one of {', '.join(_AMOUNTS)} above 0")


def shard_path(config: ShardsConfig, first_seed: int) -> Path:
    """The file that holds the rooms from `first_seed` on: split and seed range are in its name."""
    last = min(first_seed + config.episodes_per_shard, config.first_seed + config.num_episodes)
    return Path(config.out) / f"{config.split}-{first_seed:08d}-{last:08d}.stories"


def build_shards(config: ShardsConfig, *, on_progress: OnProgress | None = None) -> int:
    """Write all shards of a configuration that are not there yet; returns how many were written.

    A shard appears whole or not at all, so a killed run is resumed by the same call. `on_progress` is told a
    label, the shards that are there and those there will be. Raises ValueError for a folder that holds shards
    made with other settings, or a renderer that does not work here.
    """
    folder = Path(config.out)
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder, config)
    end = config.first_seed + config.num_episodes
    firsts = list(range(config.first_seed, end, config.episodes_per_shard))
    missing = [first for first in firsts if not _complete(shard_path(config, first))]
    done = len(firsts) - len(missing)

    def tell(further: int) -> None:
        if on_progress is not None:
            on_progress(f"{config.split} shards", done + further, len(firsts))

    tell(0)
    workers = min(len(missing), config.workers or min(8, os.cpu_count() or 1))
    if workers <= 1:
        for count, first in enumerate(missing, start=1):
            _write(config, first)
            tell(count)
        return len(missing)
    # Spawned, not forked: a parent that holds a GPU or threads cannot be forked safely.
    with ProcessPoolExecutor(max_workers=workers, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_write, config, first) for first in missing]
        for count, job in enumerate(as_completed(jobs), start=1):
            job.result()
            tell(count)
    return len(missing)


def run(config: ShardsConfig, *, on_progress: OnProgress | None = None) -> None:
    """Command `data build`."""
    written = build_shards(config, on_progress=on_progress)
    print(f"new {config.split} shards in {config.out}: {written}")


def _check_settings(folder: Path, config: ShardsConfig) -> None:
    """Keep what decides a shard's contents beside the shards, and refuse to mix."""
    kept = {name: getattr(config, name) for name in _DECIDING}
    path = folder / f"{config.split}.json"
    if path.exists() and any(folder.glob(f"{config.split}-*.stories")):
        # A setting that came later than the folder was at its default there.
        unset = {field.name: field.default for field in fields(config) if field.name in _DECIDING}
        before = unset | json.loads(path.read_text())
        differ = ", ".join(f"{name}={before[name]}" for name in kept if before[name] != kept[name])
        if differ:
            raise ValueError(
                f"{folder} holds {config.split} shards that were made with {differ}; say the same, or choose "
                "another out"
            )
        return
    write_text(path, json.dumps(kept))


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
        yield from _room_stories(config, seed, renderer)


class _Drawn(TypedDict):
    """How every picture of a shard is drawn."""

    renderer: Renderer
    size: int
    format: str


def _room_stories(config: ShardsConfig, seed: int, renderer: Renderer) -> Iterator[Story]:
    """All stories of one room, which is compiled once."""
    split, scene = config.split, RoomScene.sample(config.split, seed)
    drawn: _Drawn = {"renderer": renderer, "size": config.size, "format": config.format}
    if config.num_frames:
        yield generate_episode(split, seed, num_frames=config.num_frames, scene=scene, **drawn)
    if config.num_pictures:
        yield generate_pictures(split, seed, num_pictures=config.num_pictures, scene=scene, **drawn)
    yield from edit_stories(split, seed, num_edits=config.num_edits, scene=scene, **drawn)
    for index in range(config.num_tales):
        story = tale_story(split, seed, index=index, scene=scene, **drawn)
        if story is not None:
            yield story
    for index in range(config.num_tasks):
        task_seed = seed * config.num_tasks + index
        yield from table_stories(
            split, task_seed, num_pictures=config.num_tables, num_views=config.num_views, **drawn
        )
    yield from table_edit_stories(split, seed, num_edits=config.num_table_edits, **drawn)
