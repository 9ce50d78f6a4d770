"""Token stories -> training examples: which prompt, which frames, in which mode.

An example is one row of ids; a batch pads its rows to one length and gives every target a weight. Rows of one
bucket have one length, so that a compiled training step sees few shapes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from emuworld.tokens.sequence import AnswerSegment, answer, image_length, prompt_ids, unconditional_ids
from emuworld.tokens.text import TextTokenizer
from emuworld.tokens.vision import DOWNSAMPLE
from emuworld.training.data import TokenStory
from emuworld.training.modes import (
    ANSWERED_KINDS,
    TABLE_KINDS,
    Example,
    Shares,
    answer_example,
    change_gains,
    edit_example,
    edit_steps,
    of_kinds,
    table_example,
)

BUCKET_MODES = {  # what a bucket's kind teaches
    "walk": "explore",
    "picture": "t2i",
    "table": "t2i",
    "x2i": "x2i",
    "story": "story",
    "howto": "howto",
    "vla": "vla",
}
# The kinds of stories that it draws from.
STORY_KINDS = {
    "walk": ("walk",),
    "picture": ("walk", "pictures"),
    "table": TABLE_KINDS,
    "x2i": ("x2i",),
    **{kind: (kind,) for kind in ANSWERED_KINDS},
}
# Ids a row beside its pictures: for each picture and for the prompt. Sentences of a story are longer than
# commands, and its question may tell the whole plot.
_WORDS = {kind: (24, 150) if kind in ANSWERED_KINDS else (10, 90) for kind in BUCKET_MODES}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """Examples of one kind and length.

    `kind` is "walk" (explore, `frames` views), "picture" (t2i of rooms), "table" (t2i of table-tops), "x2i"
    (`frames` 2: a picture and its edit, 3: two pictures combined), "story", "howto" or "vla" (at most
    `frames` pictures, the given one included). `every` thins a bucket out: it takes part in each `every`-th
    step. `at_least`: only stories of so many pictures, so that short ones do not fill long rows with padding.

    `size_px` is the height of its pictures and, without `width_px`, their width; 0: the stage's own size. A
    story's pictures are cut to their middle and made smaller; stories with smaller pictures are left out.
    """

    kind: str
    batch_size: int
    frames: int = 1
    every: int = 1
    at_least: int = 1
    size_px: int = 0
    width_px: int = 0

    def __post_init__(self) -> None:
        if self.kind not in BUCKET_MODES:
            raise ValueError(
                f"bucket kind {self.kind!r} is not known; expected one of {', '.join(BUCKET_MODES)}"
            )
        if min(self.batch_size, self.frames, self.every, self.at_least) < 1:
            raise ValueError(f"batch_size, frames, every and at_least must be at least 1, got {self}")
        if self.frames < 2 and self.kind in ("x2i", "vla"):
            raise ValueError(f"a bucket of {self.kind} holds a given picture and an answer: frames=2 or more")
        if min(self.size_px, self.width_px) < 0 or self.size_px % DOWNSAMPLE or self.width_px % DOWNSAMPLE:
            raise ValueError(
                f"size_px and width_px of a bucket must be multiples of {DOWNSAMPLE}, got {self.size_px} and "
                f"{self.width_px} for {self.kind}; the nearest below are "
                f"{max(self.size_px, 0) // DOWNSAMPLE * DOWNSAMPLE} and "
                f"{max(self.width_px, 0) // DOWNSAMPLE * DOWNSAMPLE}"
            )
        if self.width_px and not self.size_px:
            raise ValueError(f"a bucket with width_px={self.width_px} needs its height too: set size_px")

    def size(self, stage: tuple[int, int]) -> tuple[int, int]:
        """Height and width of its pictures in tokens; `stage`: those of the buckets that say none."""
        if not self.size_px:
            return stage
        return self.size_px // DOWNSAMPLE, (self.width_px or self.size_px) // DOWNSAMPLE

    def row_length(self, stage: tuple[int, int]) -> int:
        """Ids a row, a multiple of 64: images of its size and room for the words between them."""
        a_picture, a_prompt = _WORDS[self.kind]
        ids = self.frames * (image_length(self.size(stage)) + a_picture) + a_prompt
        return -(-ids // 64) * 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """`ids` [B, T + 1] int64, padded; `inputs` [B, T] int64, what the model reads: ids[:, :-1], some of the
    codes replaced; `weights` [B, T] float32 of the targets ids[:, 1:], 0 = not trained; `kind`: the bucket's,
    or whatever its validation loss is to be called.
    `documents` [B, T] int64: the number of the document that each input belongs to; None: a row is one.
    `draws` [R, T] float32: of the first R rows, the numbers in 0..1 with which the model draws the codes that
    it reads in place of the given ones; below 0 where it reads what is given. None: of no row.
    """

    kind: str
    ids: np.ndarray
    inputs: np.ndarray
    weights: np.ndarray
    documents: np.ndarray | None = None
    draws: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Shares of the ways an example is put; the weights of text and visual targets are the paper's."""

    # Walks (and stories and guides, where they can) that start from a given picture.
    image_prompt: float = 0.6
    midway: float = 0.4  # vla stories that begin from one of their later pictures
    unconditional: float = 0.1  # rows as the unguided twin sees them: images only
    blank_question: float = 0.15  # walks from a picture that are asked nothing
    # Half of the rows read up to this share of wrong codes: its own, later, will not be right either.
    code_noise: float = 0.1
    # Half of the rows read up to this share of codes as the model itself draws them after the given ones
    # (scheduled sampling, Bengio et al. 2015): of what it is to answer with, but the row's first picture.
    own_codes: float = 0.0
    # Times that they are drawn, each after those of the time before and with the same random numbers: as many
    # more forward passes of these rows. The n-th begins to be what drawing code after code gives.
    own_passes: int = 1
    text_weight: float = 1.0  # of a text token in the loss
    visual_weight: float = 0.5  # of a code; the paper has 0.5, in some stages 1
    # How many times the codes that an edit or a subtask changes count beside those that stay; each picture
    # counts as much as before. Most codes of an edited picture are a copy, and what teaches the edit is few.
    change_weight: float = 1.0
    # How many times more again where a change begins: the codes around it follow from that.
    begin_weight: float = 1.0
    answers_only: bool = False  # learn no prompts, in no mode (fine-tuning)

    def __post_init__(self) -> None:
        if not 0 <= self.own_codes <= 1:
            raise ValueError(f"mixture.own_codes is a share of all codes, 0 to 1, got {self.own_codes}")
        if self.own_passes < 1:
            raise ValueError(f"mixture.own_passes must be at least 1, got {self.own_passes}")
        for name in ("change_weight", "begin_weight"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    f"mixture.{name} must be above 0 (1: changed codes count like the others), got "
                    f"{getattr(self, name)}"
                )


class ExampleSampler:
    """Draws batches from a growing list of stories. `add` may be called between batches, not during one.

    Stories of several sizes may be in the list; a bucket draws from those of its own. `size` is that of the
    buckets that say none, height and width in tokens.
    """

    def __init__(self, *, tokenizer: TextTokenizer, mixture: Mixture, size: tuple[int, int]) -> None:
        self.tokenizer = tokenizer
        self.mixture = mixture
        self.size = size
        self.num_frames = 0
        self._stories: list[TokenStory] = []
        self._shards: dict[tuple[str, tuple[int, ...]], list[TokenStory]] = {}
        self._by_bucket: dict[Bucket, np.ndarray] = {}
        self._in_shard: dict[tuple[Bucket, str, tuple[int, ...]], np.ndarray] = {}  # what a shard gives it

    def add(self, stories: Sequence[TokenStory], *, shard: str = "") -> None:
        """Stories of a shard. What is drawn depends on which shards are there, not on which came first."""
        for story in stories:
            self._shards.setdefault((shard, story.codes.shape[1:]), []).append(story)
        self._in_shard = {key: found for key, found in self._in_shard.items() if key[1] != shard}
        self._stories = [story for name in sorted(self._shards) for story in self._shards[name]]
        self.num_frames += sum(len(s.codes) for s in stories)
        self._by_bucket.clear()

    def batch(self, bucket: Bucket, rng: np.random.Generator) -> Batch:
        """One batch; ValueError where no story is long enough for the bucket."""
        length = bucket.row_length(self.size)
        vocabulary = self.tokenizer.vocabulary
        ids = np.full((bucket.batch_size, length + 1), vocabulary.pad, np.int64)
        weights = np.zeros(ids.shape, np.float32)
        for row, row_weights in zip(ids, weights, strict=True):
            example = self.example(bucket, rng)
            kept = slice(min(len(example.ids), length + 1))
            row[kept] = example.ids[kept]
            row_weights[kept] = self.weights(example)[kept]
        inputs = self.noisy(ids[:, :-1], rng)
        draws = None
        if self.mixture.own_codes and bucket.frames > 1:
            draws = self._draws(ids, weights, rng)
            inputs[: len(draws)] = ids[: len(draws), :-1]  # noise of one kind a row
        return Batch(kind=bucket.kind, ids=ids, inputs=inputs, weights=weights[:, 1:], draws=draws)

    def _draws(self, ids: np.ndarray, weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Of the first half of the rows; see `Batch`."""
        vocabulary = self.tokenizer.vocabulary
        ids, weights = ids[: len(ids) // 2, :-1], weights[: len(ids) // 2, :-1]
        begun = (ids == vocabulary.boi).cumsum(axis=1)  # pictures; the first is mostly a given one
        codes = (ids >= vocabulary.visual_start) & (ids < vocabulary.visual_stop)
        shares = rng.uniform(0.0, self.mixture.own_codes, size=(len(ids), 1))
        own = codes & (weights > 0) & (begun > 1) & (rng.random(ids.shape) < shares)
        return np.where(own, rng.random(ids.shape), -1.0).astype(np.float32)

    def weights(self, example: Example) -> np.ndarray:
        """float32, of each id of an example as a target: text, visual and control tokens; none for the prompt
        that is not learnt and for the first id, which nothing foretells.
        """
        vocabulary, mixture = self.tokenizer.vocabulary, self.mixture
        ids = np.array(example.ids)
        weights = np.where(ids < vocabulary.num_text_tokens, mixture.text_weight, mixture.visual_weight)
        if example.edited_size:
            codes = np.flatnonzero((ids >= vocabulary.visual_start) & (ids < vocabulary.visual_stop))
            weights[codes] *= change_gains(
                ids[codes],
                size=example.edited_size,
                weight=mixture.change_weight,
                begin_weight=mixture.begin_weight,
            )
        weights[: max(1, example.prompt_tokens)] = 0.0
        return weights.astype(np.float32)

    def noisy(self, inputs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A copy with random codes in place of some: every second row none, the others up to `code_noise`."""
        shares = np.maximum(0.0, rng.uniform(-1.0, 1.0, size=(len(inputs), 1))) * self.mixture.code_noise
        start = self.tokenizer.vocabulary.visual_start
        replaced = (rng.random(inputs.shape) < shares) & (inputs >= start)
        noise = rng.integers(start, self.tokenizer.vocabulary.visual_stop, size=inputs.shape)
        return np.where(replaced, noise, inputs)

    def example(self, bucket: Bucket, rng: np.random.Generator) -> Example:
        """One example of a bucket; ValueError where no story is for it."""
        if bucket.kind in ("walk", "picture"):
            story = self._stories[rng.choice(self._of_bucket(bucket))]
            prompt, ids = (
                self._walk(story, bucket.frames, rng) if bucket.kind == "walk" else self._picture(story, rng)
            )
            learnt = not self.mixture.answers_only
            return Example(ids=prompt + ids, prompt_tokens=0 if learnt else len(prompt))
        story = self._stories[rng.choice(self._of_bucket(bucket))]
        mixture, tokenizer = self.mixture, self.tokenizer
        shares = Shares(
            unconditional=mixture.unconditional, midway=mixture.midway, picture_first=mixture.image_prompt
        )
        if bucket.kind == "table":
            return table_example(story, rng, shares=shares, tokenizer=tokenizer)
        if bucket.kind == "x2i":
            steps = edit_steps(story, bucket.frames)
            at = steps[int(rng.integers(len(steps)))]
            return edit_example(story, at, rng, shares=shares, tokenizer=tokenizer)
        return answer_example(
            story,
            rng,
            frames=bucket.frames,
            max_tokens=bucket.row_length(self.size) + 1,
            shares=shares,
            tokenizer=tokenizer,
        )

    def check(self, bucket: Bucket) -> None:
        """ValueError where no story is for a bucket."""
        self._of_bucket(bucket)

    def _of_bucket(self, bucket: Bucket) -> np.ndarray:
        """Indices of the stories that a bucket draws from."""
        if bucket not in self._by_bucket:
            size, start, parts = bucket.size(self.size), 0, []
            for shard in sorted(self._shards):
                if shard[1] == size:
                    parts.append(self._found(bucket, shard) + start)
                start += len(self._shards[shard])
            found = np.concatenate(parts) if parts else np.empty(0, np.int64)
            if not len(found):
                self._refuse(bucket)
            self._by_bucket[bucket] = found
        return self._by_bucket[bucket]

    def _found(self, bucket: Bucket, shard: tuple[str, tuple[int, ...]]) -> np.ndarray:
        """Which stories of a shard a bucket draws from; looked up once, because shards are many."""
        key = (bucket, *shard)
        if key not in self._in_shard:
            stories = self._shards[shard]
            of_kind = of_kinds(stories, STORY_KINDS[bucket.kind])
            kept = [index for index in of_kind if _has_steps(stories[index], bucket)]
            self._in_shard[key] = np.array(kept, np.int64)
        return self._in_shard[key]

    def _refuse(self, bucket: Bucket) -> None:
        size = bucket.size(self.size)
        of_kind = of_kinds(self._stories, STORY_KINDS[bucket.kind])
        of_size = [index for index in of_kind if self._stories[index].codes.shape[1:] == size]
        height, width = (side * DOWNSAMPLE for side in size)
        raise ValueError(
            f"no story among {len(self._stories)} is for the bucket {bucket}: {len(of_kind)} "
            f"of its kind, {len(of_size)} of these at {height}x{width} px (height x width), none of "
            "these with its number of pictures, or captions; build shards with such stories, as large or "
            "larger (emuworld data build --help), or leave the bucket out"
        )

    def _walk(self, story: TokenStory, frames: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the answer."""
        start = int(rng.integers(len(story.codes) - frames + 1))
        codes = story.codes[start : start + frames].astype(np.int64)
        texts = story.texts[start : start + frames]
        from_picture = rng.random() < self.mixture.image_prompt
        if rng.random() < self.mixture.unconditional:
            segments = [AnswerSegment(codes=grid) for grid in codes]
            shown = [codes[0]] if from_picture else []
            prompt = unconditional_ids(shown, tokenizer=self.tokenizer)
            return prompt, answer(segments[len(shown) :], tokenizer=self.tokenizer, ended=False)[0]
        segments = [AnswerSegment(text=text, codes=grid) for text, grid in zip(texts, codes, strict=True)]
        question = self._question(story, start, rng)
        if from_picture:
            blank = rng.random() < self.mixture.blank_question
            prompt = prompt_ids(
                "explore", question="" if blank else question, images=[codes[0]], tokenizer=self.tokenizer
            )
            return prompt, answer(segments[1:], tokenizer=self.tokenizer, ended=False)[0]
        segments[0] = AnswerSegment(codes=codes[0])  # the first view of a text-only walk comes without words
        prompt = prompt_ids("explore", question=question, tokenizer=self.tokenizer)
        return prompt, answer(segments, tokenizer=self.tokenizer, ended=False)[0]

    def _question(self, story: TokenStory, start: int, rng: np.random.Generator) -> str:
        """The walk's own prompt where it starts at its first frame (half the time), else what is in view."""
        if start == 0 and story.question and (not story.captions[0] or rng.random() < 0.5):
            return story.question
        return story.captions[start]

    def _picture(self, story: TokenStory, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the answer."""
        told = [at for at, caption in enumerate(story.captions) if caption]
        at = told[int(rng.integers(len(told)))]
        segment = [AnswerSegment(codes=story.codes[at].astype(np.int64))]
        if rng.random() < self.mixture.unconditional:
            prompt = unconditional_ids(tokenizer=self.tokenizer)
        else:
            prompt = prompt_ids("t2i", question=story.captions[at], tokenizer=self.tokenizer)
        return prompt, answer(segment, tokenizer=self.tokenizer)[0]


def _has_steps(story: TokenStory, bucket: Bucket) -> bool:
    """Whether a story has the pictures that a bucket asks for."""
    if bucket.kind == "x2i" and not edit_steps(story, bucket.frames):
        return False
    if bucket.kind == "picture" and not any(story.captions):
        return False
    least = bucket.frames if bucket.kind == "walk" else 1
    return len(story.codes) >= max(least, bucket.at_least)


def step_batches(
    sampler: ExampleSampler, buckets: tuple[Bucket, ...], *, seed: int, step: int, rank: int = 0
) -> list[Batch]:
    """The batches of one optimiser step, one for each bucket that takes part in it; `(step, bucket index,
    rank)` decides each one's random numbers. Buckets that take part now and then take turns.
    """
    return [
        sampler.batch(bucket, np.random.default_rng((seed, step, i, rank)))
        for i, bucket in enumerate(buckets)
        if (step + i) % bucket.every == 0
    ]
