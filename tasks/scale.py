"""Command `bench what=published-34b`: the published sizes with random weights, beside the published way.

Weights are drawn on the device, so no checkpoint is needed. Figures go to `records.jsonl`, part by part; what
fails or has no time left says so and leaves the others alone.
"""

import datetime
import importlib.metadata
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from emuworld.checkpoint_folder import find_device
from emuworld.tasks import step_times
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.published_rig import CLOSING_TOKENS, PublishedSpeed, Rig
from emuworld.tasks.published_way import ATTENTIONS
from emuworld.tasks.run_log import Figures, RunLog
from emuworld.tokens.sequence import image_length


def run(config: PublishedSpeed, *, on_progress: OnProgress = quiet) -> Path:
    """Measure; returns the file of figures. ValueError where nothing could be measured."""
    device = find_device(config.device)
    path = Path(config.out) / "records.jsonl"
    log = RunLog(path, budget_s=config.budget_s)
    rig = Rig(config, out=path.parent, device=device, on_progress=on_progress)
    log.run("machine", lambda: machine(device))
    if log.run("weights", rig.make) is None:
        raise ValueError(f"the weights of size={config.size} cannot be made here; see {path}")
    log.run("bandwidth", lambda: step_times.bandwidth(device))
    log.run("agreement", lambda: step_times.agreement(rig.fused, visual=rig.visual))
    measure_steps(config, rig, log)
    measure_published(rig, log)
    measure_whole_path(config, rig, log)
    log.run("summary", lambda: summary(config, log))
    return path


def machine(device: torch.device) -> Figures:
    """What the figures were taken on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    figures: Figures = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        figures |= {
            "device": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return figures


def measure_steps(config: PublishedSpeed, rig: Rig, log: RunLog) -> None:
    """Every form of a guided step, then the best one with more rows, and the draw."""
    known = step_times.forms(rig.fused)
    for context in config.contexts:
        for name, form in known.items():
            times = max(3, config.steps // (3 if name.endswith("eager") else 1))
            log.run(
                f"step, 2 rows, context {context}, {name}",
                partial(step_times.step, form, num_rows=2, context=context, times=times),
            )
    for num_rows in config.rows:
        if num_rows != 2:
            log.run(
                f"step, {num_rows} rows, context {config.contexts[0]}",
                partial(
                    step_times.step,
                    rig.fused,
                    num_rows=num_rows,
                    context=config.contexts[0],
                    times=config.steps,
                ),
            )
    log.run("products", partial(step_times.products, rig.fused, num_rows=2))
    log.run(
        "draw",
        partial(
            step_times.draw,
            rig.fused,
            visual=rig.visual,
            guidance=config.guidance,
            top_k=config.top_k,
            times=config.steps,
        ),
    )


def measure_whole_path(config: PublishedSpeed, rig: Rig, log: RunLog) -> None:
    """Pictures and the story, the shortest first: a budget that ends loses the fewest."""
    story_tokens = config.story_pictures * image_length((config.story_side,) * 2) + CLOSING_TOKENS
    parts: list[tuple[int, str, Callable[[], Figures]]] = []
    if config.story_pictures:
        story = partial(rig.story, config.story_side, num_pictures=config.story_pictures)
        parts.append((story_tokens, "story", story))
    for side in config.pictures:
        parts.append((image_length((side, side)), f"t2i {side}x{side}", partial(rig.picture, side)))
    for num_tokens, name, work in sorted(parts, key=lambda part: part[0]):
        log.run(name, work, expected_s=rig.expected_s(num_tokens, log))


def measure_published(rig: Rig, log: RunLog) -> None:
    """A token the published way, with the same weights."""
    config = rig.config
    for context in config.contexts:
        for attention in ATTENTIONS:
            log.run(
                f"published way, context {context}, {attention} attention",
                partial(
                    step_times.published_way,
                    rig.plain,
                    attention=attention,
                    context=context,
                    times=config.published_tokens,
                    visual=rig.visual,
                    guidance=config.guidance,
                    top_k=config.top_k,
                ),
            )


def summary(config: PublishedSpeed, log: RunLog) -> Figures:
    """How many times faster than the published way (its faster attention) at the middle of each picture."""
    figures: Figures = {}
    for side, context in zip(config.pictures, config.contexts, strict=False):
        ours = log.figures.get(f"t2i {side}x{side}", {}).get("ms_a_token")
        published = [
            value["ms"]
            for part, value in log.figures.items()
            if part.startswith(f"published way, context {context},")
        ]
        if ours and published:
            figures[f"{side}x{side}"] = {
                "ms_a_token": ours,
                "published_ms_a_token": min(published),
                "times_faster": round(min(published) / ours, 2),
            }
    return figures
