"""Rows for learning to draw pictures at once: a sequence as it is, behind it noisy copies of its pictures.

The paper writes `text, noisy picture, clean picture, text, …` (Emu3.5, figure 9). Here the noisy copies stand
behind the whole clean sequence, which is the same: who sees whom is said by the mask, and where a token is by
its rotary position, which a noisy copy shares with its clean one. So

- clean tokens (words, codes, control tokens) see the clean tokens up to themselves, as ever;
- noisy tokens see the clean tokens before their picture's IMG, and their own noisy picture both ways; no
  other noisy picture, and not their own clean copy.

A row may hold several documents (`packing.py`): each begins at position 0, and nobody sees another's.

A block is IMG, the codes, EOL between rows. As in decoding, what stands at a token predicts the next one.

Shapes: B rows, T clean tokens, S = T + blocks times block length, padded to a multiple of 128.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from torch.nn.functional import scaled_dot_product_attention

from emuworld.model.attention import AttentionFunction
from emuworld.tokens.vocabulary import Vocabulary

_ROUND = 128  # FlexAttention's block
_NO_BLOCK = 0
_PADDING = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class NoisyRows:
    """A batch, [B, S] int64 each.

    Attributes:
        ids: the clean tokens, then the blocks; the codes in the blocks are still the clean ones.
        positions: rotary positions.
        blocks: 0 = clean token, 1 … = the noisy picture it belongs to, -1 = padding behind the clean tokens.
        starts, reach: the first and the last clean token of the row that a token sees.
        targets: the code that a noisy token predicts; -1 where it predicts none.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    blocks: NDArray[np.int64]
    starts: NDArray[np.int64]
    reach: NDArray[np.int64]
    targets: NDArray[np.int64]


def lay_out(
    ids_BT: NDArray[np.int64],
    *,
    inputs_BT: NDArray[np.int64] | None = None,
    documents_BT: NDArray[np.int64] | None = None,
    num_blocks: int,
    block_length: int,
    vocabulary: Vocabulary,
) -> NoisyRows:
    """Put a noisy copy of the answers' whole pictures, at most `num_blocks` of at most `block_length` tokens,
    behind each row. `inputs_BT`: what stands for `ids_BT` as clean tokens, some codes replaced.
    `documents_BT`: the number of each token's document, those of one side by side; None: a row is one.
    """
    num_rows, length = ids_BT.shape
    total = -(-(length + num_blocks * block_length) // _ROUND) * _ROUND
    ids = np.full((num_rows, total), vocabulary.pad, np.int64)
    ids[:, :length] = ids_BT if inputs_BT is None else inputs_BT
    positions, blocks = np.zeros_like(ids), np.full_like(ids, _PADDING)
    starts, reach, targets = np.zeros_like(ids), np.full_like(ids, -1), np.full_like(ids, -1)
    reach[:, :length] = np.arange(length)
    blocks[:, :length] = _NO_BLOCK
    for row, clean in enumerate(ids_BT):
        at, number = length, 0
        for first, end in _documents(None if documents_BT is None else documents_BT[row], length):
            positions[row, first:end] = np.arange(end - first)
            starts[row, first:end] = first
            for start, stop in _pictures(clean[first:end], vocabulary):
                if number == num_blocks or stop - start > block_length:
                    continue
                number += 1
                here, copied = slice(at, at + stop - start), slice(first + start, first + stop)
                at = here.stop
                ids[row, here] = clean[copied]
                positions[row, here] = np.arange(start, stop)
                blocks[row, here] = number
                starts[row, here] = first
                reach[row, here] = copied.start - 1
                following = clean[copied.start + 1 : copied.stop + 1] - vocabulary.visual_start
                targets[row, here] = np.where(following >= 0, following, -1)
    return NoisyRows(ids=ids, positions=positions, blocks=blocks, starts=starts, reach=reach, targets=targets)


def _documents(numbers_T: NDArray[np.int64] | None, length: int) -> list[tuple[int, int]]:
    """Where each begins and ends."""
    if numbers_T is None:
        return [(0, length)]
    bounds = [0, *(np.flatnonzero(np.diff(numbers_T)) + 1).tolist(), length]
    return list(itertools.pairwise(bounds))


def _pictures(ids_T: NDArray[np.int64], vocabulary: Vocabulary) -> list[tuple[int, int]]:
    """From IMG up to, and without, EOI: every whole picture of the answer."""
    prompt_ends = np.flatnonzero(ids_T == vocabulary.bss)
    first = int(prompt_ends[0]) if len(prompt_ends) else 0
    starts = [int(at) for at in np.flatnonzero(ids_T == vocabulary.img) if at > first]
    ends = np.flatnonzero(ids_T == vocabulary.eoi)
    return [(start, int(later[0])) for start in starts if len(later := ends[ends > start])]


def dense_attention(blocks_BS: Tensor, starts_BS: Tensor, reach_BS: Tensor) -> AttentionFunction:
    """The mask as a matrix: any device, S * S bytes a row."""
    clean_B1S = (blocks_BS == _NO_BLOCK)[:, None]
    keys_S = torch.arange(blocks_BS.shape[1], device=blocks_BS.device)
    seen_BSS = clean_B1S & (keys_S >= starts_BS[:, :, None]) & (keys_S <= reach_BS[:, :, None])
    own_BSS = (blocks_BS[:, :, None] == blocks_BS[:, None]) & ~clean_B1S
    mask_B1SS = (seen_BSS | own_BSS)[:, None]

    def attend(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor) -> Tensor:
        grouped = q_BHTd.shape[1] != k_BGTd.shape[1]
        if grouped and q_BHTd.is_cuda:  # with a mask no kernel groups heads there: all scores would be held
            repeats = q_BHTd.shape[1] // k_BGTd.shape[1]
            k_BGTd, v_BGTd = (x.repeat_interleave(repeats, dim=1) for x in (k_BGTd, v_BGTd))
            grouped = False
        return scaled_dot_product_attention(q_BHTd, k_BGTd, v_BGTd, attn_mask=mask_B1SS, enable_gqa=grouped)

    return attend


def flex_attention(blocks_BS: Tensor, starts_BS: Tensor, reach_BS: Tensor) -> AttentionFunction:
    """The mask as FlexAttention's blocks, of which empty ones are skipped. Compiled on CUDA; elsewhere it
    only computes forwards."""

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_clean = blocks_BS[row, key] == _NO_BLOCK
        seen = is_clean & (key >= starts_BS[row, query]) & (key <= reach_BS[row, query])
        return seen | ((blocks_BS[row, query] == blocks_BS[row, key]) & ~is_clean)

    num_rows, length = blocks_BS.shape
    device = str(blocks_BS.device)
    mask = torch_flex.create_block_mask(visible, num_rows, None, length, length, device=device)

    def attend(q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor) -> Tensor:
        # Inside a compiled layer it is compiled along.
        whole = torch.compiler.is_compiling() or not q_BHTd.is_cuda
        attention: Any = torch_flex.flex_attention if whole else _compiled_attention()
        grouped = q_BHTd.shape[1] != k_BGTd.shape[1]
        out_BHTd: Tensor = attention(q_BHTd, k_BGTd, v_BGTd, block_mask=mask, enable_gqa=grouped)
        return out_BHTd

    return attend


@functools.cache
def _compiled_attention() -> Callable[..., Any]:
    """One compilation for each shape of rows; uncompiled it would hold all scores at once."""
    return torch.compile(torch_flex.flex_attention, dynamic=False)
