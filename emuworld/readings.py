"""What rows of a cache have read: chunks of ids, and a key for each, the hash of all ids up to its end.

To cut a world of 1,200 ids into chunks and hash them, for two rows, takes a sixth of a millisecond, at every
step again, and a GPU waits meanwhile for those of all worlds. So a state's are remembered as long as somebody
has it, and those of the state after it are made of them and what is new.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Sequence

from emuworld.state import WorldState
from emuworld.tokens.token_ids import TokenIds

Ids = Sequence[int]  # of a chunk

_KEY_BYTES = 16


class Reading(list[TokenIds]):
    """Chunks that one row has read, with a key for each; nothing is changed once it is made.

    A key is the hash of the key before and the chunk, so where chunks begin and end is part of it.
    """

    __slots__ = ("keys", "num_tokens")

    def __init__(self, chunks: Iterable[Ids] = (), *, before: Reading | None = None) -> None:
        super().__init__(before or ())
        self.keys: list[bytes] = [] if before is None else before.keys.copy()
        self.num_tokens: int = 0 if before is None else before.num_tokens
        for chunk in chunks:
            ids = TokenIds.of(chunk)
            trunk = self.keys[-1] if self.keys else bytes(_KEY_BYTES)
            self.keys.append(hashlib.blake2b(trunk + ids.data, digest_size=_KEY_BYTES).digest())
            self.append(ids)
            self.num_tokens += len(ids)

    @classmethod
    def of(cls, chunks: Sequence[Ids]) -> Reading:
        return chunks if isinstance(chunks, Reading) else cls(chunks)


class Readings:
    """Of states that somebody still has, the readings of their rows: conditional, unguided, blind, as many as
    were asked for. By identity: to compare two states costs as much as what is saved here.
    """

    def __init__(self) -> None:
        self._held: dict[int, _Known] = {}

    def get(self, state: WorldState) -> list[Reading] | None:
        held = self._held.get(id(state))
        return held.rows if held is not None and held() is state else None

    def put(self, state: WorldState, rows: list[Reading]) -> None:
        known = _Known(state, self._forget)
        known.name, known.rows = id(state), rows
        self._held[known.name] = known

    def _forget(self, known: weakref.ref[WorldState]) -> None:
        assert isinstance(known, _Known)
        self._held.pop(known.name, None)


class _Known(weakref.ref[WorldState]):
    """A state as long as it is there, where it lies, and what its rows have read."""

    __slots__ = ("name", "rows")
    name: int
    rows: list[Reading]
