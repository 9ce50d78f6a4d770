"""This process among those that train together: who it is, what it reads, what all must agree on.

`torchrun --nproc-per-node N -m emuworld.cli train …` starts the processes. They stand in a grid, data by
tensor: those of one row (`tensor` of them) cut every layer among themselves and take the same batch; the rows
share the batch and the optimiser's state (`emuworld.parallel`). A model that is small beside a GPU is better
copied whole into every process. Alone it is the same code: every method is a plain no-op, and nothing is cut.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")
PARALLEL = ("ddp", "fsdp", "tp")


class Ranks:
    """`rank` of `world`; in the grid, row `data_rank` of `data_world`, each of `tensor` processes.

    Args:
        device: where this process trains.
        parallel: "ddp", every process a row of its own with a whole copy; "fsdp", a row of its own with a
            part of every weight; or "tp", `tensor_ranks` to a row (0: all).

    Raises:
        ValueError: the processes do not stand in such a grid.
    """

    def __init__(self, device: torch.device, *, parallel: str = "fsdp", tensor_ranks: int = 0) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if parallel not in PARALLEL:
            raise ValueError(f"parallel is {parallel!r}; expected one of {', '.join(PARALLEL)}")
        self.tensor = (tensor_ranks or self.world) if parallel == "tp" else 1
        if self.tensor < 1 or self.world % self.tensor:
            raise ValueError(
                f"{self.world} processes cannot stand in rows of {self.tensor}; set tensor_ranks to a divisor"
            )
        self.data_world, self.data_rank = self.world // self.tensor, self.rank // self.tensor
        self.mesh: DeviceMesh | None = None  # where weights are cut
        if self.world > 1:
            if not dist.is_initialized():
                # gloo beside NCCL: what is agreed on every step lies on the CPU, and must not wait for the
                # GPU.
                dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            if parallel != "ddp":
                shape = (self.data_world, self.tensor)
                self.mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    @property
    def leads_row(self) -> bool:
        """Whether this process draws the batches of its row."""
        return self.rank % self.tensor == 0

    def share(self, batch_size: int) -> int:
        """This row's part of a batch; ValueError where the batch cannot be divided."""
        if batch_size % self.data_world:
            raise ValueError(
                f"a batch of {batch_size} cannot be divided among {self.data_world} processes; "
                f"set batch_size to a multiple of {self.data_world}"
            )
        return batch_size // self.data_world

    def highest(self, *values: float) -> tuple[float, ...]:
        """The largest of each value over all processes."""
        return self._together(values, dist.ReduceOp.MAX) if self.world > 1 else values

    def total(self, *values: float) -> tuple[float, ...]:
        """The sum of each value over the rows."""
        if self.world == 1:
            return values
        return self._together([value if self.leads_row else 0.0 for value in values], dist.ReduceOp.SUM)

    def _together(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> tuple[float, ...]:
        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together, op=op)
        return tuple(together.tolist())

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace every gradient by its mean over the copies: one message for all of them. Nothing where
        weights are cut, because there the backward pass does it.
        """
        if self.world == 1 or self.mesh is not None:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(together)
        together /= self.world
        parts = together.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def from_leader(self, value: T | None) -> T:
        """What the row's leader gives; the others give None."""
        if self.tensor > 1:
            assert self.mesh is not None
            leader = self.rank - self.rank % self.tensor
            value = _broadcast(value, source=leader, group=self.mesh["tensor"].get_group())
        assert value is not None, "the leader has a value"
        return value

    def from_first(self, value: T | None) -> T:
        """What the first process gives; the others give None."""
        value = _broadcast(value, source=0, group=None) if self.world > 1 else value
        assert value is not None, "the first process has a value"
        return value

    def close(self) -> None:
        """Wait for the others and leave the group."""
        if self.world > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def _broadcast(value: T | None, *, source: int, group: dist.ProcessGroup | None) -> T | None:
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group, device=torch.device("cpu"))
    return box[0]
