"""Rows of ids that are read from one piece of memory: like a tuple wherever a tuple may stand."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest

from emuworld.tokens.token_ids import TokenIds

LARGEST, SMALLEST = 2**31 - 1, -(2**31)
ROWS = [(), (5,), (5, 7, 5, -1, 0, 7), (LARGEST, SMALLEST), tuple(range(300))]


@pytest.mark.parametrize("row", ROWS, ids=len)
def test_equal_to_tuples_and_lists_both_ways_round(row: tuple[int, ...]) -> None:
    ids = TokenIds(row)
    assert ids == row and row == ids and ids == list(row) and list(row) == ids and ids == TokenIds(row)
    assert hash(ids) == hash(row) and {row: 1}[ids] == 1  # type: ignore[index]
    for other in ((*row, 1), (*row[1:], 2), [3], "no ids", None):
        assert (ids != other) == (row != other) and (other != ids) == (row != other)
    assert all(type(token) is int for token in ids) and list(ids) == list(row) == list(iter(ids))
    assert bool(ids) == bool(row) and len(ids) == len(row)


@pytest.mark.parametrize("row", ROWS, ids=len)
def test_parts_are_those_of_a_tuple(row: tuple[int, ...]) -> None:
    ids, edges = TokenIds(row), (None, 0, 1, 3, -1, -2, 1000, -1000)
    for start in edges:
        for stop in edges:
            for step in (None, 1, 2, -1, -3):
                part = ids[start:stop:step]
                assert isinstance(part, TokenIds) and part == row[start:stop:step]
    for place in range(-len(row), len(row)):
        assert ids[place] == row[place] and type(ids[np.int64(place)]) is int
    for place in (len(row), -len(row) - 1):
        with pytest.raises(IndexError):
            ids[place]
    assert list(reversed(ids)) == list(reversed(row))


@pytest.mark.parametrize("row", ROWS, ids=len)
def test_ids_are_found_as_in_a_tuple(row: tuple[int, ...]) -> None:
    ids = TokenIds(row)
    for token in (5, 7, -1, 0, LARGEST, SMALLEST, 2**40):
        assert (token in ids) == (token in row)
        assert ids.count(token) == row.count(token) == len(ids.places(token))
        assert all(ids[place] == token for place in ids.places(token))
        for start, stop in ((0, 1000), (1, 1000), (-3, -1), (3, 2)):
            if token in row[start:stop]:
                assert ids.index(token, start, stop) == row.index(token, start, stop)
            else:
                with pytest.raises(ValueError, match="is not among"):
                    ids.index(token, start, stop)
    assert "5" not in ids and None not in ids


def test_joined_with_anything_that_has_ids() -> None:
    ids = TokenIds([1, 2])
    for others in ((3, 4), [3, 4], TokenIds([3, 4]), np.array([3, 4])):
        assert isinstance(ids + others, TokenIds) and ids + others == (1, 2, 3, 4)
    for front in ((0,), [0]):
        assert isinstance(front + ids, TokenIds) and front + ids == (0, *ids) == (0, 1, 2)
    assert ids == (1, 2), "nothing is changed"
    assert TokenIds.of(ids) is ids and TokenIds.of((1, 2)) == ids and TokenIds(ids) == ids
    assert TokenIds.from_data(ids.data) == ids


def test_numpy_reads_them_where_they_lie() -> None:
    ids = TokenIds(range(5))
    assert ids.numbers.dtype == np.int32 and ids.numbers.tolist() == [0, 1, 2, 3, 4]
    assert np.shares_memory(ids.numbers, ids.numbers) and np.shares_memory(np.asarray(ids), ids.numbers)
    assert np.array(ids, dtype=np.int64).dtype == np.int64 and np.array(ids).flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        ids.numbers[0] = 1
    row = np.zeros(5, np.int64)
    row[:] = ids
    assert row.tolist() == [0, 1, 2, 3, 4]


def test_copies_and_what_is_shown() -> None:
    ids = TokenIds(range(2700))
    for again in (copy.copy(ids), copy.deepcopy(ids), pickle.loads(pickle.dumps(ids))):
        assert isinstance(again, TokenIds) and again == ids and hash(again) == hash(ids)
    assert len(pickle.dumps(ids)) < 11_000
    assert repr(ids) == "TokenIds([0, 1, 2, 3, 4, 5, ...], 2700 ids)"
    assert repr(TokenIds([7])) == "TokenIds([7])"


@pytest.mark.parametrize("ids", [[2**31], [-(2**31) - 1], [1 << 80], [0.5], ["a"], [None], [[1]], 3, None])
def test_what_is_no_id_is_refused(ids: object) -> None:
    with pytest.raises(ValueError, match="integers of 32 bits"):
        TokenIds(ids)  # type: ignore[arg-type]


def test_the_collector_finds_nothing_in_them() -> None:
    assert not any(gc.is_tracked(one) for one in gc.get_referents(TokenIds([1000, 1001])) if one != TokenIds)
