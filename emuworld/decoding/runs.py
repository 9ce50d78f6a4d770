"""Runs of tokens, each row of a cache its own, read by all rows together: for a GPU that has many worlds.

A row's bits depend on the batch here: rows of any lengths share a call, and a run is cut into windows that
the model's step takes, padded so that few graphs are recorded. Where results must not depend
on the batch, rows are read one by one or in equal groups (`cache_pool`, `cache_rows`).

Shapes: R cache rows, T tokens of one window, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from emuworld.decoding.language_model import LanguageModel
from emuworld.model.cache import StaticCache

_MOST_QUERIES = 128  # of a key-value head in one window: what `emuworld.model.fused` takes as one step
_WIDTHS = (1, 2)  # of a window at the end of the runs; else it is full: each width is a kernel and a graph


def have_room(cache: StaticCache, runs: Sequence[Sequence[int]]) -> bool:
    """Whether the context has room for the runs and the padding behind them."""
    counts_R = np.array([len(run) for run in runs])
    longest = int((cache.lengths + counts_R).max()) + _window(cache)
    return longest <= cache.config.max_position_embeddings


def read_runs(model: LanguageModel, cache: StaticCache, runs: Sequence[Sequence[int]]) -> Tensor:
    """Every row of the cache reads its run (which may be empty): the hidden states [R, D] behind their ends.

    Rows without a run stay as they are and get zeros.
    """
    counts_R = np.array([len(run) for run in runs])
    starts_R, window = cache.lengths, _window(cache)
    ids_RT = np.zeros((len(runs), -(-int(counts_R.max()) // window) * window), dtype=np.int64)
    for row, run in enumerate(runs):
        ids_RT[row, : len(run)] = run
    on_device_RT = torch.from_numpy(ids_RT).to(model.device)
    cache.reserve(int((starts_R + counts_R).max()) + window)
    behind_RD: Tensor | None = None
    at = 0
    while at < counts_R.max():
        width = next((w for w in (*_WIDTHS, window) if w >= counts_R.max() - at), window)
        hidden_RTD = model(on_device_RT[:, at : at + width], cache=cache)
        cache.cut(starts_R + np.minimum(counts_R, at + width))
        ending = np.flatnonzero((counts_R > at) & (counts_R <= at + width))
        if behind_RD is None:
            behind_RD = hidden_RTD.new_zeros((len(runs), hidden_RTD.shape[2]))
        if len(ending):
            rows, last = (
                torch.from_numpy(one).to(model.device) for one in (ending, counts_R[ending] - 1 - at)
            )
            behind_RD[rows] = hidden_RTD[rows, last]
        at += width
    assert behind_RD is not None, "no row has anything to read"
    return behind_RD


def _window(cache: StaticCache) -> int:
    return max(1, _MOST_QUERIES // (cache.config.num_heads // cache.config.num_kv_heads))
