"""Examples of any lengths in rows of one length, as documents that do not see each other.

A row takes examples, drawn kind by kind in the buckets' proportions, as long as they fit; what does not fit
gives way to a few other draws, and the rest of the row is padding. `(seed, step, row)` decides a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from emuworld.training.examples import Batch, Bucket, ExampleSampler
from emuworld.training.modes import Example

KIND = "packed"  # of batches of such rows
_TRIES = 4  # other draws for the room that is left


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packing:
    """Rows of packed examples instead of batches of equal ones; 0 tokens: none.

    A bucket's share of the examples is its `batch_size` over its `every`.
    """

    tokens: int = 0  # of a row; the paper has 32,768
    rows: int = 8  # of a step, all processes together
    rows_at_once: int = 1  # of one forward pass


def packed_batches(
    sampler: ExampleSampler,
    buckets: Sequence[Bucket],
    *,
    packing: Packing,
    seed: int,
    step: int,
    rank: int,
    world: int,
) -> list[Batch]:
    """The rows of one step that belong to one of `world` readers."""
    mine = range(rank * packing.rows // world, (rank + 1) * packing.rows // world)
    rows = [
        packed(sampler, buckets, tokens=packing.tokens, rng=np.random.default_rng((seed, step, row)))
        for row in mine
    ]
    return [
        Batch(
            kind=KIND,
            ids=np.concatenate([row.ids for row in part]),
            inputs=np.concatenate([row.inputs for row in part]),
            weights=np.concatenate([row.weights for row in part]),
            documents=np.concatenate([_numbers(row) for row in part]),
        )
        for part in (rows[i : i + packing.rows_at_once] for i in range(0, len(rows), packing.rows_at_once))
    ]


def packed(
    sampler: ExampleSampler, buckets: Sequence[Bucket], *, tokens: int, rng: np.random.Generator
) -> Batch:
    """One row of examples. ValueError where not even one fits."""
    shares = np.array([bucket.batch_size / bucket.every for bucket in buckets])
    taken: list[Example] = []
    left, tries = tokens + 1, 0
    while tries < _TRIES and left > 0:
        example = sampler.example(buckets[rng.choice(len(buckets), p=shares / shares.sum())], rng)
        if len(example.ids) <= left:
            taken.append(example)
            left -= len(example.ids)
        else:
            tries += 1
    if not taken:
        raise ValueError(f"no example fits into packed rows of {tokens} tokens; set packing.tokens higher")
    return row_of(sampler, taken, tokens=tokens, rng=rng)


def row_of(
    sampler: ExampleSampler, examples: Sequence[Example], *, tokens: int, rng: np.random.Generator
) -> Batch:
    """Examples one behind the other in a row of `tokens` + 1 ids; padding is a document of its own."""
    ids = np.full(tokens + 1, sampler.tokenizer.vocabulary.pad, np.int64)
    weights = np.zeros(tokens + 1, np.float32)
    numbers = np.full(tokens + 1, len(examples), np.int64)
    start = 0
    for number, example in enumerate(examples):
        stop = start + len(example.ids)
        ids[start:stop] = example.ids
        weights[start:stop] = sampler.weights(example)
        numbers[start:stop] = number
        start = stop
    return Batch(
        kind=KIND,
        ids=ids[None],
        inputs=sampler.noisy(ids[None, :-1], rng),
        weights=weights[None, 1:],
        documents=numbers[None, :-1],
    )


def _numbers(batch: Batch) -> np.ndarray:
    assert batch.documents is not None
    return batch.documents
