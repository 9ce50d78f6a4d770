"""Several processes that train or draw together, on the CPU through gloo."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from typing import Any


def run_together(
    work: Callable[..., None], *arguments: Any, world: int = 2, timeout_s: float = 800.0
) -> None:
    """Run `work(rank, *arguments)` in `world` new processes, as torchrun would; all must end well."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = int(server.getsockname()[1])
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_enter, args=(work, rank, world, port, arguments)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=timeout_s)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world, f"exit codes {codes}: see above"


def _enter(work: Callable[..., None], rank: int, world: int, port: int, arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    import torch

    torch.set_num_threads(1)
    work(rank, *arguments)
    # All is done and compared by files; what went wrong in the work has been raised before this.
    # Threads of PyTorch's that are still alive when the interpreter goes end some processes with
    # "terminate called without an active exception".
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
