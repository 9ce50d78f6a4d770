"""Commands `bench what=fp8`, `drafting-34b` and `batch-34b`: the published size with random weights.

Each measures the two-pass eager way in the same process and says how many times faster it is. What fails or
has no time left says so and leaves the other parts alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emuworld.checkpoint_folder import find_device
from emuworld.decoding.sampling import MAX_DRAFT_WINDOW, Sampling
from emuworld.model.fused import CACHES, WEIGHTS, FusedTransformer
from emuworld.tasks import step_times
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.published_rig import PublishedSize, Rig
from emuworld.tasks.run_log import Figures, RunLog
from emuworld.tasks.scale import machine
from emuworld.tokens.sequence import image_length

# Of the library's products: the time below which ours are taken, and the error that they may have.
_WORTH, _NO_WORSE = 0.99, 1.1
_MARGIN = 1.3  # of the time that a picture is expected to take, over its steps alone


@dataclass(frozen=True, kw_only=True)
class Fp8Speed(PublishedSize):
    """The published size in 8-bit weights beside the same in 16 bits: a token, many rows, whole pictures."""

    out: str = "outputs/bench/fp8"  # folder of the figures
    rows: tuple[int, ...] = (2, 16, 64)  # cache rows of a step; a guided picture takes two
    sides: tuple[int, ...] = (32,)  # in tokens, of the pictures drawn from words in 8 bits


@dataclass(frozen=True, kw_only=True)
class DraftingStepSpeed(PublishedSize):
    """What a pass over a window of a picture takes at the published size, and how many tokens it must bring
    to pay. How many it does bring only trained weights can tell (`what=drafting`).
    """

    out: str = "outputs/bench/drafting-34b"  # folder of the figures
    weights: str = "bf16"  # bf16 | fp8
    windows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    side: int = 16  # in tokens, of the picture drawn through each window

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights not in WEIGHTS or not all(1 <= one <= MAX_DRAFT_WINDOW for one in self.windows):
            raise ValueError(
                f"weights must be {' or '.join(WEIGHTS)} and windows lie in 1..{MAX_DRAFT_WINDOW}, got "
                f"{self.weights} and {self.windows}"
            )


@dataclass(frozen=True, kw_only=True)
class BatchSpeed(PublishedSize):
    """Many guided pictures at once at the published size: pictures a minute."""

    out: str = "outputs/bench/batch-34b"  # folder of the figures
    weights: str = "bf16"  # bf16 | fp8
    cache: str = "bf16"  # of keys and values: bf16 | int8
    num_images: int = 32
    sides: tuple[int, ...] = (32, 64)  # in tokens; the larger ones where time is left
    contexts: tuple[int, ...] = (550, 2100, 4100)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights not in WEIGHTS or self.cache not in CACHES or self.num_images < 1:
            raise ValueError(
                f"weights must be {' or '.join(WEIGHTS)}, cache {' or '.join(CACHES)} and num_images at "
                f"least 1, got {self.weights}, {self.cache} and {self.num_images}"
            )


def run_fp8(config: Fp8Speed, *, on_progress: OnProgress = quiet) -> Path:
    """Measure; returns the file of figures."""
    run = Run(config, Path(config.out), on_progress=on_progress)
    run.published()
    for context in config.contexts:
        run.step("bf16", num_rows=2, context=context)
    before = visual_scores(run.rig.fused, run.rig.visual)
    if run.log.run("to 8 bits", run.rig.to_8_bits) is None:
        return run.path
    run.choose_8_bit_products(before)
    for num_rows in config.rows:
        for context in config.contexts:
            run.step("fp8", num_rows=num_rows, context=context)
    run.log.run("products, fp8, 2 rows", partial(step_times.products, run.rig.fused, num_rows=2))
    for side in config.sides:
        run.pictures("fp8", side, num_worlds=1)
    run.log.run("summary", run.summary)
    return run.path


def run_drafting(config: DraftingStepSpeed, *, on_progress: OnProgress = quiet) -> Path:
    """Measure; returns the file of figures."""
    run = Run(config, Path(config.out), on_progress=on_progress)
    run.published()
    if config.weights == "fp8" and run.log.run("to 8 bits", run.rig.to_8_bits) is None:
        return run.path
    for window in config.windows:
        for context in config.contexts:
            run.step(config.weights, num_rows=2, context=context, num_tokens=window)
        run.log.run(f"draw, window {window}", partial(run.window_draw, window))
    for window in (0, *config.windows):
        run.drafted_picture(config.side, window)
    run.log.run("summary", run.summary)
    return run.path


def run_batch(config: BatchSpeed, *, on_progress: OnProgress = quiet) -> Path:
    """Measure; returns the file of figures."""
    run = Run(config, Path(config.out), on_progress=on_progress)
    run.published()
    if config.weights == "fp8" and run.log.run("to 8 bits", run.rig.to_8_bits) is None:
        return run.path
    name = config.weights
    if config.cache != "bf16":
        name += f", cache in {config.cache}"
        run.rig.fused = run.rig.fused.variant(cache=config.cache)
    for context in config.contexts:
        run.step(name, num_rows=2 * config.num_images, context=context)
    for side in sorted(config.sides):
        run.pictures(name, side, num_worlds=config.num_images)
    run.log.run("summary", run.summary)
    return run.path


class Run:
    """The model and the log of one command, and the parts that its commands share."""

    def __init__(self, config: PublishedSize, out: Path, *, on_progress: OnProgress) -> None:
        device = find_device(config.device)
        self.config = config
        self.path = out / "records.jsonl"
        self.log = RunLog(self.path, budget_s=config.budget_s)
        self.rig = Rig(config, out=out, device=device, on_progress=on_progress)
        self.log.run("machine", lambda: machine(device))
        if self.log.run("weights", self.rig.make) is None:
            raise ValueError(f"the weights of size={config.size} cannot be made here; see {self.path}")
        self.log.run("bandwidth", lambda: step_times.bandwidth(device))
        self.steps_ms: dict[str, float] = {}
        self._published_ms: list[float] = []
        self._tokens_ms: dict[str, float] = {}

    def published(self) -> None:
        """A guided token in two eager passes."""
        for context in self.config.contexts:
            self.published_token(context, num_tokens=self.config.published_tokens)

    def published_token(self, context: int, *, num_tokens: int, attention: str = "sdpa") -> None:
        """The same at one context; what others are compared with where its attention is the faster one."""
        faster = attention == "sdpa"
        figures = self.log.run(
            f"two passes, eager, context {context}{'' if faster else f', {attention} attention'}",
            partial(
                step_times.published_way,
                self.rig.plain,
                attention=attention,
                context=context,
                times=num_tokens,
                visual=self.rig.visual,
                guidance=self.config.guidance,
                top_k=self.config.top_k,
            ),
        )
        if figures is not None and faster:
            self._published_ms.append(figures["ms"])

    @staticmethod
    def step_name(weights: str, num_rows: int, context: int, num_tokens: int = 1) -> str:
        return f"step, {weights}, {num_rows} rows of {num_tokens}, context {context}"

    def step(self, weights: str, *, num_rows: int, context: int, num_tokens: int = 1) -> None:
        """One pass of the best form."""
        name = self.step_name(weights, num_rows, context, num_tokens)
        figures = self.log.run(
            name,
            partial(
                step_times.step,
                self.rig.fused,
                num_rows=num_rows,
                context=context,
                times=self.config.steps,
                num_tokens=num_tokens,
            ),
        )
        if figures is not None:
            self.steps_ms[name] = figures["ms"]

    def choose_8_bit_products(self, before: Sequence[Tensor]) -> None:
        """The library's products of few rows in 8 bits beside ours: errors against 16 bits (`before`: its
        `visual_scores`), a step of each, and from here on the faster ones, where they err no more.
        """
        log, rig, context = self.log, self.rig, self.config.contexts[0]
        forms = {"fp8": rig.fused.variant(own_products=False)}
        if rig.fused.uses_kernels:
            forms["fp8, own products"] = rig.fused.variant()
        errors, steps_ms = [], []
        for name, form in forms.items():
            compared = partial(logit_errors, before, form, rig.visual)
            error = log.run(f"{name} against bf16, random weights", compared)
            work = partial(step_times.step, form, num_rows=2, context=context, times=self.config.steps)
            figures = log.run(f"step, 2 rows, context {context}, {name}", work)
            errors.append((error or {}).get("one_token", float("inf")))
            steps_ms.append((figures or {}).get("ms", float("inf")))
        library, *own = forms.values()
        rig.fused = own[0] if own and ours_pay(steps_ms, errors) else library

    def window_draw(self, window: int) -> Figures:
        config = self.config
        return step_times.window_draw(
            self.rig.fused,
            num_tokens=window,
            visual=self.rig.visual,
            guidance=config.guidance,
            top_k=config.top_k,
            times=config.steps,
        )

    def pictures(self, weights: str, side: int, *, num_worlds: int) -> None:
        """Whole pictures through the facade, where time is left for them."""
        slowest_ms = max(
            (ms for name, ms in self.steps_ms.items() if f"{weights}, {2 * num_worlds} rows of 1," in name),
            default=0.0,
        )
        self._whole(f"{num_worlds} of {side}x{side}, {weights}", side, num_worlds, slowest_ms)

    def drafted_picture(self, side: int, window: int) -> None:
        """A picture through a window; noise hardly ever comes true, so a call is about a token."""
        default = self.rig.world.default_sampling("t2i")
        slowest_ms = max(self.steps_ms.values(), default=0.0)
        name = f"1 of {side}x{side}, window {window}"
        self._whole(name, side, 1, slowest_ms, replace(default, draft_window=window))

    def _whole(
        self, name: str, side: int, num_worlds: int, step_ms: float, sampling: Sampling | None = None
    ) -> None:
        self.whole(
            name,
            partial(self.rig.pictures, side, num_worlds=num_worlds, sampling=sampling),
            expected_s=_MARGIN * 1e-3 * step_ms * image_length((side, side)),
        )

    def whole(
        self, name: str, work: Callable[[], Figures], *, expected_s: float, keep_s: float = 0.0
    ) -> None:
        """Whole pictures, whose tokens the summary compares."""
        figures = self.log.run(name, work, expected_s=expected_s, keep_s=keep_s)
        if figures is not None and "ms_a_token" in figures:
            self._tokens_ms[name] = figures["ms_a_token"]

    def summary(self) -> Figures:
        """Whole pictures beside the two-pass eager token, both with the draw: tokens a second over tokens a
        second. Beside them the steps alone.
        """
        if not self._published_ms:
            return {"steps_ms": self.steps_ms}
        published_ms = float(np.median(self._published_ms))
        faster = {name: round(published_ms / ms, 2) for name, ms in self._tokens_ms.items()}
        return {"two_passes_ms": published_ms, "times_faster": faster, "steps_ms": self.steps_ms}


@torch.inference_mode()
def visual_scores(model: FusedTransformer, visual: slice) -> list[Tensor]:
    """Visual logits behind one token and behind a long run: the products of few rows and those of many."""
    scores = []
    for num_tokens in (1, 256):
        generator = torch.Generator().manual_seed(num_tokens)
        ids_RT = torch.randint(0, model.config.vocab_size, (2, num_tokens), generator=generator)
        cache = step_times.filled_cache(model, num_rows=2, held=(40, 40), room=num_tokens + 8)
        hidden_RD = model(ids_RT.to(model.device), cache=cache)[:, -1]
        scores.append(model.logits(hidden_RD, start=visual.start, stop=visual.stop).float().cpu())
    return scores


def logit_errors(before: Sequence[Tensor], model: FusedTransformer, visual: slice) -> Figures:
    """How far a model's `visual_scores` are from those before, relative to their norm."""
    after = visual_scores(model, visual)
    errors = [float((b - a).norm() / b.norm()) for b, a in zip(before, after, strict=True)]
    return {"one_token": round(errors[0], 5), "many_tokens": round(errors[1], 5)}


def ours_pay(steps_ms: Sequence[float], errors: Sequence[float]) -> bool:
    """Whether our products are to be taken, by a step with the library's and with ours, and how far either is
    from what is exact.
    """
    return steps_ms[1] < _WORTH * steps_ms[0] and errors[1] <= _NO_WORSE * errors[0]
