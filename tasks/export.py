"""Command `export`: pictures, texts and a film of stored answers, named as the published viewer names them.

Nothing in a `.pb` file chooses a path or is run: names come from counting, pictures are decoded and written
anew. An answer's folder appears whole or not at all, and one that is there already is left alone.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emuworld.answers import load_story
from emuworld.story import Story
from emuworld.story_schema import StoryError
from emuworld.tasks.answer_film import write_answer_film
from emuworld.tasks.page import png_bytes
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.sharding import parse_shard, take_shard

SUFFIXES = (".pb", ".proto", ".bin")  # what the published viewer reads
VIDEO = "video.mp4"
_RECORD = ".exported.json"  # says what a folder was made from
_OURS = re.compile(r"\d{3,}_(\d{2,}_)?(question|global_cot|reference_image|text|image|image_cot)\.(txt|png)")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write the pictures and texts of stored answers (.pb) as files, and a film of each: one, or a folder.

    Published files and those of `emuworld generate prompts=...` are the same to it.
    """

    input: str = "outputs/generate/proto"  # a .pb file, or a folder of them (searched to its bottom)
    out: str = ""  # gets a folder an answer; "" = results/ in the input folder, or beside the file
    video: bool = True  # also video.mp4: the question, the reference pictures, texts and pictures in turn
    fps: float = 1.0  # pictures and text cards a second in the film
    font: str = ""  # a font file for the text cards; "" = the machine's fonts, whichever has the letters
    shard: str = "0/1"  # i/n: only every n-th answer, for n processes side by side
    overwrite: bool = False  # export again what is there already

    def __post_init__(self) -> None:
        parse_shard(self.shard)
        if not 0.0 < self.fps <= 120.0:
            raise ValueError(f"fps must lie between 0 and 120, got {self.fps}")


def run(config: Export, *, on_progress: OnProgress = quiet) -> list[Path]:
    """Export; returns the folders, one an answer, those that were there already among them.

    A damaged file stops nothing: ValueError names all of them when the others are done.
    """
    source = Path(config.input)
    out = Path(config.out) if config.out else (source if source.is_dir() else source.parent) / "results"
    found = take_shard(answer_files(source), config.shard)
    folders, problems, num_skipped = [], [], 0
    on_progress("answers", 0, len(found))
    for done, (path, name) in enumerate(found, start=1):
        try:
            num_skipped += not export_file(path, out / name, config=config)
            folders.append(out / name)
        except StoryError as error:
            problems.append(str(error))
        on_progress("answers", done, len(found))
    there = f", {num_skipped} of them were there already" if num_skipped else ""
    print(f"{len(folders)} answers in {out}{there}")
    if problems:
        raise ValueError(f"{len(problems)} of {len(found)} files were not exported:\n" + "\n".join(problems))
    return folders


def answer_files(source: Path) -> list[tuple[Path, Path]]:
    """Files with the names of their answers, relative to where results go. ValueError where there is none."""
    if not source.is_dir():
        if not source.exists():
            raise ValueError(f"{source} does not exist: give input=FILE.pb, or a folder of .pb files")
        return [(source, Path(source.stem))]
    paths = sorted(p for p in source.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    paths = [p for p in paths if not p.name.startswith(".")]
    if not paths:
        raise ValueError(f"{source} holds no {', '.join(SUFFIXES)} file: give the folder with the answers")
    names = [path.relative_to(source).with_suffix("") for path in paths]
    twins = [path for path, name in zip(paths, names, strict=True) if names.count(name) > 1]
    if twins:
        raise ValueError(f"{twins[0]} and {twins[1]} have one name and would share a folder: rename one")
    return list(zip(paths, names, strict=True))


def export_file(path: Path, folder: Path, *, config: Export) -> bool:
    """Export one file into `folder`; False where that had been done. StoryError where it is damaged."""
    story = load_story(path)
    record = {
        "source": hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest(),
        "video": config.video,
        "fps": config.fps,
        "font": config.font,
    }
    if not config.overwrite and _recorded(folder) == record:
        return False
    _check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        write_files(story, beside, where=str(path))
        if config.video:
            write_answer_film(beside / VIDEO, story, fps=config.fps, font=config.font)
        (beside / _RECORD).write_text(json.dumps(record) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return True


def write_files(story: Story, folder: Path, *, where: str) -> None:
    """Texts and pictures of one answer. `where` begins the message of a StoryError."""
    for name, content in files_of(story, where=where):
        (folder / name).write_bytes(content)


def files_of(story: Story, *, where: str = "the story") -> Iterator[tuple[str, bytes]]:
    """Name and content of every file but the film, in the published viewer's order.

    Segments are counted from 1, or from the number of reference pictures where there are several; pictures of
    a segment from 00. Thoughts, and a question, have a file only where there are any.
    """
    if story.question:
        yield "000_question.txt", story.question.encode()
    if story.summary:
        yield "000_global_cot.txt", story.summary.encode()
    pictures = [(f"{i:03d}_reference_image", image) for i, image in enumerate(story.reference_images)]
    for index, segment in enumerate(story.segments, start=max(1, len(story.reference_images))):
        if segment.text:
            yield f"{index:03d}_text.txt", segment.text.encode()
        for k, image in enumerate(segment.images):
            pictures.append((f"{index:03d}_{k:02d}_image", image))
    for name, image in pictures:
        try:
            yield f"{name}.png", png_bytes(image.to_array())
        except StoryError as error:
            raise StoryError(f"{where}: {name.replace('_', ' ')}: {error}") from error
        if image.thought:
            yield f"{name}_cot.txt", image.thought.encode()


def _recorded(folder: Path) -> object:
    """What the folder was made from; None where it does not say."""
    try:
        return json.loads((folder / _RECORD).read_text())
    except (OSError, ValueError):
        return None


def _check_replaceable(folder: Path) -> None:
    """ValueError unless there is nothing there, or only what an export (ours or a published one) writes."""
    if not folder.exists():
        return
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [folder.name]
    foreign = [name for name in names if not (_OURS.fullmatch(name) or name in (VIDEO, _RECORD))]
    if foreign:
        raise StoryError(
            f"{folder} holds {foreign[0]!r}, which no export wrote: choose another out, or move it away"
        )
