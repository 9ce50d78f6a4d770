"""Shares of work are done once, errors arrive, and PyTorch gets its threads back."""

import os
import threading

import pytest
import torch

from emuworld import shares
from emuworld.shares import beside, in_shares, num_spare_threads, one_thread

CPU = torch.device("cpu")


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_an_error_in_a_share_reaches_the_caller(broken: int) -> None:
    done = []

    def work(share: int, number: int) -> None:
        if share == broken:
            raise KeyError(number)
        done.append(share)

    with pytest.raises(KeyError, match="7"):
        in_shares(3, work, 7)
    assert sorted(done) == [share for share in range(3) if share != broken]


def test_the_caller_does_what_nobody_has_begun() -> None:
    busy = shares._pool()
    begun, go = threading.Semaphore(0), threading.Event()
    held = [busy.submit(lambda: (begun.release(), go.wait())) for _ in range(busy._max_workers)]
    for _ in held:
        begun.acquire()
    done = []
    try:
        in_shares(3, lambda share: done.append((share, threading.current_thread())))
    finally:
        go.set()
    assert done == [(share, threading.current_thread()) for share in range(3)]


def test_work_beside_the_caller_is_asked_for_later_in_a_forked_child_too() -> None:
    assert beside(divmod, 7, 2).result() == (3, 1)
    with pytest.raises(ZeroDivisionError):
        beside(divmod, 7, 0).result()
    child = os.fork()
    if child == 0:  # the parent's threads are not there
        os._exit(beside(divmod, 7, 2).result(timeout=60)[0])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_are_kept_from_pytorch_and_given_back(num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        with one_thread(CPU), one_thread(CPU):
            assert torch.get_num_threads() == 1
            assert num_spare_threads() == num_threads - 1
        assert torch.get_num_threads() == num_threads
        assert num_spare_threads() == 0
    finally:
        torch.set_num_threads(before)
