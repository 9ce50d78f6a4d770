"""Frames with their commands written underneath -> an mp4 film."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emuworld.files import written
from emuworld.tasks.metrics import Frame

FRAMES_A_SECOND = 10
_MARGIN_PX = 8  # left and right of a caption
_BAR_PX = 32  # under the picture; heights stay even, as the codec wants them


def side_by_side(frames: Sequence[Frame], *, gap_px: int = 8) -> Frame:
    """Frames of one height beside each other, a grey gap between them."""
    gap = np.full((frames[0].shape[0], gap_px, 3), 128, dtype=np.uint8)
    parts = [part for frame in frames for part in (gap, frame)]
    return np.concatenate(parts[1:], axis=1)


def captioned(frame: Frame, words: str) -> Frame:
    """The frame with a dark bar below it that holds its text, in two lines if need be; sides made even."""
    height, width = frame.shape[0] + frame.shape[0] % 2, frame.shape[1] + frame.shape[1] % 2
    canvas = Image.new("RGB", (width, height + _BAR_PX), (16, 16, 16))
    canvas.paste(Image.fromarray(frame), (0, 0))
    bar = ImageDraw.Draw(canvas)
    lines, size = _fitted(bar, words, width - 2 * _MARGIN_PX)
    font, down = ImageFont.load_default(size=size), height + (6 if len(lines) == 1 else 3)
    bar.multiline_text((_MARGIN_PX, down), "\n".join(lines), fill=(235, 235, 235), font=font, spacing=1)
    return np.asarray(canvas)


def _fitted(bar: ImageDraw.ImageDraw, words: str, width_px: float) -> tuple[list[str], int]:
    """The lines of a caption and the size of their letters: what does not fit into two lines is cut."""
    for size in range(16, 11, -1):
        if bar.textlength(words, ImageFont.load_default(size=size)) <= width_px:
            return [words], size
    font, lines = ImageFont.load_default(size=11), [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if bar.textlength(longer, font) <= width_px or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines[:2], 11


def write_film(path: Path, shots: Sequence[tuple[Frame, str]], *, seconds_a_shot: float = 0.8) -> None:
    """Write (frame, words) shots of one size as mp4 (H.264), beside its place, then rename."""
    if not shots:
        raise ValueError("expected at least one frame for a film, got none")
    repeats = max(1, round(seconds_a_shot * FRAMES_A_SECOND))
    with written(path, suffix=path.suffix) as beside:
        film: Any = imageio.get_writer(
            beside,
            fps=FRAMES_A_SECOND,
            codec="libx264",
            quality=8,
            macro_block_size=2,
            pixelformat="yuv420p",
        )
        with film:
            for frame, words in shots:
                picture = captioned(frame, words)
                for _ in range(repeats):
                    film.append_data(picture)
