"""A model's own answers to the questions and commands of stories: what it is distilled from itself with.

Each story is answered anew in the way its environment would ask: walks go on from their first view, edits
from the picture before, pictures are painted from their captions. Words stay, pictures become the model's.
Answers are drawn many at a time and kept on disk as codes, so an interrupted run goes on with what it has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emuworld.cache_pool import CachePool
from emuworld.checkpoint_folder import Parts
from emuworld.context import Context
from emuworld.decoding.autoregressive import finish
from emuworld.decoding.sampling import Sampling
from emuworld.files import write_text
from emuworld.segments import SegmentWriter
from emuworld.state import WorldState, block_codes, image_blocks
from emuworld.tokens.sequence import prompt_ids
from emuworld.tokens.token_ids import TokenIds
from emuworld.tokens.vision import DOWNSAMPLE
from emuworld.training.data import KINDS, TokenStory, load_tokens, save_tokens
from emuworld.training.modes import edit_references

_PAINTED_KINDS = ("pictures", "pictures-table")  # every picture from its caption


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnStories:
    """How many answers, and how they are drawn."""

    num_stories: int = 2_000  # that it answers; of a long walk each part is one
    frames: int = 6  # pictures of a part of a walk, the given one included
    batch: int = 64  # stories answered at once
    kinds: tuple[str, ...] = ()  # of stories that it answers, as walk and pictures; []: all
    max_seconds: float = math.inf  # no answers are begun that would end later; at least one batch is drawn
    guidance: float | None = None  # null: each mode's own, which then is learnt too

    def __post_init__(self) -> None:
        if min(self.num_stories, self.batch) < 1 or self.frames < 2 or self.max_seconds <= 0:
            raise ValueError(
                "own stories need num_stories and batch of 1 or more, frames of 2 or more and max_seconds "
                f"above 0, got {self}"
            )
        if unknown := set(self.kinds) - set(KINDS):
            raise ValueError(f"own.kinds has {sorted(unknown)}; known are {', '.join(KINDS)}")


class Answerer:
    """Answers stories with a checkpoint."""

    def __init__(self, parts: Parts, *, config: OwnStories, seed: int) -> None:
        self._parts, self._config, self._seed = parts, config, seed
        context = Context(
            manifest=parts.manifest,
            tokenizer=parts.tokenizer,
            fingerprint=parts.fingerprint,
            max_tokens=parts.transformer.config.max_position_embeddings,
        )
        self._writer = SegmentWriter(
            parts.transformer, context=context, caches=CachePool(parts.transformer), painter=parts.painter
        )

    def kept(
        self,
        stories: Sequence[TokenStory],
        folder: Path,
        *,
        on_done: Callable[[int], None] = lambda done: None,
    ) -> list[TokenStory]:
        """The first `num_stories` stories with the model's pictures, or as many as there was time for: read
        from `folder` as far as they are there, else drawn and put there. Other settings or another model use
        other files. A run that goes on takes what the first one had time for."""
        chunks = self._chunks(stories)
        folder.mkdir(parents=True, exist_ok=True)
        limit_s = self._config.max_seconds
        counted = folder / f"own-{self._key(chunks[0] if chunks else ())}-{limit_s:g}s.json"
        if counted.is_file():
            chunks = chunks[: int(json.loads(counted.read_text()))]
        answered: list[TokenStory] = []
        begun, longest_s, num_done = time.monotonic(), 0.0, 0
        for chunk in chunks:
            path = folder / f"own-{num_done:05d}-{self._key(chunk)}.npz"
            if not path.is_file():
                chunk_begun = time.monotonic()
                if num_done and not counted.is_file() and chunk_begun - begun + longest_s > limit_s:
                    break
                save_tokens(path, self.answer(chunk, first=num_done * self._config.batch))
                longest_s = max(longest_s, time.monotonic() - chunk_begun)
            answered += load_tokens(path)
            num_done += 1
            on_done(len(answered))
        if math.isfinite(limit_s):
            write_text(counted, json.dumps(num_done))
        return answered

    def _chunks(self, stories: Sequence[TokenStory]) -> list[list[TokenStory]]:
        """What is answered, in batches of one kind. Kinds take turns, so that whoever stops early has some of
        each."""
        parts = (part for story in stories for part in self._parts_of(story))
        alike: dict[str, list[TokenStory]] = {}
        for part in islice(parts, self._config.num_stories):
            alike.setdefault(part.kind, []).append(part)
        size = self._config.batch
        chunks = [
            (start / len(of_kind), of_kind[start : start + size])
            for of_kind in alike.values()
            for start in range(0, len(of_kind), size)
        ]
        return [chunk for _, chunk in sorted(chunks, key=itemgetter(0))]

    def answer(self, stories: Sequence[TokenStory], *, first: int = 0) -> list[TokenStory]:
        """The stories with the model's pictures in place of those that were not given."""
        codes = [story.codes.copy() for story in stories]
        worlds: list[WorldState | None] = [None] * len(stories)
        for at in range(max(len(story.codes) for story in stories)):
            turns = [i for i, story in enumerate(stories) if _num_given(story) <= at < len(story.codes)]
            asks = []
            for i in turns:
                world, text = self._ask(stories[i], codes[i], at, before=worlds[i], seed=first + i)
                asks.append(self._writer.plan(world, text, self._sampling(world.mode)))
            for i, plan, written in zip(
                turns, asks, finish(self._writer.write(asks)) if asks else (), strict=True
            ):
                blocks = image_blocks(written.ids, self._parts.manifest.vocabulary)
                codes[i][at] = block_codes(blocks[-1], self._parts.manifest.vocabulary)
                worlds[i] = plan.state.after(written.ids, size=plan.state.size, ended=False)
        return [dataclasses.replace(story, codes=own) for story, own in zip(stories, codes, strict=True)]

    def _ask(
        self,
        story: TokenStory,
        codes: NDArray[np.uint16],
        at: int,
        *,
        before: WorldState | None,
        seed: int,
    ) -> tuple[WorldState, str]:
        """The world in which picture `at` is drawn, and the text that stands before it."""
        if story.kind in _PAINTED_KINDS:
            return self._world("t2i", story.captions[at], codes[:0], codes, seed=seed, step=at), ""
        if story.kind == "x2i":
            own = dataclasses.replace(story, codes=codes)
            shown = edit_references(own, at)
            return self._world("x2i", story.texts[at], shown, codes, seed=seed, step=at), ""
        if before is not None:
            return before, story.texts[at]
        mode = "explore" if story.kind == "walk" else story.kind
        return self._world(mode, story.question, codes[: _num_given(story)], codes, seed=seed), story.texts[
            at
        ]

    def _world(
        self,
        mode: str,
        question: str,
        shown: NDArray[np.integer],
        codes: NDArray[np.uint16],
        *,
        seed: int,
        step: int = 0,
    ) -> WorldState:
        tokenizer = self._parts.tokenizer
        pictures = [grid.astype(np.int64) for grid in shown]
        ids = prompt_ids(mode, question=question, images=pictures, tokenizer=tokenizer)
        height, width = codes.shape[1:]
        return WorldState(
            mode=mode,
            prompt_ids=TokenIds(ids),
            answer_ids=TokenIds(),
            seed=(self._seed << 32) + seed,
            step=step,
            size=(height * DOWNSAMPLE, width * DOWNSAMPLE),
            ended=False,
            fingerprint=self._parts.fingerprint,
        )

    def _sampling(self, mode: str) -> Sampling:
        """Token by token, in any case."""
        sampling = dataclasses.replace(self._parts.manifest.sampling_for(mode), passes=0)
        guidance = self._config.guidance
        return sampling if guidance is None else dataclasses.replace(sampling, guidance=guidance)

    def _parts_of(self, story: TokenStory) -> Iterator[TokenStory]:
        """A story as it is answered: walks in parts of `frames`, each of which begins where the one before
        ended, and pictures so many at a time as a part of a walk has to draw; nothing of other kinds."""
        if self._config.kinds and story.kind not in self._config.kinds:
            return
        drawn, total = self._config.frames - 1, len(story.codes)
        if story.kind in _PAINTED_KINDS:
            for start in range(0, total, drawn):
                yield _part(story, start, start + drawn)
        elif story.kind == "walk":
            for start in range(0, max(1, total - drawn), drawn):
                part = _part(story, start, start + drawn + 1)
                # What its later pictures show is the model's, so nobody knows in words.
                question = story.captions[start] if start else story.question or story.captions[0]
                yield dataclasses.replace(
                    part, question=question, texts=("", *part.texts[1:]), captions=("",) * len(part.codes)
                )
        else:
            yield story

    def _key(self, stories: Sequence[TokenStory]) -> str:
        digest = hashlib.sha256(self._parts.fingerprint)
        settings = {k: v for k, v in dataclasses.asdict(self._config).items() if k != "max_seconds"}
        digest.update(json.dumps([settings, self._seed]).encode())
        for story in stories:
            digest.update(json.dumps([story.question, story.texts, story.captions, story.kind]).encode())
            digest.update(story.codes.tobytes())
        return digest.hexdigest()[:12]


def _num_given(story: TokenStory) -> int:
    """How many of a story's pictures are not the model's to draw."""
    return 1 if story.kind == "walk" else story.num_references


def _part(story: TokenStory, start: int, stop: int) -> TokenStory:
    """Some pictures of a story, with what belongs to them."""
    part = slice(start, stop)
    return dataclasses.replace(
        story, texts=story.texts[part], captions=story.captions[part], codes=story.codes[part]
    )
