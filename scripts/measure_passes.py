"""Seconds a frame of 256 px by the number of passes in which it is drawn (0 = token by token), one world.

./run python scripts/measure_passes.py --threads 2 [--passes 0 1 2 4 8 16] [--guidance 1 2] [--model small]

A model that has not learnt to draw at once draws noise, at the speed of one that has. Steps are what an
environment's are: a command of words, the picture, and the pass that reads it before the next one.
"""

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from emuworld.checkpoint_folder import find
from emuworld.decoding.noise import Noise
from emuworld.manifest import Manifest
from emuworld.world_model import WorldModel, load

COMMANDS = ("turn left", "move forward", "look up", "turn right", "move forward", "turn left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--passes", type=int, nargs="+", default=[0, 1, 2, 4, 8, 16])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 2.0])
    parser.add_argument("--guided-until", type=float, default=0.9)
    parser.add_argument("--model", default="small")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = load(with_passes(find(options.model), Path(folder) / "model"), device=options.device)
        torch.set_num_threads(options.threads)
        print(
            f"{options.threads} threads, {model.device}; a frame: fastest / median wall, median CPU seconds"
        )
        for guidance in options.guidance:
            for passes in options.passes:
                walls, cpus = seconds(model, passes=passes, guidance=guidance, until=options.guided_until)
                print(
                    f"guidance {guidance:g}, {passes:>2} passes: {min(walls):.2f} / "
                    f"{statistics.median(walls):.2f} s wall, {statistics.median(cpus):.2f} s CPU",
                    flush=True,
                )


def with_passes(source: Path, folder: Path) -> Path:
    """A copy of a checkpoint that takes `passes`."""
    shutil.copytree(source, folder)
    manifest = Manifest.load(folder)
    dataclasses.replace(manifest, dida=manifest.dida or Noise()).save(folder)
    return folder


def seconds(
    model: WorldModel, *, passes: int, guidance: float, until: float
) -> tuple[list[float], list[float]]:
    """Wall and CPU seconds (of all threads; beside busy processes the steadier of the two) of each step but
    the first, whose prompt is read besides."""
    sampling = dataclasses.replace(
        model.default_sampling("explore"), passes=passes, guidance=guidance, guided_until=until
    )
    model.caches.clear()
    state = model.begin(mode="explore", prompt="a room with a red ball", seed=0)
    walls, cpus = [], []
    for command in COMMANDS:
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        state, _ = model.imagine(state, command, sampling=sampling)
        walls.append(time.perf_counter() - start_s)
        cpus.append(time.process_time() - start_cpu_s)
    return walls[1:], cpus[1:]


if __name__ == "__main__":
    main()
