"""Forward and backward pass of a batch as a CUDA graph, one for each shape of batch.

A small model's layers are over before Python has asked for the next ones: eight compiled layers and autograd
cost some 27 ms of a processor for each batch, whatever its size (docs/log.md). A replay is one launch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Learn = Callable[..., tuple[Tensor, ...]]
"""A batch's tensors -> figures to keep; adds to gradients."""


class BatchGraphs:
    """`learn` for batches of any shapes. Gradients must stay where they are from step to step: fill them with
    zeros. Graphs run one after the other and share their memory, which is that of the largest batch.
    """

    def __init__(self, learn: Learn, *, device: torch.device) -> None:
        self._learn = learn
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None  # PyTorch's handle, of a type that changes with its version
        self._seen: dict[tuple[torch.Size, ...], int] = {}
        self._graphs: dict[tuple[torch.Size, ...], _BatchGraph] = {}

    def __call__(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """What comes in the same shapes for the third time is recorded. Results last until the next call."""
        shapes = tuple(tensor.shape for tensor in batch)
        if shapes not in self._graphs:
            times = self._seen[shapes] = self._seen.get(shapes, 0) + 1
            if times == 1:  # compiles
                return self._learn(*batch)
            if times == 2:  # warms up what the recording needs
                return self._beside(batch)
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[shapes] = _BatchGraph(self._learn, batch, stream=self._stream, pool=self._pool)
        return self._graphs[shapes](batch)

    def _beside(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """As it stands, on the stream of the recordings."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            figures = self._learn(*batch)
        current.wait_stream(self._stream)
        for tensor in batch:
            tensor.record_stream(self._stream)
        return figures


class _BatchGraph:
    def __init__(
        self,
        learn: Learn,
        batch: tuple[Tensor, ...],
        *,
        stream: torch.cuda.Stream,
        pool: Any,
    ) -> None:
        self._batch = tuple(tensor.clone(memory_format=torch.contiguous_format) for tensor in batch)
        torch.cuda.synchronize(stream.device)
        self._graph = torch.cuda.CUDAGraph()
        # "thread_local", because batches are pinned and shards decoded in other threads meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._figures = learn(*self._batch)

    def __call__(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for mine, theirs in zip(self._batch, batch, strict=True):
            mine.copy_(theirs, non_blocking=True)
        self._graph.replay()
        return self._figures
