"""Threads that work through the same parts together: pieces that each claims, and waiting for the others.

All is done with a few numbers in memory that the threads share (`mail`), in machine code without Python's
lock. Every piece of work has a ticket. Tickets are counted up for ever and none is given twice, so that a
thread which was held up and comes late finds nothing to claim and does no harm. Who does which piece is left
to chance; what is done is not.

Shapes: J numbers of a job. `mail` is int64 [MAIL]; a job's first number is its first ticket, its second how
many threads may take part.
"""

import os
from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from emuworld.model.exact_numbers import PLAIN
from emuworld.model.threads import MAIL, MOST_THREADS

_APART = 16  # numbers in two lines of a processor's cache, which are fetched together
_EDITION, _DONE, _JOB = 0, _APART, 2 * _APART
_NEXT = 6 * _APART  # of each thread's share
LONGEST_JOB = _NEXT - _JOB
assert _NEXT + _APART * MOST_THREADS <= MAIL
_SPINS = 4000  # some 50 us; a thread that is waited for so long is probably not running


@intrinsic
def _load(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_number(builder, arguments[0]), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def _store(typing_context: Any, address: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _number(builder, arguments[0]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def _add(typing_context: Any, address: Any, number: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _number(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _replace(typing_context: Any, address: Any, old: Any, new: Any) -> Any:
    """Whether the number was `old`; then it is `new` now."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, old, new = arguments
        result = builder.cmpxchg(_number(builder, address), old, new, "seq_cst", "seq_cst")
        return builder.extract_value(result, 1)

    return types.boolean(types.int64, types.int64, types.int64), generate


@intrinsic
def _pause(typing_context: Any) -> Any:
    """Tell the core that this is a waiting loop, where there is an instruction for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if binding.get_default_triple().startswith("x86_64"):
            kind = ir.FunctionType(ir.VoidType(), ())
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", (), kind), ())
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _give_way(typing_context: Any) -> Any:
    """Let another thread have the core, where the system has a call for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if hasattr(os, "sched_yield"):
            kind = ir.FunctionType(ir.IntType(32), ())
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), ())
        return context.get_dummy_value()

    return types.void(), generate


def _number(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, ir.IntType(64).as_pointer())


@njit(**PLAIN)
def claim(mail: Any, first: int, num_pieces: int, whose: int, num_threads: int) -> int:
    """A piece of one thread's share of a part whose tickets begin with `first`, or -1 where all are taken.

    A thread claims its own share first, so that it reads neighbours one after another, and then what is left
    of the others'.
    """
    place = mail.ctypes.data + 8 * (_NEXT + _APART * whose)
    start, stop = num_pieces * whose // num_threads, num_pieces * (whose + 1) // num_threads
    while True:
        found = _load(place)
        ticket = max(found, first + start)
        if ticket >= first + stop:
            return -1
        if _replace(place, found, ticket + 1):
            return ticket - first


@njit(**PLAIN)
def finish(mail: Any, count: int) -> None:
    """So many more pieces are done."""
    if count > 0:
        _add(mail.ctypes.data + 8 * _DONE, count)


@njit(**PLAIN)
def wait(mail: Any, stop: int) -> None:
    """Until all tickets before `stop` are done."""
    place, turns = mail.ctypes.data + 8 * _DONE, 0
    while _load(place) < stop:
        turns += 1
        if turns < _SPINS:
            _pause()
        else:
            _give_way()


@njit(**PLAIN)
def publish(mail: Any, job_J: Any) -> None:
    """Put a job where the others see it; gives it its first ticket. The job before must be done."""
    edition, place = mail.ctypes.data + 8 * _EDITION, mail.ctypes.data + 8 * _JOB
    job_J[0] = _load(mail.ctypes.data + 8 * _DONE)
    _add(edition, 1)  # odd: not to be read
    for j in range(job_J.size):
        _store(place + 8 * j, job_J[j])
    _add(edition, 1)


@njit(**PLAIN)
def receive(mail: Any, seen: int, patience: int, job_J: Any) -> int:
    """Wait for another job than the one that was seen; its edition, or 0 where none came for long."""
    edition, place = mail.ctypes.data + 8 * _EDITION, mail.ctypes.data + 8 * _JOB
    for _ in range(patience):
        found = _load(edition)
        if found != seen and found % 2 == 0:
            for j in range(job_J.size):
                job_J[j] = _load(place + 8 * j)
            if _load(edition) == found:
                return found
        _pause()
    return 0
