"""Command `bench what=parallel-34b`: the published size cut among the processes that torchrun started.

Every process makes its own part of the same random weights, tensor by tensor, so that nobody ever holds the
whole, and one process's figures are of the very model that eight cut among themselves. Started by itself it
is one process with all of it, through the same code: what several are compared with.

Shapes: R rows, T tokens, D hidden size, V visual ids, W worlds.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from emuworld import parallel
from emuworld.checkpoint_folder import find_device
from emuworld.decoding.sampling import Truncation, pick_guided
from emuworld.model.config import SIZES, TransformerConfig, sized
from emuworld.model.fused import WEIGHTS
from emuworld.model.sums import summed
from emuworld.model.transformer import Transformer, init_weight
from emuworld.parallel import SplitTransformer
from emuworld.tasks import step_times
from emuworld.tasks.published_rig import RandomTransformer
from emuworld.tasks.run_log import Figures
from emuworld.tasks.scale import machine
from emuworld.tasks.speed import refinement
from emuworld.tasks.speed.shared_log import SharedLog
from emuworld.tokens.vocabulary import EMU35

_VISUAL = slice(EMU35.visual_start, EMU35.visual_stop)
_FEWER = 5  # times as many short steps are timed as long passes
_PASSES_EXPECTED = 3  # pictures: one to warm up, one timed, and some


@dataclass(frozen=True, kw_only=True)
class SplitSpeed(RandomTransformer):
    """The 34 B cut among torchrun's processes: a guided token, a prefill, a picture drawn at once, and how
    much of each is communication.
    """

    out: str = "outputs/bench/parallel-34b"  # folder of the figures
    weights: str = "bf16"  # bf16 | fp8
    contexts: tuple[int, ...] = (550, 2100, 4100)  # tokens held when a token is timed
    prefill: int = 4096  # tokens read at once
    side: int = 64  # in codes, of the picture drawn at once
    passes: int = 8  # in which it is drawn
    graphs: bool = True  # on CUDA: a token is replayed as one CUDA graph
    nccl: bool = True  # on CUDA, at the end: a token whose sums are all NCCL's

    def __post_init__(self) -> None:
        if self.size not in SIZES or self.weights not in WEIGHTS:
            raise ValueError(
                f"size must be one of {', '.join(SIZES)} and weights {' or '.join(WEIGHTS)}, got "
                f"{self.size!r} and {self.weights!r}"
            )
        if min(self.steps, self.prefill, self.side, self.passes) < 1:
            raise ValueError(
                f"steps, prefill, side and passes must be at least 1, got {self.steps}, {self.prefill}, "
                f"{self.side} and {self.passes}"
            )


def run(config: SplitSpeed) -> Path:
    """Measure, in every process that has joined (`parallel.join`); returns the file that the first writes."""
    device = find_device(config.device)
    group = parallel.tensor_group()
    log = SharedLog(Path(config.out) / "records.jsonl", budget_s=config.budget_s, group=group)
    num_processes = 1 if group is None else group.size()
    log.run("machine", lambda: _machine(device, num_processes=num_processes))
    measured = _Measured(config, device=device, log=log)
    if log.run("weights", measured.make) is None:
        raise ValueError(f"the weights of size={config.size} cannot be made here; see {log.path}")
    log.run("graphs and processes agree", measured.agreement)
    for context in config.contexts:
        measured.time_token(context)
    measured.time_passes()
    if config.nccl and group is not None and device.type == "cuda":
        measured.time_nccl()
    log.run("summary", lambda: _summary(config, log, num_processes=num_processes))
    return log.path


def _machine(device: torch.device, *, num_processes: int) -> Figures:
    figures = {**machine(device), "processes": num_processes}
    if device.type == "cuda":
        figures["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    figures["nccl_settings"] = {
        name: os.environ[name] for name in sorted(os.environ) if name.startswith("NCCL_")
    }
    return figures


def random_tensors(
    config: TransformerConfig, *, device: torch.device, dtype: torch.dtype, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Whole random weights by their names, one after the other; each has random numbers of its own, so that
    they are the same whoever keeps which part of them."""
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Transformer(config).named_parameters()}
    for number, (name, shape) in enumerate(shapes.items()):
        weight = torch.empty(shape, device=device, dtype=dtype)
        generator = torch.Generator(device).manual_seed(1_000_003 * seed + number)
        init_weight(name, weight, config=config, generator=generator)
        yield name, weight


class _Measured:
    """This process's part of the model, and what is timed with it."""

    def __init__(self, config: SplitSpeed, *, device: torch.device, log: SharedLog) -> None:
        self._config = config
        self._device = device
        self._log = log
        self._long = max(2, config.steps // _FEWER)
        self._tokens_ms: list[float] = []

    @torch.inference_mode()
    def make(self) -> Figures:
        config, device = self._config, self._device
        start_s = time.perf_counter()
        changes = {} if config.num_layers is None else {"num_layers": config.num_layers}
        shape = sized(config.size, vocab_size=EMU35.size, tie_word_embeddings=False, **changes)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.model = SplitTransformer(
            shape,
            random_tensors(shape, device=device, dtype=dtype, seed=config.seed),
            group=parallel.tensor_group(),
            device=device,
            dtype=dtype,
            weights=config.weights,
        ).variant(use_graphs=self._graphs)
        self._unsummed = None
        if parallel.tensor_group() is not None:
            self._unsummed = self.model.variant(reduce=lambda parts: parts, use_graphs=self._graphs)
        self._wait()
        figures = {"weights": config.weights, "made_s": round(time.perf_counter() - start_s, 2)}
        return {**figures, "heads_here": self.model.config.num_heads, **step_times.memory(device)}

    @property
    def _graphs(self) -> bool:
        return self._config.graphs and self._device.type == "cuda"

    @torch.inference_mode()
    def agreement(self) -> Figures:
        """Scores of one step, replayed, beside those computed launch by launch; ValueError where processes
        have different ones, which would draw different tokens.
        """
        scores_RV = self._scores(self.model)
        eager_RV = self._scores(self.model.variant(use_graphs=False))
        figures = {"graph_against_eager": _relative(scores_RV, eager_RV)}
        group = parallel.tensor_group()
        if group is None:
            return figures
        mine = torch.stack((scores_RV.double().sum(), scores_RV.argmax().double())).cpu()
        least, most = mine.clone(), mine.clone()
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=group)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
        if not torch.equal(least, most):
            raise ValueError(f"processes have different scores: {least.tolist()} to {most.tolist()}")
        return figures

    def _scores(self, model: SplitTransformer) -> Tensor:
        """Of the visual ids behind a token of two rows; the third call, which is a replay where there are
        graphs.
        """
        cache = step_times.filled_cache(model, num_rows=2, held=(40, 31), room=8)
        ids_R1 = torch.full((2, 1), _VISUAL.start, device=self._device)
        for _ in range(3):
            hidden_R1D = model(ids_R1, cache=cache, advance_B=(False, False))
        return model.logits(hidden_R1D[:, -1], start=_VISUAL.start, stop=_VISUAL.stop).float()

    def time_token(self, context: int) -> None:
        """A guided token with head and draw."""
        figures = self._log.run(f"token, context {context}", partial(self._token_figures, context))
        if figures is not None:
            self._tokens_ms.append(figures["ms"])

    def _token_figures(self, context: int) -> Figures:
        figures = self._times(partial(self._token, context=context), times=self._config.steps, num_sums=1)
        return {**figures, "tokens_a_second": round(1e3 / figures["ms"], 2)}

    def _token(self, model: SplitTransformer, *, context: int) -> Callable[[], None]:
        """Reads the last token in both rows and draws the next, as `decoding.autoregressive` does; its place
        stays the same.
        """
        config = self._config
        cache = step_times.filled_cache(model, num_rows=2, held=(context, context), room=8)
        uniforms_W = torch.tensor([0.5], dtype=torch.float64, device=self._device)
        ids_R1 = torch.full((2, 1), _VISUAL.start, device=self._device)

        def step() -> None:
            hidden_RD = model(ids_R1, cache=cache, advance_B=(False, False))[:, -1]
            rows_1V = model.logits(hidden_RD, start=_VISUAL.start, stop=_VISUAL.stop).split(1)
            truncation = Truncation(top_k=config.top_k)
            drawn_W = pick_guided(rows_1V, uniforms_W, truncation=truncation, guidance=config.guidance)
            ids_R1.copy_((drawn_W + _VISUAL.start).expand(2)[:, None])

        return step

    def time_passes(self) -> None:
        """Many tokens at once: a prefill, a refinement pass, and a whole picture in its passes."""
        config = self._config
        self._log.run("draw", self._draw_figures)
        self._log.run(f"prefill of {config.prefill}", self._prefill_figures)
        name = f"picture of {config.side}x{config.side}"
        refined = self._log.run(f"{name}, a pass without its draw", self._refinement_figures)
        expected_s = 0.0 if refined is None else 1e-3 * refined["ms"] * config.passes * _PASSES_EXPECTED
        self._log.run(f"{name} in {config.passes} passes", self._picture_figures, expected_s=expected_s)

    def _draw_figures(self) -> Figures:
        """What of a token is head and draw."""
        config = self._config
        return step_times.draw(
            self.model, visual=_VISUAL, guidance=config.guidance, top_k=config.top_k, times=config.steps
        )

    def _prefill_figures(self) -> Figures:
        """One row from its beginning."""
        num_tokens = self._config.prefill

        def reading(model: SplitTransformer) -> Callable[[], Tensor]:
            cache = step_times.filled_cache(model, num_rows=1, held=(0,), room=num_tokens)
            ids_1T = torch.zeros((1, num_tokens), dtype=torch.int64, device=self._device)
            return lambda: model(ids_1T, cache=cache, advance_B=(False,))

        figures = self._times(reading, times=self._long)
        return {**figures, "tokens_a_second": round(1e3 * num_tokens / figures["ms"], 1)}

    def _refinement_figures(self) -> Figures:
        """Both rows of a picture, whose tokens see each other both ways."""
        return self._times(partial(refinement.refining, side=self._config.side), times=self._long)

    def _picture_figures(self) -> Figures:
        config = self._config
        return refinement.painted(
            self.model,
            vocabulary=EMU35,
            side=config.side,
            num_passes=config.passes,
            guidance=config.guidance,
            top_k=config.top_k,
            seed=config.seed,
            runs=2,
        )

    def time_nccl(self) -> None:
        """A token whose small sums are not read from the other GPUs' memory."""
        made = self._log.run("NCCL's sums", self._make_nccl)
        if made is None:
            return
        for context in self._config.contexts:
            self._log.run(f"token, context {context}, NCCL's sums", partial(self._nccl_token, context))

    @torch.inference_mode()
    def _make_nccl(self) -> Figures:
        group = parallel.tensor_group()
        assert group is not None
        self._by_nccl = self.model.variant(reduce=partial(summed, group=group), use_graphs=self._graphs)
        return {"against_default": _relative(self._scores(self._by_nccl), self._scores(self.model))}

    @torch.inference_mode()
    def _nccl_token(self, context: int) -> Figures:
        step = self._token(self._by_nccl, context=context)
        figures = step_times.spread(step_times.timed(step, times=self._config.steps, device=self._device))
        return {**figures, "tokens_a_second": round(1e3 / figures["ms"], 2)}

    @torch.inference_mode()
    def _times(
        self,
        work_of: Callable[[SplitTransformer], Callable[[], object]],
        *,
        times: int,
        num_sums: int = 0,
    ) -> Figures:
        """Milliseconds of a call; where several processes share the model, also without summing anything,
        and the share and microseconds that the sums take: two a layer, and `num_sums` more.
        """
        timed = partial(step_times.timed, times=times, device=self._device)
        figures = step_times.spread(timed(work_of(self.model)))
        if self._unsummed is not None:
            without_ms = step_times.spread(timed(work_of(self._unsummed)))["ms"]
            count = 2 * self.model.config.num_layers + num_sums
            figures |= {
                "ms_without_sums": without_ms,
                "share_of_sums": round(1.0 - without_ms / figures["ms"], 4),
                "us_a_sum": round(1e3 * (figures["ms"] - without_ms) / count, 2),
            }
        return {**figures, **step_times.memory(self._device)}

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _relative(found: Tensor, expected: Tensor) -> float:
    return round(float((found - expected).norm() / expected.norm()), 6)


def _summary(config: SplitSpeed, log: SharedLog, *, num_processes: int) -> Figures:
    """The medians of all parts beside those that one process had, where it ran before with the same settings
    and wrote into the same file: how many times faster.
    """
    ms = {part: figures["ms"] for part, figures in log.figures.items() if "ms" in figures}
    ms |= {part: 1e3 * figures["total_s"] for part, figures in log.figures.items() if "total_s" in figures}
    kind = [config.size, config.num_layers, config.weights, log.figures["machine"].get("device", "cpu")]
    figures: Figures = {"processes": num_processes, "kind": kind, "ms": ms}
    if num_processes > 1 and log.leads:
        lines = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
        alone = [line for line in lines if line["part"] == "summary" and line.get("processes") == 1]
        alone_ms = {
            part: value for line in alone if line["kind"] == kind for part, value in line["ms"].items()
        }
        figures["times_faster_than_one"] = {
            part: round(alone_ms[part] / value, 3) for part, value in ms.items() if part in alone_ms
        }
    return figures
