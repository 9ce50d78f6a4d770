"""A world's ids as one block of numbers: each step of each world adds a picture to thousands of them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

_BYTES = 4  # of an id: the published ones need 19 bits


class TokenIds(Sequence[int]):
    """Ids that nothing changes, 4 bytes each; equal to a tuple or list of the same ones, and hashed like it.

    A tuple of numbers is copied number by number, and Python's garbage collector looks at each of them.

    Raises:
        ValueError: what is no id, or needs more than 32 bits.
    """

    __slots__ = ("_data",)
    _data: bytes

    def __init__(self, ids: Iterable[int] = ()) -> None:
        if isinstance(ids, TokenIds):
            self._data = ids._data
            return
        try:
            self._data = array("i", ids).tobytes()
        except (TypeError, OverflowError) as error:
            raise ValueError(f"ids must be whole numbers of at most 32 bits ({error})") from error

    def numpy(self) -> NDArray[np.int32]:
        """[N] int32, the ids themselves: not to be written to."""
        return np.frombuffer(self._data, dtype=np.int32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False and dtype not in (None, np.dtype(np.int32)):
            raise ValueError(f"ids are int32: as {np.dtype(dtype)} they are a copy")
        return self.numpy().astype(dtype or np.int32, copy=bool(copy))

    def __len__(self) -> int:
        return len(self._data) // _BYTES

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> TokenIds: ...

    def __getitem__(self, index: int | slice) -> int | TokenIds:
        if not isinstance(index, slice):
            return self._view()[index]
        start, stop, step = index.indices(len(self))
        if step != 1:
            return TokenIds(self._view()[index])
        return _of(self._data[_BYTES * start : _BYTES * stop])

    def __iter__(self) -> Iterator[int]:
        return iter(self._view())

    def __contains__(self, value: object) -> bool:
        return value in self._view().tolist()

    def index(self, value: int, start: int = 0, stop: int | None = None) -> int:
        return self._view().tolist().index(value, start, len(self) if stop is None else stop)

    def count(self, value: int) -> int:
        return self._view().tolist().count(value)

    def __add__(self, other: Iterable[int]) -> TokenIds:
        return _of(self._data + TokenIds(other)._data)

    def __radd__(self, other: Iterable[int]) -> TokenIds:
        return TokenIds(other) + self

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TokenIds):
            return self._data == other._data
        if isinstance(other, tuple | list):
            return self._view().tolist() == list(other)
        return NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._view()))

    def __repr__(self) -> str:
        most = 8
        shown = ", ".join(map(str, self[:most]))
        return f"TokenIds({len(self)}: {shown}{', ...' if len(self) > most else ''})"

    def _view(self) -> memoryview[int]:
        return memoryview(self._data).cast("i")


def _of(data: bytes) -> TokenIds:
    ids = TokenIds()
    ids._data = data
    return ids
