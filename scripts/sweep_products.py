"""How to cut up the products of few rows of the 34 B on this GPU: terabytes a second by plan.

./run python scripts/sweep_products.py [--budget-s 90] [--kinds bf16 fp8] [--rows 2 16] [--out FILE.json]

Every plan that this GPU can run is checked against fp32 and timed in a CUDA graph that goes through more
weights than its cache holds, beside the library's product. What is printed last goes into `few_rows.BEST`,
for 64 rows (bf16 only) into `BEST_OF_MANY`.
The file is written after each matrix.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from emuworld.model import few_rows, fp8, fp8_kernels
from emuworld.model.few_rows import Plan

SHAPES = {  # [N, K]; the layers' own and the visual ids of the head
    "down": (5120, 25600),
    "qkv": (10240, 5120),
    "attention out": (5120, 8192),
    "gate and up": (51200, 5120),
    "head": (131072, 5120),
}
NUM_LAYERS = 64
TILES = {  # outputs, inputs of a block, warps, stages: likeliest first
    "bf16": (
        (64, 128, 4, 4),
        (64, 128, 4, 3),
        (64, 64, 4, 6),
        (128, 64, 4, 4),
        (32, 128, 4, 5),
        (64, 256, 4, 3),
        (32, 256, 4, 4),
        (128, 128, 8, 3),
        (64, 64, 4, 4),
        (128, 64, 8, 6),
        (16, 256, 4, 4),
        (16, 512, 4, 3),
    ),
    "fp8": (
        (64, 256, 4, 4),
        (128, 256, 8, 3),
        (64, 256, 4, 3),
        (64, 128, 4, 6),
        (128, 128, 8, 4),
        (64, 512, 4, 3),
        (128, 128, 4, 4),
        (64, 128, 4, 4),
        (128, 256, 8, 4),
        (64, 256, 4, 6),
        (128, 256, 4, 3),
        (256, 128, 8, 3),
        (128, 128, 8, 6),
        (64, 256, 8, 4),
        (64, 512, 8, 3),
        (128, 64, 4, 6),
        (64, 128, 8, 6),
    ),
}
TILES_OF_MANY = (  # for more than 16 rows, in bf16
    (128, 128, 8, 3),
    (128, 64, 4, 4),
    (128, 64, 8, 4),
    (256, 64, 8, 4),
    (64, 128, 4, 3),
    (128, 128, 8, 4),
    (64, 128, 4, 4),
    (64, 64, 4, 6),
    (128, 64, 8, 6),
    (256, 64, 8, 3),
    (128, 128, 4, 3),
    (256, 128, 8, 3),
    (64, 256, 4, 3),
)
SPLITS = (1, 2, 3, 4, 5, 6, 8, 10)
LEAST_PROGRAMS, MOST_PROGRAMS = 1.5, 13.0  # for each multiprocessor; fewer cannot, more need not be split
FEWEST_BLOCKS = 3  # of a program
BYTES_IN_TURN = 600e6  # ten times the cache of an H200
NUM_CALLS, NUM_REPLAYS = 20, 5
AT_ONCE = 16  # plans compiled before they are timed
START_S, LAST_S = 8.0, 5.0  # of the budget: what imports have taken, and the last batch of plans
LARGEST_ERROR = 4e-3  # of the whole; rounding to bf16 is 1.7e-3
Product = Callable[[torch.Tensor, fp8.Weight], torch.Tensor]
"""x [M, K] and weight [N, K] -> [M, N]."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A matrix, as many times as a cache cannot hold, and rows to multiply."""

    weights: Sequence[fp8.Weight]
    x_MK: torch.Tensor
    expected_MN: torch.Tensor
    """fp32."""

    @classmethod
    def make(cls, kind: str, shape: tuple[int, int], *, num_rows: int) -> "Case":
        torch.manual_seed(0)
        weight_NK = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        x_MK = torch.randn(num_rows, shape[1], device="cuda", dtype=torch.bfloat16)
        weight: fp8.Weight = fp8.quantise(weight_NK) if kind == "fp8" else weight_NK
        dense_NK = weight.dequantised() if isinstance(weight, fp8.Fp8Weight) else weight.float()
        copies = [weight]
        while len(copies) < 2 or len(copies) * weight.nbytes < BYTES_IN_TURN:
            copies.append(_copy(weight))
        return cls(weights=copies, x_MK=x_MK, expected_MN=F.linear(x_MK.float(), dense_NK))

    def error(self, found_MN: torch.Tensor) -> float:
        return float((found_MN.float() - self.expected_MN).norm() / self.expected_MN.norm())

    def measured(self, product: Product) -> dict[str, Any]:
        """Microseconds a call, terabytes a second and the relative error of the last call's result."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(beside):
            product(self.x_MK, self.weights[0])
            beside.synchronize()
            graph.capture_begin()  # `torch.cuda.graph` would collect garbage first, for each plan
            try:
                for index in range(NUM_CALLS):
                    found_MN = product(self.x_MK, self.weights[index % len(self.weights)])
            finally:
                graph.capture_end()
        times_us = []
        for _ in range(1 + NUM_REPLAYS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            times_us.append(1e3 * start.elapsed_time(stop) / NUM_CALLS)
        us = statistics.median(times_us[1:])
        return {
            "us": round(us, 2),
            "tb_a_s": round(1e-6 * self.weights[0].nbytes / us, 3),
            "error": round(self.error(found_MN), 5),
        }


def _copy(weight: fp8.Weight) -> fp8.Weight:
    if isinstance(weight, fp8.Fp8Weight):
        return fp8.Fp8Weight(weight.values_NK.clone(), weight.scales_N)
    return weight.clone()


def planned(plan: Plan) -> Product:
    def product(x_MK: torch.Tensor, weight: fp8.Weight) -> torch.Tensor:
        if isinstance(weight, fp8.Fp8Weight):
            return fp8_kernels.linear_in_parts(x_MK, weight.values_NK, weight.scales_N, plan=plan)
        return few_rows.linear(x_MK, weight, plan=plan)

    return product


def others(case: Case) -> dict[str, Product]:
    """What the plans compete with."""
    if not isinstance(case.weights[0], fp8.Fp8Weight):
        return {"library": F.linear}
    padded_MK = F.pad(case.x_MK, (0, 0, 0, -len(case.x_MK) % 16))
    values_MK, scales_M1 = fp8_kernels.round_rows(padded_MK)

    def library(x_MK: torch.Tensor, weight: fp8.Weight) -> torch.Tensor:
        """Without the rounding of x."""
        assert isinstance(weight, fp8.Fp8Weight)
        return torch._scaled_mm(
            values_MK,
            weight.values_NK.t(),
            scale_a=scales_M1,
            scale_b=weight.scales_N[None],
            out_dtype=x_MK.dtype,
            use_fast_accum=True,
        )[: len(x_MK)]

    def widened(x_MK: torch.Tensor, weight: fp8.Weight) -> torch.Tensor:
        assert isinstance(weight, fp8.Fp8Weight)
        return fp8_kernels.linear(x_MK, weight.values_NK, weight.scales_N)

    return {"library": library, "widened": widened}


def plans(kind: str, shape: tuple[int, int], *, num_rows: int) -> Iterator[Plan]:
    num_multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    num_outputs, num_inputs = shape
    tiles = TILES[kind] if num_rows <= few_rows.MOST_ROWS else TILES_OF_MANY
    for outputs, block, warps, stages in tiles:
        for split in SPLITS:
            programs = split * -(-num_outputs // outputs) / num_multiprocessors
            enough = programs >= LEAST_PROGRAMS and num_inputs >= FEWEST_BLOCKS * split * block
            if enough and (split == 1 or programs <= MOST_PROGRAMS):
                yield Plan(outputs, block, split, warps, stages)


def attempt(work: Callable[[Product], dict[str, Any]], product: Product) -> dict[str, Any]:
    """Figures, or why there are none: a plan may need more shared memory than there is."""
    try:
        return work(product)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {str(error)[:200]}"}


def swept(kind: str, shape: tuple[int, int], *, num_rows: int, stop_s: float) -> dict[str, Any]:
    """Figures of the other ways and of each plan until the clock says stop."""
    case = Case.make(kind, shape, num_rows=num_rows)
    figures: dict[str, Any] = {
        name: attempt(case.measured, product) for name, product in others(case).items()
    }

    def compiled(plan: Plan) -> dict[str, Any]:
        """Its first call, which compiles it, beside those of others."""
        return attempt(
            lambda product: {"first": case.error(product(case.x_MK, case.weights[0]))}, planned(plan)
        )

    tried: list[dict[str, Any]] = []
    waiting = list(plans(kind, shape, num_rows=num_rows))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while waiting and time.perf_counter() < stop_s:
            batch, waiting = waiting[:AT_ONCE], waiting[AT_ONCE:]
            for plan, found in zip(batch, list(pool.map(compiled, batch)), strict=True):
                if "failed" not in found:
                    found = attempt(case.measured, planned(plan))
                if found.get("error", 0.0) > LARGEST_ERROR:
                    found["failed"] = "wrong"
                tried.append({"plan": plan._asdict(), **found})
    right = sorted((one for one in tried if "failed" not in one), key=lambda one: one["us"])
    figures["best"] = right[0] if right else None
    figures["tried"] = right + [one for one in tried if "failed" in one]
    figures["left_out"] = len(waiting)
    return figures


def report(name: str, found: dict[str, Any]) -> None:
    """The other ways and the three best plans, by what they read a second."""

    def line(one: dict[str, Any]) -> str:
        return one.get("failed") or f"{one['tb_a_s']:.2f} TB/s, {one['us']:.1f} us, error {one['error']:.4f}"

    num_failed = sum("failed" in one for one in found["tried"])
    print(f"{name}: {len(found['tried'])} plans tried, {num_failed} failed, {found['left_out']} left out")
    for way in ("library", "widened"):
        if way in found:
            print(f"  {way}: {line(found[way])}")
    for one in found["tried"][:3]:
        print(f"  {tuple(one['plan'].values())}: {line(one)}", flush=True)


def summary(figures: dict[str, Any], *, num_rows: int) -> None:
    """Lines for `few_rows.BEST`, and what all products of a token take."""
    for kind in TILES:
        total_us = 0.0
        for name, (num_outputs, num_inputs) in SHAPES.items():
            found = figures.get(f"{kind}, {name}, {num_rows} rows")
            if found is None or found["best"] is None:
                break
            library_us = found["library"].get("us", float("inf"))
            best_us = found["best"]["us"]
            total_us += best_us * (1 if name == "head" else NUM_LAYERS)
            plan = ", ".join(f"{key}={value}" for key, value in found["best"]["plan"].items())
            dtype = "torch.bfloat16" if kind == "bf16" else "torch.float8_e4m3fn"
            print(
                f"({dtype}, {num_outputs}, {num_inputs}): Plan({plan}),  # {found['best']['tb_a_s']} TB/s, "
                f"{library_us / best_us:.2f} times the library"
            )
        else:
            print(f"all products of a token, {kind}, {num_rows} rows: {1e-3 * total_us:.2f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budget-s", type=float, default=90.0)
    parser.add_argument("--kinds", nargs="+", choices=list(TILES), default=list(TILES))
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=Path("sweep_products.json"))
    options = parser.parse_args()
    end_s = time.perf_counter() + options.budget_s - START_S - LAST_S
    figures: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    for num_rows in options.rows:
        cases = [
            (kind, name)
            for kind in options.kinds
            for name in options.shapes
            if kind == "bf16" or num_rows <= few_rows.MOST_ROWS
        ]
        for index, (kind, name) in enumerate(cases):
            now_s = time.perf_counter()
            if now_s > end_s:
                break
            stop_s = now_s + (end_s - now_s) / (len(cases) - index)
            found = swept(kind, SHAPES[name], num_rows=num_rows, stop_s=stop_s)
            figures[f"{kind}, {name}, {num_rows} rows"] = found
            options.out.write_text(json.dumps(figures, indent=1))
            report(f"{kind}, {name}, {num_rows} rows", found)
        summary(figures, num_rows=num_rows)


if __name__ == "__main__":
    main()
