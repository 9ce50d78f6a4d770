"""Several documents in one row, none of which sees another: positions begin anew, attention stays inside.

On CUDA the mask is FlexAttention's, which skips the blocks that are dark as a whole; elsewhere it is dense.
Only training needs it: importing FlexAttention takes seconds.

Shapes: B rows, T tokens, H query heads, G key-value heads, d head_dim.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention


class Documents(NamedTuple):
    """What attention and rotary positions need of rows of documents."""

    positions_BT: Tensor
    """int64: the place of each token in its document."""
    mask: Tensor | BlockMask
    """[B, 1, T, T] bool, True = may attend, or the same in blocks."""

    def attend(self, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, *, dropout: float = 0.0) -> Tensor:
        """Causal attention inside the documents; returns [B, H, T, d]. FlexAttention has no dropout of
        attention weights: it is left out there, with a warning.
        """
        gqa = q_BHTd.shape[1] != k_BGTd.shape[1]
        if isinstance(self.mask, Tensor):
            return scaled_dot_product_attention(
                q_BHTd, k_BGTd, v_BGTd, attn_mask=self.mask, dropout_p=dropout, enable_gqa=gqa
            )
        if dropout:
            _warn_of_dropout()
        attend = _compiled() if q_BHTd.is_cuda else flex_attention
        return attend(q_BHTd, k_BGTd, v_BGTd, block_mask=self.mask, enable_gqa=gqa)


def documents(numbers_BT: Tensor, *, blocks: bool | None = None) -> Documents:
    """Positions and mask of rows whose tokens carry the number of their document; those of one document
    stand together. `blocks`: FlexAttention's form; None: on CUDA.
    """
    num_rows, length = numbers_BT.shape
    places_T = torch.arange(length, device=numbers_BT.device)
    begins_BT = torch.ones_like(numbers_BT, dtype=torch.bool)
    begins_BT[:, 1:] = numbers_BT[:, 1:] != numbers_BT[:, :-1]
    starts_BT = torch.where(begins_BT, places_T, 0).cummax(dim=1).values
    positions_BT = places_T - starts_BT
    if not (numbers_BT.is_cuda if blocks is None else blocks):
        same_BTT = numbers_BT[:, :, None] == numbers_BT[:, None, :]
        return Documents(positions_BT, (same_BTT & (places_T[:, None] >= places_T))[:, None])

    def visible(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (numbers_BT[row, query] == numbers_BT[row, key]) & (query >= key)

    device = str(numbers_BT.device)
    return Documents(positions_BT, create_block_mask(visible, num_rows, None, length, length, device=device))


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


@cache
def _warn_of_dropout() -> None:
    warnings.warn(
        "attention weights of packed documents are not dropped on a GPU (FlexAttention has no dropout); "
        "embeddings and outputs are",
        stacklevel=3,
    )
