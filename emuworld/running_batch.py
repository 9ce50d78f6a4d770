"""Worlds that are imagined together, each at its own pace: who is done makes room for the next at once.

`WorldModel.imagine_batch` waits for the longest segment of its batch. Here a world's place is taken again as
soon as its segment is written, while the others go on writing words or drawing; so a model that is served or
that answers many questions stays busy. What each world becomes is the same as by `imagine`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from typing import Generic, NamedTuple, TypeVar

import torch

from emuworld.decoding.autoregressive import News, StepCallback, Written
from emuworld.decoding.sampling import Sampling
from emuworld.pictures import Decode
from emuworld.segments import Places, Plan, SegmentWriter
from emuworld.state import Segment, WorldState

Name = TypeVar("Name")


class Imagined(NamedTuple, Generic[Name]):
    """A segment that is finished: what `imagine` gives, and the name under which it was asked for."""

    name: Name
    state: WorldState
    segment: Segment


class _Asked(NamedTuple, Generic[Name]):
    name: Name
    plan: Plan


class RunningBatch(Generic[Name]):
    """Segments of many worlds, in the order in which they are finished. See `WorldModel.running_batch`."""

    def __init__(
        self,
        writer: SegmentWriter,
        *,
        num_worlds: int,
        decode: Decode,
        lock: threading.RLock,
        on_step: StepCallback | None = None,
    ) -> None:
        if num_worlds < 1:
            raise ValueError(f"num_worlds must be 1 or more, got {num_worlds}")
        self._writer = writer
        self._num_worlds = num_worlds
        self._decode = decode
        self._lock = lock
        self._on_step = on_step
        self._waiting: deque[_Asked[Name]] = deque()
        self._running: dict[int, _Asked[Name]] = {}
        self._written: deque[tuple[_Asked[Name], Written]] = deque()
        self._num_rows = 0  # of each place
        self._writing: Generator[News, None, list[Written]] | None = None

    def __len__(self) -> int:
        """Worlds that wait, are being imagined, or are finished and not yet told."""
        return len(self._waiting) + len(self._running) + len(self._written)

    def add(
        self,
        state: WorldState,
        text: str | None = None,
        *,
        name: Name,
        sampling: Sampling | None = None,
    ) -> None:
        """Ask for the next segment of a world, told under `name` (anything); also while others are listened
        to.

        Arguments and errors are those of `WorldModel.imagine`; errors come here.
        """
        self._waiting.append(_Asked(name, self._writer.plan(state, text, sampling)))

    def __iter__(self) -> Iterator[Imagined[Name]]:
        """What is finished, until nothing is left. Who listens may `add` meanwhile, and stop and go on."""
        while self:
            if not self._written:
                self._step()
                continue
            asked, written = self._written.popleft()
            yield Imagined(asked.name, *self._writer.read(asked.plan, written, decode=self._decode))

    def close(self) -> None:
        """Give up what is not finished."""
        with self._lock:
            if self._writing is not None:
                self._writing.close()
        self._writing = None
        self._waiting.clear()
        self._running.clear()

    def __enter__(self) -> RunningBatch[Name]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _step(self) -> None:
        """One step of all that run. An error gives up what runs; the rest can be listened to again."""
        with self._lock, torch.inference_mode():
            try:
                if self._writing is None:
                    self._writing = self._begin()
                next(self._writing)
            except StopIteration:
                self._writing = None
            except BaseException:
                self._writing = None
                self._running.clear()
                raise

    def _begin(self) -> Generator[News, None, list[Written]]:
        self._num_rows = max(asked.plan.num_rows for asked in self._waiting)
        places = Places(num_worlds=self._num_worlds, num_rows=self._num_rows, exchange=self._exchange)
        return self._writer.write(list(self._take().values()), self._on_step, places=places)

    def _exchange(self, written: list[tuple[int, Written]]) -> Mapping[int, Plan]:
        self._written += [(self._running.pop(place), one) for place, one in written]
        return self._take()

    def _take(self) -> dict[int, Plan]:
        """Free places for those who wait, in their order. One who needs more rows than a place has waits
        until all places are free, and those behind wait too."""
        taken = {}
        for place in range(self._num_worlds):
            if place in self._running or not self._waiting:
                continue
            if self._waiting[0].plan.num_rows > self._num_rows:
                break
            self._running[place] = self._waiting.popleft()
            taken[place] = self._running[place].plan
        return taken
