"""The static cache: rows, growth, copies and what it refuses."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from triton_cases import run_cases

from emuworld.model import int8_cache
from emuworld.model.cache import StaticCache
from emuworld.model.config import sized

HAS_TRITON = importlib.util.find_spec("triton") is not None
CASES_SCRIPT = Path(__file__).with_name("cache_cases.py")
CONFIG = sized("tiny", vocab_size=10)
NUM_KV = 2 * CONFIG.num_kv_heads


def filled(num_rows: int, capacity: int, lengths: list[int]) -> StaticCache:
    """Row r holds the number 100 r + position at every position."""
    cache = StaticCache(CONFIG, num_rows=num_rows, capacity=capacity)
    for row, length in enumerate(lengths):
        append(cache.rows([row]), [100 * row + position for position in range(length)])
    return cache


def append(cache: StaticCache, numbers: list[int], **kwargs: object) -> None:
    step = cache.begin(len(numbers))
    values_T = torch.tensor(numbers, dtype=torch.float32)
    kv_RKTd = values_T[:, None].expand(cache.num_rows, NUM_KV, len(numbers), CONFIG.head_dim)
    for layer in range(CONFIG.num_layers):
        cache.write(layer, kv_RKTd, step=step)
    cache.finish(step, **kwargs)


def held(cache: StaticCache, row: int) -> list[int]:
    length = int(cache.lengths[row])
    numbers = []
    for layer in range(CONFIG.num_layers):
        for part in cache.row_kv(layer, row, length):
            assert (part == part[:, :1, :, :1]).all()
            numbers.append(part[0, 0, :, 0].int().tolist())
    assert all(other == numbers[0] for other in numbers)
    return numbers[0]


def test_rows_share_memory_and_lengths() -> None:
    cache = filled(4, 64, [3, 0, 5, 1])
    view = cache.rows([2, 0])
    append(view, [7, 8])
    assert cache.lengths.tolist() == [5, 0, 7, 1]
    assert held(cache, 2) == [200, 201, 202, 203, 204, 7, 8] == held(view, 0)
    assert held(cache, 0) == [0, 1, 2, 7, 8]
    assert cache.rows(slice(1, 3)).lengths.tolist() == [0, 7]


def test_all_rows_at_once_are_the_rows_one_by_one() -> None:
    cache = filled(4, 64, [3, 6, 5, 1])
    for view in (cache, cache.rows([1, 2]), cache.rows([3, 0])):
        for row in range(view.num_rows):
            for together, alone in zip(view.all_kv(1, 5), view.row_kv(1, row, 5), strict=True):
                assert torch.equal(together[row : row + 1], alone)


def test_uniform_rows_are_written_together() -> None:
    cache = filled(3, 64, [2, 2, 2])
    append(cache, [9], advance_B=np.array([True, False, True]))
    assert [held(cache, row) for row in range(3)] == [[0, 1, 9], [100, 101], [200, 201, 9]]


def test_growth_keeps_what_is_held_also_through_views() -> None:
    cache = filled(2, 10, [10, 4])
    view = cache.rows([1])
    cache.reserve(1000)
    assert cache.capacity >= 1000 and view.capacity == cache.capacity
    append(view, [5])
    assert held(cache, 0) == list(range(10)) and held(cache, 1) == [100, 101, 102, 103, 5]


def test_copy_and_truncate() -> None:
    cache = filled(2, 10, [6, 2])
    cache.copy_row(0, 1)
    cache.truncate(0, 3)
    assert held(cache, 0) == [0, 1, 2] and held(cache, 1) == [0, 1, 2, 3, 4, 5]
    other = StaticCache(CONFIG, num_rows=1, capacity=1)
    append(other, [42] * 64)
    cache.copy_row(0, 1, origin=other)
    assert held(cache, 1) == [42] * 64
    cache.rows([1, 0]).truncate_all(np.array([2, 0]))
    assert held(cache, 0) == [] and held(cache, 1) == [42] * 2


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    cache = filled(2, 64, [64, 3])
    with pytest.raises(ValueError, match="64 \\+ 1 do not fit"):
        cache.begin(1)
    with pytest.raises(ValueError, match="cannot be cut to 4"):
        cache.truncate(1, 4)
    with pytest.raises(ValueError, match="cannot be cut to"):
        cache.truncate_all(np.array([1, 4]))
    with pytest.raises(ValueError, match="distinct"):
        cache.rows([1, 1])
    with pytest.raises(ValueError, match="one truth value for each of 2 rows"):
        cache.finish(cache.rows([1, 0]).begin(0), advance_B=[True])
    with pytest.raises(ValueError, match="at least one row"):
        StaticCache(CONFIG, num_rows=0, capacity=4)
    assert cache.lengths.tolist() == [64, 3]


def test_ids_are_known_where_they_were_told() -> None:
    config = sized("tiny", vocab_size=50)
    cache = StaticCache(config, num_rows=3, capacity=64)
    assert cache.ids(0, 0) == []
    cache.finish(cache.begin(2))
    cache.rows([2, 0]).finish(cache.rows([2, 0]).begin(3), ids_RT=np.array([[1, 2, 3], [4, 5, 6]]))
    assert [cache.ids(row, 0) for row in range(3)] == [[-1, -1, 4, 5, 6], [-1, -1], [-1, -1, 1, 2, 3]]
    cache.finish(cache.begin(1), advance_B=[True, False, True], ids_RT=np.array([[7], [8], [9]]))
    cache.truncate(2, 4)
    cache.reserve(100)
    assert cache.ids(0, 1) == [-1, 4, 5, 6, 7] and cache.ids(1, 0) == [-1, -1] and cache.ids(2, 3) == [2]
    other = StaticCache(config, num_rows=1, capacity=64)
    other.copy_row(0, 0, origin=cache)
    cache.copy_row(2, 1)
    assert other.ids(0, 3) == [5, 6, 7] and cache.ids(1, 0) == [-1, -1, 1, 2]
    cache.rows([1]).finish(cache.rows([1]).begin(1))
    assert cache.ids(1, 3) == [2, -1]


def test_what_rows_hold_is_read_from_any_start() -> None:
    cache = filled(3, 20, [9, 4, 20])
    read = cache.rows([2, 0]).read_parts(np.array([3, 8]), np.array([5, 1]))
    for (kv_LKTd,), numbers in zip(read, ([203, 204, 205, 206, 207], [8]), strict=True):
        expected = torch.tensor(numbers, dtype=torch.float32)[:, None].expand(len(numbers), CONFIG.head_dim)
        assert torch.equal(kv_LKTd, expected.expand(CONFIG.num_layers, NUM_KV, -1, -1))
        assert kv_LKTd.untyped_storage().nbytes() == kv_LKTd.nbytes


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_the_kernel_reads_the_same_and_compiles(tmp_path: Path) -> None:
    """In Triton's interpreter; and to machine code for compute capability 9.0, which needs no GPU."""
    printed = run_cases(CASES_SCRIPT, "compare", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert printed.count("the same bits") == 9
    assert "compiled" in run_cases(CASES_SCRIPT, "compile", TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, int8_cache.FORMAT])
def test_a_gpu_reads_what_its_rows_hold(dtype: torch.dtype) -> None:
    """Proves the kernel's addresses on a GPU, for many rows at once."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    config = sized("small", vocab_size=10, num_layers=5)
    cache = StaticCache(config, num_rows=40, capacity=700, device="cuda", dtype=dtype)
    parts = [part for layer in cache.memory.kv_RKCd for part in int8_cache.parts(layer)]
    for part in parts:
        part.copy_(50 * torch.randn(part.shape, device="cuda"))
    rng = np.random.default_rng(0)
    rows, starts, lengths = rng.permutation(40)[:33], rng.integers(0, 300, 33), rng.integers(1, 400, 33)
    per_layer = len(parts) // config.num_layers
    read = cache.rows(rows).read_parts(starts, lengths)
    for row, start, length, found in zip(rows, starts, lengths, read, strict=True):
        for at, one in enumerate(found):
            expected = [part[row, :, start : start + length] for part in parts[at::per_layer]]
            assert torch.equal(one, torch.stack(expected))
