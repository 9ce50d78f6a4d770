"""The kernel that draws a token against its definition in numpy (`compare`, under TRITON_INTERPRET=1), or
compiled for a GPU that need not be there (`compile`); run by test_draw_kernel.py in a process of its own.
"""

import sys
from typing import Any

import numpy as np
import torch
import triton_cases
from numpy.typing import NDArray

from emuworld.decoding import draw_kernel, draw_spread
from emuworld.decoding.sampling import Truncation

Array = NDArray[np.float64]
GUIDANCE, IMAGE_GUIDANCE = 3.0, 1.5
SETTINGS = [
    Truncation(),
    Truncation(temperature=0.5),
    Truncation(top_k=40),
    Truncation(top_p=0.9),
    Truncation(temperature=0.5, top_p=0.6),
    Truncation(temperature=0.5, top_k=100, top_p=0.95),
    Truncation(top_k=100, top_p=0.8),
]


def compare() -> None:
    """Rows in registers, and long ones by one program each."""
    draw_kernel.LONG_BLOCK, draw_kernel.LONG_TILE, draw_kernel.MOST_SPREAD_ROWS = 4096, 4096, 0
    compare_all()


def compare_spread() -> None:
    """All rows in shares; then once more where one program makes most of the search."""
    draw_kernel.SHORT_IDS = 0
    compare_all()
    draw_spread.STEPS = 1
    compare_all((9_001,))


def compare_all(sizes: tuple[int, ...] = (300, 4096, 9_001)) -> None:
    rng = np.random.default_rng(0)
    for size in sizes:
        for num_rows in (1, 2, 3):
            for truncation in SETTINGS[:: {300: 1, 4096: 2}.get(size, 3)]:
                compare_case([logits_of(rng, size, torch.float32) for _ in range(num_rows)], truncation)
        compare_edges(rng, size, {300: SETTINGS[1:4], 4096: SETTINGS[2:3]}.get(size, SETTINGS[3:4]))


def compare_edges(rng: np.random.Generator, size: int, settings: list[Truncation]) -> None:
    """Types, masks, one id with all the mass, equal scores, fewer allowed ids than top-k."""
    halves = [logits_of(rng, size, torch.float16) for _ in range(2)]
    masked = logits_of(rng, size, torch.float32)
    masked[rng.random(size) < 0.7] = -torch.inf
    few = torch.full((size,), -torch.inf)
    few[[7, 20, 133]] = torch.tensor([0.0, 1.0, -3.0])
    dominant = logits_of(rng, size, torch.float32)
    dominant[size - 3] = 60.0
    for truncation in settings:
        compare_case(halves, truncation)
        compare_case([masked], truncation)
        # Masked in all, or in one of them.
        compare_case([masked, torch.where(masked.isinf(), masked, halves[0].float())], truncation)
        compare_case([masked, halves[0].float()], truncation)
        compare_case([few], truncation)
        compare_case([dominant], truncation)
        compare_case([torch.full((size,), -2.5)], truncation)
        compare_case([halves[0].round().float()], truncation)  # many are equal


def logits_of(rng: np.random.Generator, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(2.0 * rng.normal(size=size)).to(dtype)


def compare_case(logits: list[torch.Tensor], truncation: Truncation) -> None:
    scores = guided(logits)
    # An id at the edge of top-p may fall to either side with the rounding of the sums.
    narrow, weights = (kept_weights(scores, truncation, slack=slack) for slack in (-1e-6, 1e-6))
    near = 1e-5 + 1.0 - narrow.sum() / weights.sum()
    cdf = np.cumsum(weights)
    kept = np.flatnonzero(weights)
    likely = kept[np.argsort(-weights[kept])]
    # The middle of the likeliest and of the least likely id that is kept, and what lies at the ends.
    middles = [(cdf[i] - 0.5 * weights[i]) / cdf[-1] for i in (likely[0], likely[-1])]
    uniforms = torch.tensor([0.0, *middles, 0.73, 1 - 2**-53], dtype=torch.float64)
    rows = [row.expand(len(uniforms), -1) for row in logits]
    ids, logs = draw_kernel.draw(
        rows, uniforms, truncation=truncation, guidance=GUIDANCE, image_guidance=IMAGE_GUIDANCE
    )
    for drawn, uniform in zip(ids.tolist(), uniforms.tolist(), strict=True):
        assert weights[drawn] > 0.0, f"{drawn} was not kept"
        share = uniform - np.array([cdf[drawn] - weights[drawn], cdf[drawn]]) / cdf[-1]
        assert share[0] > -near and share[1] < near, f"{drawn} at {uniform}: {share}"
    finite = scores[np.isfinite(scores)]
    expected = scores[ids.numpy()] - finite.max() - np.log(np.exp(finite - finite.max()).sum())
    np.testing.assert_allclose(logs.numpy(), expected, atol=2e-5)
    print("agrees")


def guided(logits: list[torch.Tensor]) -> Array:
    c, *others = (row.double().numpy() for row in logits)
    with np.errstate(invalid="ignore"):
        scores = c
        if len(others) == 1:
            scores = others[0] + GUIDANCE * (c - others[0])
        elif others:
            u, b = others
            scores = b + IMAGE_GUIDANCE * (u - b) + GUIDANCE * (c - u)
    return np.where(np.isneginf(c), -np.inf, scores).astype(np.float32).astype(np.float64)


def kept_weights(scores: Array, truncation: Truncation, *, slack: float) -> Array:
    """By definition, with top-p as much larger; of equal scores at an edge all stay."""
    weights = np.exp((scores - scores.max()) / truncation.temperature)
    if 0 < truncation.top_k < len(scores):
        weights[scores < np.sort(scores)[-truncation.top_k]] = 0.0
    if truncation.top_p < 1.0:
        _, place = np.unique(scores, return_inverse=True)
        mass = np.bincount(place, weights)
        likelier = mass[::-1].cumsum()[::-1] - mass
        weights[likelier[place] >= truncation.top_p * (1.0 + slack) * weights.sum()] = 0.0
    return weights


def compile_all() -> None:
    compile_forms("*bf16", {"by_count": False, "by_mass": False, "tempered": False, "rows": 2})
    compile_forms("*fp32", {"by_count": True, "by_mass": True, "tempered": True, "rows": 3})
    compile_spread()


def compile_forms(x_type: str, forms: dict[str, object]) -> None:
    short = {"ways": draw_kernel.SHORT_WAYS, "block": 4096, "part": 64}
    compiled(draw_kernel._draw_short, forms | short, x_type=x_type, num_warps=4)
    long = {"ways": draw_kernel.LONG_WAYS, "block": draw_kernel.LONG_BLOCK, "parts": 64}
    long |= {"width": draw_kernel.LONG_TILE // 64, "part_block": 2048}
    compiled(draw_kernel._draw_long, forms | long, x_type=x_type, num_warps=draw_kernel.LONG_WARPS)


def compile_spread() -> None:
    """For the published visual ids."""
    sizes = {"shares": 128, "block": 1024}
    ways = {"ways": draw_spread.WAYS}
    for rows, by in ((2, True), (3, False)):
        forms = {"rows": rows, "tempered": by, "by_count": by, "by_mass": by}
        compiled(draw_spread._rate, sizes | ways | forms, num_warps=8)
    ways |= {"alone_ways": 8, "alone_block": 2048}
    for counts in (True, False):
        compiled(
            draw_spread._narrow,
            sizes | ways | {"counts": counts, "ends": True},
            num_warps=8,
            most_shared=10_000,
        )
        compiled(draw_spread._weigh, sizes | {"draws": counts}, num_warps=8)


def compiled(
    kernel: Any,
    constants: dict[str, object],
    *,
    x_type: str = "*bf16",
    num_warps: int,
    most_shared: int = 4096,
) -> None:
    """For rows of a multiple of 16 ids."""
    whole = ("c_stride", "u_stride", "b_stride", "size", "part")
    kinds = dict.fromkeys(kernel.arg_names, "fp32") | dict.fromkeys((*whole, "uniform_stride"), "i32")
    kinds |= {"uniforms_ptr": "*fp64", "ids_ptr": "*i64", "logs_ptr": "*fp32"}
    kinds |= {"counters_ptr": "*i32", "sums_ptr": "*fp64"}
    kinds |= dict.fromkeys(("scores_ptr", "state_ptr", "found_ptr"), "*fp32")
    kinds |= dict.fromkeys(("c_ptr", "u_ptr", "b_ptr"), x_type)
    code = triton_cases.compiled(kernel, constants, kinds=kinds, whole=whole, num_warps=num_warps)
    assert code.metadata.shared < most_shared, "scores are laid out anew through shared memory"


if __name__ == "__main__":
    {"compare": compare, "compare_spread": compare_spread, "compile": compile_all}[sys.argv[1]]()
