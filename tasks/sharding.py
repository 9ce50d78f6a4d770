"""Work that several processes share without talking to each other: `shard=i/n` takes every n-th item."""

import re
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def parse_shard(shard: str) -> tuple[int, int]:
    """`i/n` as (i, n), i counted from 0. ValueError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", shard)
    if match is None or not int(match[1]) < int(match[2]):
        raise ValueError(
            f"shard={shard!r} must be i/n with i from 0 to n - 1, for example 0/4, 1/4, 2/4, 3/4"
        )
    return int(match[1]), int(match[2])


def take_shard(items: Sequence[Item], shard: str) -> list[Item]:
    """Items i, i + n, i + 2 n, ... as the published code shares prompts out."""
    index, count = parse_shard(shard)
    return list(items[index::count])
