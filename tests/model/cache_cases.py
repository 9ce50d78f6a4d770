"""The Triton kernel that reads rows out of a cache against plain PyTorch (`compare`, under
TRITON_INTERPRET=1), or compiled for a GPU that need not be there (`compile`); run by test_cache.py in a
process of its own.
"""

import sys

import numpy as np
import torch
from triton_cases import compiled

from emuworld.model import cache_kernels, int8_cache


def compare() -> None:
    """Rows in any order, from any start, of several lengths, in 16 bits and in 8 (numbers and scales)."""
    generator = torch.Generator().manual_seed(0)
    shape = (5, 4, 192, 32)
    rows_R, starts_R, lengths_R = np.array([3, 0, 4]), np.array([0, 64, 7]), np.array([1, 128, 90])
    for dtype in (torch.bfloat16, int8_cache.FORMAT):
        layers = [torch.empty(shape, dtype=dtype) for _ in range(3)]
        if dtype == int8_cache.FORMAT:
            layers = [int8_cache.zeros(shape, device=torch.device("cpu")) for _ in range(3)]
        for layer in layers:
            for part in int8_cache.parts(layer):
                part.copy_(torch.randn(part.shape, generator=generator) * 50)
        for part_L in zip(*map(int8_cache.parts, layers), strict=True):
            found = cache_kernels.read_rows(part_L, rows_R, starts_R, lengths_R)
            for one, row, start, length in zip(found, rows_R, starts_R, lengths_R, strict=True):
                expected = torch.stack([part[row, :, start : start + length] for part in part_L])
                assert torch.equal(one, expected) and one.is_contiguous()
                print("the same bits")


def compile_all() -> None:
    kinds = {"table_ptr": "*i64", "row_stride": "i32", "head_stride": "i32"}
    kinds |= dict.fromkeys(("num_rows", "num_layers", "num_heads", "words"), "i32")
    compiled(
        cache_kernels._read_rows,
        {"block": 2048},
        kinds=kinds,
        whole=("row_stride", "head_stride"),
        num_warps=4,
    )


if __name__ == "__main__":
    {"compare": compare, "compile": compile_all}[sys.argv[1]]()
