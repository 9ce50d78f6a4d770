"""Ids in one block: a tuple in all but its weight."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from emuworld.token_ids import TokenIds

GIVEN = (3, 0, 282_925, 7, 3, -1, 2**31 - 1)


def test_it_is_like_the_tuple_of_its_ids() -> None:
    ids = TokenIds(GIVEN)
    assert ids == GIVEN and ids == GIVEN and ids == list(GIVEN) and hash(ids) == hash(GIVEN)
    assert ids != GIVEN[:-1] and ids != "ids" and TokenIds(GIVEN) == ids and TokenIds(ids) == ids
    assert (len(ids), ids[2], ids[-1], list(ids)) == (7, 282_925, 2**31 - 1, list(GIVEN))
    assert not TokenIds() and TokenIds() == () and 7 in ids and 8 not in ids
    assert (ids.count(3), ids.index(3), ids.index(3, 1)) == (2, 0, 4)
    for cut in (slice(1, 4), slice(-2, None), slice(5, 2), slice(None, None, -2)):
        assert ids[cut] == GIVEN[cut]
    with pytest.raises(IndexError):
        ids[7]
    with pytest.raises(ValueError):
        ids.index(8)


def test_it_is_joined_with_any_ids() -> None:
    ids = TokenIds(GIVEN)
    more = (1, 2)
    assert ids + more == ids + list(more) == GIVEN + more
    assert more + ids == more + GIVEN and ids + ids == GIVEN + GIVEN
    assert ids == GIVEN, "and stays what it is"


def test_numpy_reads_it_where_it_lies() -> None:
    ids = TokenIds(GIVEN)
    assert ids.numpy().dtype == np.int32 and not ids.numpy().flags.writeable
    assert np.shares_memory(ids.numpy(), np.asarray(ids))
    numbers = np.array(ids, dtype=np.int64)
    assert numbers.dtype == np.int64 and numbers.tolist() == list(GIVEN)
    numbers[0] = 9
    assert ids == GIVEN


def test_it_is_copied_and_pickled_and_told_in_short() -> None:
    ids = TokenIds(GIVEN)
    assert pickle.loads(pickle.dumps(ids)) == ids == copy.deepcopy(ids)
    assert repr(TokenIds(range(20))) == "TokenIds(20: 0, 1, 2, 3, 4, 5, 6, 7, ...)"


@pytest.mark.parametrize("bad", [(2**31,), (1.5,), ("a",), (None,)])
def test_what_is_no_id_is_refused(bad: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="32 bits"):
        TokenIds(bad)  # type: ignore[arg-type]
