"""The Triton kernels against plain PyTorch (`compare`, under TRITON_INTERPRET=1), or compiled for a GPU that
need not be there (`compile`); run by test_fused.py in a process of its own.
"""

import sys
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
import triton_cases
from triton.runtime import interpreter

from emuworld.model import (
    few_rows,
    fp8,
    fp8_activations,
    fp8_kernels,
    fp8_norms,
    head_kernels,
    kernels,
    operations,
)
from emuworld.model.operations import Norms, Place, Rotary

# The interpreter's bfloat16 products are wrong (it multiplies the bits), so float16 stands for it.
LARGEST_ERROR = {torch.float32: 1e-6, torch.float16: 1e-3}
POINTERS = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "rows_ptr": "*i32", "starts_ptr": "*i32"}
POINTERS |= {"values_ptr": "*fp8e4nv", "scales_ptr": "*fp32"}
POINTERS |= {"parts_ptr": "*fp8e4nv", "row_scales_ptr": "*fp32"}
POINTERS |= {"sums_ptr": "*fp32", "maxima_ptr": "*fp32", "weights_ptr": "*fp32", "counters_ptr": "*i32"}


def compare() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in LARGEST_ERROR:
        # hidden, inner, heads, groups, head_dim, tokens a row, rows' lengths, capacity
        compare_case(160, 300, 8, 2, 16, 1, (5, 0, 200), 256, dtype=dtype, generator=generator)
        compare_case(96, 1100, 4, 4, 32, 3, (130, 64), 192, dtype=dtype, generator=generator)
        compare_case(64, 64, 8, 1, 64, 8, (70,), 128, dtype=dtype, generator=generator)
    compare_case(64, 64, 8, 1, 16, 16, (70,), 1024, dtype=torch.float16, generator=generator)
    # Several blocks of queries, the last of them not full; keys in parts and in one.
    compare_case(64, 64, 4, 1, 16, 40, (0,), 2048, dtype=torch.float16, generator=generator)
    compare_case(64, 64, 8, 4, 16, 90, (70, 0, 3), 4096, dtype=torch.float16, generator=generator)
    for num_rows, num_inputs, num_outputs in ((2, 96, 80), (5, 512, 160), (33, 272, 48)):
        compare_fp8(num_rows, num_inputs, num_outputs, generator=generator)
    interpreter.InterpreterBuilder.create_fma = fused_multiply_add
    compare_rounding()
    for num_rows, size in ((3, 96), (70, 1100)):
        compare_rounded(num_rows, size, generator=generator)
    # Inputs in one part and in several, of which the last is shorter or empty; outputs that fill no tile.
    for num_rows, num_inputs, num_outputs in ((2, 272, 80), (7, 1024, 64), (16, 640, 208)):
        for split in (1, 3, 8):
            compare_plan(num_rows, num_inputs, num_outputs, split=split, generator=generator)
    compare_many(generator=generator)
    for num_rows, num_inputs, num_outputs in ((2, 272, 80), (7, 1024, 64), (16, 640, 208)):
        compare_parts(num_rows, num_inputs, num_outputs, generator=generator)
    for num_rows, num_inputs, num_outputs in ((1, 96, 80), (2, 272, 24), (16, 640, 208)):
        compare_gated(num_rows, num_inputs, num_outputs, generator=generator)


def compare_case(
    size: int,
    inner: int,
    num_heads: int,
    num_groups: int,
    head_dim: int,
    num_tokens: int,
    starts: tuple[int, ...],
    capacity: int,
    *,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> None:
    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    num_rows = len(starts)
    x_MD, delta_MD, weight_D = (
        noise(num_rows * num_tokens, size),
        noise(num_rows * num_tokens, size),
        noise(size),
    )
    found, expected = x_MD.clone(), x_MD.clone()
    agrees(
        kernels.add_rms_norm(found, None, weight_D, eps=1e-5),
        operations.add_rms_norm(expected, None, weight_D, eps=1e-5),
    )
    agrees(
        kernels.add_rms_norm(found, delta_MD, weight_D, eps=1e-5),
        operations.add_rms_norm(expected, delta_MD, weight_D, eps=1e-5),
    )
    agrees(found, expected)
    if num_rows * num_tokens <= few_rows.MOST_ROWS:
        weight_ND = noise(inner, size)
        agrees(few_rows.linear(delta_MD, weight_ND), delta_MD @ weight_ND.T)
    gate_up_MX = noise(num_rows * num_tokens, 2 * inner)
    agrees(kernels.swiglu(gate_up_MX), operations.swiglu(gate_up_MX))

    qkv_MX = noise(num_rows * num_tokens, (num_heads + 2 * num_groups) * head_dim)
    found = noise(num_rows + 2, 2 * num_groups, capacity, head_dim)
    expected = found.clone()
    rows_R = torch.randperm(num_rows + 2, generator=generator)[:num_rows].int()
    place = Place(rows_R, torch.tensor(starts, dtype=torch.int32), capacity)
    norms = Norms(noise(head_dim), noise(head_dim), 1e-5)
    angles = torch.rand(capacity, head_dim // 2, generator=generator) * 6.0
    rotary = Rotary(angles.cos(), angles.sin())
    q_MHd = operations.write_heads(qkv_MX, expected, place=place, norms=norms, rotary=rotary)
    agrees(kernels.write_heads(qkv_MX, found, place=place, norms=norms, rotary=rotary), q_MHd)
    written = [found[row, :, start : start + num_tokens] for row, start in zip(rows_R, starts, strict=True)]
    assert not any(torch.equal(new, torch.zeros_like(new)) for new in written)
    assert (found != expected).float().mean() < 0.01, "something else than the new places was written"
    for causal in (True, False):
        agrees(
            kernels.attend(q_MHd, expected, place=place, causal=causal),
            operations.attend(q_MHd, expected, place=place, causal=causal),
        )


def compare_fp8(num_rows: int, num_inputs: int, num_outputs: int, *, generator: torch.Generator) -> None:
    """Activations of very unequal sizes, the largest beyond what 16 bits of this kind hold."""
    weight = fp8.quantise(torch.randn(num_outputs, num_inputs, generator=generator))
    x_MK = torch.randn(num_rows, num_inputs, generator=generator)
    x_MK[0] *= 1e5
    values_MK, scales_M1 = fp8_kernels.round_rows(x_MK)
    rounded = fp8.quantise(torch.nn.functional.pad(x_MK, (0, 0, 0, -num_rows % 16)))
    torch.testing.assert_close(scales_M1[:, 0], rounded.scales_N[:num_rows])
    # The interpreter loses the carry where a mantissa rounds up to the next power of two.
    same_MK = values_MK.view(torch.uint8) == rounded.values_NK[:num_rows].view(torch.uint8)
    assert float(same_MK.float().mean()) > 0.95
    found = fp8_kernels.linear(x_MK, weight.values_NK, weight.scales_N)
    expected = fp8.by_definition(x_MK, weight)
    errors_M = (found - expected).norm(dim=-1) / expected.norm(dim=-1)  # row by row: the first is huge
    assert float(errors_M.max()) < 4e-4, f"relative errors {errors_M}"  # of halves: 2 ** -11
    print(f"agrees to {float(errors_M.max()):.1e}")


def compare_rounded(num_rows: int, size: int, *, generator: torch.Generator) -> None:
    """Norms and SwiGLU that round, and what rounds after them: the same bits. And those of the definition, of
    numbers in 16 bits too, whose quotients often lie in the middle of two of 8 bits.
    """
    x_MD, delta_MD = (torch.randn(num_rows, size, generator=generator).half() for _ in range(2))
    weight_D = torch.rand(size, generator=generator).half()
    for delta in (None, delta_MD):
        found, expected = x_MD.clone(), x_MD.clone()
        same_bits(
            fp8_activations.add_rms_norm(found, delta, weight_D, eps=1e-5),
            kernels.add_rms_norm(expected, delta, weight_D, eps=1e-5),
        )
        assert torch.equal(found, expected)
    gate_up_MX = torch.randn(num_rows, 2 * size, generator=generator).half()
    gate_up_MX[1] = 0.0
    same_bits(fp8_activations.swiglu(gate_up_MX), kernels.swiglu(gate_up_MX))


def compare_rounding() -> None:
    """All quotients of mantissas of bfloat16 and of halves, before they are stored as 8 bits (which is where
    the interpreter is wrong): those of a division, in the middle of two numbers of 8 bits too.
    """
    for num_mantissas, dtype in ((128, torch.bfloat16), (1024, torch.float16)):
        x_K = (1.0 + torch.arange(num_mantissas) / num_mantissas).to(dtype).float()
        scales_M1 = 2.0 * x_K[:, None] / fp8.LARGEST
        found_MK = torch.empty(num_mantissas, num_mantissas)
        _write_quotients[(num_mantissas,)](x_K, scales_M1, found_MK, fp8.LARGEST, num_mantissas)
        assert torch.equal(found_MK, x_K / scales_M1)
        # With a product in place of the division it would not be so, nor in 8 bits.
        assert ((x_K * (1.0 / scales_M1)).to(fp8.FORMAT).float() != found_MK.to(fp8.FORMAT).float()).any()
        print("all quotients")


@triton.jit
def _write_quotients(
    x_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    out_ptr: tl.tensor,
    largest: tl.constexpr,
    block: tl.constexpr,
) -> None:
    at = tl.arange(0, block)
    scale = tl.load(scales_ptr + tl.program_id(0))
    quotients = fp8_kernels.in_8_bits(tl.load(x_ptr + at), scale, largest)
    tl.store(out_ptr + tl.program_id(0) * block + at, quotients)


def fused_multiply_add(builder: object, x: Any, y: Any, z: Any) -> Any:
    """The interpreter rounds the product; what it multiplies has 24 bits, so 53 hold it."""
    total = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
    return interpreter.TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)


def same_bits(found: fp8.Rounded, wide_MK: torch.Tensor) -> None:
    expected = fp8_kernels.round_rows(wide_MK)
    assert torch.equal(found.scales_M1, expected.scales_M1)
    assert torch.equal(found.values_MK.view(torch.uint8), expected.values_MK.view(torch.uint8))
    print("the same bits")


def compare_plan(
    num_rows: int, num_inputs: int, num_outputs: int, *, split: int, generator: torch.Generator
) -> None:
    """Activations are bfloat16's numbers, of sizes that differ by input and by row; one row is zeros."""
    plan = few_rows.Plan(outputs=64, block=64, split=split, warps=4, stages=3)
    weight_NK = torch.randn(num_outputs, num_inputs, generator=generator)
    x_MK = torch.randn(num_rows, num_inputs, generator=generator) * torch.logspace(-3, 3, num_inputs)
    x_MK[0] *= 1e10
    x_MK[1] = 0.0
    x_MK = x_MK.bfloat16().float()
    weight = fp8.quantise(weight_NK)
    for _ in range(2):  # the second time finds its counters as the first did
        rows_agree(few_rows.linear(x_MK, weight_NK, plan=plan), x_MK @ weight_NK.T)
        found = fp8_kernels.linear_in_parts(x_MK, weight.values_NK, weight.scales_N, plan=plan)
        rows_agree(found, fp8.by_definition(x_MK, weight), within=1e-5)


def compare_parts(num_rows: int, num_inputs: int, num_outputs: int, *, generator: torch.Generator) -> None:
    """Norms in two parts: their sum, also of numbers a thousand times smaller; and products with it."""
    x_MD = (torch.randn(num_rows, num_inputs, generator=generator) * 2.0).half()
    x_MD[:, 5] *= 500.0
    x_MD[1] = 0.0
    delta_MD = torch.randn(num_rows, num_inputs, generator=generator).half()
    weight_D = (0.5 + torch.rand(num_inputs, generator=generator)).half()
    found_x, expected_x = x_MD.clone(), x_MD.clone()
    parts = fp8_norms.add_rms_norm_in_parts(found_x, delta_MD, weight_D, eps=1e-5)
    h_MD = kernels.add_rms_norm(expected_x, delta_MD, weight_D, eps=1e-5).float()
    assert torch.equal(found_x, expected_x)
    high_MK, low_MK = parts.values_PK.float().unflatten(0, (num_rows, 2)).unbind(1)
    sum_MK = (high_MK + low_MK / 16) * parts.scales_M[:, None]
    # Halves have three bits more than the parts; and the interpreter loses a carry, as in `compare_fp8`.
    least_MK = h_MD.abs().amax(dim=1, keepdim=True) * 1e-6
    error_MK = (sum_MK - h_MD).abs()
    assert (error_MK <= h_MD.abs() * 2.0**-4 + 10 * least_MK).all()
    assert float((error_MK <= h_MD.abs() * 2.0**-8 + least_MK).float().mean()) > 0.95
    weight = fp8.quantise(torch.randn(2 * num_outputs, num_inputs, generator=generator))
    expected_MN = sum_MK @ weight.dequantised().T
    for split in (1, 3):
        plan = few_rows.Plan(outputs=64, block=64, split=split, warps=4, stages=3)
        found = fp8_kernels.linear_of_parts(parts, *weight, dtype=torch.float32, plan=plan)
        rows_agree(found, expected_MN, within=1e-5)
    plan = few_rows.Plan(outputs=64, block=64, split=1, warps=4, stages=3)
    found = fp8_kernels.linear_of_parts(parts, *weight, dtype=torch.float32, plan=plan, gated=True)
    rows_agree(found, operations.swiglu(expected_MN), within=1e-4)


def compare_many(*, generator: torch.Generator) -> None:
    """Products of more rows than a matrix unit takes, which are no power of two."""
    weight_NK = torch.randn(208, 272, generator=generator)
    for num_rows in (17, 50, 64):
        x_MK = torch.randn(num_rows, 272, generator=generator)
        for split in (1, 3):
            plan = few_rows.Plan(outputs=64, block=64, split=split, warps=4, stages=3)
            rows_agree(few_rows.linear(x_MK, weight_NK, plan=plan), x_MK @ weight_NK.T)
        plan = few_rows.Plan(outputs=32, block=64, split=1, warps=4, stages=3)
        rows_agree(
            few_rows.linear(x_MK, weight_NK, plan=plan, gated=True), operations.swiglu(x_MK @ weight_NK.T)
        )


def compare_gated(num_rows: int, num_inputs: int, num_outputs: int, *, generator: torch.Generator) -> None:
    """Gates and ups multiplied where they are summed, and by a kernel of their own."""
    x_MK = torch.randn(num_rows, num_inputs, generator=generator).bfloat16().float()
    weight_NK = torch.randn(2 * num_outputs, num_inputs, generator=generator)
    weight = fp8.quantise(weight_NK)
    for outputs in (16, 64):
        plan = few_rows.Plan(outputs=outputs, block=64, split=1, warps=4, stages=3)
        both_MX = few_rows.linear(x_MK, weight_NK, plan=plan)
        rows_agree(few_rows.linear(x_MK, weight_NK, plan=plan, gated=True), operations.swiglu(both_MX))
        both_MX = fp8_kernels.linear_in_parts(x_MK, *weight, plan=plan)
        found = fp8_kernels.linear_in_parts(x_MK, *weight, plan=plan, gated=True)
        rows_agree(found, operations.swiglu(both_MX))
        x16_MK, weight16_NK = x_MK.half() / 8, weight_NK.half()
        both_MX = few_rows.linear(x16_MK, weight16_NK, plan=plan)
        found = few_rows.linear(x16_MK, weight16_NK, plan=plan, gated=True)
        # Rounding of gates and ups as in the other form, or one in three of these would differ.
        assert float((found != kernels.swiglu(both_MX)).float().mean()) < 0.02
        agrees(found, operations.swiglu(both_MX))


def rows_agree(found: torch.Tensor, expected: torch.Tensor, *, within: float = 1e-6) -> None:
    """fp32, row by row: their sizes differ too much to be seen beside each other."""
    errors_M = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    assert float(errors_M.max()) < within, f"relative errors {errors_M}"
    print(f"agrees to {float(errors_M.max()):.1e}")


def agrees(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    assert error < LARGEST_ERROR[expected.dtype], f"relative error {error}"
    print(f"agrees to {error:.1e}")


def compile_all() -> None:
    heads = {"num_groups": 8, "head_dim": 128}
    for rows, block, warps in ((1, 8192, 8), (8, 512, 4)):
        compiled(kernels._add_rms_norm, {"adds": True, "rows": rows, "block": block}, num_warps=warps)
    for tokens, warps in ((1, 1), (16, 4)):
        sizes = {"num_heads": 64, "tokens": tokens, **heads}
        compiled(head_kernels._write_heads, sizes, num_warps=warps)
    for queries, warps, stages in ((16, 4, 3), (64, 4, 2), (128, 8, 2)):
        for parts, causal in ((16, True), (1, True), (1, False)):
            sizes = {"repeats": 8, "queries": queries, "parts": parts, "causal": causal, "block": 64, **heads}
            compiled(kernels._attend_part, sizes, num_warps=warps, num_stages=stages)
    sizes = {"repeats": 4, "queries": 128, "parts": 1, "causal": True, "block": 64}
    compiled(kernels._attend_part, sizes | {"num_groups": 2, "head_dim": 64}, num_warps=8, num_stages=3)
    for rows, outputs, block in ((16, 16, 256), (64, 64, 128)):
        sizes = {"shrink": 1 / 16, "rows": rows, "outputs": outputs, "block": block}
        compiled(fp8_kernels._linear, sizes, num_warps=4, num_stages=4)
    for outputs, block, split in ((16, 256, 1), (64, 128, 1), (64, 128, 8)):
        sizes = {"rows": 16, "outputs": outputs, "block": block, "split": split}
        for gated in (False, True)[: 1 + (split == 1)]:
            compiled(few_rows._linear, sizes | {"gated": gated}, num_warps=4, num_stages=4)
    for plan in few_rows.BEST_OF_MANY.values():
        sizes = {
            "rows": 64,
            "outputs": plan.outputs,
            "block": plan.block,
            "split": plan.split,
            "gated": False,
        }
        ptx = compiled(few_rows._linear, sizes, num_warps=plan.warps, num_stages=plan.stages)
        assert "wgmma.mma_async" in ptx
    for rows, split, gated in ((8, 1, False), (8, 8, False), (16, 1, False), (8, 1, True), (16, 1, True)):
        sizes = {"rows": rows, "outputs": 64, "block": 256, "split": split, "gated": gated}
        ptx = compiled(fp8_kernels._linear_in_parts, sizes, num_warps=4, num_stages=4)
        assert "wgmma.mma_async" in ptx and ".e4m3.e4m3" in ptx, "weights are widened"
        ptx = compiled(fp8_kernels._linear_of_parts, sizes, num_warps=4, num_stages=4)
        assert "wgmma.mma_async" in ptx and ".e4m3.e4m3" in ptx, "weights are widened"
    rounding = {"largest": 448.0, "tiny": 1e-12, "block": 4096}
    for x_type in ("*bf16", "*fp32"):
        compiled(fp8_kernels._round_rows, rounding, x_type=x_type, num_warps=8)
    rounding = {"largest": 448.0, "tiny": 1e-12}
    for block, warps in ((8192, 8), (32768, 32)):
        ptx = compiled(fp8_activations._swiglu, rounding | {"block": block}, num_warps=warps // 2)
        assert "div.rn.f32" in ptx
        compiled(fp8_activations._add_rms_norm, rounding | {"adds": True, "block": block}, num_warps=warps)
    compiled(fp8_norms._add_rms_norm_in_parts, {"adds": True, "block": 8192}, num_warps=32)
    compiled(kernels._join_parts, {"repeats": 8, "parts": 16, **heads}, num_warps=4)
    for rows, block in ((1, 1024), (4, 1024), (32, 128)):
        compiled(kernels._swiglu, {"rows": rows, "block": block}, num_warps=4)
    compile_launches()


def compile_launches() -> None:
    """What may be there before the one before has ended waits before it touches memory, and only then lets
    the next one come.
    """
    product = {"rows": 8, "outputs": 128, "block": 128, "split": 6, "gated": False}
    heads = {"num_groups": 8, "head_dim": 128}
    attention = {"repeats": 8, "queries": 16, "parts": 16, "causal": True, "block": 64, **heads}
    cases: list[tuple[Any, dict[str, object], dict[str, int]]] = [
        (few_rows._linear, product | {"rows": 16, "outputs": 64}, {"num_warps": 4, "num_stages": 3}),
        (
            fp8_kernels._linear,
            {"shrink": 1 / 16, "rows": 16, "outputs": 16, "block": 256},
            {"num_warps": 4, "num_stages": 4},
        ),
        (fp8_kernels._linear_in_parts, product, {"num_warps": 8, "num_stages": 3}),
        (fp8_kernels._linear_of_parts, product, {"num_warps": 8, "num_stages": 3}),
        (kernels._add_rms_norm, {"adds": True, "rows": 1, "block": 8192}, {"num_warps": 8}),
        (fp8_norms._add_rms_norm_in_parts, {"adds": True, "block": 8192}, {"num_warps": 32}),
        (head_kernels._write_heads, {"num_heads": 64, "tokens": 1, **heads}, {"num_warps": 1}),
        (kernels._attend_part, attention, {"num_warps": 4, "num_stages": 3}),
        (kernels._join_parts, {"repeats": 8, "parts": 16, **heads}, {"num_warps": 4}),
    ]
    for kernel, constants, options in cases:
        assert "griddepcontrol" not in compiled(kernel, constants, **options)
        waits_first(compiled(kernel, constants | {"pdl": True}, **options))


def waits_first(ptx: str) -> None:
    before, waits, after = ptx.partition("griddepcontrol.wait")
    assert waits and "griddepcontrol" not in before
    assert after.count("griddepcontrol.launch_dependents") == 1
    assert not any(word in before for word in ("ld.global", "cp.async", "st.global", "atom."))


def compiled(
    kernel: Any,
    constants: dict[str, object],
    *,
    x_type: str = "*bf16",
    cache_type: str = "*bf16",
    **options: int,
) -> str:
    """With bf16 tensors, whose sizes and strides are multiples of 16; returns the assembly."""
    constants = {"pdl": False} | constants if "pdl" in kernel.arg_names else constants
    kinds = {name: kind_of(name) for name in kernel.arg_names} | {"x_ptr": x_type, "cache_ptr": cache_type}
    code = triton_cases.compiled(kernel, constants, kinds=kinds, whole=WHOLE, **options)
    assert code.metadata.shared < 100 << 10, "more shared memory than most GPUs have for a block"
    return code.asm["ptx"]


WHOLE = ("row_stride", "head_stride", "size", "num_inputs", "num_outputs")


def kind_of(name: str) -> str:
    if name.endswith("_ptr"):
        return POINTERS.get(name, "*bf16")
    return "fp32" if name in ("eps", "log2_scale") else "i32"


if __name__ == "__main__":
    {"compare": compare, "compile": compile_all}[sys.argv[1]]()
