"""Command `bench what=drafting`: tokens a pass and seconds a picture, by window, with a trained model.

All windows draw the same pictures from the same states, one after the other, so that a busy neighbour meets
them alike. Window 0 is token by token. The state's prefix is in the cache; drawing and pixels are on the
clock.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.run_log import Figures
from emuworld.tasks.speed import opened
from emuworld.tasks.step_times import spread
from emuworld.world_model import WorldModel, WorldState


@dataclass(frozen=True, kw_only=True)
class DraftingSpeed:
    """Drafting with a trained model: tokens a pass and seconds a picture by window, pictures from words and
    steps of a walk.
    """

    out: str = "outputs/bench/drafting"  # folder of the figures
    model: str = "small"  # built-in name, or folder of a checkpoint
    device: str = "auto"  # auto | cpu | cuda
    modes: tuple[str, ...] = ("t2i", "explore")
    windows: tuple[int, ...] = (0, 2, 4, 8, 16, 32)  # 0 = token by token
    num_worlds: int = 6  # of each mode
    num_steps: int = 2  # pictures behind the first one of a walk
    seed: int = 0
    budget_s: float = math.inf  # no part is begun that would end later

    def __post_init__(self) -> None:
        if not self.windows or min(self.num_worlds, self.num_steps + 1) < 1:
            raise ValueError(
                f"give windows, num_worlds of at least 1 and num_steps of at least 0, got {self.windows}, "
                f"{self.num_worlds} and {self.num_steps}"
            )


def run(config: DraftingSpeed, *, on_progress: OnProgress = quiet) -> Path:
    """Measure; returns the file of figures."""
    model, log = opened.begin(config.model, device=config.device, out=config.out, budget_s=config.budget_s)
    published = opened.published_ms(model, log)
    for mode in config.modes:
        pictures = _Pictures(config, model, mode)
        for at in range(config.num_worlds):
            on_progress(mode, at, config.num_worlds)
            name = f"{mode}, world {at + 1}"
            if log.run(name, partial(pictures.draw, at), expected_s=pictures.slowest_s) is None:
                break
        on_progress(mode, config.num_worlds, config.num_worlds)
        for window in config.windows:
            log.run(f"{mode}, window {window}", partial(pictures.figures, window, published))
    return log.path


class _Pictures:
    """The pictures of one mode, drawn through every window."""

    def __init__(self, config: DraftingSpeed, model: WorldModel, mode: str) -> None:
        self._config, self._model, self._mode = config, model, mode
        self._seconds: dict[int, list[float]] = {window: [] for window in config.windows}
        self._rates: dict[int, list[float]] = {window: [] for window in config.windows}
        self.slowest_s = 0.0

    def draw(self, at: int) -> Figures:
        """One world: its first picture, and in a walk the steps behind it."""
        config, model, mode = self._config, self._model, self._mode
        (state,) = opened.worlds(model, mode, num_worlds=1, seed=config.seed + at)
        texts = opened.commands(mode, seed=config.seed + at)
        num_pictures = 1 if mode == "t2i" else 1 + config.num_steps
        total_s = 0.0
        for number in range(num_pictures):
            state, seconds = self._draw_all(state, "" if number == 0 else next(texts))
            total_s += seconds
        self.slowest_s = max(self.slowest_s, total_s)
        return {"pictures": num_pictures, "total_s": round(total_s, 2)}

    def _draw_all(self, state: WorldState, text: str) -> tuple[WorldState, float]:
        """The state behind the picture, as the last window drew it."""
        default = replace(self._model.default_sampling(self._mode), passes=0)
        widest = replace(default, draft_window=max(self._config.windows))
        after, total_s, _ = opened.timed_picture(self._model, state, text, widest)  # fills the caches
        for window in self._config.windows:
            sampling = replace(default, draft_window=window)
            after, seconds, passes = opened.timed_picture(self._model, state, text, sampling)
            height, width = after.size or (0, 0)
            self._seconds[window].append(seconds)
            num_tokens = height * width // 256
            self._rates[window].append(num_tokens / passes if window else 1.0)
            total_s += seconds
        return after, total_s

    def figures(self, window: int, published_ms: float | None) -> Figures:
        """Tokens a pass over all pictures, seconds a picture, and how many times faster than two passes."""
        seconds, rates = self._seconds[window], self._rates[window]
        if not seconds:
            raise ValueError("no picture was drawn in time; give a larger budget_s")
        times = spread([1e3 * second for second in seconds])
        figures: Figures = {
            "pictures": len(seconds),
            "tokens_a_pass": round(len(rates) / sum(1 / rate for rate in rates), 3),
            "fewest": round(min(rates), 3),
            "most": round(max(rates), 3),
            "s_a_picture": round(1e-3 * times["ms"], 3),
            "p10_s": round(1e-3 * times["p10_ms"], 3),
            "p90_s": round(1e-3 * times["p90_ms"], 3),
        }
        if published_ms is not None and self._model.size is not None:
            height, width = self._model.size
            whole_s = 1e-3 * published_ms * (height // 16) * (width // 16 + 1)
            figures["times_faster_than_two_passes"] = round(whole_s * 1e3 / times["ms"], 2)
        return figures
