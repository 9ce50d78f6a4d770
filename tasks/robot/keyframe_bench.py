"""Command `bench what=keyframes`: how well keyframes are read and carried out, task by task.

Each task's own plan is shown as pictures and carried out again from them (`keyframe_fidelity`): words and
picture, words alone, picture alone; the simulator's own frames, and those after a tokenizer's round trip.
Every trial is a line of `trials.jsonl`, so a killed run goes on where it was, and several processes share
one folder through `shard=i/n`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emuworld.envs.render import Renderer, make_renderer
from emuworld.envs.tabletop.orders import FAMILY_COUNTS
from emuworld.envs.tabletop.plans import Task, sample_task
from emuworld.envs.tabletop.scene import TableScene
from emuworld.tasks.metrics import wilson
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.robot.calibration import Frame
from emuworld.tasks.robot.keyframe_execution import USES
from emuworld.tasks.robot.keyframe_fidelity import Via, tell, try_again
from emuworld.tasks.robot.suite import SUITE, load_suite
from emuworld.tasks.sharding import take_shard
from emuworld.tokens.vision import VisionTokenizer
from emuworld.world_model import load

Row = dict[str, Any]

SIMULATOR = "simulator"


@dataclass(frozen=True, kw_only=True)
class KeyframeBench:
    """How well keyframes are read and carried out: simulator's own frames, and after a tokenizer."""

    tasks: str = SUITE  # robot-331 (frozen) | validation | test (drawn from the split, equally by family)
    families: tuple[str, ...] = ()  # only these
    first: int | None = None  # so many tasks of them
    in_picture_only: bool = False  # only tasks whose goal place is in the picture alone
    seed: int = 0  # of the first drawn task of each family
    vias: tuple[str, ...] = (SIMULATOR,)  # simulator | a model's name or folder, or a tokenizer's folder
    uses: tuple[str, ...] = ("both",)  # both | text | keyframe
    size_px: int = 256
    renderer: str = "auto"  # auto | gl | rays | cuda
    shard: str = "0/1"  # i/n: every n-th task, for several processes with one folder
    out: str = "outputs/bench/keyframes"


def run(config: KeyframeBench, *, on_progress: OnProgress = quiet) -> Path:
    """Try every task that the folder has no line for, print the table; returns the path of the lines."""
    unknown = sorted(set(config.uses) - set(USES))
    if unknown or not config.vias or not config.uses:
        raise ValueError(f"uses {unknown or '()'} are unknown; expected some of {', '.join(USES)}")
    tasks = take_shard(_tasks(config), config.shard)
    vias = {name: via(name) for name in config.vias}
    path = Path(config.out) / "trials.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    renderer = make_renderer(config.renderer)
    try:
        for done, task in enumerate(tasks, start=1):
            _try(task, config, vias, path, renderer)
            on_progress("tasks", done, len(tasks))
    finally:
        renderer.close()
    print(table(_rows(path, config)))
    return path


def via(name: str) -> Via | None:
    """The pictures' way: None for the simulator's own, else encoded and decoded by a tokenizer."""
    if name == SIMULATOR:
        return None
    folder = Path(name)
    if (folder / "vision.json").is_file() and not (folder / "emuworld.json").is_file():
        return functools.partial(_round_trip, VisionTokenizer.load(folder))
    model = load(name, device="cpu")

    def through_model(frame: Frame) -> Frame:
        return model.decode(model.encode([frame]))[0]

    return through_model


def _round_trip(tokenizer: VisionTokenizer, frame: Frame) -> Frame:
    codes = tokenizer.encode(torch.from_numpy(np.ascontiguousarray(frame))[None])
    return np.asarray(tokenizer.decode(codes)[0].numpy())


def table(rows: Sequence[Row]) -> str:
    """Success by way, use and family, with 95 % intervals, and how far off places were read."""
    lines = [
        f"{'frames':24}{'use':10}{'family':16}{'success':>22}{'read mm median / p95':>22}{'no place':>10}"
    ]
    for name, use in sorted({(row["via"], row["use"]) for row in rows}):
        group = [row for row in rows if (row["via"], row["use"]) == (name, use)]
        lines.append(_line(name, use, "all", group))
        lines += [
            _line("", "", family, part)
            for family in FAMILY_COUNTS
            if (part := [row for row in group if row["family"] == family])
        ]
        in_picture = [row for row in group if row["goal_in_picture"]]
        if 0 < len(in_picture) < len(group):
            lines.append(_line("", "", "goal in picture", in_picture))
    return "\n".join(lines)


def _line(name: str, use: str, family: str, rows: Sequence[Row]) -> str:
    found = wilson(sum(row["success"] for row in rows), len(rows))
    steps = [step for row in rows for step in row["steps"] if step["error_mm"] is not None]
    errors = [step["error_mm"] for step in steps if step["used_picture"]]
    read = f"{np.median(errors):.1f} / {np.percentile(errors, 95):.1f}" if errors else "-"
    unread = f"{len(steps) - len(errors)}/{len(steps)}" if steps else "-"
    success = f"{100 * found.value:.1f} % ({100 * found.low:.0f}-{100 * found.high:.0f}, n={len(rows)})"
    return f"{name[-23:]:24}{use:10}{family:16}{success:>22}{read:>22}{unread:>10}"


def _tasks(config: KeyframeBench) -> list[Task]:
    unknown = sorted(set(config.families) - set(FAMILY_COUNTS))
    if unknown:
        raise ValueError(f"families {unknown} are unknown; expected some of {', '.join(FAMILY_COUNTS)}")
    families = config.families or tuple(FAMILY_COUNTS)
    if config.tasks == SUITE:
        tasks = [task for task in load_suite() if task.family in families]
        if config.in_picture_only:
            tasks = [task for task in tasks if task.goal_in_picture]
        return tasks[: config.first]
    if config.tasks not in ("validation", "test"):
        raise ValueError(f"tasks={config.tasks!r} is unknown; expected {SUITE}, validation or test")
    count, tasks, seed = config.first or 10 * len(families), [], config.seed
    while len(tasks) < count and seed < config.seed + 1000:
        drawn = [sample_task(family, config.tasks, seed) for family in families]
        tasks += [task for task in drawn if task.goal_in_picture or not config.in_picture_only]
        seed += 1
    return tasks[:count]


def _try(
    task: Task, config: KeyframeBench, vias: dict[str, Via | None], path: Path, renderer: Renderer
) -> None:
    """Carry one task out in every way that has no line yet."""
    key = [task.family, task.seed, task.variation]
    done = {(row["via"], row["use"]) for row in _rows(path, config) if [row[name] for name in _KEY] == key}
    todo = [(name, use) for name in vias for use in config.uses if (name, use) not in done]
    if not todo:
        return
    size = (config.size_px, config.size_px)
    scene = TableScene.from_dict(task.scene)
    told = tell(task, scene, renderer=renderer, size=size)
    if told is None:
        raise ValueError(f"the own plan of {key} fails, so there are no frames to read")
    for name, use in todo:
        trial = try_again(task, scene, told, renderer=renderer, size=size, use=use, via=vias[name])
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(trial.to_dict() | {"via": name} | _settings(config)) + "\n")


_KEY = ("family", "seed", "variation")


def _settings(config: KeyframeBench) -> Row:
    """What a line was made with, beside its task: lines of other settings do not count."""
    return {"tasks": config.tasks, "renderer": config.renderer, "size_px": config.size_px}


def _rows(path: Path, config: KeyframeBench) -> list[Row]:
    """The whole lines of these settings; one that a kill cut short is left out."""
    rows: list[Row] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    settings = _settings(config)
    return [row for row in rows if {name: row[name] for name in settings} == settings]
