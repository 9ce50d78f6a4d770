"""What decoding needs of a transformer; the three forms in `emuworld.model` have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from emuworld.model.cache import StaticCache


class LanguageModel(Protocol):
    """Hidden states behind a cache, and the scores of ranges of ids."""

    @property
    def device(self) -> torch.device: ...

    def __call__(
        self,
        ids_BT: Tensor,
        *,
        cache: StaticCache,
        advance_B: Sequence[bool] | np.ndarray | None = None,
        causal: bool = True,
    ) -> Tensor:
        """Append the tokens to every row of the cache, or only where `advance_B` is True; hidden states
        [B, T, D]. Where not `causal`, the tokens see each other both ways. What is returned may be
        overwritten by the next call."""

    def logits(self, hidden: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        """[..., D] -> [..., stop - start]."""
