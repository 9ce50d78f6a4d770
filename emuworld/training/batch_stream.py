"""Batches drawn ahead, beside the steps that learn from them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Full, Queue

from emuworld.training.examples import Batch

_BATCHES_AHEAD = 6


class BatchStream:
    """Draws the batches of each step ahead in a thread; whoever changes their source holds `lock`."""

    def __init__(self, draw: Callable[[int], list[Batch]], *, first_step: int) -> None:
        self._draw = draw
        self._queue: Queue[list[Batch] | BaseException] = Queue(_BATCHES_AHEAD)
        self._stop = threading.Event()
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self._fill, args=(first_step,), daemon=True)
        self._thread.start()

    def next(self) -> list[Batch]:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stop.set()

    def _fill(self, step: int) -> None:
        while not self._stop.is_set():
            item: list[Batch] | BaseException
            try:
                with self.lock:
                    item = self._draw(step)
            except Exception as error:  # told to whoever waits for the step, or it would wait for ever
                item = error
            while not self._stop.is_set():
                try:
                    self._queue.put(item, timeout=0.5)
                    break
                except Full:
                    continue
            step += 1
