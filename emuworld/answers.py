"""Answers as files: what a model said and drew -> a `Story` as the published writer lays it out, `.pb` files.

The layout (fact sheet, section 6): the question, the thought before the answer in `summary`, one clip for
each text with the pictures behind it, the thought before a picture with that picture, pictures as PNG. Blank
text opens no clip unless it is the first thing in the answer, and a thought that no picture followed is left
out: so does the published writer, and equal answers give equal bytes.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from emuworld.files import written
from emuworld.pictures import Pixels
from emuworld.state import Segment
from emuworld.story import Story, StoryImage, StorySegment
from emuworld.story_schema import MAX_STORY_BYTES, StoryError

# What other files begin with: named in the error, so that a mix-up is seen at once.
_OTHER_FILES = {
    "a pickle, which is never opened": re.compile(rb"\x80[\x02-\x05]"),
    "a zip archive (perhaps a PyTorch checkpoint)": re.compile(rb"PK\x03\x04"),
    "a shard of stories": re.compile(rb"EMUSTORY"),
    "a picture": re.compile(rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP|GIF8|BM", re.S),
    "gzip data": re.compile(rb"\x1f\x8b"),
    "JSON": re.compile(rb"[\[{]\s*[\[{\"]"),
}


def to_story(question: str, *, references: Iterable[Pixels] = (), segments: Iterable[Segment]) -> Story:
    """The answer as a story.

    Args:
        question: the prompt, without its template.
        references: the question's pictures, uint8 [H, W, 3].
        segments: what `WorldModel.imagine` gave, in order.

    Raises:
        StoryError: a picture is no uint8 [H, W, 3].
    """
    clips: list[tuple[str, list[StoryImage]]] = []
    thoughts = []
    for segment in segments:
        if segment.answer_thought is not None:
            thoughts.append(segment.answer_thought)
        if segment.text.strip() or (segment.image is not None and not clips):
            clips.append((segment.text if segment.text.strip() else "", []))
        if segment.image is not None:
            clips[-1][1].append(StoryImage.from_array(segment.image, thought=segment.thought or ""))
    return Story(
        question=question,
        reference_images=tuple(StoryImage.from_array(pixels) for pixels in references),
        segments=tuple(StorySegment(text=text, images=tuple(images)) for text, images in clips),
        summary="\n".join(thoughts),
    )


def save_story(path: str | os.PathLike[str], story: Story) -> None:
    """Write the `.pb` file: whole, or not at all. StoryError where the story is too large or no Unicode."""
    data = story.to_bytes()
    with written(path) as beside, beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def load_story(path: str | os.PathLike[str]) -> Story:
    """Read a `.pb` file, a published one or our own; pictures stay encoded until `StoryImage.to_array`.

    Whatever is in it, no code runs, no path in it is followed, and no more memory is taken than the file has
    bytes. StoryError names the file and what is wrong with it.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise StoryError(f"{path} is no file: give a .pb file")
        with path.open("rb") as file:
            data = file.read(MAX_STORY_BYTES + 1)
    except OSError as error:
        raise StoryError(f"{path} cannot be read: {error.strerror}") from error
    if not data:
        raise StoryError(f"{path} is empty: write it again")
    kind = next((name for name, signature in _OTHER_FILES.items() if signature.match(data)), None)
    if kind is not None:
        raise StoryError(f"{path} is {kind}, not the .pb file of an answer")
    try:
        return Story.from_bytes(data)
    except StoryError as error:
        raise StoryError(f"{path}: {error}") from error
