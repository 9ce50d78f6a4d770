"""Command `generate`: pictures from words, or an imagined walk, written as PNG files with a contact sheet."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from emuworld.envs.dream import INTERLEAVED_MODES, MODES, Dream, Episode
from emuworld.tasks.metrics import Frame
from emuworld.tasks.page import contact_sheet, png_bytes, replace_file
from emuworld.world_model import load

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Write n pictures of a prompt (mode=t2i), or n imagined worlds stepped through commands
    (mode=explore).
    """

    mode: str = "t2i"  # t2i, explore, or another mode that the model was trained for
    prompt: str = "a room with a red ball and a blue box"
    n: int = 4  # pictures or worlds, of the seeds seed, seed + 1, ...
    out: str = "outputs/generate"  # folder for the PNG files
    commands: tuple[str, ...] = ()  # what is done in each world, one after the other (not in t2i)
    image: str = ""  # a picture file to start from (not in t2i); "" = the model imagines the first view
    model: str = "small"  # a built-in name or a checkpoint folder
    device: str = "auto"  # auto | cpu | cuda
    seed: int = 0
    size_px: int | None = None  # height and width, a multiple of 16; null = the model's own
    temperature: float | None = None  # 0 = always the likeliest token; null = the model's own
    guidance: float | None = None  # how strongly the words pull; null = the model's own
    batch: int = 8  # pictures imagined together

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is unknown; expected one of {', '.join(MODES)}")
        if self.n < 1 or self.batch < 1:
            raise ValueError(f"n and batch must be at least 1, got n={self.n} and batch={self.batch}")
        if self.mode == "t2i" and (self.commands or self.image):
            raise ValueError("t2i paints from words alone; commands and image go with mode=explore")


def quiet(label: str, done: int, total: int) -> None:
    """No report of progress."""


def run(config: Generate, *, on_progress: OnProgress = quiet) -> list[Path]:
    """Make the pictures; returns their files, the contact sheet last."""
    dream = Dream(
        model=load(config.model, device=config.device),
        mode=config.mode,
        size=config.size_px,
        temperature=config.temperature or None,
        greedy=config.temperature == 0.0,
        guidance=config.guidance,
    )
    worlds: list[list[Frame]] = []
    total = config.n * (len(config.commands) + 1)
    on_progress("pictures", 0, total)
    for start in range(0, config.n, config.batch):
        seeds = range(config.seed + start, config.seed + min(start + config.batch, config.n))
        before = sum(map(len, worlds))
        worlds += _imagine(dream, config, seeds, partial(_report, on_progress, before, total))
    out = Path(config.out)
    paths = []
    for index, frames in enumerate(worlds):
        for step, frame in enumerate(frames):
            name = (
                f"{config.seed + index:04d}.png"
                if len(frames) == 1
                else f"{config.seed + index:04d}_{step:02d}.png"
            )
            replace_file(out / name, png_bytes(frame))
            paths.append(out / name)
    columns = len(worlds[0]) if len(worlds[0]) > 1 else None
    sheet = out / "sheet.png"
    replace_file(sheet, png_bytes(contact_sheet([f for frames in worlds for f in frames], columns=columns)))
    print(f"{len(paths)} pictures of {config.prompt!r} in {out}, all of them in {sheet}")
    return [*paths, sheet]


def _report(on_progress: OnProgress, before: int, total: int, done: int) -> None:
    on_progress("pictures", before + done, total)


def _imagine(
    dream: Dream, config: Generate, seeds: range, on_frames: Callable[[int], None]
) -> list[list[Frame]]:
    """Frames of one world per seed: the picture of the prompt, or the first view and one after each
    command.
    """
    options: dict[str, Any] = {"prompt": config.prompt}
    if config.image:
        with Image.open(config.image) as file:
            options["image"] = np.asarray(file.convert("RGB"))
    turns = [dream.reset_turn(np.random.default_rng(seed), options) for seed in seeds]
    outcomes = dream.resolve(turns)
    commands = list(config.commands) if config.mode in INTERLEAVED_MODES else [config.prompt]
    frames: list[list[Frame]] = [
        [o.episode.frame] if config.mode in INTERLEAVED_MODES else [] for o in outcomes
    ]
    episodes: list[Episode] = [outcome.episode for outcome in outcomes]
    on_frames(sum(map(len, frames)))
    for command in commands:
        outcomes = dream.resolve([dream.step_turn(episode, command) for episode in episodes])
        for row, outcome in enumerate(outcomes):
            if outcome.info["invalid_action"]:
                raise ValueError(
                    f"{command!r} cannot be carried out: it is empty, or the model's context is full after "
                    f"{episodes[row].frame_index} frames; shorten it or begin a new world"
                )
            frames[row].append(outcome.episode.frame)
        episodes = [outcome.episode for outcome in outcomes]
        on_frames(sum(map(len, frames)))
    return frames
