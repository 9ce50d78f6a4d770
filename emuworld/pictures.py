"""Pictures as users give and get them (numpy, uint8) <-> codes: checks, sizes, one vision pass a picture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from emuworld.manifest import Manifest
from emuworld.tokens.vision import DOWNSAMPLE, VisionTokenizer

Codes = NDArray[np.integer]  # [h, w], 0-based
Pixels = NDArray[np.uint8]  # [H, W, 3]


def encode(vision: VisionTokenizer, images: Iterable[Pixels], *, device: torch.device) -> list[Codes]:
    """Codes of each picture; sides must be multiples of 16. Same codes whatever stands beside a picture."""
    with torch.inference_mode(), _one_thread(device):
        # One by one: a convolution over a batch may round otherwise than over one picture.
        return [
            vision.encode(torch.tensor(checked(image)[None], device=device))[0].cpu().numpy()
            for image in images
        ]


def decode(vision: VisionTokenizer, codes: Iterable[Codes], *, device: torch.device) -> list[Pixels]:
    """The picture of each grid of codes, [16 h, 16 w, 3]. Same pixels whatever stands beside it."""
    with torch.inference_mode(), _one_thread(device):
        return [
            vision.decode(torch.tensor(np.asarray(c)[None], dtype=torch.int64, device=device))[0]
            .cpu()
            .numpy()
            for c in codes
        ]


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On the CPU, one thread.

    A convolution may round otherwise on one, two or three threads, and then the same world would show other
    bytes in a child process that has fewer. It costs 60 ms a picture of 256 px (0.18 s for 0.12 s on two
    cores).
    """
    num_threads = torch.get_num_threads()
    if device.type != "cpu" or num_threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def checked(image: Pixels) -> Pixels:
    """The picture as an array; ValueError unless it is uint8 [H, W, 3]."""
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(
            f"a picture must be uint8 [H, W, 3], got {image.dtype} {list(image.shape)}; "
            "convert it with numpy.asarray(image.convert('RGB'))"
        )
    return image


def resized(image: Pixels, size: tuple[int, int]) -> Pixels:
    """Lanczos to (height, width), without keeping the aspect ratio; the picture itself where it has that
    size."""
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.LANCZOS))


def choose_size(
    size: tuple[int, int] | None, *, pictures: Sequence[Pixels], manifest: Manifest
) -> tuple[int, int] | None:
    """Height and width of a world's pictures: the given ones, else the checkpoint's, else the last picture's.

    The last picture's sides are rounded to what the model can draw. None: the model chooses.
    """
    chosen = size if size is not None else manifest.default_size
    if chosen is None and pictures:
        low, high = manifest.smallest_side, manifest.largest_side
        height, width = (
            min(max(round(side / DOWNSAMPLE) * DOWNSAMPLE, low), high) for side in pictures[-1].shape[:2]
        )
        chosen = (height, width)
    if chosen is None:
        return None
    manifest.check_size(chosen)
    return int(chosen[0]), int(chosen[1])
