"""Data-parallel training: one process a GPU, the same code with one process as with several.

`torchrun --nproc-per-node N -m emuworld.cli train …` starts the processes. Each reads its own share of the
shards, computes the gradient of its own share of every batch, and the mean of the gradients moves all copies
alike. What one process must decide for all (the share of the run that is over, a wish to stop) is agreed on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """This process among its equals: `rank` of `world`. Alone (`world` 1) every method is a plain no-op."""

    def __init__(self, device: torch.device) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if self.world > 1 and not dist.is_initialized():
            # gloo beside NCCL: what is agreed on every step lies on the CPU, and must not wait for the GPU.
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def share(self, batch_size: int) -> int:
        """This process's part of a batch; ValueError where the batch cannot be divided."""
        if batch_size % self.world:
            raise ValueError(
                f"a batch of {batch_size} cannot be divided among {self.world} processes; "
                f"set batch_size to a multiple of {self.world}"
            )
        return batch_size // self.world

    def highest(self, *values: float) -> tuple[float, ...]:
        """The largest of each value over all processes."""
        if self.world == 1:
            return values
        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together, op=dist.ReduceOp.MAX)
        return tuple(together.tolist())

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its mean over the processes: one message for all of them."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        together /= self.world
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def copy_first(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's values."""
        if self.world == 1:
            return
        tensors = list(tensors)
        together = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.broadcast(together, src=0)
        for tensor, part in zip(tensors, together.split([t.numel() for t in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def close(self) -> None:
        """Wait for the others and leave the group."""
        if self.world > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
