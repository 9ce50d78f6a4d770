"""Stories on disk -> frames for the vision tokenizer, token sequences for the transformer.

Both readers take a folder of shards (`emuworld.story`), start with what is there and pick up shards that
appear later, so a renderer may still be writing while training runs. Pictures are decoded once: the frame
pool keeps pixels, the token store codes. Pictures that are larger than the run's are cut to their middle and
made smaller; stories with smaller ones are left out and told, because nothing is enlarged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from emuworld.files import written
from emuworld.pictures import Size, middle
from emuworld.story import Story, StoryError, StoryImage, read_shard
from emuworld.training.shard_files import find_shards

# What a story is, by the first word of its `story_id` (the last one by the first two). t2i learns from walks
# and pictures, explore from walks, each other mode from its own.
KINDS = ("walk", "pictures", "x2i", "story", "howto", "vla", "pictures-table")
MIRRORED_KINDS = ("walk", "pictures", "x2i", "story")  # rooms; a mirrored robot would be another robot


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenStory:
    """A story as the transformer needs it: words, and one grid of codes a frame.

    The first `num_references` frames are reference pictures; they have no text.
    """

    question: str
    texts: tuple[str, ...]  # the text of each step; texts[0] belongs to the first frame
    captions: tuple[str, ...]  # what is in view, a frame each; "" where unknown
    codes: np.ndarray  # [N, h, w] uint16
    kind: str = "walk"  # one of KINDS
    num_references: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodedShard:
    """A shard with its pictures decoded: the words of its stories, and all frames in reading order.

    `too_small`: how many stories are left out because a picture of theirs is smaller than the frames.
    """

    stem: str  # file name without its ending
    stories: list[TokenStory]  # without codes
    frames: torch.Tensor  # [N, H, W, 3] uint8
    too_small: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DamagedShard:
    """A shard that cannot be read whole; nothing of it is used."""

    stem: str
    why: str


def _decode_shard(path: Path, size: Size, kinds: Collection[str]) -> DecodedShard:
    """The stories of some kinds, their pictures at `size`."""
    height, width = size
    stories: list[TokenStory] = []
    images: list[StoryImage] = []
    too_small = 0
    for story in read_shard(path):
        words, shown = replace_pictures(story), [image for _, image in _shown(story)]
        if words.kind not in kinds:
            continue
        if any(image.height < height or image.width < width for image in shown):
            too_small += 1
            continue
        stories.append(words)
        images += shown
    frames = torch.empty((len(images), height, width, 3), dtype=torch.uint8)
    for i, image in enumerate(images):
        pixels = image.to_array()
        if pixels.shape[:2] != size:
            pixels = middle(Image.fromarray(pixels), size)
        frames[i] = torch.from_numpy(pixels)
    return DecodedShard(stem=path.stem, stories=stories, frames=frames, too_small=too_small)


def replace_pictures(story: Story) -> TokenStory:
    """The words of a story; its codes come later."""
    shown = _shown(story)
    texts = tuple(text for text, _ in shown)
    return TokenStory(
        question=story.question,
        texts=texts,
        captions=tuple(image.caption for _, image in shown),
        codes=np.empty((len(shown), 0, 0), np.uint16),
        kind=_kind(story.story_id, texts),
        num_references=len(story.reference_images),
    )


def _shown(story: Story) -> list[tuple[str, StoryImage]]:
    """Every picture of a story with its text, the reference pictures first."""
    answered = [(segment.text, image) for segment in story.segments for image in segment.images]
    return [*(("", image) for image in story.reference_images), *answered]


def _kind(story_id: str, texts: Sequence[str]) -> str:
    """What its id says; a story of another origin is a walk if it has words, else a set of pictures."""
    words = story_id.split("-")
    for kind in ("-".join(words[:2]), words[0]):
        if kind in KINDS:
            return kind
    return "walk" if any(texts) else "pictures"


def in_share(stem: str, *, rank: int, world: int) -> bool:
    """Whether a shard belongs to one of `world` readers, by its name alone, so that late shards are divided
    too.
    """
    return _number(stem) % world == rank


def _number(stem: str) -> int:
    """A number for each shard, without an order. No checksum: those of "train-00000000-00000008" and its like
    give ten in a row to one reader of two.
    """
    return int.from_bytes(hashlib.blake2b(stem.encode(), digest_size=8).digest())


class _Shards(IterableDataset):
    """Decodes shards; each loader process takes its share."""

    def __init__(
        self,
        folder: Path,
        *,
        size: Size,
        kinds: Collection[str],
        skip: frozenset[str],
        follow: bool,
        share: tuple[int, int],
    ) -> None:
        self.folder, self.size, self.kinds = folder, size, kinds
        self.skip, self.follow, self.share = skip, follow, share

    def __iter__(self) -> Iterator[DecodedShard | DamagedShard]:
        worker = get_worker_info()
        loader, loaders = (worker.id, worker.num_workers) if worker else (0, 1)
        rank, world = self.share[0] * loaders + loader, self.share[1] * loaders
        seen = set(self.skip)
        while True:
            shards = find_shards(self.folder)
            # In no order of theirs: shards of one kind may all come before those of another.
            fresh = sorted((p for p in shards if p.stem not in seen), key=lambda p: _number(p.stem))
            for path in fresh:
                seen.add(path.stem)
                if in_share(path.stem, rank=rank, world=world):
                    yield self._decoded(path)
            if not fresh and not self.follow:
                return
            if not fresh:
                time.sleep(0.5)

    def _decoded(self, path: Path) -> DecodedShard | DamagedShard:
        try:
            return _decode_shard(path, self.size, self.kinds)
        except StoryError as error:
            return DamagedShard(stem=path.stem, why=str(error))


class ShardFeed:
    """The shards of a folder, decoded in other processes, each given once. A damaged one is reported once and
    left out (`damaged`).

    `size` is that of the frames, `kinds` are those of the stories that are wanted; the first shard with
    stories whose pictures are smaller is told of.

    `workers` 0 decodes in a thread of this process, which is enough on a CPU; beside a GPU a thread would
    hold up the one that feeds it. With `follow` the feed never ends: it waits for shards that are being
    written. `share` (rank, world) takes one of `world` parts of the shards.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        size: Size,
        kinds: Collection[str] = KINDS,
        workers: int = 0,
        follow: bool = False,
        skip: Iterable[str] = (),
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.size = size
        self.follow = follow
        dataset = _Shards(
            Path(folder), size=size, kinds=kinds, skip=frozenset(skip), follow=follow, share=share
        )
        self._loader = DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context="spawn" if workers else None,
            in_order=False,  # a process that waits for its next shard must not hold up the others
        )
        self._queue: Queue[DecodedShard | BaseException | None] = Queue(max(2, workers))
        self._closed = threading.Event()
        self._ended = False
        self._told_small = False
        self.damaged: list[DamagedShard] = []
        threading.Thread(target=self._read, daemon=True).start()

    def ready(self) -> DecodedShard | None:
        """A shard that is decoded by now, or None. Never blocks."""
        if self._ended:
            return None
        try:
            return self._given(self._queue.get_nowait())
        except Empty:
            return None

    def wait(self) -> DecodedShard | None:
        """The next shard, waiting for it; None after the last (never with `follow`)."""
        return None if self._ended else self._given(self._queue.get())

    def close(self) -> None:
        self._closed.set()

    def _given(self, item: DecodedShard | BaseException | None) -> DecodedShard | None:
        if isinstance(item, BaseException):
            raise item
        self._ended = item is None
        return item

    def _read(self) -> None:
        last: BaseException | None = None
        try:
            for shard in self._loader:
                if isinstance(shard, DamagedShard):
                    self.damaged.append(shard)
                    print(f"a shard is left out: {shard.why}", file=sys.stderr, flush=True)
                    continue
                self._tell_small(shard)
                if not self._put(shard):
                    return
        except Exception as error:  # handed to the thread that asks for shards
            last = error
        self._put(last)

    def _tell_small(self, shard: DecodedShard) -> None:
        if not shard.too_small or self._told_small:
            return
        self._told_small = True
        height, width = self.size
        print(
            f"stories with pictures smaller than {height}x{width} px (height x width) are left out, because "
            f"pictures are not enlarged: {shard.too_small} of {shard.stem}, and those of later shards; build "
            f"shards with size={max(height, width)}, or set a smaller size_px",
            file=sys.stderr,
            flush=True,
        )

    def _put(self, item: DecodedShard | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.5)
                return True
            except Full:
                continue
        return False


class FramePool:
    """Frames of a folder of shards in one uint8 tensor on the device, drawn at random.

    Holds at most `capacity` frames; once full, new shards replace the oldest.
    """

    def __init__(self, feed: ShardFeed, *, capacity: int, device: torch.device) -> None:
        self._feed = feed
        self._frames = torch.empty((capacity, *feed.size, 3), dtype=torch.uint8, device=device)
        self.num_frames = 0
        self._next = 0

    def fill(self, at_least: int) -> None:
        """Wait until `at_least` frames are in, or every present shard is; ValueError where none is."""
        while self.num_frames < at_least and (shard := self._feed.wait()) is not None:
            self._add(shard.frames)
        if not self.num_frames:
            height, width = self._feed.size
            raise ValueError(
                f"the shards hold no story whose pictures have {height}x{width} px or more; "
                f"build them with size={max(height, width)}, or set a smaller size_px"
            )

    def refresh(self) -> None:
        """Take in a shard that the background has decoded, if there is one."""
        if (shard := self._feed.ready()) is not None:
            self._add(shard.frames)

    def _add(self, frames: torch.Tensor) -> None:
        capacity = len(self._frames)
        for part in frames.split(capacity):
            if self._next + len(part) > capacity:
                self._next = 0
            self._frames[self._next : self._next + len(part)] = part.to(self._frames.device)
            self._next += len(part)
            self.num_frames = max(self.num_frames, self._next)

    def sample(self, num: int, rng: np.random.Generator) -> torch.Tensor:
        """[num, H, W, 3] uint8 on the device."""
        rows = torch.from_numpy(rng.integers(self.num_frames, size=num)).to(self._frames.device)
        return self._frames[rows]


def with_codes(stories: Sequence[TokenStory], codes: np.ndarray) -> list[TokenStory]:
    """The stories with the codes of their frames [N, h, w]."""
    out, at = [], 0
    for story in stories:
        end = at + len(story.texts)
        out.append(dataclasses.replace(story, codes=codes[at:end]))
        at = end
    return out


_OTHER_SIDE = {"left": "right", "right": "left"}


def mirrored(story: TokenStory) -> TokenStory:
    """The words of a story whose pictures are mirrored: left and right change places."""
    return dataclasses.replace(
        story,
        question=_mirrored_words(story.question),
        texts=tuple(map(_mirrored_words, story.texts)),
        captions=tuple(map(_mirrored_words, story.captions)),
    )


def _mirrored_words(text: str) -> str:
    return re.sub(r"\b(left|right)\b", lambda match: _OTHER_SIDE[match[1]], text)


def save_tokens(path: Path, stories: Sequence[TokenStory]) -> None:
    """Keep the tokens of one shard (npz of plain arrays and one JSON text), written beside and renamed."""
    names = ("question", "texts", "captions", "kind", "num_references")
    words = [{name: getattr(story, name) for name in names} for story in stories]
    codes = np.concatenate([s.codes for s in stories]) if stories else np.empty((0, 0, 0), np.uint16)
    with written(path) as beside, beside.open("wb") as file:
        np.savez(file, codes=codes, words=np.array(json.dumps(words)))


def load_tokens(path: Path) -> list[TokenStory]:
    """Read what `save_tokens` wrote; nothing is unpickled."""
    with np.load(path, allow_pickle=False) as file:
        codes, words = file["codes"], json.loads(str(file["words"]))
    out, at = [], 0
    for w in words:
        n = len(w["texts"])
        fields: dict[str, Any] = {**w, "texts": tuple(w["texts"]), "captions": tuple(w["captions"])}
        fields.setdefault("kind", _kind("", w["texts"]))  # files of the first release do not say it
        out.append(TokenStory(codes=codes[at : at + n], **fields))
        at += n
    return out
