"""Stage `text`: the built-in byte-pair encoding learns the language of a folder of stories."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

from emuworld.story import Story, read_shard
from emuworld.tokens.bpe import train_bpe
from emuworld.training.shard_files import find_shards, wait_for_shards

FILE_NAME = "text.tiktoken"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTraining:
    """Settings of the stage."""

    shards: str = "outputs/data/train"  # folder that `data build` wrote
    out: str = "outputs/train/text"  # folder of text.tiktoken
    num_tokens: int = 512  # the rooms' language has few words more; every byte has a token besides
    max_shards: int = 64  # that are read
    wait_for_data_s: float = 0.0  # for the first shard


def train(config: TextTraining) -> dict[str, float]:
    """Run the stage; writes `text.tiktoken` into `config.out`."""
    wait_for_shards(config.shards, timeout_s=config.wait_for_data_s)
    paths = find_shards(config.shards)[: config.max_shards]
    lines = [line for path in paths for line in story_lines(read_shard(path))]
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    ranks = train_bpe(lines, num_tokens=config.num_tokens, path=out / FILE_NAME)
    print(
        f"text: {len(ranks)} tokens from {len(lines)} lines of {len(paths)} shards, {out / FILE_NAME}",
        flush=True,
    )
    return {"tokens": float(len(ranks)), "lines": float(len(lines))}


def story_lines(stories: Iterable[Story]) -> Iterator[str]:
    """Every text of the stories: questions, commands, captions."""
    for story in stories:
        if story.question:
            yield story.question
        yield from (image.caption for image in story.reference_images if image.caption)
        for segment in story.segments:
            if segment.text:
                yield segment.text
            yield from (image.caption for image in segment.images if image.caption)
