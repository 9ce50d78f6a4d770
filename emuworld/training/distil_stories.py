"""Where the stage `dida` has its stories from: shards, codes that pretraining left, and its model's own.

Pictures that pretraining has encoded with the same vision tokenizer are not encoded again. Reading, encoding
and drawing may be bounded by the clock, for runs that have a GPU for minutes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from emuworld.checkpoint_folder import Parts
from emuworld.tokens.vision import DOWNSAMPLE
from emuworld.training.data import TokenStory, load_tokens
from emuworld.training.encoding import TokenFeed
from emuworld.training.examples import Bucket, ExampleSampler
from emuworld.training.modes import Example
from emuworld.training.own_stories import Answerer
from emuworld.training.sizes import size_name

if TYPE_CHECKING:
    from emuworld.training.distil import DidaTraining

_HELD_EVERY = 20  # every so many-th story of a kind is kept for validation
_READERS = 8


class MixedSampler(ExampleSampler):
    """Examples of two samplers: of `own` with the probability `share`, where it has any for a bucket."""

    def __init__(self, data: ExampleSampler, own: ExampleSampler, *, share: float) -> None:
        super().__init__(tokenizer=data.tokenizer, mixture=data.mixture, size=data.size)
        self._data, self._own, self._share = data, own, share
        self._lacking: set[Bucket] = set()

    def check(self, bucket: Bucket) -> None:
        self._data.check(bucket)

    def example(self, bucket: Bucket, rng: np.random.Generator) -> Example:
        if rng.random() < self._share and bucket not in self._lacking:
            try:
                self._own.check(bucket)
            except ValueError:
                self._lacking.add(bucket)
            else:
                return self._own.example(bucket, rng)
        return self._data.example(bucket, rng)


def samplers(config: DidaTraining, parts: Parts, *, out: Path) -> tuple[ExampleSampler, ExampleSampler]:
    """Examples for training, and of stories held back for validation."""
    begun = time.monotonic()
    wanted = config.num_stories or (config.own.num_stories if config.stories == "own" else 0)
    data: list[TokenStory] = []
    for stories in _encoded(config, parts, out=out):
        data += stories
        late = time.monotonic() - begun > config.prepare_seconds
        if (wanted and len(data) >= wanted) or late:
            break
    print(f"dida: {len(data)} stories in {time.monotonic() - begun:.0f} s", flush=True)
    own: list[TokenStory] = []
    if config.stories != "data":
        own = Answerer(parts, config=config.own, seed=config.seed).kept(
            data, out / "own", on_done=lambda done: print(f"dida: {done} own stories", flush=True)
        )
    if config.stories == "own":
        data = own
    training, held = (_sampler(config, parts, data, held=held) for held in (False, True))
    if config.stories == "both":
        training = MixedSampler(training, _sampler(config, parts, own, held=None), share=config.own_share)
    for bucket in config.buckets:
        training.check(bucket)
    return training, held


def _encoded(config: DidaTraining, parts: Parts, *, out: Path) -> Iterator[Sequence[TokenStory]]:
    """The stories of the shards, as codes: those that are kept somewhere first."""
    size = (config.size_px, config.size_px)
    if config.codes:
        name = f"tokens-train-{parts.vision.code_fingerprint()[:12]}-{size_name(size)}*"
        files = sorted(path for folder in Path(config.codes).glob(name) for path in folder.glob("*.npz"))
        if not files:
            raise ValueError(
                f"codes={config.codes} has no {name} with the codes of this checkpoint's vision tokenizer; "
                "give the out= of its pretraining, or leave codes out to encode the shards anew"
            )
        with ThreadPoolExecutor(_READERS) as pool:
            for start in range(0, len(files), _READERS):  # a few ahead, not all: the caller may have enough
                yield from pool.map(load_tokens, files[start : start + _READERS])
        return
    feed = TokenFeed(
        config.shards,
        vision=parts.vision,
        cache=out / f"tokens-{parts.fingerprint.hex()[:12]}",
        size=size,
        workers=config.workers,
        compile=False,
        device=parts.transformer.device,
        follow=False,
        mirror=False,
        share=(0, 1),
    )
    try:
        for shard in feed.cached():
            yield shard.stories
        while (more := feed.wait()) is not None:
            yield more.stories
    finally:
        feed.close()


def _sampler(
    config: DidaTraining, parts: Parts, stories: Sequence[TokenStory], *, held: bool | None
) -> ExampleSampler:
    """Of the stories of each kind that are held back, or of the others; of all where they are too few, or for
    None."""
    side = config.size_px // DOWNSAMPLE
    sampler = ExampleSampler(tokenizer=parts.tokenizer, mixture=config.mixture, size=(side, side))
    for kind in sorted({story.kind for story in stories}):
        alike = [story for story in stories if story.kind == kind]
        few = held is None or len(alike) < 2 * _HELD_EVERY
        sampler.add([story for at, story in enumerate(alike) if few or (at % _HELD_EVERY == 0) == held])
    return sampler
