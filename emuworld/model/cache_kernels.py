"""Copies out of a cache as a Triton kernel: what many rows hold, all layers of them, in one launch.

PyTorch would gather it token by token, stack the layers and copy every row once more.

Import it only where Triton is installed. Shapes as in `cache`; L layers.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

_WORD_BYTES = 4  # of what is copied at a time; a head's token is made of whole ones, in 16 bits and in 8
_WORDS = 2048  # of a program


def read_rows(
    part_L: Sequence[torch.Tensor], rows_R: np.ndarray, starts_R: np.ndarray, lengths_R: np.ndarray
) -> list[torch.Tensor]:
    """Of each of these rows so many tokens from its start on, [L, K, T, ...] in memory of its own.

    `part_L` is one of `int8_cache.parts` of every layer, [R, K, C, ...].
    """
    first, num_layers = part_L[0], len(part_L)
    _, num_heads, _, size = first.shape
    words = size * first.itemsize // _WORD_BYTES
    assert words * _WORD_BYTES == size * first.itemsize and all(p.stride() == first.stride() for p in part_L)
    found = [first.new_empty((num_layers, num_heads, length, size)) for length in lengths_R.tolist()]
    addresses = [tensor.data_ptr() for tensor in (*part_L, *found)]
    table = np.concatenate((rows_R, starts_R, lengths_R, np.array(addresses)))
    strides = [stride * first.itemsize // _WORD_BYTES for stride in first.stride()[:2]]
    with torch.cuda.device_of(first):
        _read_rows[(len(found), num_layers * num_heads, triton.cdiv(int(lengths_R.max()) * words, _WORDS))](
            torch.from_numpy(table).to(first.device, non_blocking=True),
            len(found),
            num_layers,
            num_heads,
            words,
            *strides,
            block=_WORDS,
            num_warps=4,
        )
    return found


@triton.jit(do_not_specialize=["num_rows", "num_layers", "num_heads", "words"])
def _read_rows(
    table_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_layers: tl.tensor,
    num_heads: tl.tensor,
    words: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    block: tl.constexpr,
) -> None:
    """One program a block of the words of a row's layer and head. The table: rows, starts and lengths, then
    where each layer and each result begins.
    """
    item, pair = tl.program_id(0), tl.program_id(1)
    layer, head = pair // num_heads, pair % num_heads
    row = tl.load(table_ptr + item)
    start = tl.load(table_ptr + num_rows + item)
    length = tl.load(table_ptr + 2 * num_rows + item)
    from_ptr = tl.load(table_ptr + 3 * num_rows + layer).to(tl.pointer_type(tl.int32))
    to_ptr = tl.load(table_ptr + 3 * num_rows + num_layers + item).to(tl.pointer_type(tl.int32))
    from_ptr += row * row_stride + head.to(tl.int64) * head_stride + start * words
    to_ptr += pair * (length * words)
    at = tl.program_id(2) * block + tl.arange(0, block)
    there = at < length * words
    tl.store(to_ptr + at, tl.load(from_ptr + at, mask=there, other=0), mask=there)
