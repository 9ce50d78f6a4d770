"""One decoding step as a CUDA graph: recorded once, then replayed as a single launch.

Shapes: R rows, T tokens of each, D hidden_size.
"""

from collections.abc import Callable
from functools import cache as memoise
from typing import Any

import torch

Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""ids [R, T] and spots [2, R] (rows of the cache's memory, their lengths), on the device -> [R, T, D]."""
Key = tuple[int, ...]


class StepGraphs:
    """The graphs over one cache's memory, by what differs between steps.

    What a step needs inside is taken from one pool: they never run side by side. The pool lives as long as
    these graphs (PyTorch refuses one whose graphs have all gone).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Key, StepGraph | None] = {}
        self._pool: Any = None  # PyTorch's handle, of a type that changes with its version

    def run(self, key: Key, compute: Compute, ids_RT: torch.Tensor, spots_2R: torch.Tensor) -> torch.Tensor:
        """Hidden states [R, T, D]. What comes for the second time is recorded, and replayed from then on."""
        if key not in self._graphs:
            self._graphs[key] = None  # computed as it stands, which also warms up what a recording needs
            return compute(*(tensor.to(self._device, non_blocking=True) for tensor in (ids_RT, spots_2R)))
        graph = self._graphs[key]
        if graph is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = StepGraph(compute, ids_RT, spots_2R, device=self._device, pool=self._pool)
            self._graphs[key] = graph
        return graph(ids_RT, spots_2R)


class StepGraph:
    """`compute` for one shape of its arguments; whatever else it reads must stay where it is.

    Recording runs the step, for the arguments given; running it again writes the same keys and values.
    """

    def __init__(
        self,
        compute: Compute,
        ids_RT: torch.Tensor,
        spots_2R: torch.Tensor,
        *,
        device: torch.device,
        pool: Any,
    ) -> None:
        self._ids_RT, self._spots_2R = ids_RT.to(device).clone(), spots_2R.to(device)
        beside = _beside(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            # The result's place is made outside the graph: graphs that share a pool reuse what is inside.
            self._hidden_RTD = torch.empty_like(compute(self._ids_RT, self._spots_2R))
        torch.cuda.current_stream(device).wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        # The default, "global", spoils a recording when any other thread asks the driver for something
        # meanwhile: NCCL's watchdog does (pytorch/pytorch#104555), and so do worlds in other threads.
        with torch.cuda.graph(self._graph, pool=pool, stream=beside, capture_error_mode="thread_local"):
            self._hidden_RTD.copy_(compute(self._ids_RT, self._spots_2R))

    def __call__(self, ids_RT: torch.Tensor, spots_2R: torch.Tensor) -> torch.Tensor:
        """Hidden states [R, T, D], the caller's own. Waits for nothing, also where arguments are on the
        host: what is copied from there is so small that the driver has read it when the call returns.
        """
        self._ids_RT.copy_(ids_RT, non_blocking=True)
        self._spots_2R.copy_(spots_2R, non_blocking=True)
        self._graph.replay()
        return self._hidden_RTD.clone()


@memoise
def _beside(device: torch.device) -> torch.cuda.Stream:
    """The stream of all recordings: what libraries keep for each stream is made once, and not in a graph."""
    return torch.cuda.Stream(device)
