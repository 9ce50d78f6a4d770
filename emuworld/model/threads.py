"""Crews: machine code that several threads run at once, without Python's lock."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

MOST_THREADS = 64  # of a crew
MAIL = 2048
"""int64 numbers by which a crew agrees on its work, see `claims`."""
Work = Callable[[np.ndarray, np.ndarray, int, int], None]
"""Machine code like `exact_kernel.run`: gets a job, the mail, who one is (0: whose job it is) and how long to
look out for a job. It may fail before it has published or claimed anything, not later."""

_PATIENCE = 60_000  # looks, about a millisecond: more than lies between two tokens of a picture

_crews: dict[Work, "Crew"] = {}


class Crew:
    """Threads that do jobs together: the caller of `do`, and helpers who take part when they are there.

    A helper that has nothing to do looks out for the next job for a while before it sleeps, so that the short
    jobs of one picture find it awake. Nobody waits for a helper to wake up, and for one that the system does
    not let run no longer than for the one piece that it may have begun.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._mail = np.zeros(MAIL, np.int64)
        self._is_at_work = threading.Lock()
        self._awake: set[int] = set()
        self._helpers = ThreadPoolExecutor(MOST_THREADS, thread_name_prefix="emuworld-crew")

    def do(self, job_J: np.ndarray) -> None:
        """Returns when the job is done; its second number says by how many threads at most. A caller that
        comes while the crew is at another's job does its own alone."""
        job_J[1] = num_threads = min(int(job_J[1]), MOST_THREADS)
        if num_threads < 2 or not self._is_at_work.acquire(blocking=False):
            job_J[1] = 1
            self._work(job_J, np.zeros(MAIL, np.int64), 0, 0)
            return
        try:
            for helper in range(1, num_threads):
                if helper not in self._awake:
                    self._awake.add(helper)
                    self._helpers.submit(self._help, helper, len(job_J))
            self._work(job_J, self._mail, 0, 0)
        finally:
            self._is_at_work.release()

    def _help(self, helper: int, job_size: int) -> None:
        try:
            self._work(np.zeros(job_size, np.int64), self._mail, helper, _PATIENCE)
        finally:
            self._awake.discard(helper)


def crew_of(work: Work) -> Crew:
    """The crew for all jobs of a kind, gathered when it is first needed."""
    if work not in _crews:
        _crews[work] = Crew(work)
    return _crews[work]


def _after_fork() -> None:
    """The parent's threads are not here: waiting for them hangs."""
    _crews.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
