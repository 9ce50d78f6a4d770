"""Sums over processes, each with a part: small ones over the GPUs of one host in one step, by each reading
the others' parts itself over NVLink; all others by NCCL, or gloo.

NCCL takes 12 us for the 20 KB that a token's layers exchange, 128 times a token of the 34 B; PyTorch's
one-shot kernel 10 (two H200, docs/log.md). Larger messages go through NCCL, which moves each byte once.
Uses no NVLink multicast.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _symmetric_memory as symmetric_memory

_MOST_BYTES = 512 << 10  # of a message; above it two GPUs are no faster this way


def summed(parts: Tensor, *, group: dist.ProcessGroup) -> Tensor:
    """The sum over the processes by NCCL or gloo, in place."""
    dist.all_reduce(parts, group=group)
    return parts


def can_read_each_other(group: dist.ProcessGroup) -> bool:
    """Whether every process of the group has a GPU on this host that can read the memory of the others."""
    world = group.size()
    if int(os.environ.get("LOCAL_WORLD_SIZE", "0")) != world or torch.cuda.device_count() < world:
        return False
    others = ((one, other) for one in range(world) for other in range(world) if one != other)
    return all(torch.cuda.can_device_access_peer(one, other) for one, other in others)


class OneShotSum:
    """A `Reduce` for `SplitTransformer.variant`; all processes make it together, and call it in step.

    Args:
        group: processes with a GPU each, all on one host.
        device, dtype: of what is summed.
    """

    def __init__(self, group: dist.ProcessGroup, *, device: torch.device, dtype: torch.dtype) -> None:
        # Read when memory is first shared. No kernel here needs multicast, and not every host bears it.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        self._group = group
        self._shared = symmetric_memory.empty(_MOST_BYTES // dtype.itemsize, device=device, dtype=dtype)
        symmetric_memory.rendezvous(self._shared, group.group_name)

    def __call__(self, parts: Tensor) -> Tensor:
        if parts.dtype != self._shared.dtype or parts.numel() > self._shared.numel() or parts.numel() % 8:
            return summed(parts, group=self._group)
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(
            self._shared[: parts.numel()].view_as(parts), parts.contiguous(), "sum", self._group.group_name
        )
        return total
