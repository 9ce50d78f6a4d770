"""Command `bench what=many-worlds`: frames a second of many worlds that walk at once with a trained model.

A step is timed from the end of the one before it to its own end, and the commands of all steps are there
before the first: a GPU gets no time that is not counted, in which it could finish what a step has left to do.
"""

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from emuworld.checkpoint_folder import find, present_files
from emuworld.decoding.noise import Noise
from emuworld.decoding.sampling import MOST_PASSES
from emuworld.manifest import FILE_NAME, Manifest
from emuworld.tasks import step_times
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.run_log import Figures
from emuworld.tasks.speed import opened
from emuworld.world_model import WorldModel


@dataclass(frozen=True, kw_only=True)
class ManyWorldsSpeed:
    """Frames a second of many worlds at once, drawing and pixels taken apart."""

    out: str = "outputs/bench/many-worlds"  # folder of the figures
    model: str = "small"  # built-in name, or folder of a checkpoint
    device: str = "auto"  # auto | cpu | cuda
    weights: str = "bf16"  # of the transformer on CUDA: bf16 | fp8
    mode: str = "explore"
    num_worlds: int = 256
    num_steps: int = 4  # frames of each world; the first is not counted: graphs are recorded there
    draft_window: int | None = None  # null = the checkpoint's own setting
    passes: tuple[int, ...] = ()  # in which pictures are drawn at once, 0 = token by token; []: as it is set
    guidance: float | None = None  # null = the checkpoint's own setting
    seed: int = 0
    budget_s: float = math.inf  # no part is begun that would end later

    def __post_init__(self) -> None:
        if any(not 0 <= passes <= MOST_PASSES for passes in self.passes):
            raise ValueError(f"passes lie in 0..{MOST_PASSES}, got {self.passes}")
        if self.num_worlds < 1 or self.num_steps < 2:
            raise ValueError(
                f"num_worlds must be at least 1 and num_steps at least 2, got {self.num_worlds} and "
                f"{self.num_steps}"
            )


def run(config: ManyWorldsSpeed, *, on_progress: OnProgress = quiet) -> Path:
    """Measure; returns the file of figures."""
    name = config.model
    if any(config.passes):
        name = _drawing_at_once(name, Path(config.out) / "as-if-adapted")
    model, log = opened.begin(
        name, device=config.device, out=config.out, budget_s=config.budget_s, weights=config.weights
    )
    published_ms = opened.published_ms(model, log)
    own = 0 if config.draft_window else model.default_sampling(config.mode).passes
    for passes in config.passes or (own,):
        walk = _Walk(config, model, passes=passes)
        kind = f", {passes} passes" if config.passes else ""
        expected_s = 0.0
        for step in range(config.num_steps):
            on_progress(f"frames of all worlds{kind}", step, config.num_steps)
            figures = log.run(f"frame {step + 1}{kind}", walk.step, expected_s=expected_s)
            if figures is None:
                break
            expected_s = figures["total_s"]
        on_progress(f"frames of all worlds{kind}", config.num_steps, config.num_steps)
        log.run(f"summary{kind}", partial(walk.summary, published_ms))
    return log.path


def _drawing_at_once(name: str, folder: Path) -> str:
    """A checkpoint that draws pictures at once: this one, or links to its files with a manifest that says it
    has learnt to, for what it takes is the same.
    """
    source = find(name)
    manifest = Manifest.load(source)
    if manifest.dida is not None:
        return name
    folder.mkdir(parents=True, exist_ok=True)
    for file in present_files(source):
        (folder / file).unlink(missing_ok=True)
        if file != FILE_NAME:
            (folder / file).symlink_to(source / file)
    replace(manifest, dida=Noise()).save(folder)
    return str(folder)


class _Walk:
    """All worlds, step by step. The first step begins when it is asked for."""

    def __init__(self, config: ManyWorldsSpeed, model: WorldModel, *, passes: int) -> None:
        self._model = model
        self._states = opened.worlds(model, config.mode, num_worlds=config.num_worlds, seed=config.seed)
        commands = opened.commands(config.mode, seed=config.seed)
        self._texts = [["" for _ in self._states]]
        self._texts += [[next(commands) for _ in self._states] for _ in range(config.num_steps - 1)]
        default = model.default_sampling(config.mode)
        window = default.draft_window if config.draft_window is None else config.draft_window
        guidance = default.guidance if config.guidance is None else config.guidance
        self._sampling = replace(default, draft_window=window, passes=passes, guidance=guidance)
        self._done: list[Figures] = []
        self._end_s = 0.0  # of the step before

    def step(self) -> Figures:
        """A frame of every world. The last call of the loop ends where pixels begin."""
        calls_s: list[float] = []
        begin_s = self._end_s if self._done else time.perf_counter()
        pairs = self._model.imagine_batch(
            self._states,
            self._texts[len(self._done)],
            sampling=self._sampling,
            on_step=lambda done, total: calls_s.append(time.perf_counter()),
        )
        self._end_s = end_s = time.perf_counter()
        self._states = [state for state, _ in pairs]
        figures = {
            "total_s": round(end_s - begin_s, 4),
            "drawing_s": round(calls_s[-1] - begin_s, 4),
            "pixels_s": round(end_s - calls_s[-1], 4),
            "calls": len(calls_s),
            "frames_a_second": round(len(pairs) / (end_s - begin_s), 2),
            **step_times.memory(self._model.device),
        }
        self._done.append(figures)
        return figures

    def summary(self, published_ms: float | None) -> Figures:
        """Over all steps but the first."""
        counted = self._done[1:]
        if not counted:
            raise ValueError("no step but the first was done in time; give a larger budget_s")
        times = step_times.spread([1e3 * figures["total_s"] for figures in counted])
        figures: Figures = {**times, "frames_a_second": round(1e3 * len(self._states) / times["ms"], 2)}
        if published_ms is not None and self._model.size is not None:
            height, width = (side // 16 for side in self._model.size)
            one_by_one_ms = published_ms * height * (width + 1) * len(self._states)
            figures["times_faster_than_two_passes"] = round(one_by_one_ms / times["ms"], 1)
        return figures
