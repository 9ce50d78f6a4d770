"""The picture sizes of a stage: which its buckets ask for, and whether they can be trained.

Every size is encoded from the stories' own pictures and has codes of its own on disk.
"""

from __future__ import annotations

from collections.abc import Sequence

from emuworld.pictures import Size
from emuworld.tokens.vision import DOWNSAMPLE
from emuworld.training.data import KINDS
from emuworld.training.examples import STORY_KINDS, Bucket


def size_of(bucket: Bucket, *, size_px: int) -> Size:
    """Height and width in pixels of a bucket's pictures; `size_px`: the stage's side."""
    height, width = bucket.size((size_px // DOWNSAMPLE, size_px // DOWNSAMPLE))
    return height * DOWNSAMPLE, width * DOWNSAMPLE


def trained_sizes(buckets: Sequence[Bucket], *, size_px: int) -> dict[Size, tuple[str, ...]]:
    """Each size of the buckets, small to large, with the kinds of stories that are needed at it. A single
    size is for every kind, so that one more bucket later finds its codes.
    """
    asked: dict[Size, set[str]] = {}
    for bucket in buckets:
        asked.setdefault(size_of(bucket, size_px=size_px), set()).update(STORY_KINDS[bucket.kind])
    if len(asked) == 1:
        return dict.fromkeys(asked, KINDS)
    return {size: tuple(sorted(asked[size])) for size in sorted(asked)}


def check_buckets(buckets: Sequence[Bucket], *, size_px: int, packed_tokens: int) -> None:
    """ValueError for buckets that a stage cannot train. `packed_tokens`: of a packed row, 0: not packed."""
    if not buckets:
        raise ValueError("a stage needs at least one bucket, got none")
    if size_px < DOWNSAMPLE or size_px % DOWNSAMPLE:
        raise ValueError(f"size_px must be a multiple of {DOWNSAMPLE}, {DOWNSAMPLE} or more, got {size_px}")
    for bucket in buckets if packed_tokens else ():
        size = size_name(size_of(bucket, size_px=size_px))
        longest = bucket.row_length((size_px // DOWNSAMPLE, size_px // DOWNSAMPLE))
        if longest > packed_tokens:
            raise ValueError(
                f"{bucket.frames} pictures of {size} px and their words take up to {longest} tokens, more "
                f"than a packed row of {packed_tokens} (bucket {bucket}): give it fewer frames or a smaller "
                "size_px, or set packing.tokens higher"
            )


def size_name(size: Size) -> str:
    """Height x width, as in file names and in the log."""
    return f"{size[0]}x{size[1]}"


def loss_name(bucket: Bucket, *, buckets: Sequence[Bucket], size_px: int) -> str:
    """What the validation loss of a bucket is called: its kind, with the size where a stage has several."""
    several = len({size_of(one, size_px=size_px) for one in buckets}) > 1
    return f"{bucket.kind}_{size_name(size_of(bucket, size_px=size_px))}" if several else bucket.kind
