"""The kernel that draws a token on CUDA, in Triton's interpreter and on a GPU; and what stands for it on the
CPU.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from triton_cases import run_cases

from emuworld.decoding import sampling
from emuworld.decoding.sampling import Truncation, guide, pick, pick_and_rate, pick_guided

HAS_TRITON = importlib.util.find_spec("triton") is not None
CASES_SCRIPT = Path(__file__).with_name("draw_cases.py")


@pytest.mark.parametrize(
    "truncation", [Truncation(top_p=0.9), Truncation(top_k=9), Truncation(temperature=0.0)]
)
@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_on_the_cpu_it_is_guidance_then_the_pick(num_rows: int, truncation: Truncation) -> None:
    """To the bit, from 16-bit logits."""
    generator = torch.Generator().manual_seed(num_rows)
    rows = [torch.randn(20, 200, generator=generator).bfloat16() for _ in range(num_rows)]
    uniforms = torch.rand(20, dtype=torch.float64, generator=generator)
    scales = {"guidance": 3.0, "image_guidance": 1.5}
    scores = guide(*rows, **scales) if num_rows > 1 else rows[0].float()
    expected = pick(scores, uniforms, truncation=truncation)
    assert torch.equal(pick_guided(rows, uniforms, truncation=truncation, **scales), expected)
    drawn, rated = pick_and_rate(rows, uniforms, truncation=truncation, **scales)
    assert torch.equal(drawn, expected)
    torch.testing.assert_close(rated, scores.log_softmax(dim=-1).gather(1, expected[:, None])[:, 0])


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(("part", "num_cases"), [("compare", 82), ("compare_spread", 99)])
def test_the_kernel_draws_what_its_definition_says(part: str, num_cases: int) -> None:
    """In Triton's interpreter, in a process of its own: what `import triton` finds decides."""
    printed = run_cases(CASES_SCRIPT, part, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert printed.count("agrees") == num_cases


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_kernel_compiles_for_the_published_sizes(tmp_path: Path) -> None:
    """To machine code for compute capability 9.0, which needs no GPU."""
    printed = run_cases(CASES_SCRIPT, "compile", TRITON_CACHE_DIR=str(tmp_path))
    assert printed.count("compiled") == 10


@pytest.mark.gpu
@pytest.mark.parametrize("num_ids", [10, 4096, 5000, 131_072])
@pytest.mark.parametrize(
    "truncation",
    [
        Truncation(),
        Truncation(top_p=0.9),
        Truncation(top_k=5),
        Truncation(top_k=900, temperature=0.7),
        Truncation(top_k=900, top_p=0.8),
    ],
)
@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_the_kernel_has_the_distribution_of_the_cpus_form(
    num_rows: int, truncation: Truncation, num_ids: int
) -> None:
    """Proves on CUDA, by evenly spaced uniform numbers: each id is drawn as often as it is likely, what was
    cut never, what was kept if it is likely enough; and how likely it is said to be.
    """
    if not torch.cuda.is_available() or sampling.draw_kernel is None:
        pytest.skip("needs CUDA and Triton")
    generator = torch.Generator().manual_seed(num_ids)
    logits = [3.0 * torch.randn(1, num_ids, generator=generator) for _ in range(num_rows)]
    scales = {"guidance": 1.5, "image_guidance": 1.2}
    scores = guide(*logits, **scales) if num_rows > 1 else logits[0]
    p, order = sampling._truncated(scores, truncation)
    p = p.double() / p.double().sum()
    expected = (
        p[0] if order is None else torch.zeros(num_ids, dtype=torch.float64).scatter_(0, order[0], p[0])
    )
    num = 1 << 15
    uniforms = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    rows = [row.cuda().expand(num, -1) for row in logits]
    drawn, rated = pick_and_rate(rows, uniforms.cuda(), truncation=truncation, **scales)
    counts = torch.bincount(drawn.cpu(), minlength=num_ids)
    assert int(counts[expected == 0].sum()) == 0
    assert float((counts - num * expected).abs().max()) < 1.0 + 2e-5 * num
    assert int(counts[num * expected > 2.0 + 2e-5 * num].min()) > 0
    torch.testing.assert_close(rated.cpu(), scores[0].log_softmax(-1)[drawn.cpu()], atol=1e-4, rtol=0)
    few = slice(5, None, num // 32)
    again = pick_guided([row[few] for row in rows], uniforms[few].cuda(), truncation=truncation, **scales)
    at_edges = int((again != drawn[few]).sum())
    assert at_edges <= (num_ids > sampling.draw_kernel.SHORT_IDS), "few rows draw something else"
    alone = pick_guided([row[5:6] for row in rows], uniforms[5:6].cuda(), truncation=truncation, **scales)
    assert int(alone) == int(again[0]), "a row alone draws something else than among few"
