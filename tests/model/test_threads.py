"""Crews: whoever is there does the work, once, and nobody waits for who is not."""

import itertools
import threading
import time

import numpy as np
import pytest
from numba import njit

from emuworld.model import claims
from emuworld.model.threads import MAIL, Crew

NUM_PARTS, NUM_PIECES = 50, 7


@njit(nogil=True)
def count(job_J: np.ndarray, mail: np.ndarray, mine: int, patience: int) -> None:
    """A job as `exact_kernel.run` does them: every piece of a part adds one to its place, where the part
    before is done. The job's third number is the address of the places."""
    if mine == 0:
        claims.publish(mail, job_J)
    edition = 0
    while True:
        if mine > 0:
            edition = claims.receive(mail, edition, patience, job_J)
            if edition == 0:
                return
        first = job_J[0]
        for part in range(NUM_PARTS):
            num_done = 0
            for other in range(job_J[1]):
                while True:
                    piece = claims.claim(mail, first, NUM_PIECES, (mine + other) % job_J[1], job_J[1])
                    if piece < 0:
                        break
                    before = job_J[2] + 8 * ((part - 1) * NUM_PIECES + piece)
                    if part == 0 or claims._load(before) > 0:
                        claims._add(before + 8 * NUM_PIECES, 1)
                    num_done += 1
            claims.finish(mail, num_done)
            first += NUM_PIECES
            claims.wait(mail, first)
        if mine == 0:
            return


def job(places: np.ndarray, num_threads: int) -> np.ndarray:
    return np.array([0, num_threads, places.ctypes.data])


def places() -> np.ndarray:
    return np.zeros(NUM_PARTS * NUM_PIECES, np.int64)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 5])
def test_every_piece_is_done_once_and_in_order(num_threads: int) -> None:
    crew = Crew(count)
    for _ in range(200):
        done = places()
        crew.do(job(done, num_threads))
        assert (done == 1).all()


def test_helpers_sleep_when_there_is_nothing_to_do() -> None:
    crew, done = Crew(count), places()
    crew.do(job(done, 3))
    until_s = time.monotonic() + 20
    while crew._awake and time.monotonic() < until_s:
        time.sleep(0.01)
    assert not crew._awake and (done == 1).all()
    crew.do(job(done, 3))  # and they are woken again
    assert (done == 2).all()


def test_who_comes_late_finds_nothing_to_do() -> None:
    """It still has the job before, the same tickets in mind, while the next one is done."""
    mail, late = np.zeros(MAIL, np.int64), np.zeros(3, np.int64)
    before, after = places(), places()
    count(job(before, 2), mail, 0, 0)
    edition = claims.receive(mail, 0, 1, late)
    assert edition > 0 and late.tolist() == [0, 2, before.ctypes.data]
    count(job(after, 2), mail, 0, 0)
    assert [claims.claim(mail, part * NUM_PIECES, NUM_PIECES, part % 2, 2) for part in range(NUM_PARTS)] == [
        -1
    ] * NUM_PARTS
    claims.wait(mail, NUM_PARTS * NUM_PIECES)
    assert (before == 1).all() and (after == 1).all()
    assert claims.receive(mail, edition, 1, late) > edition
    assert late.tolist() == [NUM_PARTS * NUM_PIECES, 2, after.ctypes.data]
    assert claims.receive(mail, edition + 2, 100, late) == 0


def test_a_helper_that_stands_still_holds_up_its_piece_and_no_more() -> None:
    mail, done = np.zeros(MAIL, np.int64), places()
    claims.publish(mail, job(done, 2))
    assert claims.claim(mail, 0, NUM_PIECES, 0, 2) == 0  # as a helper that then stands still
    caller = threading.Thread(target=count, args=(job(done, 2), mail, 1, 1))
    caller.start()
    time.sleep(0.05)
    assert done[1:NUM_PIECES].tolist() == [1] * (NUM_PIECES - 1) and done.sum() == NUM_PIECES - 1
    done[0] = 1
    claims.finish(mail, 1)
    caller.join(20)
    assert (done == 1).all()


def test_a_job_is_done_while_the_crew_is_at_another() -> None:
    crew, done = Crew(count), places()
    with crew._is_at_work:
        crew.do(job(done, 2))
    assert (done == 1).all() and not crew._awake


def test_after_an_error_the_crew_works_on() -> None:
    def work(job_J: np.ndarray, mail: np.ndarray, mine: int, patience: int) -> None:
        if next(attempts) < 1 or (mine == 1 and next(helps) < 2):
            raise MemoryError
        count(job_J, mail, mine, patience)

    attempts, helps = itertools.count(), itertools.count()
    crew, done = Crew(work), places()
    with pytest.raises(MemoryError):
        crew.do(job(done, 1))
    for times in range(1, 20):
        crew.do(job(done, 2))
        assert (done == times).all()
