"""Command `bench what=small-cpu`: what a user of the built-in model waits for on a CPU.

From `import` to the first frame in fresh processes, frames of a walk through the environment, pictures from
words, and a token of the exact form; beside them a token of two eager passes with the same weights in fp32.
"""

import math
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import torch

from emuworld.checkpoint_folder import find_device
from emuworld.model import checkpoint
from emuworld.model.cache import StaticCache
from emuworld.model.exact import ExactTransformer, exact
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.run_log import Figures, RunLog
from emuworld.tasks.scale import machine
from emuworld.tasks.speed import opened
from emuworld.tasks.step_times import spread, timed
from emuworld.world_model import WorldModel, load

_FIRST_FRAME = """
import gymnasium as gym, emuworld
gym.make("EmuWorld/Explore-v0", model={model!r}).reset(seed=0)
"""
_CONTEXT_TOKENS = 300  # held when a token is timed
_TIMES = 30


@dataclass(frozen=True, kw_only=True)
class SmallSpeed:
    """The built-in model on a CPU: import, first frame, frames of a walk, pictures from words, a token."""

    out: str = "outputs/bench/small-cpu"  # folder of the figures
    model: str = "small"  # built-in name, or folder of a checkpoint
    num_processes: int = 3  # fresh ones, for each of import and first frame
    num_steps: int = 8  # frames of the walk behind the first
    num_pictures: int = 4  # from words
    rows: tuple[int, ...] = (1, 2, 4, 8, 16)  # of a token
    seed: int = 0
    budget_s: float = math.inf  # no part is begun that would end later


def run(config: SmallSpeed, *, on_progress: OnProgress = quiet) -> Path:
    """Measure; returns the file of figures."""
    device = find_device("cpu")
    path = Path(config.out) / "records.jsonl"
    log = RunLog(path, budget_s=config.budget_s)
    model = load(config.model, device="cpu")
    log.run("machine", lambda: machine(device))
    published_ms = opened.published_ms(model, log)
    transformer = exact(checkpoint.load(model.folder))
    for num_rows in config.rows:
        log.run(f"token, {num_rows} rows", partial(_token, transformer, num_rows=num_rows))
    log.run("import emuworld", partial(_processes, "import emuworld", config.num_processes))
    first_s = log.run("first picture from words", partial(_pictures, model, config, 1, published_ms))
    expected_s = 1e-3 * first_s["ms"] if first_s else 0.0
    code = _FIRST_FRAME.format(model=config.model)
    log.run(
        "import to first frame",
        partial(_processes, code, config.num_processes),
        expected_s=config.num_processes * (expected_s + 3.0),
    )
    log.run(
        "pictures from words",
        partial(_pictures, model, config, config.num_pictures, published_ms),
        expected_s=config.num_pictures * expected_s,
    )
    log.run(
        "frames of a walk",
        partial(_walk, model, config, published_ms, on_progress),
        expected_s=(1 + config.num_steps) * expected_s,
    )
    return path


def _processes(code: str, num_processes: int) -> Figures:
    times_ms = []
    for _ in range(num_processes):
        begin_s = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times_ms.append(1e3 * (time.perf_counter() - begin_s))
    return spread(times_ms)


def _token(model: ExactTransformer, *, num_rows: int) -> Figures:
    cache = StaticCache(model.config, num_rows=num_rows, capacity=_CONTEXT_TOKENS + 8, dtype=model.dtype)
    cache.finish(cache.begin(_CONTEXT_TOKENS))
    ids_R1 = torch.zeros(num_rows, 1, dtype=torch.int64)
    stay_R = [False] * num_rows
    return spread(
        timed(lambda: model(ids_R1, cache=cache, advance_B=stay_R), times=_TIMES, device=torch.device("cpu"))
    )


def _pictures(model: WorldModel, config: SmallSpeed, count: int, published_ms: float | None) -> Figures:
    sampling = model.default_sampling("t2i")
    states = opened.worlds(model, "t2i", num_worlds=count, seed=config.seed)
    seconds = [opened.timed_picture(model, state, "", sampling)[1] for state in states]
    return _frames(seconds, published_ms, model)


def _walk(
    model: WorldModel, config: SmallSpeed, published_ms: float | None, on_progress: OnProgress
) -> Figures:
    env = gym.make("EmuWorld/Explore-v0", model=model)
    begin_s = time.perf_counter()
    env.reset(seed=config.seed)
    seconds = [time.perf_counter() - begin_s]
    texts = opened.commands("explore", seed=config.seed)
    for step in range(config.num_steps):
        on_progress("frames of a walk", step, config.num_steps)
        begin_s = time.perf_counter()
        env.step(next(texts))
        seconds.append(time.perf_counter() - begin_s)
    on_progress("frames of a walk", config.num_steps, config.num_steps)
    return {"first_s": round(seconds[0], 3), **_frames(seconds[1:] or seconds, published_ms, model)}


def _frames(seconds: list[float], published_ms: float | None, model: WorldModel) -> Figures:
    times = spread([1e3 * second for second in seconds])
    figures = {**times, "frames_a_second": round(1e3 / times["ms"], 3)}
    if published_ms is not None and model.size is not None:
        height, width = (side // 16 for side in model.size)
        figures["times_faster_than_two_passes"] = round(published_ms * height * (width + 1) / times["ms"], 2)
    return figures
