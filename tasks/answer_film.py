"""An answer as a film, as the published viewer makes it: a card with the question, the reference pictures,
then for each segment a card with its text and its pictures. H.264, one size: that of the first picture.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
from PIL import Image

from emuworld.story import Story
from emuworld.story_schema import StoryError
from emuworld.tasks.cards import text_card
from emuworld.tasks.metrics import Frame

_SIZE_OF_WORDS = (720, 720)  # of an answer without a picture: the area of an interleaved answer's
_SMALLEST_PX, _LARGEST_PX = 16, 4096  # what players of H.264 take


def write_answer_film(path: Path, story: Story, *, fps: float = 1.0, font: str = "") -> None:
    """Write the film as mp4 (libx264, crf 18, preset slow, yuv420p), one frame a card or picture.

    `font`: see `text_card`. StoryError where a picture does not decode or the film cannot be encoded.
    """
    try:
        film: Any = imageio.get_writer(
            path,
            format="FFMPEG",
            fps=fps,
            codec="libx264",
            quality=None,  # crf instead
            pixelformat="yuv420p",
            macro_block_size=2,
            ffmpeg_params=["-crf", "18", "-preset", "slow"],
        )
        with film:
            for shot in shots(story, font=font):
                film.append_data(shot)
    except OSError as error:
        raise StoryError(f"{path.name} cannot be written: {error}") from error


def shots(story: Story, *, font: str = "") -> Iterator[Frame]:
    """The film's frames, uint8 [H, W, 3], all of one size with even sides."""
    size = film_size(story)
    if story.question.strip() or not (story.reference_images or story.segments):
        yield text_card(story.question, size=size, font=font)
    for image in story.reference_images:
        yield _resized(image.to_array(), size)
    for segment in story.segments:
        if segment.text.strip():
            yield text_card(segment.text, size=size, font=font)
        for image in segment.images:
            yield _resized(image.to_array(), size)


def film_size(story: Story) -> tuple[int, int]:
    """Height and width of the first picture, made even as the codec wants them."""
    images = [*story.reference_images, *(image for segment in story.segments for image in segment.images)]
    height, width = (images[0].height, images[0].width) if images else _SIZE_OF_WORDS
    return _even(height), _even(width)


def _even(side: int) -> int:
    return min(max(side - side % 2, _SMALLEST_PX), _LARGEST_PX)


def _resized(frame: Frame, size: tuple[int, int]) -> Frame:
    if frame.shape[:2] == size:
        return frame
    return np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.LANCZOS))
