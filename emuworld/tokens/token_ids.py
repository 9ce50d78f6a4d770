"""A row of token ids that nobody changes: 4 bytes an id, in one piece of memory.

A tuple holds an object for each id, which every copy has to count, every garbage collection to visit and
somebody to give back; 256 worlds of 2,700 ids are 700,000 of them. Here they are read with numpy from where
they lie.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

_ID = struct.Struct("i")
_SHOWN = 6  # ids in a `repr`


class TokenIds(Sequence[int]):
    """Numbers of 32 bits with a sign: immutable; equal to every tuple and list of the same numbers, and
    hashed like such a tuple.

    Raises:
        ValueError: `ids` has something that is no such number.
    """

    __slots__ = ("_data",)
    _data: bytes

    def __init__(self, ids: Iterable[int] = ()) -> None:
        try:
            numbers = ids if isinstance(ids, list | tuple) else list(ids)
            self._data = struct.pack(f"{len(numbers)}i", *numbers)
        except (TypeError, struct.error) as error:
            raise ValueError(f"token ids must be integers of 32 bits ({error}); give such") from error

    @classmethod
    def of(cls, ids: Iterable[int]) -> TokenIds:
        """The same object where it is one already."""
        return ids if isinstance(ids, TokenIds) else cls(ids)

    @classmethod
    def from_data(cls, data: bytes) -> TokenIds:
        """What has this `data`."""
        made = object.__new__(cls)
        made._data = data
        return made

    @property
    def data(self) -> bytes:
        """The numbers in the byte order of this machine."""
        return self._data

    @property
    def numbers(self) -> NDArray[np.int32]:
        """[N], read only, without a copy."""
        return np.frombuffer(self._data, dtype=np.int32)

    def places(self, token: int) -> list[int]:
        """Where an id stands, ascending."""
        found: list[int] = np.flatnonzero(self.numbers == token).tolist()
        return found

    def __len__(self) -> int:
        return len(self._data) // _ID.size

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> TokenIds: ...
    def __getitem__(self, place: int | slice) -> int | TokenIds:
        if not isinstance(place, slice):
            try:
                token: int = _ID.unpack_from(self._data, _ID.size * place)[0]
            except struct.error as error:
                raise IndexError(f"there is no id {place} among {len(self)}") from error
            return token
        start, stop, step = place.indices(len(self))
        if step != 1:
            return TokenIds.from_data(self.numbers[place].tobytes())
        return TokenIds.from_data(self._data[_ID.size * start : _ID.size * stop])

    def __iter__(self) -> Iterator[int]:
        return iter(self.numbers.tolist())

    def __contains__(self, token: object) -> bool:
        return bool((self.numbers == token).any())

    def count(self, token: int) -> int:
        return len(self.places(token))

    def index(self, token: int, start: int = 0, stop: int = sys.maxsize) -> int:
        start, stop, _ = slice(start, stop).indices(len(self))
        for place in self.places(token):
            if start <= place < stop:
                return place
        raise ValueError(f"id {token} is not among those from {start} to {stop}")

    def __add__(self, others: Iterable[int]) -> TokenIds:
        return TokenIds.from_data(self._data + TokenIds.of(others)._data)

    def __radd__(self, others: Iterable[int]) -> TokenIds:
        return TokenIds(others) + self

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TokenIds):
            return self._data == other._data
        if isinstance(other, list | tuple):
            return len(self) == len(other) and self.numbers.tolist() == list(other)
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.numbers, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self[:_SHOWN]))
        return f"TokenIds([{shown}])" if len(self) <= _SHOWN else f"TokenIds([{shown}, ...], {len(self)} ids)"
