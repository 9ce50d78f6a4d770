"""A model that is cut among processes: one leads, the others follow.

The first process runs the command, the environment or the search as ever. Whatever it asks of the transformer
goes to the others first, as plans of segments: all then compute the same segments from the same caches, and
draw the same tokens (`SplitTransformer`, `TokenUniforms`). Only the first sees pictures and writes files.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from emuworld import parallel
from emuworld.cache_pool import CachedModel, CachePool
from emuworld.context import Context
from emuworld.decoding.autoregressive import News, OnDrawn, StepCallback, Written, finish
from emuworld.decoding.dida import Painter
from emuworld.readings import Reading
from emuworld.segments import Places, Plan, SegmentWriter

_END, _CLEAR = "end", "clear"


class _Task(NamedTuple):
    """Segments to write, and where others may join them: how many worlds, and rows of each."""

    plans: list[Plan]
    places: tuple[int, int] | None


class _LeadingWriter(SegmentWriter):
    """Tells the plans, then writes them to their end: who follows does not wait for a listener. Plans for
    free places are taken as long as there are any, and all is told at that end.
    """

    def write(
        self,
        plans: Sequence[Plan],
        on_step: StepCallback | None = None,
        *,
        on_drawn: OnDrawn | None = None,
        places: Places | None = None,
    ) -> Generator[News, None, list[Written]]:
        _tell(_Task(list(plans), None if places is None else (places.num_worlds, places.num_rows)))
        told: list[News] = []
        telling = places and replace(places, exchange=_telling(places))
        writing = super().write(plans, on_step, on_drawn=on_drawn, places=telling)
        while True:
            try:
                told.append(next(writing))
            except StopIteration as end:
                yield from told
                written: list[Written] = end.value
                return written


class _LeadingCaches(CachePool):
    def read_ahead(self, sequences: Sequence[Reading]) -> None:
        """Nothing: who follows hears of plans only, and all have to make the same calls of the model."""

    def clear(self) -> None:
        _tell(_CLEAR)
        super().clear()


def writer_and_caches(
    transformer: CachedModel, *, context: Context, cache_bytes: int | None, painter: Painter | None
) -> tuple[SegmentWriter, CachePool]:
    """What a model writes with: plainly, or as the leader or a follower of the processes that have joined."""
    leads = parallel.tensor_group() is not None and dist.get_rank() == 0
    caches = (_LeadingCaches if leads else CachePool)(transformer, max_bytes=cache_bytes)
    writer = _LeadingWriter if leads else SegmentWriter
    return writer(transformer, context=context, caches=caches, painter=painter), caches


def follow(writer: SegmentWriter, caches: CachePool) -> None:
    """Write what the leader writes, until it ends."""
    while (told := _hear()) != _END:
        if told == _CLEAR:
            caches.clear()
        else:
            plans, size = told
            places = size and Places(num_worlds=size[0], num_rows=size[1], exchange=_hearing)
            finish(writer.write(plans, places=places))
    parallel.leave()


def end() -> None:
    """The leader has no more work: the others return from `follow`, and all leave the group."""
    _tell(_END)
    parallel.leave()


def _telling(places: Places) -> Callable[[list[tuple[int, Written]]], Mapping[int, Plan]]:
    """Its exchange, whose answers the others hear. Nobody is asked, and nothing told, while no world is done:
    whoever could add one hears of nothing before all are.
    """

    def exchange(written: list[tuple[int, Written]]) -> Mapping[int, Plan]:
        if not written:
            return {}
        plans = places.exchange(written)
        _tell(plans)
        return plans

    return exchange


def _hearing(written: list[tuple[int, Written]]) -> Mapping[int, Plan]:
    plans: Mapping[int, Plan] = _hear() if written else {}
    return plans


def _tell(what: Any) -> None:
    dist.broadcast_object_list([what], src=0, device=torch.device("cpu"))


def _hear() -> Any:
    box: list[Any] = [None]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]
