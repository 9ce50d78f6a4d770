"""Counter-based random numbers: one uniform number for each token that a world may draw, or several for each
code of a picture that is drawn at once.

The number depends on the world's seed, its step, the stream (the text, or the n-th image) and the position in
it, on nothing else: not on how many worlds run beside it, nor on what was drawn before. Images have streams
of their own, so branches of one state that differ in their command draw their images with the same numbers
(common random numbers: what differs between them is the command's doing).
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

_KEYS = 2**63  # the counter's highest word where keys are made: no draw's number
_BLOCK = 512  # numbers made at once: 20 us, and an image of 256 px needs one block


class _Counting(threading.local):
    """A generator of each thread, which begins wherever it is told: five times as fast as to make one."""

    def __init__(self) -> None:
        self._philox = np.random.Philox(0)
        self._state = self._philox.state

    def begin(self, key: NDArray[np.uint64], counter: NDArray[np.uint64]) -> np.random.Philox:
        """As `Philox(key=key, counter=counter)`."""
        self._philox.state = {**self._state, "state": {"key": key, "counter": counter}}
        return self._philox


_counting = _Counting()


class TokenUniforms:
    """Uniform numbers in [0, 1) of one step of one world.

    Args:
        seed: the world's seed, 0 .. 2**64 - 1.
        step: how many segments the world had before, 0 .. 2**64 - 1.
    """

    def __init__(self, *, seed: int, step: int) -> None:
        for name, value in (("seed", seed), ("step", step)):
            if not 0 <= value < 2**64:
                raise ValueError(f"{name} must lie in 0..2**64 - 1, got {value}")
        self._key = np.array([seed, step], dtype=np.uint64)
        self._blocks: dict[tuple[int, int], NDArray[np.float64]] = {}

    def text(self, position: int) -> float:
        """The number for the token at `position` of the segment, where it is text, a control token or a
        digit."""
        return self._at(0, position)

    def image(self, index: int, position: int) -> float:
        """The number for the visual token at `position` (separators count) of the step's `index`-th image."""
        return self._at(1 + index, position)

    def image_run(self, index: int, position: int, count: int) -> list[float]:
        """`image` for so many positions one after another."""
        block, offset = divmod(position, _BLOCK)
        if offset + count > _BLOCK:
            return [self.image(index, position + k) for k in range(count)]
        self._at(1 + index, position)
        numbers: list[float] = self._blocks[1 + index, block][offset : offset + count].tolist()
        return numbers

    def grid(self, index: int, draw: int, count: int) -> NDArray[np.float64]:
        """`count` numbers, one for each code of the step's `index`-th image, where that is drawn at once: the
        `draw`-th time that all its codes need one."""
        return self._numbers(stream=1 + index, block=0, draw=1 + draw, count=count)

    def image_key(self, index: int, position: int) -> int:
        """64 random bits for the visual token at `position` of the step's `index`-th image, independent of
        the uniform number there: from them come numbers for every id (`emuworld.decoding.drafting`)."""
        counter = np.array([0, position, 1 + index, _KEYS], dtype=np.uint64)
        return int(np.random.Philox(key=self._key, counter=counter).random_raw())

    def _at(self, stream: int, position: int) -> float:
        block, offset = divmod(position, _BLOCK)
        if (stream, block) not in self._blocks:
            self._blocks[stream, block] = self._numbers(stream=stream, block=block, draw=0, count=_BLOCK)
        return float(self._blocks[stream, block][offset])

    def _numbers(self, *, stream: int, block: int, draw: int, count: int) -> NDArray[np.float64]:
        # The words of the 256-bit counter, lowest first; one block uses the lowest word up to count / 4.
        counter = np.array([0, block, stream, draw], dtype=np.uint64)
        raw = _counting.begin(self._key, counter).random_raw(count)
        # The raw stream is what numpy guarantees to keep; 53 bits fill a double's mantissa.
        return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
