"""Table-tops -> stories: the training data of `vla`, `howto` and, by its captions, `t2i`.

`carry_out` carries a plan out in physics; the stories are told from one keyframe a subtask: the order and its
plan (`vla`), illustrated steps (`howto`), subtasks that nobody ordered (`vla`, with a blank question, so that
the model learns what a subtask does and not only the right ones). A story depends on nothing but split, seed
and the number of its telling.

A `vla` story starts mid-way like this: reference picture = the keyframe of segment k, answer = the segments
after it, the same question. No second story is written for that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emuworld.envs.episodes import PUBLISHED_SHARE, TRUTH
from emuworld.envs.palette import joined, with_article
from emuworld.envs.render import Renderer
from emuworld.envs.rooms.scenes import generator
from emuworld.envs.tabletop.captions import Sight, sights, table_caption
from emuworld.envs.tabletop.drafts import uses_new_composition
from emuworld.envs.tabletop.layout import TablePlan
from emuworld.envs.tabletop.orders import draw_task
from emuworld.envs.tabletop.plans import Task, possible_subtasks
from emuworld.envs.tabletop.restyling import Recolouring
from emuworld.envs.tabletop.sampling import sample_plan
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.shots import QUIET_STEPS
from emuworld.envs.tabletop.subtasks import Subtask, phrase
from emuworld.questions import ROBOTS, howto_question, vla_question
from emuworld.story import Story, StoryImage, StorySegment

KINDS = ("vla", "play", "howto", "pictures")
SEGMENTATION_PX = 128
PLAY_STEPS = 3
_ROBOTS = (*ROBOTS, "Franka Panda")  # one arm is drawn, whatever a question calls it
_SPLIT_SHARE = 0.4  # of "put the … on …" steps that are told as two: pick up, then put
_TRIES = 12  # draws of a subtask that the arm can begin
_VLA_STREAM, _PLAY_STREAM, _PICTURES_STREAM = 50, 51, 52


@dataclass(frozen=True, kw_only=True, eq=False)
class Keyframe:
    """The picture at the end of a subtask (None: at the start), what it shows in words, the truth as JSON."""

    subtask: Subtask | None
    pixels: NDArray[np.uint8]  # [H, W, 3]
    caption: str
    truth: bytes

    def image(self, format: str) -> StoryImage:
        return StoryImage.from_array(
            self.pixels, format=format, caption=self.caption, features={TRUTH: self.truth}
        )


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A state that physics has led to (`TableScene.save`), and by which subtask (None: the start)."""

    subtask: Subtask | None
    state: bytes


def table_stories(
    split: str,
    seed: int,
    *,
    renderer: Renderer,
    size: int = 256,
    format: str = "JPEG",
    kinds: Sequence[str] = KINDS,
    num_pictures: int = 2,
    num_views: int = 1,
) -> Iterator[Story]:
    """The stories of one task of a split; the first word of a `story_id` is its mode ("pictures" for t2i).

    "vla": question = instruction, reference picture = the first frame, a segment a subtask. "play": the same
    with a blank question and `PLAY_STEPS` subtasks drawn at random. "howto": "How to …" where something is
    put or built, with the first frame as reference picture or, half of the time, as the first segment.
    "pictures": `num_pictures` other tables. `num_views`: so many times the first three are told, each after
    the first in other colours, with another look and from another camera (`restyling`).

    Every picture has a caption and its truth. A plan that physics does not carry out gives no story.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        raise ValueError(f"kinds {unknown} are unknown; expected some of {', '.join(KINDS)}")
    if {"vla", "howto"} & set(kinds):
        rng = generator(split, seed, _VLA_STREAM)
        task = draw_task(split, seed)
        scene = TableScene.from_dict(task.scene)
        moments = carry_out(scene, task, varied_plan(task, rng))
        for view in range(num_views if moments is not None else 0):
            assert moments is not None
            seen = _View(scene, rng, task=task, split=split, view=view)
            frames = seen.frames(moments, renderer=renderer, size=size)
            name = f"{split}-{seed}" if view == 0 else f"{split}-{seed}-{view}"
            if "vla" in kinds:
                yield vla_story(
                    seen.task, frames, seen.rng, split=split, story_id=f"vla-{name}", format=format
                )
            if "howto" in kinds and _is_worth_a_guide(frames):
                yield howto_story(
                    seen.task, frames, seen.rng, split=split, story_id=f"howto-{name}", format=format
                )
    if "play" in kinds:
        yield from _play_stories(
            split, seed, renderer=renderer, size=size, format=format, num_views=num_views
        )
    if "pictures" in kinds and num_pictures:
        yield _pictures(split, seed, num_pictures=num_pictures, renderer=renderer, size=size, format=format)


class _View:
    """How one telling of a roll-out looks and what its things are called: view 0 as it happened."""

    def __init__(
        self, scene: TableScene, rng: np.random.Generator, *, task: Task, split: str, view: int
    ) -> None:
        self.split, self.rng, self.task, self._scene = split, rng, task, scene
        self._colours: Recolouring | None = None
        if view:
            self._colours = Recolouring(scene.plan, rng, split=split)
            self.task = self._colours.task(task, rng)
            self._scene = scene.restyled(TablePlan.from_dict(self.task.scene))

    def frames(self, moments: Sequence[Moment], *, renderer: Renderer, size: int) -> list[Keyframe]:
        """The keyframe of every moment."""
        frames = []
        for moment in moments:
            self._scene.restore(moment.state)
            step = moment.subtask
            if step is not None and self._colours is not None:
                step = self._colours.step(step)
            frames.append(
                keyframe(self._scene, step, self.rng, split=self.split, renderer=renderer, size=size)
            )
        return frames


def varied_plan(task: Task, rng: np.random.Generator) -> tuple[Subtask, ...]:
    """The oracle plan, some of its steps told as two: "pick up the red cube", then where it goes."""
    steps: list[Subtask] = []
    for step in task.oracle:
        if step.skill in ("place", "stack") and rng.random() < _SPLIT_SHARE:
            steps.append(Subtask(skill="pick", target=step.target))
        steps.append(step)
    return tuple(steps)


def carry_out(scene: TableScene, task: Task, plan: Sequence[Subtask]) -> list[Moment] | None:
    """The task's start and the state after each step; None if a step fails or the goal does not hold."""
    moments = [Moment(subtask=None, state=scene.save())]
    for step in plan:
        goal = task.goal_position if step.from_picture else None
        if not scene.execute(step, goal_position=goal).done:
            return None
        moments.append(Moment(subtask=step, state=scene.save()))
    return moments if all(scene.holds(one) for one in task.goal) else None


def keyframe(
    scene: TableScene,
    subtask: Subtask | None,
    rng: np.random.Generator,
    *,
    split: str,
    renderer: Renderer,
    size: int,
) -> Keyframe:
    """Draw a scene as it is now."""
    camera = scene.camera()
    pixels = renderer.render(scene.model, scene.data, camera, height=size, width=size)
    geoms = renderer.segmentation(
        scene.model, scene.data, camera, height=SEGMENTATION_PX, width=SEGMENTATION_PX
    )
    seen = sights(scene, geoms)
    return Keyframe(
        subtask=subtask,
        pixels=pixels,
        caption=table_caption(scene, seen, rng, split=split),
        truth=frame_truth(scene, subtask, seen),
    )


def vla_story(
    task: Task,
    frames: Sequence[Keyframe],
    rng: np.random.Generator,
    *,
    split: str,
    story_id: str,
    format: str = "JPEG",
) -> Story:
    """Instruction and first frame, then subtasks with their keyframes."""
    question = _instruction(task, rng)
    if rng.random() < PUBLISHED_SHARE:
        robot = _ROBOTS[int(rng.integers(len(_ROBOTS)))]
        steps = len(frames) - 1 if rng.random() < 0.5 else None
        question = vla_question(_sentence(question), robot=robot, num_steps=steps)
    elif rng.random() >= 0.2:
        question = _sentence(question)
    return Story(
        question=question,
        reference_images=(frames[0].image(format),),
        segments=tuple(_segment(frame, rng, split=split, format=format) for frame in frames[1:]),
        story_id=story_id,
    )


def _is_worth_a_guide(frames: Sequence[Keyframe]) -> bool:
    """Whether more than one step, or something that is put somewhere, is there to be explained."""
    steps = [frame.subtask for frame in frames if frame.subtask is not None]
    return len(steps) > 1 or any(step.skill in ("place", "stack") for step in steps)


def howto_story(
    task: Task,
    frames: Sequence[Keyframe],
    rng: np.random.Generator,
    *,
    split: str,
    story_id: str,
    format: str = "JPEG",
) -> Story:
    """ "How to …": illustrated steps in sentences, from a picture, or from words with the things first."""
    first = frames[0].image(format)
    steps = [
        StorySegment(text=_sentence(phrase(frame.subtask, rng, split)), images=(frame.image(format),))
        for frame in frames[1:]
        if frame.subtask is not None
    ]
    from_picture = len(steps) > 1 and rng.random() < 0.5
    if not from_picture:
        steps.insert(0, StorySegment(text=_needed(frames), images=(first,)))
    question = f"How to {_instruction(task, rng)}."
    if rng.random() < PUBLISHED_SHARE:
        question = howto_question(question, num_steps=len(steps))
    return Story(
        question=question,
        reference_images=(first,) if from_picture else (),
        segments=tuple(steps),
        story_id=story_id,
    )


def _play_stories(
    split: str, seed: int, *, renderer: Renderer, size: int, format: str, num_views: int
) -> Iterator[Story]:
    """Subtasks that nobody ordered, on the table of another task: what each of them does to the world."""
    rng = generator(split, seed, _PLAY_STREAM)
    task = draw_task(split, int(rng.integers(2**62)))
    scene = TableScene.from_dict(task.scene)
    moments = [Moment(subtask=None, state=scene.save())]
    while len(moments) <= PLAY_STEPS and (step := _played(scene, task.names, rng, split=split)) is not None:
        moments.append(Moment(subtask=step, state=scene.save()))
    for view in range(num_views):
        seen = _View(scene, rng, task=task, split=split, view=view)
        first, *frames = seen.frames(moments, renderer=renderer, size=size)
        yield Story(
            reference_images=(first.image(format),),
            segments=tuple(_segment(frame, rng, split=split, format=format) for frame in frames),
            story_id=f"vla-play-{split}-{seed}" if view == 0 else f"vla-play-{split}-{seed}-{view}",
        )


def _played(
    scene: TableScene, names: tuple[str, ...], rng: np.random.Generator, *, split: str
) -> Subtask | None:
    """Carry out a subtask drawn at random, a skill first; None where the arm could do none of the draws."""
    possible = possible_subtasks(names)
    for _ in range(_TRIES):
        subtasks = possible[str(rng.choice(sorted(possible)))]
        step = subtasks[int(rng.integers(len(subtasks)))]
        if split != "test" and uses_new_composition((step,)):
            continue
        before = scene.save()
        result = scene.execute(step)
        if result.done and result.control_steps > 0:  # a closed drawer that is to be closed shows nothing
            return step
        scene.restore(before)
    return None


def _pictures(
    split: str, seed: int, *, num_pictures: int, renderer: Renderer, size: int, format: str
) -> Story:
    """Single views of tables as they are set up, one table each."""
    rng = generator(split, seed, _PICTURES_STREAM)
    segments = []
    for _ in range(num_pictures):
        plan = sample_plan(split, int(rng.integers(2**62)))
        scene = TableScene(plan, settle_steps=QUIET_STEPS)
        frame = keyframe(scene, None, rng, split=split, renderer=renderer, size=size)
        segments.append(StorySegment(images=(frame.image(format),)))
    return Story(segments=tuple(segments), story_id=f"pictures-table-{split}-{seed}")


def _segment(frame: Keyframe, rng: np.random.Generator, *, split: str, format: str) -> StorySegment:
    assert frame.subtask is not None
    return StorySegment(text=phrase(frame.subtask, rng, split), images=(frame.image(format),))


def _instruction(task: Task, rng: np.random.Generator) -> str:
    """The plainest words half of the time, else any of the task's."""
    others = task.instructions
    return task.instruction if rng.random() < 0.5 else others[int(rng.integers(len(others)))]


def _needed(frames: Sequence[Keyframe]) -> str:
    """ "You need a red cube and a blue plate.": what the steps are about, in their order."""
    names: dict[str, None] = {}
    for frame in frames:
        if frame.subtask is not None:
            names[frame.subtask.target] = None
            if frame.subtask.destination is not None:
                names[frame.subtask.destination] = None
    return f"You need {joined([with_article(name) for name in names])}."


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def frame_truth(
    scene: TableScene,
    subtask: Subtask | None,
    seen: Sequence[Sight],
    more: Mapping[str, Any] | None = None,
) -> bytes:
    """A frame's truth as compact JSON: `TableScene.measure`, what is seen, the subtask that led here; `more`
    adds values of JSON types.
    """
    truth: dict[str, Any] = {
        **scene.measure(),
        "seen": [[item.name, item.pixels, item.column] for item in seen],
        "subtask": None if subtask is None else subtask.to_dict(),
        **(more or {}),
    }
    return json.dumps(truth, separators=(",", ":")).encode()
