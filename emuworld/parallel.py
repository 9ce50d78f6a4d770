"""Several processes serve one transformer, each with its part of it.

`SplitTransformer` is tensor parallel for inference: each process has a narrower transformer of plain tensors,
whose products are summed over the processes; no DTensor stands between a decoding step and its kernels.
Training's form of the same cut is `emuworld.training.sharding`: DTensor takes two seconds to import.

Layout (Shoeybi et al., Megatron-LM, arXiv 1909.08053): the projections into heads and into the feed-forward
are cut by outputs, those back into the residual stream by inputs. The head's ids go to the processes in turn,
so that any range of them is shared evenly (the visual ids are the upper half); they need not divide.

Shapes: B batch, T tokens, D hidden size, v ids of this process.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from emuworld.model.cache import StaticCache
from emuworld.model.config import TransformerConfig
from emuworld.model.fused import FusedTransformer, Reduce
from emuworld.model.sums import OneShotSum, can_read_each_other, summed
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
        rank_here, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if rank_here >= num_gpus:
            raise ValueError(f"every process needs a GPU of its own; start {num_gpus} on this machine")
        torch.cuda.set_device(rank_here)
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
        config: of the whole.
        tensors: the whole weights by their names in the state dict, each asked for once and kept in part
            only: they may be mapped from files, or made on the way.
        group: the processes among which it is cut; None: this one alone, which has all of it.
        device, dtype: of this part.
        weights: "bf16" (as `dtype` says) or "fp8", as for `FusedTransformer`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        tensors: Iterable[tuple[str, Tensor]],
        *,
        group: dist.ProcessGroup | None,
        device: torch.device,
        dtype: torch.dtype,
        weights: str = "bf16",
    ) -> None:
        self._rank, self._world = (0, 1) if group is None else (dist.get_rank(group), group.size())
        check_divides(config, self._world)
        self._reduce: Reduce | None = None if group is None else _sums(group, device=device, dtype=dtype)
        narrow, self._head_vD = _narrow(
            config,
            tensors,
            rank=self._rank,
            world=self._world,
            device=device,
            dtype=dtype,
            in_turn=weights == "fp8",
        )
        self._fused = FusedTransformer(
            narrow, weights=weights, head="bf16", device=device, reduce=self._reduce
        )
        if self._reduce is not None and device.type == "cuda":
            # The first messages make the connections, which no CUDA graph may record: one of either kind.
            self._reduce(torch.zeros(1, device=device))
            self._reduce(torch.zeros(8, device=device, dtype=dtype))

    def variant(self, *, reduce: Reduce | None = None, use_graphs: bool | None = None) -> SplitTransformer:
        """The same weights; sums over the processes in another way (default: as here), or without graphs."""
        other = copy.copy(self)
        other._reduce = reduce or self._reduce
        other._fused = self._fused.variant(use_graphs=use_graphs, reduce=other._reduce)
        return other

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

    @property
    def cache_dtype(self) -> torch.dtype:
        return self._fused.cache_dtype

    def __call__(
        self,
        ids_BT: Tensor,
        *,
        cache: StaticCache | None = None,
        advance_B: Sequence[bool] | np.ndarray | None = None,
        causal: bool = True,
        last_B: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm, or [B, 1, D]; see `Transformer.forward`."""
        return self._fused(ids_BT, cache=cache, advance_B=advance_B, causal=causal, last_B=last_B)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, *, start: int = 0, stop: int | None = None) -> Tensor:
        """[..., D] -> [..., stop - start]: the scores of ids start to stop only."""
        stop = self.config.vocab_size if stop is None else stop
        first = start + (self._rank - start) % self._world
        at = first // self._world
        own = F.linear(hidden, self._head_vD[at : at + len(range(first, stop, self._world))])
        if self._reduce is None:
            return own
        scores = hidden.new_zeros((*hidden.shape[:-1], stop - start))
        scores[..., first - start :: self._world] = own
        return self._reduce(scores)


def _sums(group: dist.ProcessGroup, *, device: torch.device, dtype: torch.dtype) -> Reduce:
    """How the parts that processes have are summed here."""
    if device.type == "cuda" and can_read_each_other(group):
        return OneShotSum(group, device=device, dtype=dtype)
    return partial(summed, group=group)


def _narrow(
    config: TransformerConfig,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    rank: int,
    world: int,
    device: torch.device,
    dtype: torch.dtype,
    in_turn: bool,
) -> tuple[Transformer, Tensor]:
    """The transformer of one process's heads and feed-forward columns, whose own head is not to be used, and
    the rows of the head [v, D].

    With `in_turn`, what lies on another device stays there until its layer's turn.
    """
    narrow_config = replace(
        config,
        num_heads=config.num_heads // world,
        num_kv_heads=config.num_kv_heads // world,
        intermediate_size=config.intermediate_size // world,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        narrow = Transformer(narrow_config)
    parts: dict[str, Tensor] = {}
    for name, whole in tensors:
        tensor = whole.detach()
        if name == "lm_head.weight":
            head_vD = tensor[rank::world].to(device, dtype, copy=True).contiguous()
            continue
        if name.endswith(_BY_OUTPUTS):
            tensor = tensor.chunk(world, dim=0)[rank]
        elif name.endswith(_BY_INPUTS):
            tensor = tensor.chunk(world, dim=1)[rank]
        if not in_turn or tensor.device.type == device.type:
            tensor = tensor.to(device, dtype, copy=True).contiguous()
        parts[name] = tensor
    narrow.load_state_dict(parts, strict=False, assign=True)
    narrow.tie_weights()
    return narrow.eval(), head_vD


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
