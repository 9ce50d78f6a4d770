"""Work for several threads at once, in shares, or beside the caller; and PyTorch's own operations on one.

Below everything else: it imports nothing of ours.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Result = TypeVar("Result")

_threads: ThreadPoolExecutor | None = None
_local = threading.local()  # of each thread: how many others `one_thread` keeps PyTorch from


def in_shares(num_shares: int, work: Callable[..., None], *arguments: object) -> None:
    """`work(share, *arguments)` for each share, all at the same time; the caller does the first, and those
    that nobody has begun by then. Returns, or raises, when all are done. `work` must not call this."""
    others = [_pool().submit(work, share, *arguments) for share in range(1, num_shares)]
    try:
        work(0, *arguments)
        for share, other in enumerate(others, start=1):
            if other.cancel():
                work(share, *arguments)
    finally:
        errors = [other.exception() for other in others if not other.cancelled()]  # waits for each
    for error in errors:
        if error is not None:
            raise error


def beside(work: Callable[..., Result], *arguments: object) -> Future[Result]:
    """`work(*arguments)` in another thread, for what waits more than it computes."""
    return _pool().submit(work, *arguments)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """PyTorch's own operations on a CPU in the caller's thread alone.

    Some round otherwise on another number of threads (convolutions do). And at the end of each its threads
    wait for each other, also for one that the system does not let run: beside a busy process a copy of half a
    millisecond takes eight.
    """
    num_threads = torch.get_num_threads()
    if device.type != "cpu" or num_threads == 1:
        yield
        return
    torch.set_num_threads(1)
    _local.num_spare = num_threads - 1
    try:
        yield
    finally:
        _local.num_spare = 0
        torch.set_num_threads(num_threads)


def num_spare_threads() -> int:
    """How many more threads may compute while the caller's PyTorch is kept on one, for `in_shares`."""
    return getattr(_local, "num_spare", 0)


def _pool() -> ThreadPoolExecutor:
    """The threads of all models, started when they are first needed."""
    global _threads
    if _threads is None:
        _threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="emuworld")
    return _threads


def _after_fork() -> None:
    """The parent's threads are not here: waiting for them hangs."""
    global _threads
    _threads = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
