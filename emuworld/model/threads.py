"""Work for several threads at once: machine code that lets go of Python's lock while it runs."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_threads: ThreadPoolExecutor | None = None


def in_shares(num_shares: int, work: Callable[..., None], *arguments: object) -> None:
    """`work(share, *arguments)` for each share, all at the same time; the caller does the first. Returns, or
    raises, when all are done. `work` must not call this."""
    others = [_pool().submit(work, share, *arguments) for share in range(1, num_shares)]
    try:
        work(0, *arguments)
    finally:
        errors = [other.exception() for other in others]  # waits for each
    for error in errors:
        if error is not None:
            raise error


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
