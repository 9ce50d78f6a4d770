"""Command `bench what=all-34b`: all of the published size on one GPU, over one set of random weights.

What `published-34b`, `drafting-34b`, `batch-34b`, `fp8` and `parallel-34b` measure one by one, in the order
of its worth and without doing anything twice: a part is begun only if it should end within `budget_s`, and
every figure is written as soon as it is known. The 8-bit weights come last, because the 16-bit ones go.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from emuworld.model.fused import FusedTransformer
from emuworld.tasks import step_times
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.published_rig import CLOSING_TOKENS, PublishedSize
from emuworld.tasks.run_log import Figures
from emuworld.tasks.speed import refinement
from emuworld.tasks.speed.published import Run, ours_pay, visual_scores
from emuworld.tokens.sequence import image_length

_OWN, _LIBRARY = "kernels, own products, graph", "kernels, graph"  # forms of a step
_MARGIN = 1.15  # of the time that a picture is expected to take, over its steps and draws
_PIXELS_S = 2.0  # a picture of 1024 px through the vision tokenizer, kernels chosen on the way
_PASS_S = {64: 1.2, 32: 0.3}  # by side: a refinement pass in 16 bits, as once measured


@dataclass(frozen=True, kw_only=True)
class EverythingSpeed(PublishedSize):
    """The published 34 B with random weights on one GPU: two eager passes, steps, pictures, a story, windows,
    32 pictures at once, pictures drawn at once, and the same in 8 bits.
    """

    out: str = "outputs/bench/all-34b"  # folder for figures, pictures and .pb files
    contexts: tuple[int, ...] = (550, 2100, 4100)  # tokens held: the middle and end of pictures
    published_contexts: tuple[int, ...] = (550, 2100)  # of the two eager passes
    published_tokens: int = 8  # tokens timed of the published way
    steps: int = 20  # steps timed of each kind
    pictures: tuple[int, ...] = (32, 64)  # sides in tokens of the pictures drawn from words; [] = none
    story_side: int = 16  # side in tokens of a story's pictures
    story_pictures: int = 3
    windows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # places of a picture that one pass takes
    num_images: int = 32  # guided pictures at once
    batch_side: int = 32  # side in tokens of those that are drawn to their end
    rows: tuple[int, ...] = (2, 16, 64)  # cache rows of a step in 8 bits
    sides: tuple[int, ...] = (32, 64)  # of the pictures that are drawn at once
    passes: int = 8  # in which they are
    guided_until: float = 0.75  # of one of them; of another every pass is guided
    bf16: bool = True  # false: 8 bits alone, for a run of a minute
    fp8: bool = True
    fp8_s: float = 40.0  # kept for 8 bits when it is decided whether many pictures are drawn to their end

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.contexts and self.published_contexts):
            raise ValueError("contexts and published_contexts must name a number of tokens each, got none")
        if not (self.bf16 or self.fp8):
            raise ValueError("bf16=false fp8=false leaves nothing to measure; set one of them to true")


def run(config: EverythingSpeed, *, on_progress: OnProgress = quiet) -> Path:
    """Measure; returns the file of figures."""
    measured = _Everything(config, on_progress=on_progress)
    if config.bf16:
        measured.in_16_bits()
    if config.fp8:
        measured.in_8_bits()
    measured.log.run("summary", measured.summary)
    return measured.path


class _Everything(Run):
    """The parts, and what they are expected to take."""

    config: EverythingSpeed

    def __init__(self, config: EverythingSpeed, *, on_progress: OnProgress) -> None:
        super().__init__(config, Path(config.out), on_progress=on_progress)

    def in_16_bits(self) -> None:
        """The parts in the order of their worth."""
        sides = sorted(self.config.pictures)
        self.two_passes()
        self.tokens()
        for side in sides[:1]:
            self.picture(side)
        self.story()
        self.many_tokens("bf16")
        self.many_rows("bf16", (2 * self.config.num_images,))
        self.drawn_at_once("bf16")
        self.log.run("summary so far", self.summary)
        for side in sides[1:]:
            self.picture(side)
        self.many_pictures()

    def two_passes(self) -> None:
        """A token in two eager passes: the faster attention at every context, the other at the first."""
        config = self.config
        for context in config.published_contexts:
            self.published_token(context, num_tokens=config.published_tokens)
        self.published_token(
            config.published_contexts[0], num_tokens=config.published_tokens, attention="eager"
        )

    def tokens(self) -> None:
        """A guided token: do all forms agree, what they take, and where the time of the best goes."""
        config, rig, log = self.config, self.rig, self.log
        agreement = log.run("agreement", lambda: step_times.agreement(rig.fused, visual=rig.visual))
        forms, context = step_times.forms(rig.fused), config.contexts[0]
        for name, form in forms.items():
            times = 5 if name.endswith("eager") else config.steps
            work = partial(step_times.step, form, num_rows=2, context=context, times=times)
            log.run(f"step, 2 rows, context {context}, {name}", work)
        if _OWN in forms:
            log.run("products of a step", lambda: self._choose_products(forms, agreement or {}))
        for context in config.contexts:
            self.step("bf16", num_rows=2, context=context)
        self.draw(1)
        log.run("products, bf16, 2 rows", partial(step_times.products, rig.fused, num_rows=2))
        for name in sorted({_OWN, _LIBRARY} & forms.keys()):
            work = partial(step_times.products, forms[name], num_rows=2)
            log.run(f"products, bf16, 2 rows, {name}", work)
        for context in (config.contexts[0], config.contexts[-1]):
            log.run(
                f"between the products, 2 rows, context {context}",
                partial(step_times.between_products, rig.fused, num_rows=2, context=context),
            )

    def _choose_products(self, forms: dict[str, FusedTransformer], agreement: Figures) -> Figures:
        """Our products of few rows or the library's from here on: ours where they are faster on this machine
        and no farther from plain PyTorch.
        """
        context, errors, steps_ms = self.config.contexts[0], [], []
        for name in (_LIBRARY, _OWN):
            step = self.log.figures.get(f"step, 2 rows, context {context}, {name}", {})
            steps_ms.append(step.get("ms", float("inf")))
            errors.append(max(agreement.get(f"{name}, {n} tokens", {}).get("hidden", 1.0) for n in (1, 2)))
        taken = ours_pay(steps_ms, errors)
        self.rig.fused = forms[_OWN if taken else _LIBRARY]
        return {
            "own_ms": steps_ms[1],
            "library_ms": steps_ms[0],
            "error": errors[1],
            "library_error": errors[0],
            "own_taken": taken,
        }

    def picture(self, side: int) -> None:
        """A picture from words, to its `.pb` file."""
        name = f"t2i {side}x{side}"
        expected_s = self._expected_s("bf16", 1, image_length((side, side))) + _PIXELS_S * (side / 64) ** 2
        self.whole(name, partial(self.rig.picture, side), expected_s=expected_s)

    def story(self) -> None:
        """A reference picture, lines with pictures, and the model's own words."""
        side, num_pictures = self.config.story_side, self.config.story_pictures
        if num_pictures == 0:
            return
        num_tokens = num_pictures * image_length((side, side)) + CLOSING_TOKENS
        self.log.run(
            "story",
            partial(self.rig.story, side, num_pictures=num_pictures),
            expected_s=self._expected_s("bf16", 1, num_tokens) + _PIXELS_S,
        )

    def many_tokens(self, weights: str) -> None:
        """A pass over a window of a picture, in its middle."""
        context = self.config.contexts[min(1, len(self.config.contexts) - 1)]
        for window in self.config.windows:
            if window > 1:  # one of one token is known
                self.step(weights, num_rows=2, context=context, num_tokens=window)
        for window in sorted({*self.config.windows[:1], *self.config.windows[-1:]}):
            self.log.run(f"draw, window {window}", partial(self.window_draw, window))

    def many_rows(self, weights: str, rows: tuple[int, ...]) -> None:
        """A token of many pictures at once, and its draw."""
        self.rig.fresh()  # these caches leave room for no other
        for num_rows in rows:
            for context in self.config.contexts:
                self.step(weights, num_rows=num_rows, context=context)
        self.draw(self.config.num_images)

    def many_pictures(self) -> None:
        """Many pictures drawn to their end, if time is left for them and for 8 bits."""
        config, side = self.config, self.config.batch_side
        num_tokens, num_worlds = image_length((side, side)), config.num_images
        pixels_s = num_worlds * _PIXELS_S * (side / 64) ** 2
        self.whole(
            f"{num_worlds} of {side}x{side}, bf16",
            partial(self.rig.pictures, side, num_worlds=num_worlds),
            expected_s=self._expected_s("bf16", num_worlds, num_tokens) + pixels_s,
            keep_s=config.fp8_s if config.fp8 else 0.0,
        )

    def drawn_at_once(self, weights: str) -> None:
        """Pictures drawn at once: a pass over all codes, with and without its draw, and all passes."""
        config, rig = self.config, self.rig
        for side in config.sides:
            name = f"picture of {side}x{side}, {weights}"
            pass_s = _PASS_S.get(side, 0.0) if config.size == "emu3.5" else 0.0
            work = partial(refinement.passes, rig.fused, side=side, times=2)
            figures = self.log.run(f"{name}, a pass without its draw", work, expected_s=4 * pass_s)
            pass_s = pass_s if figures is None else 1e-3 * figures["ms"]
            painted = partial(
                refinement.painted,
                rig.fused,
                vocabulary=rig.vocabulary,
                side=side,
                num_passes=config.passes,
                guidance=config.guidance,
                top_k=config.top_k,
                seed=config.seed,
            )
            whole_s = _MARGIN * config.passes * pass_s + 1.0
            self.log.run(f"{name}, in {config.passes} passes", painted, expected_s=whole_s)
            self.log.run(
                f"{name}, in {config.passes} passes, guided until {config.guided_until:g}",
                partial(painted, guided_until=config.guided_until),
                expected_s=whole_s,
            )
            self.log.run(
                f"{name}, attention of a pass", partial(step_times.attention_of_a_pass, rig.fused, side=side)
            )

    def in_8_bits(self) -> None:
        """The same with 8-bit weights; what was made of the 16-bit ones goes."""
        rig, log = self.rig, self.log
        rig.fresh()
        before = visual_scores(rig.fused, rig.visual)
        if log.run("to 8 bits", rig.to_8_bits) is None:
            return
        self.choose_8_bit_products(before)
        for context in self.config.contexts:
            self.step("fp8", num_rows=2, context=context)
        self.draw(1)
        log.run("products, fp8, 2 rows", partial(step_times.products, rig.fused, num_rows=2))
        self.drawn_at_once("fp8")
        self.many_rows("fp8", tuple(rows for rows in self.config.rows if rows != 2))
        for side in sorted(self.config.pictures)[:1]:
            self.whole(
                f"t2i {side}x{side}, fp8",
                partial(rig.pictures, side, num_worlds=1),
                expected_s=self._expected_s("fp8", 1, image_length((side, side))) + _PIXELS_S,
            )

    def draw(self, num_worlds: int) -> None:
        """Head, guidance and draw of a token of so many guided pictures."""
        name = f"draw, {num_worlds} guided"
        if name in self.log.figures:
            return
        self.log.run(
            name,
            partial(
                step_times.draw,
                self.rig.fused,
                visual=self.rig.visual,
                guidance=self.config.guidance,
                top_k=self.config.top_k,
                times=self.config.steps,
                num_worlds=num_worlds,
            ),
        )

    def _expected_s(self, weights: str, num_worlds: int, num_tokens: int) -> float:
        return _MARGIN * 1e-3 * num_tokens * self._token_ms(weights, num_worlds, num_tokens / 2)

    def _token_ms(self, weights: str, num_worlds: int, context: float) -> float:
        """A step and a draw of so many guided pictures that hold `context` tokens; 0: not known."""
        known = {
            held: self.steps_ms[name]
            for held in sorted(self.config.contexts)
            if (name := self.step_name(weights, 2 * num_worlds, held)) in self.steps_ms
        }
        if not known:
            return 0.0
        draw_ms: float = self.log.figures.get(f"draw, {num_worlds} guided", {}).get("ms", 0.0)
        return float(np.interp(context, list(known), list(known.values()))) + draw_ms

    def summary(self) -> Figures:
        """Times faster than two eager passes; a token and pictures a minute, as steps and draws give them."""
        figures = super().summary()
        config, side = self.config, max(self.config.pictures, default=self.config.batch_side)
        num_tokens = image_length((side, side))
        pixels_s = self.log.figures.get(f"t2i {side}x{side}", {}).get("vision_decode_s", 0.0)
        for weights in ("bf16", "fp8"):
            tokens_ms = {str(held): round(self._token_ms(weights, 1, held), 3) for held in config.contexts}
            if any(tokens_ms.values()):
                figures[f"a guided token with its draw by context, {weights}, ms"] = tokens_ms
            token_ms = self._token_ms(weights, config.num_images, num_tokens / 2)
            if token_ms:
                drawn_s = 1e-3 * token_ms * num_tokens
                figures[f"{config.num_images} of {side}x{side}, {weights}, as steps and draws give it"] = {
                    "ms_a_token": round(token_ms, 3),
                    "pictures_a_minute": round(60 * config.num_images / drawn_s, 2),
                    "with_pixels": round(
                        60 * config.num_images / (drawn_s + config.num_images * pixels_s), 2
                    ),
                }
        products = self.log.figures.get("products, bf16, 2 rows")
        step_ms = self.steps_ms.get(self.step_name("bf16", 2, config.contexts[0]))
        if products and step_ms is not None:
            layers_ms = sum(kind["ms"] for name, kind in products.items() if name != "head_VD")
            figures["step"] = {
                "ms": step_ms,
                "products_ms": round(layers_ms, 3),
                "between_ms": round(step_ms - layers_ms, 3),
            }
        return figures
