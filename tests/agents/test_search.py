"""Search over states whose best path is known by construction: digits whose sum counts."""

from collections.abc import Sequence

import pytest

from emuworld.agents import search
from emuworld.agents.search import Path


def digits(states: Sequence[int]) -> list[tuple[int, int | None, bool]]:
    """A state is a number; its next item is its last digit, and 0 is the end."""
    return [(state // 10, state % 10 or None, state // 10 == 0) for state in states]


def test_sample_follows_every_start_to_its_end() -> None:
    paths = search.sample([321, 4], digits, depth=9)
    assert [path.items for path in paths] == [(1, 2, 3), (4,)]
    assert all(path.ended for path in paths)


def test_sample_stops_at_depth_and_says_so() -> None:
    (path,) = search.sample([54321], digits, depth=2)
    assert path.items == (1, 2) and not path.ended and path.state == 543


def test_a_step_without_an_item_ends_a_path() -> None:
    (path,) = search.sample([302], digits, depth=9)
    assert path.items == (2,) and path.ended


def test_budget_bounds_what_is_expanded() -> None:
    asked: list[int] = []

    def counted(states: Sequence[int]) -> list[tuple[int, int | None, bool]]:
        asked.extend(states)
        return digits(states)

    paths = search.sample([111, 222, 333], counted, depth=3, max_items=7)
    assert len(asked) == 6 and [len(path.items) for path in paths] == [2, 2, 2]


def test_one_call_for_all_live_states() -> None:
    sizes: list[int] = []

    def counted(states: Sequence[int]) -> list[tuple[int, int | None, bool]]:
        sizes.append(len(states))
        return digits(states)

    search.sample([1, 22, 333], counted, depth=5)
    assert sizes == [3, 2, 1]


def grow(states: Sequence[int]) -> list[tuple[int, int | None, bool]]:
    """An item is the branch that `fork` has written into the last digit."""
    return [(state, state % 10, False) for state in states]


def fork(state: int, branch: int) -> int:
    return state * 10 + branch


def total(path: Path[int, int]) -> float:
    return float(sum(path.items))


def test_beam_finds_the_best_path() -> None:
    best = search.beam([0], grow, fork=fork, score=total, width=2, branches=4, depth=3)
    assert best[0].items == (3, 3, 3) and len(best) == 2
    assert [total(path) for path in best] == sorted((total(path) for path in best), reverse=True)


def test_beam_keeps_an_ended_path_that_scores_well() -> None:
    def ends_at_once(states: Sequence[int]) -> list[tuple[int, int | None, bool]]:
        return [(state, 9 if state % 10 == 1 else 1, state % 10 == 1) for state in states]

    best = search.beam([0], ends_at_once, fork=fork, score=total, width=2, branches=2, depth=3)
    assert best[0].items[-1] == 9 and best[0].ended


def test_greedy_beam_can_lose_what_a_wide_one_finds() -> None:
    """Score that rewards a bad first step later: width 1 must miss it, width 2 must not."""

    def late(path: Path[int, int]) -> float:
        return 100.0 if path.items[:2] == (0, 1) else float(path.items[0])

    narrow = search.beam([0], grow, fork=fork, score=late, width=1, branches=2, depth=2)
    wide = search.beam([0], grow, fork=fork, score=late, width=2, branches=2, depth=2)
    assert late(narrow[0]) == 1.0 and late(wide[0]) == 100.0


def test_beam_keeps_its_budget() -> None:
    calls: list[int] = []

    def counted(states: Sequence[int]) -> list[tuple[int, int | None, bool]]:
        calls.append(len(states))
        return grow(states)

    search.beam([0], counted, fork=fork, score=total, width=3, branches=3, depth=9, max_items=14)
    assert calls == [3, 9]


def test_ranked_keeps_the_order_of_equals() -> None:
    assert search.ranked(["a", "bb", "c", "dd"], len) == ["bb", "dd", "a", "c"]


@pytest.mark.parametrize(
    "proposals, shares",
    [([], []), (["a"], [1.0]), (["a", "a", "b"], [0.5, 0.5, 0.0]), (["a"] * 4, [1.0] * 4)],
)
def test_agreement(proposals: list[str], shares: list[float]) -> None:
    assert search.agreement(proposals) == shares


@pytest.mark.parametrize("bad", [{"depth": 0}, {"depth": 1, "max_items": 0}])
def test_bounds_are_checked(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        search.sample([1], digits, **bad)
