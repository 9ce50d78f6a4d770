"""What each kind of training story costs one core: stories and frames a second, CPU milliseconds a frame.

    ./run python scripts/measure_data.py --renderer gl --seeds 8
    ./run python scripts/measure_data.py --renderer none    # all but drawing

"none" stands for a renderer that costs nothing: it gives one noisy picture for every frame, and true
segmentations by rays.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emuworld.envs.episodes import generate_episode, generate_pictures
from emuworld.envs.render import Renderer, make_renderer
from emuworld.envs.rendering.rays import RayRenderer
from emuworld.envs.rooms.edit_episodes import edit_stories
from emuworld.envs.rooms.tale_episodes import tale_story
from emuworld.envs.tabletop.edit_episodes import table_edit_stories
from emuworld.envs.tabletop.episodes import table_stories
from emuworld.story import Story


class NoDrawing(RayRenderer):
    """Gives the same picture for every frame."""

    def render(self, *args: Any, height: int, width: int) -> NDArray[np.uint8]:
        level = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        return level.repeat(8, axis=0).repeat(8, axis=1)


def kinds(renderer: Renderer, num_views: int) -> dict[str, Callable[[int], Iterable[Story]]]:
    """What `emuworld data build` makes of a seed, kind by kind."""
    tables = {"renderer": renderer, "num_views": num_views}
    return {
        "walk": lambda seed: [generate_episode("train", seed, num_frames=42, renderer=renderer)],
        "pictures": lambda seed: [generate_pictures("train", seed, num_pictures=8, renderer=renderer)],
        "x2i rooms": lambda seed: edit_stories("train", seed, num_edits=6, renderer=renderer),
        "x2i tables": lambda seed: table_edit_stories("train", seed, num_edits=6, renderer=renderer),
        "story": lambda seed: filter(None, [tale_story("train", seed, index=0, renderer=renderer)]),
        "vla and howto": lambda seed: table_stories("train", seed, kinds=("vla", "howto"), **tables),
        "vla, nobody's order": lambda seed: table_stories("train", seed, kinds=("play",), **tables),
        "t2i tables": lambda seed: table_stories("train", seed, kinds=("pictures",), **tables),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--renderer", default="auto", choices=("auto", "gl", "rays", "cuda", "none"))
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--views", type=int, default=4, help="tellings of each task (num_views)")
    arguments = parser.parse_args()
    renderer = NoDrawing() if arguments.renderer == "none" else make_renderer(arguments.renderer)
    made = kinds(renderer, arguments.views)
    for make in made.values():
        list(make(999))  # imports, textures, caches
    for name, make in made.items():
        cpu, wall = time.process_time(), time.perf_counter()
        stories = [story for seed in range(arguments.seeds) for story in make(seed)]
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        frames = sum(
            len(story.reference_images) + sum(len(segment.images) for segment in story.segments)
            for story in stories
        )
        print(
            f"{name:20s} {len(stories):4d} stories {frames:5d} frames: {1000 * cpu / frames:6.1f} ms a frame,"
            f" {frames / cpu:6.1f} frames/s, {len(stories) / cpu:5.1f} stories/s of CPU; {wall:.0f} s passed",
            flush=True,
        )


if __name__ == "__main__":
    main()
