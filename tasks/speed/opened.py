"""What the rows of `emuworld bench` over an opened checkpoint share: its log, worlds to draw in, pictures on
the clock, and a token the published way with the same weights.
"""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from emuworld.checkpoint_folder import find_device
from emuworld.decoding.sampling import Sampling
from emuworld.envs.prompts import draw_prompt, example_commands
from emuworld.model import checkpoint
from emuworld.tasks import step_times
from emuworld.tasks.run_log import Figures, RunLog
from emuworld.tasks.scale import machine
from emuworld.world_model import WorldModel, WorldState, load

_CONTEXT_TOKENS = 300  # held by both passes of the published way: a prompt and half a picture of 256 px
_PUBLISHED_TOKENS = 20


def begin(
    name: str, *, device: str, out: str, budget_s: float, weights: str = "bf16"
) -> tuple[WorldModel, RunLog]:
    """A checkpoint, and the log of what is measured on it, which begins with the machine."""
    place = find_device(device)
    log = RunLog(Path(out) / "records.jsonl", budget_s=budget_s)
    log.run("machine", lambda: machine(place))
    return load(name, device=device, weights=weights), log


def published_ms(model: WorldModel, log: RunLog) -> float | None:
    """Milliseconds of a guided token in two eager passes, with these weights on this device; None: failed."""
    figures = log.run("two passes, eager", partial(_published, model))
    return None if figures is None else figures["ms"]


def _published(model: WorldModel) -> Figures:
    on_cuda = model.device.type == "cuda"
    plain = checkpoint.load(
        model.folder, device=model.device, dtype=torch.bfloat16 if on_cuda else torch.float32
    )
    vocabulary = model.manifest.vocabulary
    return step_times.published_way(
        plain,
        attention="sdpa",
        context=_CONTEXT_TOKENS,
        times=_PUBLISHED_TOKENS,
        visual=slice(vocabulary.visual_start, vocabulary.visual_stop),
        guidance=model.default_sampling("t2i").guidance,
        top_k=vocabulary.num_visual_tokens,
    )


def worlds(model: WorldModel, mode: str, *, num_worlds: int, seed: int) -> list[WorldState]:
    """Worlds with invented prompts, before their first picture."""
    rng = np.random.default_rng(seed)
    return [
        model.begin(mode=mode, prompt=draw_prompt(rng, mode=mode), seed=seed + i) for i in range(num_worlds)
    ]


def commands(mode: str, *, seed: int) -> Iterator[str]:
    """Texts of the steps: what a mode's action space samples; nothing where a picture is the whole answer."""
    rng = np.random.default_rng(seed)
    while True:
        yield "" if mode in ("t2i", "x2i") else str(rng.choice(example_commands(mode)))


def timed_picture(
    model: WorldModel, state: WorldState, text: str, sampling: Sampling
) -> tuple[WorldState, float, int]:
    """The next state, the seconds it took with the picture's pixels, and the passes of the loop."""
    steps: list[int] = []
    begin_s = time.perf_counter()
    state, _ = model.imagine(state, text, sampling=sampling, on_step=lambda done, _: steps.append(done))
    return state, time.perf_counter() - begin_s, len(steps)
