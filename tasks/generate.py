"""Command `generate`: prompts in any mode -> answers as `.pb` files, for a single prompt pictures as PNG too.

A killed run goes on with the same command: an answer's file appears whole, and one that is finished is not
made again.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from emuworld.answers import load_story, save_story
from emuworld.files import write_bytes, write_text
from emuworld.pictures import contact_sheet
from emuworld.story import Story
from emuworld.tasks.answering import Answer, Rules, answer_all
from emuworld.tasks.metrics import Frame
from emuworld.tasks.page import png_bytes
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.prompts import Question, read_prompts
from emuworld.tasks.sharding import parse_shard, take_shard
from emuworld.world_model import Sampling, WorldModel, load

MODES = ("t2i", "x2i", "story", "howto", "explore", "vla")
FOLDER = "proto"  # where the published code keeps its answers, too


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Answer a prompt, or a file of prompts, in any mode: pictures from words, edits, stories, guides, walks
    and robot plans.

    Answers go to OUT/proto as .pb files, which `emuworld export` and the published viewer turn into pictures,
    texts and films. A single prompt also gives PNG files and a contact sheet.
    """

    mode: str = "t2i"  # t2i, x2i (edits a picture), story, howto, explore or vla
    prompt: str = "a room with a red ball and a blue box"
    prompts: str = ""  # instead of prompt: a .txt, .json or .jsonl file or a folder; see docs/answers.md
    images: tuple[str, ...] = ()  # picture files that the prompt refers to or starts from (not in t2i)
    commands: tuple[str, ...] = ()  # texts of the answer's steps; none = the model writes them (not in t2i)
    n: int | None = None  # answers to a prompt, seeds seed, seed + 1, ...; null = 4 to one in t2i, else 1
    max_images: int | None = None  # an answer is over with so many pictures; null = where the model ends it
    text_first: bool = False  # in t2i and x2i: the model may write before its picture
    out: str = "outputs/generate"  # folder for the answers
    model: str = "small"  # a built-in name, a checkpoint folder or a hub id
    device: str = "auto"  # auto | cpu | cuda
    seed: int = 0
    size_px: int | None = None  # height and width, a multiple of 16; null = the model's own
    aspect: str = ""  # width:height instead of size_px: 1:1, 4:3, 16:9, 21:9, 9:16, ..., or auto
    temperature: float | None = None  # 0 = always the likeliest token; null = the model's own
    guidance: float | None = None  # how strongly the words pull; null = the model's own
    image_guidance: float | None = None  # how strongly reference pictures pull; null = the model's own
    stay: float | None = None  # more of it: an edit changes less of its picture; null = the model's own
    passes: int | None = None  # that draw a picture at once; 0 = token by token; null = the model's own
    draft_window: int | None = None  # places that go through the model together; null = the model's own
    batch: int = 8  # answers imagined together
    shard: str = "0/1"  # i/n: only every n-th answer, for n processes side by side
    overwrite: bool = False  # with prompts: replace answers of other settings, which stop the run otherwise

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r} is unknown; expected one of {', '.join(MODES)}")
        for name in ("n", "max_images", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.prompts and self.mode == "t2i" and (self.commands or self.images):
            raise ValueError("t2i paints from words alone; commands and images go with mode=explore or x2i")
        if self.prompts and (self.commands or self.images):
            raise ValueError("commands and images of many prompts stand in their file; see docs/answers.md")
        if self.size_px is not None and self.aspect:
            raise ValueError("give size_px or aspect, not both")
        parse_shard(self.shard)


def run(config: Generate, *, on_progress: OnProgress = quiet) -> list[Path]:
    """Make the answers; returns their files and, for a single prompt, those of the pictures, the sheet last.

    ValueError names the prompts that could not be answered, when the others are done.
    """
    questions = take_shard(_questions(config), config.shard)
    model = load(config.model, device=config.device)
    _note_untrained(questions, model=model)
    folder = Path(config.out) / FOLDER
    waiting = _unfinished(questions, model=model, config=config)
    done = len(questions) - len(waiting)
    on_progress("answers", done, len(questions))
    problems = []
    for answer in answer_all(
        model,
        waiting,
        rules=_rules(config),
        sampling_for=lambda mode: _sampling(model, mode, config),
        batch=config.batch,
        on_step=lambda written, expected: on_progress("tokens of this step", written, expected),
    ):
        if answer.story is None:
            problems.append(f"{answer.question.name}: {answer.problem}")
        else:
            _keep(folder, answer, answer.story, model=model, config=config)
            done += 1
            on_progress("answers", done, len(questions))
    paths = [folder / f"{q.name}.pb" for q in questions if (folder / f"{q.name}.pb").exists()]
    there = f", {len(questions) - len(waiting)} of them were there already" if config.prompts else ""
    if done:
        print(f"{done} answers in {folder}{there}; emuworld export input={folder} shows them")
    if problems:
        listed = "\n".join(sorted(problems))
        raise ValueError(f"{len(problems)} of {len(questions)} prompts were not answered:\n{listed}")
    return paths if config.prompts else [*paths, *_write_pictures(config, paths)]


# What is asked --------------------------------------------------------------------------------------------


def _questions(config: Generate) -> list[Question]:
    """Every question of the run with its own mode and seed: each prompt n times."""
    if config.prompts:
        asked, count = read_prompts(Path(config.prompts)), config.n or 1
    else:
        images = tuple(map(Path, config.images))
        asked = [Question(name="", prompt=config.prompt, images=images, commands=config.commands)]
        count = config.n or (4 if config.mode == "t2i" else 1)
    questions = []
    for question in asked:
        mode, first = question.mode or config.mode, config.seed if question.seed is None else question.seed
        if mode not in MODES:
            raise ValueError(f"{question.name}: mode {mode!r} is unknown; expected one of {', '.join(MODES)}")
        for k in range(count):
            name = f"{question.name}_{k:02d}" if count > 1 else question.name
            name = name if config.prompts else f"{first + k:04d}"
            questions.append(replace(question, name=name, mode=mode, seed=first + k))
    return questions


def _note_untrained(questions: Sequence[Question], *, model: WorldModel) -> None:
    trained = model.manifest.modes
    untrained = sorted({question.mode for question in questions if question.mode} - set(trained))
    if untrained:
        print(
            f"note: this checkpoint was trained for {', '.join(trained)}, and not for {', '.join(untrained)}"
        )


def _rules(config: Generate) -> Rules:
    size = (config.size_px, config.size_px) if config.size_px is not None else config.aspect or None
    return Rules(size=size, max_images=config.max_images, text_first=config.text_first)


def _sampling(model: WorldModel, mode: str, config: Generate) -> Sampling:
    """The checkpoint's own settings for a mode with the run's in place of them."""
    sampling = model.default_sampling(mode)
    if config.temperature is not None:
        text = replace(sampling.text, temperature=config.temperature)
        image = replace(sampling.image, temperature=config.temperature)
        sampling = replace(sampling, text=text, image=image)
    if config.guidance is not None:
        sampling = replace(sampling, guidance=config.guidance)
    if config.image_guidance is not None:
        sampling = replace(sampling, image_guidance=config.image_guidance)
    if config.stay is not None:
        sampling = replace(sampling, stay=config.stay)
    if config.passes is not None:
        sampling = replace(sampling, passes=config.passes)
    elif config.draft_window or config.stay:
        sampling = replace(sampling, passes=0)  # both are of token by token, whatever the model draws with
    if config.draft_window is not None:
        sampling = replace(sampling, draft_window=config.draft_window)
    return sampling


# What is kept ---------------------------------------------------------------------------------------------


def _made_from(question: Question, *, model: WorldModel, config: Generate) -> str:
    """A digest of all that decides an answer: the question, its pictures, the model and the settings."""
    assert question.mode is not None
    parts = {
        "question": [question.prompt, question.commands, question.seed, question.mode, question.aspect],
        "images": [hashlib.blake2b(p.read_bytes()).hexdigest() for p in question.images if p.is_file()],
        "model": model.fingerprint.hex(),
        "rules": asdict(_rules(config)),
        "sampling": _sampling(model, question.mode, config).to_json(),
    }
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _unfinished(questions: Sequence[Question], *, model: WorldModel, config: Generate) -> list[Question]:
    """The questions without a finished answer. ValueError where there is one of other settings."""
    folder = Path(config.out) / FOLDER
    waiting = []
    for question in questions:
        path = folder / f"{question.name}.pb"
        if path.exists() and _record(path).get("made_from") == _made_from(
            question, model=model, config=config
        ):
            continue
        if path.exists() and config.prompts and not config.overwrite:
            raise ValueError(
                f"{path} is an answer to another prompt or of other settings: choose another out, or say "
                "overwrite=true to replace such answers"
            )
        waiting.append(question)
    return waiting


def _record(path: Path) -> dict[str, Any]:
    """What stands beside an answer's file; empty where nothing does."""
    try:
        content = json.loads(path.with_suffix(".json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _keep(folder: Path, answer: Answer, story: Story, *, model: WorldModel, config: Generate) -> None:
    """Write the answer and what it was made from; the answer last, for it says that both are there."""
    question = answer.question
    path = folder / f"{question.name}.pb"
    record = {
        "made_from": _made_from(question, model=model, config=config),
        "model": config.model,
        "mode": question.mode,
        "prompt": question.prompt,
        "images": [str(image) for image in question.images],
        "seed": question.seed,
        "stopped": answer.stopped,
        "num_images": sum(len(segment.images) for segment in story.segments),
    }
    path.unlink(missing_ok=True)  # an older answer must not be taken for what the new record describes
    write_text(path.with_suffix(".json"), json.dumps(record, ensure_ascii=False) + "\n")
    save_story(path, story)


def _write_pictures(config: Generate, paths: Sequence[Path]) -> list[Path]:
    """The pictures of a few answers as PNG, reference pictures first, and all of them on one sheet."""
    out = Path(config.out)
    worlds = [_frames(load_story(path)) for path in paths]
    written = []
    for path, frames in zip(paths, worlds, strict=True):
        for step, frame in enumerate(frames):
            name = f"{path.stem}.png" if len(frames) == 1 else f"{path.stem}_{step:02d}.png"
            write_bytes(out / name, png_bytes(frame))
            written.append(out / name)
    if not written:
        print("the model ended its answers without a picture")
        return []
    lengths = {len(frames) for frames in worlds}
    columns = max(lengths) if len(lengths) == 1 and max(lengths) > 1 else None
    sheet = out / "sheet.png"
    write_bytes(sheet, png_bytes(contact_sheet([f for frames in worlds for f in frames], columns=columns)))
    print(f"{len(written)} pictures of {config.prompt!r} in {out}, all of them in {sheet}")
    return [*written, sheet]


def _frames(story: Story) -> list[Frame]:
    images = [*story.reference_images, *(image for segment in story.segments for image in segment.images)]
    return [image.to_array() for image in images]
