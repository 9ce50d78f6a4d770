"""The training loop that every stage shares: schedule, time budget, progress, log, checkpoints, resume.

A stage gives three things: a function that does one optimiser step at a learning-rate factor, the state to
save, and what to do at the end. What the loop does not know: models, data, losses.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from emuworld.files import write_text
from emuworld.training.ranks import Ranks
from emuworld.training.states import StateStore

_FIRST_SAVE_S = 5.0  # that a save is taken to need before there was one


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train and how often to look up.

    Training ends at `max_steps` or after `max_seconds` of training time (earlier runs that were resumed
    count), whichever comes first; the learning rate follows whichever is further: linear warm-up, constant,
    then linear to zero over the last `decay_fraction`, or warm-up and cosine.

    `stage_seconds` bounds the stage as a whole, in this process: preparation, training, the last save and the
    last measurement. Training ends so much earlier.
    """

    max_steps: int = 10_000  # of the whole run, earlier parts of it counted
    max_seconds: float = math.inf  # of training, earlier parts counted; whichever comes first
    stage_seconds: float = math.inf  # of the stage, preparation and last measurement included
    warmup_steps: int = 100  # over which the learning rate rises
    decay_fraction: float = 0.4  # last part of the run, over which it falls to zero (trapezoid)
    log_every_steps: int = 50  # a line of OUT/STAGE.log.jsonl
    save_every_s: float = 60.0  # state, from which a killed run goes on
    save_every_steps: int = 0  # as well; 0: by the clock alone
    schedule: str = "trapezoid"  # trapezoid | cosine: half of one, down to minimum_factor
    minimum_factor: float = 1e-3  # of the learning rate, which never falls below that
    resume: bool = True  # false: begin anew, whatever state there is

    def __post_init__(self) -> None:
        if self.schedule not in ("trapezoid", "cosine") or not 0 <= self.minimum_factor <= 1:
            raise ValueError(
                f"schedule is 'trapezoid' or 'cosine' and minimum_factor in 0..1, got {self.schedule!r} and "
                f"{self.minimum_factor}"
            )
        if (
            self.max_steps < 1
            or min(self.max_seconds, self.stage_seconds) <= 0
            or not 0 <= self.decay_fraction <= 1
        ):
            raise ValueError(
                "a run needs max_steps >= 1, max_seconds and stage_seconds > 0 and decay_fraction in 0..1, "
                f"got {self.max_steps}, {self.max_seconds}, {self.stage_seconds} and {self.decay_fraction}"
            )


def learning_rate_factor(*, step: int, progress: float, config: LoopConfig) -> float:
    """Factor in (0, 1] for a step, by the share of the run that is over (`progress`, 0 to 1)."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    low = config.minimum_factor
    if config.schedule == "cosine":
        return max(warm * (low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * progress))), 1e-3 * warm)
    decay = (1.0 - progress) / config.decay_fraction if config.decay_fraction > 0 else 1.0
    return max(min(warm, decay), low)


class TrainingLog:
    """Appends one JSON object a line; a line is written whole, so a killed run leaves a readable file.

    A run that goes on from `step` drops the lines of later steps, which it will do again; one that begins
    anew begins a new log.
    """

    def __init__(self, path: Path, *, step: int = 0) -> None:
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
            write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)

    def write(self, **values: Any) -> None:
        self._file.write(
            json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in values.items()}) + "\n"
        )

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):  # the end of a line that was being written
        return 1 << 62


def run(
    config: LoopConfig,
    *,
    out: Path,
    name: str,
    train_step: Callable[[int, float], Mapping[str, float | torch.Tensor]],
    store: StateStore,
    on_log: Callable[[int], Mapping[str, float]] | None = None,
    on_save: Callable[[], None] | None = None,
    ranks: Ranks | None = None,
    begun: float | None = None,
    closing_s: Callable[[], float] = lambda: 0.0,
) -> int:
    """Run the stage; returns the number of steps done in all.

    `train_step(step, factor)` does one optimiser step at `factor` of the base learning rate and returns
    figures to log. `on_save` writes what others open, each time that the state was saved and at the end.
    Ctrl-C and SIGTERM save the state and end the run cleanly. Of several `ranks` all end at
    the same step, and the first alone writes, logs and shows progress. For `stage_seconds`: `begun` is when
    the stage began, on the monotonic clock, `closing_s` what its end will take besides saving.
    """
    ranks = ranks or Ranks(torch.device("cpu"))
    out.mkdir(parents=True, exist_ok=True)
    saved = store.load() if config.resume else None
    step, spent_s = (int(saved["step"]), saved["spent_s"]) if saved else (0, 0.0)
    log = TrainingLog(out / f"{name}.log.jsonl", step=step) if ranks.first else None
    start = last_save = time.monotonic()
    last_step, save_s = step if saved else -1, _FIRST_SAVE_S

    def save() -> None:
        nonlocal last_save, last_step, save_s
        save_begun = time.monotonic()
        store.save({"step": step, "spent_s": spent_s + save_begun - start})
        if on_save:
            on_save()
        last_save, last_step = time.monotonic(), step
        save_s = last_save - save_begun

    def limit_s() -> float:
        """Of training time, those of earlier runs included."""
        late = (start if begun is None else begun) + config.stage_seconds - closing_s() - save_s
        return max(1e-9, min(config.max_seconds, spent_s + late - start))

    with closing(log) if log else nullcontext(), _signals() as stop, _progress(shown=ranks.first) as bar:
        task = bar.add_task(name, total=1.0, figures="")
        while True:
            elapsed_s = spent_s + time.monotonic() - start
            progress, stopped, due = ranks.highest(
                max(step / config.max_steps, elapsed_s / limit_s()),
                float(bool(stop)),
                float(step > last_step and _due(config, step, time.monotonic() - last_save)),
            )
            if progress >= 1.0 or stopped:
                break
            if due:
                save()
            figures = train_step(step, learning_rate_factor(step=step, progress=progress, config=config))
            step += 1
            if step % config.log_every_steps == 0 or step == 1:
                values = {k: float(v) for k, v in figures.items()} | dict(on_log(step) if on_log else {})
                elapsed_s = spent_s + time.monotonic() - start
                if log is not None:
                    log.write(step=step, seconds=elapsed_s, **values)
                _refuse_nan(values, step=step, place=store.place)
                shown = f"step {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in values.items())
                bar.update(task, completed=progress, figures=shown)
                if ranks.first and not bar.console.is_terminal:
                    print(f"{name} {elapsed_s:.0f}s {shown}", flush=True)
        if step > last_step:
            save()
    if stopped:
        raise SystemExit(f"{name} stopped at step {step}; the same command resumes from {store.place}")
    return step


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Numbers of the signals to stop that came meanwhile; they do nothing else."""
    stop: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, _frame: stop.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _due(config: LoopConfig, step: int, since_s: float) -> bool:
    every = config.save_every_steps
    return since_s > config.save_every_s or bool(every and step % every == 0)


def _refuse_nan(values: Mapping[str, float], *, step: int, place: Path) -> None:
    bad = [name for name, value in values.items() if math.isnan(value)]
    if bad:
        raise ValueError(
            f"{', '.join(bad)} became NaN at step {step}; the last saved state is {place}: "
            "resume with a lower learning rate"
        )


def _progress(*, shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        disable=not shown,
    )
