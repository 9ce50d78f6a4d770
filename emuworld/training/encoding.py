"""Shards of pictures -> token stories: the vision tokenizer's part of the transformer's training.

Pictures are encoded once, and their codes kept beside the run, so that a resumed run does not encode again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from emuworld.pictures import Size
from emuworld.tokens.vision import VisionTokenizer, to_pixels
from emuworld.training.data import (
    KINDS,
    MIRRORED_KINDS,
    DecodedShard,
    ShardFeed,
    TokenStory,
    in_share,
    load_tokens,
    mirrored,
    save_tokens,
    with_codes,
)

# That are encoded. On a GPU a last, smaller part costs as much as a whole one; a shard has some 260 frames.
_FRAMES_AT_ONCE = 64
_PIXELS_AT_ONCE = 256 * 512 * 512  # of larger pictures fewer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardTokens:
    """The stories of one shard, by the shard's name."""

    stem: str
    stories: list[TokenStory]


class TokenFeed:
    """Shards -> token stories: pictures are encoded once on the device, the codes kept in `cache`.

    `size` is the height and width in pixels at which pictures are encoded, `kinds` are the kinds of stories
    that are wanted. Another size or other kinds need another cache.
    """

    def __init__(
        self,
        folder: str,
        *,
        vision: VisionTokenizer,
        cache: Path,
        size: Size,
        workers: int,
        compile: bool,
        device: torch.device,
        follow: bool,
        mirror: bool,
        share: tuple[int, int],
        kinds: Collection[str] = KINDS,
    ) -> None:
        self._vision = vision
        self._cache = cache
        self._device = device
        self._mirror = mirror
        self._share = share
        self._latents: Callable[[Tensor], Tensor] = vision.latents
        if compile:
            self._latents = torch.compile(vision.latents, dynamic=False)
        cache.mkdir(parents=True, exist_ok=True)
        self._feed = ShardFeed(
            folder,
            size=size,
            kinds=kinds,
            workers=workers,
            follow=follow,
            skip=[path.stem for path in cache.glob("*.npz")],
            share=share,
        )

    def cached(self) -> Iterator[ShardTokens]:
        """The shards that an earlier run has encoded already."""
        for path in sorted(self._cache.glob("*.npz")):
            if in_share(path.stem, rank=self._share[0], world=self._share[1]):
                yield ShardTokens(stem=path.stem, stories=load_tokens(path))

    def ready(self) -> ShardTokens | None:
        """A shard that the background has decoded by now, if there is one. One at a time: a feed that is
        faster than the encoder would hold up the training.
        """
        shard = self._feed.ready()
        return None if shard is None else self._encode(shard)

    def wait(self) -> ShardTokens | None:
        """The next shard, waiting for it; None where every present shard was given."""
        shard = self._feed.wait()
        return None if shard is None else self._encode(shard)

    def close(self) -> None:
        self._feed.close()

    def _encode(self, shard: DecodedShard) -> ShardTokens:
        frames = shard.frames.to(self._device)
        words, rows = self._to_mirror(shard.stories)
        if len(rows):
            frames = torch.cat((frames, frames[torch.from_numpy(rows).to(frames.device)].flip(2)))
        stories = [*shard.stories, *words]
        if stories:
            stories = with_codes(stories, self._codes(frames))
        save_tokens(self._cache / f"{shard.stem}.npz", stories)
        return ShardTokens(stem=shard.stem, stories=stories)

    def _to_mirror(self, stories: Sequence[TokenStory]) -> tuple[list[TokenStory], np.ndarray]:
        """The stories that are learnt from mirrored too, all but those that show a robot, with their words
        mirrored; and which of the frames are theirs.
        """
        if not self._mirror:
            return [], np.empty(0, np.int64)
        kept = [story.kind in MIRRORED_KINDS for story in stories]
        rows = np.flatnonzero(np.repeat(kept, [len(story.texts) for story in stories]))
        return [mirrored(story) for story, keep in zip(stories, kept, strict=True) if keep], rows

    @torch.no_grad()
    def _codes(self, frames: Tensor) -> np.ndarray:
        """Codes [N, h, w], uint16 where they fit; in fp16 arithmetic on a GPU (ten mantissa bits: about as
        exact as the TF32 default), fp32 on a CPU.
        """
        codes = []
        most = min(_FRAMES_AT_ONCE, max(1, _PIXELS_AT_ONCE // (frames.shape[1] * frames.shape[2])))
        for chunk in frames.split(most):
            num = len(chunk)
            if num < most and self._device.type == "cuda":  # one shape, one compilation
                chunk = torch.cat((chunk, chunk.new_zeros((most - num, *chunk.shape[1:]))))
            pixels = to_pixels(chunk)
            with torch.autocast(self._device.type, torch.float16, enabled=self._device.type == "cuda"):
                z = self._latents(pixels)
            codes.append(self._vision.quantize.codes(z)[:num].to(torch.int32))
        kind = np.uint16 if self._vision.num_codes <= 1 << 16 else np.uint32
        return torch.cat(codes).cpu().numpy().astype(kind)
