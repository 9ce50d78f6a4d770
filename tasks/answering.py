"""Questions -> answers, several worlds at a time: a segment that is done makes room for the next at once.

It knows no files. A question that cannot be answered (a prompt too long, a picture that does not open) is an
answer with a `problem`, and the others go on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from emuworld.answers import to_story
from emuworld.story import Story
from emuworld.tasks.metrics import Frame
from emuworld.tasks.prompts import Question, read_picture
from emuworld.world_model import RunningBatch, Sampling, Segment, WorldModel, WorldState

ONE_PICTURE_MODES = ("t2i", "x2i")
OnStep = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How every question of a run is answered.

    `size`: pixels (height, width), a name of the size table, or None, the checkpoint's way. `max_images`: an
    answer is over with so many pictures; None = where the model ends it.
    """

    size: tuple[int, int] | str | None = None
    max_images: int | None = None
    text_first: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """A question's answer. `stopped` says why nothing follows: a `stop_reason` of the last segment ("end",
    "context", ...), "image" where one picture is the whole answer, "commands" behind the last of them, or
    "max_images". Without a story there is a `problem`.
    """

    question: Question
    story: Story | None = None
    stopped: str = ""
    problem: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class _World:
    """A question being answered. `texts`: what is still to be said; None = the model writes."""

    question: Question
    references: tuple[Frame, ...]
    sampling: Sampling
    state: WorldState
    texts: tuple[str, ...] | None
    segments: tuple[Segment, ...] = ()

    @property
    def next_text(self) -> str | None:
        return self.texts[0] if self.texts else None


def answer_all(
    model: WorldModel,
    questions: Sequence[Question],
    *,
    rules: Rules,
    sampling_for: Callable[[str], Sampling],
    batch: int,
    on_step: OnStep | None = None,
) -> Iterator[Answer]:
    """Answers in the order in which they are finished.

    Every question must say its mode and seed. `batch`: worlds imagined together. `on_step`: tokens written
    and expected of the segments in hand.
    """
    waiting = iter(questions)
    with model.running_batch(min(batch, len(questions)) or 1, on_step=on_step) as running:
        while True:
            while len(running) < batch and (question := next(waiting, None)) is not None:
                try:
                    world = _begun(model, question, rules=rules, sampling_for=sampling_for)
                except ValueError as error:
                    yield Answer(question=question, problem=str(error))
                else:
                    _ask(running, world)
            if (imagined := next(iter(running), None)) is None:
                return
            world, state, segment = imagined
            world = _after(world, state, segment)
            stopped = _stopped(model, world, rules=rules)
            if stopped:
                yield _answer(world, stopped)
            else:
                _ask(running, world)


def _ask(running: RunningBatch[_World], world: _World) -> None:
    running.add(world.state, world.next_text, sampling=world.sampling, name=world)


def _begun(
    model: WorldModel, question: Question, *, rules: Rules, sampling_for: Callable[[str], Sampling]
) -> _World:
    mode, seed = question.mode, question.seed
    assert mode is not None and seed is not None, "the caller fills in what the prompts file left open"
    if question.commands and mode in ONE_PICTURE_MODES:
        raise ValueError(f"{mode} answers with one picture: leave out commands, or take another mode")
    if question.images and mode == "t2i":
        raise ValueError("t2i paints from words alone: leave out the pictures, or take mode=x2i")
    if not question.images and mode == "x2i":
        raise ValueError("x2i edits pictures: give at least one in images, or take mode=t2i")
    references = tuple(read_picture(path) for path in question.images)
    size = question.aspect or rules.size
    if size is None and mode == "t2i":
        size = "default"  # of the published example; elsewhere the reference picture or the model decides
    state = model.begin(mode=mode, prompt=question.prompt, images=references, seed=seed, size=size)
    texts: tuple[str, ...] | None = None
    if mode in ONE_PICTURE_MODES and not rules.text_first:
        texts = ("",)
    elif question.commands:  # as in an environment: without a picture the first view has no words
        texts = question.commands if references else ("", *question.commands)
    if texts and not model.fits(state, texts[0]):
        raise ValueError(
            f"a text of {len(texts[0])} characters and a picture do not fit behind the prompt, in a context "
            f"of {model.max_tokens} tokens; shorten it"
        )
    return _World(
        question=question, references=references, sampling=sampling_for(mode), state=state, texts=texts
    )


def _after(world: _World, state: WorldState, segment: Segment) -> _World:
    texts = world.texts[1:] if world.texts is not None else None
    return replace(world, state=state, segments=(*world.segments, segment), texts=texts)


def _stopped(model: WorldModel, world: _World, *, rules: Rules) -> str:
    """Why the answer is over; "" where it goes on."""
    last = world.segments[-1]
    if last.ended:
        return str(last.stop_reason)
    num_images = sum(segment.image is not None for segment in world.segments)
    if rules.max_images is not None and num_images >= rules.max_images:
        return "max_images"
    if world.texts == ():
        return "commands"
    if world.texts and not model.fits(world.state, world.texts[0]):
        return "context"  # what the model writes itself ends its answer there
    return ""


def _answer(world: _World, stopped: str) -> Answer:
    try:
        story = to_story(world.question.prompt, references=world.references, segments=world.segments)
    except ValueError as error:
        return Answer(question=world.question, problem=str(error))
    return Answer(question=world.question, story=story, stopped=stopped)
