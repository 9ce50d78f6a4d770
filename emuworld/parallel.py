"""Several processes serve one transformer, each with its part of it.

`SplitTransformer` is tensor parallel for inference: each process has a narrower transformer of plain tensors,
whose products are summed over the processes; no DTensor stands between a decoding step and its kernels.
Training's form of the same cut is `emuworld.training.sharding`: DTensor takes two seconds to import.

Layout (Shoeybi et al., Megatron-LM, arXiv 1909.08053): the projections into heads and into the feed-forward
are cut by outputs, those back into the residual stream by inputs, embedding and head by ids. Ids need not
divide: the last process has fewer rows.

Shapes: B batch, T tokens, D hidden size, v ids of this process.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from emuworld.model.cache import StaticCache
from emuworld.model.config import TransformerConfig
from emuworld.model.fused import FusedTransformer
from emuworld.model.transformer import Transformer

_BY_OUTPUTS = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "gate", "up"))
_BY_INPUTS = tuple(f"{name}_proj.weight" for name in ("o", "down"))
_joined: list[dist.ProcessGroup] = []


def join() -> None:
    """Enter the group of the processes that torchrun started; models that are opened from now on are cut
    among them (`tensor_group`). Alone nothing changes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or _joined:
        return
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Who follows waits for as long as the leader's user thinks.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timedelta(days=7))
    assert dist.group.WORLD is not None
    _joined.append(dist.group.WORLD)


def leave() -> None:
    """Wait for the others and leave the group: a process that just ends may take the others' last message
    along, or be ended by its own threads. Models that were opened in the group are of no use any more.
    """
    if _joined:
        dist.barrier(_joined.pop())
        dist.destroy_process_group()


def tensor_group() -> dist.ProcessGroup | None:
    """The processes that cut every model among themselves, where `join` was called in several."""
    return _joined[0] if _joined else None


class SplitTransformer:
    """One process's part of a transformer for inference; the interface of `Transformer`, with a cache.

    Every process must make the same calls with the same ids. Hidden states agree between processes to
    rounding; logits are equal to the bit, because each id's score comes from the one process that has its
    row, so that equal random numbers draw equal tokens everywhere. The embedding is whole in every process.

    Args:
        model: stays as it is; where it is mapped from its files, only this part of them is read.
        group: the processes among which it is cut.
        device, dtype: of this part.
    """

    def __init__(
        self, model: Transformer, *, group: dist.ProcessGroup, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._group = group
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        check_divides(model.config, world)
        self._part = vocabulary_part(model.config.vocab_size, rank=rank, world=world)
        narrow = _narrow(model, rank=rank, world=world, device=device, dtype=dtype)
        self._fused = FusedTransformer(narrow, reduce=self._sum)
        self._head_vD = model.lm_head.weight.detach()[slice(*self._part)].to(device, dtype, copy=True)

    @property
    def config(self) -> TransformerConfig:
        """Of this part: its heads are those that a cache holds here."""
        return self._fused.config

    @property
    def device(self) -> torch.device:
        return self._fused.device

    @property
    def dtype(self) -> torch.dtype:
        return self._fused.dtype

    def __call__(
        self,
        ids_BT: Tensor,
        *,
        cache: StaticCache | None = None,
        advance_B: Sequence[bool] | np.ndarray | None = None,
        causal: bool = True,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm; see `Transformer.forward`."""
        return self._fused(ids_BT, cache=cache, advance_B=advance_B, causal=causal)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        """[..., D] -> [..., stop - start]: the scores of ids start to stop only."""
        stop = self.config.vocab_size if stop is None else stop
        first, last = max(start, self._part[0]), min(stop, self._part[1])
        scores = hidden.new_zeros((*hidden.shape[:-1], stop - start))
        if first < last:
            rows = slice(first - self._part[0], last - self._part[0])
            scores[..., first - start : last - start] = F.linear(hidden, self._head_vD[rows])
        return self._sum(scores)

    def _sum(self, parts: Tensor) -> Tensor:
        dist.all_reduce(parts, group=self._group)
        return parts


def _narrow(
    model: Transformer, *, rank: int, world: int, device: torch.device, dtype: torch.dtype
) -> Transformer:
    """The transformer of one process's heads and feed-forward columns. Its head is not to be used."""
    config = replace(
        model.config,
        num_heads=model.config.num_heads // world,
        num_kv_heads=model.config.num_kv_heads // world,
        intermediate_size=model.config.intermediate_size // world,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        narrow = Transformer(config)
    parts = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        if name.endswith(_BY_OUTPUTS):
            tensor = tensor.chunk(world, dim=0)[rank]
        elif name.endswith(_BY_INPUTS):
            tensor = tensor.chunk(world, dim=1)[rank]
        parts[name] = tensor.detach().to(device, dtype, copy=True).contiguous()
    narrow.load_state_dict(parts, strict=False, assign=True)
    narrow.tie_weights()
    return narrow.eval()


def vocabulary_part(num_ids: int, *, rank: int, world: int) -> tuple[int, int]:
    """First and last + 1 of the ids whose rows of the head a process holds, as DTensor cuts them."""
    rows = -(-num_ids // world)
    return min(num_ids, rank * rows), min(num_ids, (rank + 1) * rows)


def check_divides(config: TransformerConfig, world: int) -> None:
    """ValueError where the heads or the feed-forward cannot be cut into `world` equal parts."""
    sizes = {
        "key-value heads": config.num_kv_heads,
        "heads": config.num_heads,
        "feed-forward columns": config.intermediate_size,
    }
    for name, size in sizes.items():
        if size % world:
            raise ValueError(
                f"a transformer of {size} {name} cannot be cut among {world} processes; use a number that "
                f"divides {config.num_kv_heads}"
            )
