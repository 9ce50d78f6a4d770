"""The Triton kernels over a cache in 8 bits against plain PyTorch (`compare`, under TRITON_INTERPRET=1), on
a GPU (`compare-gpu`), or compiled for one that need not be there (`compile`); run by test_int8_cache.py in a
process of its own.
"""

import sys

import torch
from kernel_cases import agrees, compiled, waits_first

from emuworld.model import head_kernels, int8_attention, int8_cache, kernels, operations
from emuworld.model.operations import Norms, Place, Rotary


def compare(device: str = "cpu") -> None:
    """One token, a part of a block, a full block, several blocks of queries."""
    head_kernels.MANY_ROWS = 150  # a program of the last case takes several tokens
    generator = torch.Generator().manual_seed(0)
    for heads, groups, head_dim, num_tokens, starts in (
        (8, 2, 32, 1, (5, 0, 200)),
        (4, 4, 32, 3, (130, 64)),
        (8, 1, 128, 1, (300,)),
        (8, 1, 64, 8, (70,)),
        (8, 4, 32, 90, (70, 0)),
    ):
        compare_case(heads, groups, head_dim, num_tokens, starts, device=device, generator=generator)


def compare_case(
    num_heads: int,
    num_groups: int,
    head_dim: int,
    num_tokens: int,
    starts: tuple[int, ...],
    *,
    device: str,
    generator: torch.Generator,
) -> None:
    """Values of tokens whose sizes lie a thousand times apart; one token is zeros."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float16  # see kernel_cases

    def noise(*shape: int, factor: torch.Tensor | float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * factor).to(device, dtype)

    num_rows, capacity = len(starts), 512
    sizes_C1 = torch.logspace(-1.5, 1.5, capacity)[torch.randperm(capacity, generator=generator), None]
    sizes_C1[3] = 0.0
    shape = (num_rows + 1, 2 * num_groups, capacity, head_dim)
    held_RKCd = noise(*shape, factor=sizes_C1)
    held_RKCd[:, :num_groups] = noise(num_rows + 1, num_groups, capacity, head_dim)
    found, expected = (int8_cache.zeros(shape, device=torch.device(device)) for _ in range(2))
    for whole in (found, expected):
        for part, new in zip(
            int8_cache.parts(whole), int8_cache.narrowed(held_RKCd, int8_cache.FORMAT), strict=True
        ):
            part.copy_(new)
    rows_R = torch.randperm(num_rows + 1, generator=generator)[:num_rows].int().to(device)
    place = Place(rows_R, torch.tensor(starts, dtype=torch.int32, device=device), capacity)
    norms = Norms(noise(head_dim), noise(head_dim), 1e-5)
    angles = torch.rand(capacity, head_dim // 2, generator=generator).to(device) * 6.0
    rotary = Rotary(angles.cos(), angles.sin())
    qkv_MX = noise(num_rows * num_tokens, (num_heads + 2 * num_groups) * head_dim)
    q_MHd = operations.write_heads(qkv_MX, expected, place=place, norms=norms, rotary=rotary)
    close(kernels.write_heads(qkv_MX, found, place=place, norms=norms, rotary=rotary), q_MHd)
    for part, other in zip(int8_cache.parts(found), int8_cache.parts(expected), strict=True):
        rest, other_rest = part.clone(), other.clone()
        for row, start in zip(rows_R.tolist(), starts, strict=True):
            rest[row, :, start : start + num_tokens] = other_rest[row, :, start : start + num_tokens] = 0
        assert torch.equal(rest, other_rest), "something else than the new places was written"
    wide, other_wide = (
        int8_cache.widened(*int8_cache.parts(one), dtype=torch.float32) for one in (found, expected)
    )
    for row, start in zip(rows_R.tolist(), starts, strict=True):
        new, other_new = (one[row, :, start : start + num_tokens] for one in (wide, other_wide))
        # Plain PyTorch rounds normed keys; a number that lies between two of 8 bits may fall to either side.
        for heads, limit in ((slice(num_groups), 1e-2), (slice(num_groups, None), 2e-3)):
            assert float((new[heads] - other_new[heads]).norm() / other_new[heads].norm()) < limit
    for causal in (True, False):
        close(
            kernels.attend(q_MHd, expected, place=place, causal=causal),
            operations.attend(q_MHd.float(), expected, place=place, causal=causal).to(dtype),
        )


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    if expected.dtype == torch.float16:
        return agrees(found, expected)
    error = float((found.float() - expected.float()).norm() / expected.float().norm())
    assert error < 6e-3, f"relative error {error}"
    print(f"agrees to {error:.1e}")


def compile_all() -> None:
    heads: dict[str, object] = {"num_groups": 8, "head_dim": 128}
    for tokens, warps in ((1, 1), (16, 4)):
        sizes = {"num_heads": 64, "tokens": tokens, **heads}
        compiled(head_kernels._write_heads, sizes, cache_type="*i8", num_warps=warps)
    attend, _, *few = int8_attention.PLAN
    for queries, warps, block, depth in ((8, 4, *few), (16, 4, *few), (64, 4, 64, 2), (128, 8, 64, 2)):
        for parts, causal in ((16, True), (1, False)):
            sizes = {
                "repeats": 8,
                "queries": queries,
                "parts": parts,
                "causal": causal,
                "block": block,
                **heads,
            }
            sizes["pdl"] = True
            ptx = compiled(attend, sizes, cache_type="*i8", num_warps=warps, num_stages=depth)
            assert ".s8.s8" in ptx and "cvt.rn.f16.s" not in ptx, "numbers are widened one by one"
            assert "ld.shared.b8" not in ptx and "ld.shared.u8" not in ptx, "values are read byte by byte"
            waits_first(ptx)


if __name__ == "__main__":
    {"compare": compare, "compare-gpu": lambda: compare("cuda"), "compile": compile_all}[sys.argv[1]]()
