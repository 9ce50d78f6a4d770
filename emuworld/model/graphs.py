"""One decoding step as a CUDA graph: recorded once, then replayed as a single launch.

Shapes: R rows, T tokens of each, D hidden_size.
"""

from collections.abc import Callable, Sequence
from functools import cache as memoise
from typing import Any

import torch

Compute = Callable[..., torch.Tensor]
"""ids [R, T] and spots [2, R] (rows of the cache's memory, their lengths), on the device -> [R, T, D]; with
the index [R] of a token of each, [R, 1, D]."""
Key = tuple[int, ...]
_MOST_WIDE = 8  # what each keeps for its result is tens of megabytes
# Of the memory: with less of it free no wide ones are recorded, and before others what PyTorch has set aside
# is given back.
_SPARE_SHARE = 4


class StepGraphs:
    """The graphs over one cache's memory, by what differs between steps.

    What a step needs inside is taken from one pool: they never run side by side. The pool lives as long as
    these graphs (PyTorch refuses one whose graphs have all gone).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Key, StepGraph | None] = {}
        self._num_wide = 0
        self._pool: Any = None  # PyTorch's handle, of a type that changes with its version

    def run(self, key: Key, compute: Compute, *inputs: torch.Tensor, wide: bool = False) -> torch.Tensor:
        """`compute` of the inputs, ids first, which may be on the host. What comes for the second time is
        recorded, and replayed from then on; of `wide` ones, of many tokens, only the first few are.
        """
        graph = self._graphs.get(key)
        if graph is None:
            if key not in self._graphs or (wide and not self._has_room()):
                self._graphs[key] = None  # computed as it stands also warms up what a recording needs
                return compute(*(tensor.to(self._device, non_blocking=True) for tensor in inputs))
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = self._graphs[key] = StepGraph(compute, inputs, device=self._device, pool=self._pool)
            self._num_wide += wide
        return graph(*inputs)

    def _has_room(self) -> bool:
        """For another wide one."""
        return self._num_wide < _MOST_WIDE and not _is_short_of_memory(self._device)


class StepGraph:
    """`compute` for one shape of its arguments; whatever else it reads must stay where it is.

    Recording runs the step, for the arguments given; running it again writes the same keys and values.
    """

    def __init__(
        self, compute: Compute, inputs: Sequence[torch.Tensor], *, device: torch.device, pool: Any
    ) -> None:
        self._inputs = [torch.empty_like(t, device=device).copy_(t, non_blocking=True) for t in inputs]
        beside = _beside(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            # The result's place is made outside the graph: graphs that share a pool reuse what is inside.
            self._hidden_RTD = torch.empty_like(compute(*self._inputs))
        torch.cuda.current_stream(device).wait_stream(beside)
        self._graph = torch.cuda.CUDAGraph()
        if _is_short_of_memory(device):
            torch.cuda.empty_cache()
        # Not `torch.cuda.graph`, which always gives back what is set aside: all that follows waits for the
        # driver then. The default mode, "global", spoils a recording when another thread asks the driver for
        # something meanwhile: NCCL's watchdog (pytorch/pytorch#104555) and worlds in other threads do.
        with torch.cuda.stream(beside):
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                self._hidden_RTD.copy_(compute(*self._inputs))
            finally:
                self._graph.capture_end()

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Hidden states, the caller's own. Waits for nothing, also where arguments are on the host: what is
        copied from there is so small that the driver has read it when the call returns.
        """
        for own, tensor in zip(self._inputs, inputs, strict=True):
            own.copy_(tensor, non_blocking=True)
        self._graph.replay()
        return self._hidden_RTD.clone()


def _is_short_of_memory(device: torch.device) -> bool:
    free_bytes, all_bytes = torch.cuda.mem_get_info(device)
    return free_bytes < all_bytes // _SPARE_SHARE


@memoise
def _beside(device: torch.device) -> torch.cuda.Stream:
    """The stream of all recordings: what libraries keep for each stream is made once, and not in a graph."""
    return torch.cuda.Stream(device)
