"""Products of few rows on a GPU; `kernel_cases.py` compares them in Triton's interpreter."""

import importlib.util

import pytest
import torch
from torch.nn import functional as F

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from emuworld.model import few_rows, fp8, fp8_kernels, kernels
from emuworld.model.few_rows import Plan


def test_narrow_matrices_get_programs_by_split_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices of the 34 B on the 132 multiprocessors of an H200, where nothing was measured."""
    monkeypatch.setattr(few_rows, "num_multiprocessors", lambda device: 132)
    monkeypatch.setattr(few_rows, "BEST", {(torch.bfloat16, 5120, 8192): Plan(32, 256, 3, 4, 5)})
    splits = {(10240, 5120): 4, (5120, 25600): 8, (51200, 5120): 1, (131072, 5120): 1}
    for shape, split in splits.items():
        weight_NK = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        assert few_rows.plan_for(weight_NK) == Plan(64, 128, split, warps=4, stages=4)
        assert few_rows.pays(weight_NK) == (split == 1)
    measured_NK = torch.empty(5120, 8192, dtype=torch.bfloat16, device="meta")
    assert few_rows.plan_for(measured_NK) == Plan(32, 256, 3, 4, 5)
    assert few_rows.pays(measured_NK)


def test_many_rows_are_the_librarys_where_nothing_was_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight_NK, wide_NK = (
        torch.empty(size, 8192, dtype=torch.bfloat16, device="meta") for size in (5120, 512_000)
    )
    assert few_rows.pays(weight_NK, num_rows=64)  # was measured
    plan = Plan(128, 64, 6, 8, 4)
    monkeypatch.setattr(few_rows, "BEST_OF_MANY", {(torch.bfloat16, 5120, 8192): plan})
    assert few_rows.plan_for(weight_NK, num_rows=64) == plan != few_rows.plan_for(weight_NK, num_rows=16)
    assert not few_rows.gates(weight_NK, num_rows=64)
    assert few_rows.pays(weight_NK, num_rows=17) and few_rows.pays(weight_NK, num_rows=64)
    assert not few_rows.pays(weight_NK, num_rows=65) and not few_rows.pays(wide_NK, num_rows=17)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("split", [1, 2, 3, 8])
@pytest.mark.parametrize("num_rows", [1, 2, 16, 33, 64])
def test_products_on_the_gpu(num_rows: int, split: int) -> None:
    """Proves that programs which share their outputs wait for each other, with other products between and in
    a graph that is replayed, and that they add in the same order.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    generator = torch.Generator("cuda").manual_seed(0)
    plan = Plan(64, 128, split, warps=4, stages=3)
    cases = []
    for num_inputs, num_outputs in ((5120, 10240), (8192, 5120), (272, 1040)):
        weight_NK = torch.randn(num_outputs, num_inputs, device="cuda", generator=generator).bfloat16()
        x_MK = torch.randn(num_rows, num_inputs, device="cuda", generator=generator).bfloat16()
        cases.append((x_MK, weight_NK))
    first = [few_rows.linear(x_MK, weight_NK, plan=plan) for x_MK, weight_NK in cases]
    for found_MN, (x_MK, weight_NK) in zip(first, cases, strict=True):
        expected_MN = F.linear(x_MK.float(), weight_NK.float())
        assert float((found_MN.float() - expected_MN).norm() / expected_MN.norm()) < 0.003
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = [few_rows.linear(x_MK, weight_NK, plan=plan) for x_MK, weight_NK in cases]
    for _ in range(50):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 2, 16])
def test_gates_are_multiplied_as_by_a_kernel_of_their_own(num_rows: int) -> None:
    """Proves that gates and ups are rounded alike in both forms, for sizes that fill tiles and others."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    generator = torch.Generator("cuda").manual_seed(0)
    for num_inputs, size in ((5120, 25600), (272, 520)):
        weight_NK = torch.randn(2 * size, num_inputs, device="cuda", generator=generator).bfloat16()
        weight_NK *= num_inputs**-0.5
        x_MK = torch.randn(num_rows, num_inputs, device="cuda", generator=generator).bfloat16()
        for plan in (Plan(32, 256, 1, warps=4, stages=4), Plan(64, 128, 1, warps=4, stages=3)):
            both_MX = few_rows.linear(x_MK, weight_NK, plan=plan)
            found_MI = few_rows.linear(x_MK, weight_NK, plan=plan, gated=True)
            assert torch.equal(found_MI, kernels.swiglu(both_MX))
        weight = fp8.quantise(weight_NK)
        for plan in (Plan(128, 256, 1, warps=8, stages=3), Plan(64, 256, 1, warps=4, stages=3)):
            both_MX = fp8_kernels.linear_in_parts(x_MK, *weight, plan=plan)
            found_MI = fp8_kernels.linear_in_parts(x_MK, *weight, plan=plan, gated=True)
            assert torch.equal(found_MI, kernels.swiglu(both_MX))
