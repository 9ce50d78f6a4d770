"""Search over sequences, written for any states: it knows no model, no pictures and no robots.

A state is whatever the caller's functions take. Many states go through one call of `expand`, because a world
model imagines a batch cheaper than one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

State = TypeVar("State")
Item = TypeVar("Item")
Candidate = TypeVar("Candidate")


@dataclass(frozen=True, kw_only=True)
class Path(Generic[State, Item]):
    """Items one after another and the state behind the last; `ended`: nothing follows."""

    state: State
    items: tuple[Item, ...] = ()
    ended: bool = False


# One more item for each state: the state behind it, the item (None: the sequence is over without one) and
# whether anything can follow.
Expand = Callable[[Sequence[State]], Sequence[tuple[State, Item | None, bool]]]


def extend(paths: Sequence[Path[State, Item]], expand: Expand[State, Item]) -> list[Path[State, Item]]:
    """Every path one item longer, those that have ended as they are; one call of `expand` for all."""
    live = [path for path in paths if not path.ended]
    grown = iter(expand([path.state for path in live]) if live else ())
    return [path if path.ended else _grown(path, *next(grown)) for path in paths]


def sample(
    starts: Sequence[State], expand: Expand[State, Item], *, depth: int, max_items: int | None = None
) -> list[Path[State, Item]]:
    """A path from every start, at most `depth` items long, all side by side.

    Not more than `max_items` items are asked of `expand`: paths stay shorter, all alike, where that is less
    than they would need. ValueError for a depth or a budget below 1.
    """
    _check(depth=depth, max_items=max_items)
    paths: list[Path[State, Item]] = [Path(state=state) for state in starts]
    spent = 0
    for _ in range(depth):
        num_live = sum(not path.ended for path in paths)
        if num_live == 0 or (max_items is not None and spent + num_live > max_items):
            break
        paths, spent = extend(paths, expand), spent + num_live
    return paths


def beam(
    starts: Sequence[State],
    expand: Expand[State, Item],
    *,
    fork: Callable[[State, int], State],
    score: Callable[[Path[State, Item]], float],
    width: int,
    branches: int,
    depth: int,
    max_items: int | None = None,
) -> list[Path[State, Item]]:
    """The `width` best paths, best first, when each kept path grows `branches` ways at every depth.

    `fork(state, i)` gives the i-th branch of a state (the same world with other luck). Ended paths stay in
    the beam as long as they score well enough. Equal scores keep the order in which they were found.
    """
    _check(depth=depth, max_items=max_items)
    if width < 1 or branches < 1:
        raise ValueError(f"width={width} and branches={branches} must be 1 or more")
    paths: list[Path[State, Item]] = [Path(state=state) for state in starts]
    spent = 0
    for _ in range(depth):
        forks = [
            Path(state=fork(path.state, branch), items=path.items)
            for path in paths
            if not path.ended
            for branch in range(branches)
        ]
        if not forks or (max_items is not None and spent + len(forks) > max_items):
            break
        spent += len(forks)
        paths = ranked([*(path for path in paths if path.ended), *extend(forks, expand)], score)[:width]
    return ranked(paths, score)


def ranked(candidates: Sequence[Candidate], score: Callable[[Candidate], float]) -> list[Candidate]:
    """Best first; candidates of equal score keep their order."""
    return sorted(candidates, key=lambda candidate: -score(candidate))


def agreement(proposals: Sequence[Hashable]) -> list[float]:
    """For each proposal, the share of the others that say the same, 0 to 1; 1 where there is no other."""
    others = len(proposals) - 1
    if others < 1:
        return [1.0] * len(proposals)
    return [(proposals.count(one) - 1) / others for one in proposals]


def _grown(path: Path[State, Item], state: State, item: Item | None, ended: bool) -> Path[State, Item]:
    items = path.items if item is None else (*path.items, item)
    return Path(state=state, items=items, ended=ended or item is None)


def _check(*, depth: int, max_items: int | None) -> None:
    if depth < 1:
        raise ValueError(f"depth={depth} must be 1 or more")
    if max_items is not None and max_items < 1:
        raise ValueError(f"max_items={max_items} must be 1 or more, or None for no limit")
