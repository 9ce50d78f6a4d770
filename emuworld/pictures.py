"""Pictures as users give and get them (numpy, uint8) <-> codes: checks, sizes, one vision pass a picture.

Sizes follow the Emu3.5 release (fact sheet, section 4.4) where a checkpoint has no size of its own: a table
of named ratios, and reference pictures resized to an area with their ratio kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import cache
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from emuworld.manifest import Manifest
from emuworld.shares import beside, one_thread
from emuworld.staging import Arriving
from emuworld.tokens.vision import DOWNSAMPLE, VisionTokenizer

Codes = NDArray[np.integer]  # [h, w], 0-based
Pixels = NDArray[np.uint8]  # [H, W, 3]
Size = tuple[int, int]  # height, width
Decode = Callable[[Iterable[Codes]], "ToHost"]  # see `decoding`

PICTURE_AREA = 1024**2  # pixels of a picture in t2i and x2i, and of their reference pictures
INTERLEAVED_AREA = 720**2  # the same in the modes whose answers hold many pictures
ASPECTS: dict[str, Size] = {  # "width:height" -> height and width in tokens at `PICTURE_AREA`, as published
    "4:3": (55, 73),
    "21:9": (41, 97),
    "16:9": (47, 85),
    "3:2": (52, 78),
    "1:1": (64, 64),
    "3:4": (73, 55),
    "9:16": (85, 47),
    "2:3": (78, 52),
}
DEFAULT_ASPECT = "4:3"
SIZE_NAMES = (*ASPECTS, "default", "auto")


def encode(vision: VisionTokenizer, images: Iterable[Pixels], *, device: torch.device) -> list[Codes]:
    """Codes of each picture; sides must be multiples of 16. On the CPU the same codes whatever stands beside
    a picture; on a GPU pictures of one size go through the network together, which may round otherwise.
    """
    return _in_groups(
        [checked(image) for image in images],
        lambda images_BHW3: vision.encode(images_BHW3.to(device)),
        most=lambda shape: vision.pictures_at_once((shape[0] // DOWNSAMPLE, shape[1] // DOWNSAMPLE)),
        device=device,
    ).received()


def decode(vision: VisionTokenizer, codes: Iterable[Codes], *, device: torch.device) -> list[Pixels]:
    """The picture of each grid of codes, [16 h, 16 w, 3]. On the CPU the same pixels whatever stands beside
    it; on a GPU pictures of one size are made together, the first while further codes are still coming.
    """
    return decoding(vision, codes, device=device).received()


def decoding(vision: VisionTokenizer, codes: Iterable[Codes], *, device: torch.device) -> ToHost:
    """`decode`, begun: a GPU may still be at work when it returns."""
    return _in_groups(
        (np.asarray(grid).astype(np.int64) for grid in codes),
        vision.decode,
        most=vision.pictures_at_once,
        device=device,
    )


def while_drawn(
    vision: VisionTokenizer, *, device: torch.device
) -> tuple[ToHost, Callable[[Sequence[int], torch.Tensor], None] | None]:
    """Pictures that are begun as soon as their codes [P, h, w] are on a GPU, which need not have come to the
    host, and what is to be told of those and of their places; on a CPU nothing is."""
    to_host = ToHost()

    def begin(places: Sequence[int], codes_Phw: torch.Tensor) -> None:
        most = vision.pictures_at_once(tuple(codes_Phw.shape[1:]))
        for at in range(0, len(places), most):  # the groups of `decoding`
            results = vision.decode(codes_Phw[at : at + most], known=True)
            to_host.send(places[at : at + most], results)

    return to_host, begin if device.type == "cuda" else None


def _in_groups(
    arrays: Iterable[NDArray[Any]],
    compute: Callable[[torch.Tensor], torch.Tensor],
    *,
    most: Callable[[tuple[int, ...]], int],
    device: torch.device,
) -> ToHost:
    """`compute` of each array; on a GPU of up to `most` of one shape together, on the CPU one by one."""
    groups: dict[tuple[int, ...], dict[int, NDArray[Any]]] = {}
    most_of = cache(most)
    to_host = ToHost()

    def send(group: dict[int, NDArray[Any]]) -> None:
        # One by itself keeps numpy's strides: another layout is another convolution, which may round
        # otherwise.
        stacked = next(iter(group.values()))[None] if len(group) == 1 else np.stack(list(group.values()))
        to_host.send(list(group), compute(torch.tensor(stacked)))

    with torch.inference_mode(), one_thread(device):
        for at, array in enumerate(arrays):
            group = groups.setdefault(array.shape, {})
            group[at] = array
            if device.type == "cpu" or len(group) == most_of(array.shape):
                send(groups.pop(array.shape))
        for group in groups.values():
            send(group)
    return to_host


class ToHost:
    """Results on their way to the host: those of a GPU are copied by other threads, while it and the caller
    do what comes next."""

    def __init__(self) -> None:
        self.places: set[int] = set()
        """Whose results are on their way, or there."""
        self._found: dict[int, NDArray[Any]] = {}
        self._coming: list[tuple[Sequence[int], Future[NDArray[Any]]]] = []

    def send(self, places: Sequence[int], results: torch.Tensor) -> None:
        """Nothing waits for these."""
        self.places.update(places)
        if results.is_cuda:
            self._coming.append((places, beside(Arriving(results, patient=True).numpy)))
        else:
            self._found |= zip(places, results.numpy(), strict=True)

    def by_place(self) -> dict[int, NDArray[Any]]:
        """All, once they are there."""
        for places, kept in self._coming:
            self._found |= zip(places, kept.result(), strict=True)
        self._coming.clear()
        return self._found

    def received(self) -> list[NDArray[Any]]:
        """All, in the order of their places."""
        return [found for _, found in sorted(self.by_place().items())]


def checked(image: Pixels | Codes) -> Pixels:
    """The picture as an array; ValueError unless it is uint8 [H, W, 3]."""
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(
            f"a picture must be uint8 [H, W, 3], got {array.dtype} {list(array.shape)}; "
            "convert it with numpy.asarray(image.convert('RGB'))"
        )
    return cast(Pixels, array)


def reference(picture: Pixels | Codes, *, size: Size | None, mode: str, manifest: Manifest) -> Pixels | Codes:
    """A reference picture as a world of `size` (None: open) shows it to the model; codes stay as they are.

    A checkpoint with one size of its own has learnt that size: its references are stretched to the world's
    (Lanczos). Any other takes references of any size and ratio: each is resized to the mode's area.
    """
    if is_codes(picture):
        return picture
    picture = checked(picture)
    if manifest.default_size is not None:
        return resized(picture, size or manifest.default_size)
    return area_resized(picture, area=min(_area(mode), manifest.largest_side**2))


def is_codes(picture: Pixels | Codes) -> bool:
    """Whether this is a grid of codes, int [h, w], as `encode` gives it. (uint8 [h, w] is a grey picture.)"""
    picture = np.asarray(picture)
    return picture.ndim == 2 and np.issubdtype(picture.dtype, np.integer) and picture.dtype != np.uint8


def resized(image: Pixels, size: Size) -> Pixels:
    """Lanczos to (height, width), without keeping the aspect ratio; the picture itself where it has that
    size."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.LANCZOS))


def middle(image: Image.Image, size: Size) -> Pixels:
    """The middle of an RGB picture at (height, width), at its own proportions (Lanczos, up or down)."""
    height, width = size
    scale = max(width / image.width, height / image.height)
    cut = (width / scale, height / scale)
    left, top = (image.width - cut[0]) / 2, (image.height - cut[1]) / 2
    box = (left, top, left + cut[0], top + cut[1])
    return np.array(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def area_resized(image: Pixels, *, area: int) -> Pixels:
    """Bicubic to `area_size`, up or down, as the release resizes reference pictures."""
    height, width = area_size((image.shape[0], image.shape[1]), area=area)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def area_size(size: Size, *, area: int) -> Size:
    """The sides of a picture of `size` when it is brought to about `area` pixels, multiples of 16.

    To the letter of the release, its rounding included: 1920 by 1080 becomes 960 by 544 at 518,400 pixels.
    """
    ratio = size[1] / size[0]
    height = int(math.sqrt(area / ratio))
    width = int(height * ratio)
    half = DOWNSAMPLE // 2
    height, width = (
        (height + half) // DOWNSAMPLE * DOWNSAMPLE,
        (width + half) // DOWNSAMPLE * DOWNSAMPLE,
    )
    if height == 0 or width == 0:
        raise ValueError(
            f"a picture of {size[0]} by {size[1]} pixels is too narrow: at an area of {area} one side is "
            f"less than half a token of {DOWNSAMPLE} pixels; crop it first"
        )
    return height, width


def asked_size(size: Size | str | None, *, mode: str, manifest: Manifest) -> Size | None:
    """Height and width in pixels that a world is asked to draw; None: open.

    Args:
        size: sides in pixels; a name of `SIZE_NAMES`; None: the checkpoint's own size, where it has one.
            "auto" leaves it open for any checkpoint, "default" is the checkpoint's own size, else 4:3.
            A ratio has the mode's area: 1024 x 1024 in t2i and x2i, where the published table holds, and
            720 x 720 elsewhere; that of the checkpoint's own size where it has one.

    Raises:
        ValueError: an unknown name, or sides that the checkpoint cannot draw.
    """
    if isinstance(size, str):
        size = _named_size(size, mode=mode, manifest=manifest)
    elif size is None:
        size = manifest.default_size
    if size is None:
        return None
    manifest.check_size(size)
    return int(size[0]), int(size[1])


def reference_size(picture: Pixels | Codes, *, manifest: Manifest) -> Size:
    """The size of a reference picture that `reference` gave, within what the checkpoint can draw."""
    low, high = manifest.smallest_side, manifest.largest_side
    scale = DOWNSAMPLE if is_codes(picture) else 1
    height, width = (min(max(side * scale, low), high) for side in picture.shape[:2])
    return height, width


def _named_size(name: str, *, mode: str, manifest: Manifest) -> Size | None:
    if name not in SIZE_NAMES:
        raise ValueError(f"size {name!r} is no name of a size; choose one of {', '.join(SIZE_NAMES)}")
    if name == "auto":
        return None
    own = manifest.default_size
    if name == "default":
        if own is not None:
            return own
        name = DEFAULT_ASPECT
    wide, high = map(int, name.split(":"))
    # No side may pass the checkpoint's limit, whatever the ratio.
    limit = manifest.largest_side**2 * min(wide, high) // max(wide, high)
    area = min(_area(mode) if own is None else own[0] * own[1], limit)
    if area == PICTURE_AREA:
        height, width = ASPECTS[name]
        return height * DOWNSAMPLE, width * DOWNSAMPLE
    return area_size((high, wide), area=area)


def _area(mode: str) -> int:
    return PICTURE_AREA if mode in ("t2i", "x2i") else INTERLEAVED_AREA


def contact_sheet(frames: Sequence[Pixels], *, columns: int | None = None, gap_px: int = 6) -> Pixels:
    """Frames of one or several sizes on one white sheet, row by row."""
    if not frames:
        raise ValueError("expected at least one frame for a contact sheet, got none")
    columns = columns or math.ceil(math.sqrt(len(frames)))
    cell_h = max(frame.shape[0] for frame in frames) + gap_px
    cell_w = max(frame.shape[1] for frame in frames) + gap_px
    rows = math.ceil(len(frames) / columns)
    sheet = np.full(
        (rows * cell_h + gap_px, min(columns, len(frames)) * cell_w + gap_px, 3), 255, dtype=np.uint8
    )
    for index, frame in enumerate(frames):
        top, left = gap_px + index // columns * cell_h, gap_px + index % columns * cell_w
        sheet[top : top + frame.shape[0], left : left + frame.shape[1]] = frame
    return sheet
