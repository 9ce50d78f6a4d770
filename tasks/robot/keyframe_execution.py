"""A subtask with its keyframe, carried out in physics: words say what is done, the picture says where.

The text gives skill and object, the keyframe the place where the object is to end, read by
`keyframe_readout` after undoing the picture's own gain and shift. Either can be left out: `USES` are the
three ways to measure what each is worth. The grasp is the simulator's own (the present state is known); what
is judged is the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emuworld.agents.agent import Step
from emuworld.agents.objectives import resized
from emuworld.envs.render import Renderer
from emuworld.envs.tabletop.scene import SkillResult, TableScene
from emuworld.envs.tabletop.subtasks import Subtask, parse
from emuworld.tasks.robot.calibration import Calibration, Frame, Mask, calibrate, undo
from emuworld.tasks.robot.keyframe_readout import FOUND, Position, Reading, read_position
from emuworld.tasks.robot.table_view import TableView

USES = ("both", "text", "keyframe")
PLACING = ("place", "stack", "push")  # skills that end with the target at a place that a picture can show
MOVED_M = 0.04  # a picture that shows an object less far from where it stands does not ask to move it
# Score that is enough where the words name the place too (in a drawer or a bin most of a thing may be hidden)
# or say that the picture has it, or where nothing else in the picture has moved.
FAINT = 0.1


@dataclass(frozen=True, kw_only=True, eq=False)
class Executed:
    """What became of one step.

    `subtask`: what was understood, None where nothing was; `reading`: where the picture has the target, None
    where it was not asked; `used_picture`: the goal place came from it.
    """

    subtask: Subtask | None
    reading: Reading | None
    calibration: Calibration | None
    used_picture: bool
    result: SkillResult


@dataclass(frozen=True, kw_only=True, eq=False)
class Keyframe:
    """A picture made comparable with the present view: its size, gain and shift are undone."""

    picture: Frame
    calibration: Calibration


def take_up(picture: Frame, view: TableView) -> Keyframe:
    """Calibrate a picture against what is seen now, on what stands still there."""
    sized = resized(picture, view.size)
    calibration = calibrate(sized, view.frame, still=still_mask(view))
    return Keyframe(picture=undo(sized, calibration), calibration=calibration)


def still_mask(view: TableView) -> Mask:
    """Pixels that show neither the arm nor a loose object now: what a subtask leaves alone, but for what
    it hides."""
    moving = view.robot_mask()
    for name in view.names:
        moving = moving | view.mask(name)
    return ~moving


def execute_step(
    scene: TableScene,
    step: Step,
    *,
    view: TableView,
    use: str = "both",
    on_motion: Callable[[], None] | None = None,
) -> Executed:
    """Carry out one step in the scene.

    Args:
        view: the scene as it is now; a new one is needed after this.
        use: of `USES`: "text" ignores the picture, "keyframe" ignores the words.
        on_motion: called after every control step, for films.
    """
    if use not in USES:
        raise ValueError(f"use={use!r} is unknown; expected one of {', '.join(USES)}")
    keyframe = None if step.keyframe is None or use == "text" else take_up(step.keyframe, view)
    if use == "keyframe":
        subtask, reading = (None, None) if keyframe is None else read_subtask(keyframe, view)
    else:
        subtask, reading = parse(step.text), None
        if subtask is not None and keyframe is not None:
            reading = read_goal(keyframe, view, subtask)
    if subtask is None:
        said = f"no subtask in {step.text!r}" if use != "keyframe" else "nothing moves in the picture"
        return _nothing(said, keyframe)
    goal = goal_position(subtask, reading)
    return Executed(
        subtask=subtask,
        reading=reading,
        calibration=None if keyframe is None else keyframe.calibration,
        used_picture=goal is not None,
        result=scene.execute(
            subtask, goal_position=None if goal is None else goal.tolist(), on_step=on_motion
        ),
    )


def read_goal(keyframe: Keyframe, view: TableView, subtask: Subtask) -> Reading | None:
    """Where the picture has the target of a subtask; None for what has no place (press, open, a new name)."""
    if subtask.skill not in PLACING or subtask.target not in view.names:
        return None
    on = subtask.destination if subtask.relation in ("on", "in") else None
    return read_position(keyframe.picture, view.target(subtask.target), on=on)


def goal_position(subtask: Subtask, reading: Reading | None) -> Position | None:
    """The place to hand to the skill: the picture's, where it shows the target and agrees with the words.

    Where the words name what the target is put on or into, a picture that has it elsewhere is not believed.
    A place beside or a way is held against the words by the skill (`TableScene.execute`).
    """
    if reading is None or reading.moved_m < MOVED_M:
        return None
    if subtask.from_picture:  # nothing else says where
        return reading.position if reading.score >= FAINT else None
    if subtask.relation not in ("on", "in"):
        return reading.position if reading.found else None
    agrees = reading.on == subtask.destination and reading.score >= FAINT
    return reading.position if agrees else None


def read_subtask(keyframe: Keyframe, view: TableView) -> tuple[Subtask | None, Reading | None]:
    """The picture alone: the object that is most clearly elsewhere, and not at its old place, goes there."""
    readings = read_all(keyframe.picture, view, view.names)
    gone = {
        name: one
        for name, one in readings.items()
        if one.moved_m >= MOVED_M and one.at_old_place < min(one.score, FOUND)
    }
    faint = {name: one for name, one in gone.items() if one.score >= FAINT and one.at_old_place < 0.0}
    gone = {name: one for name, one in gone.items() if one.found} or faint
    if not gone:
        return None, None
    name = max(gone, key=lambda one: gone[one].score - gone[one].at_old_place)
    return Subtask(skill="place", target=name), gone[name]


def read_all(picture: Frame, view: TableView, names: Sequence[str]) -> dict[str, Reading]:
    """Where a calibrated picture has each of these objects."""
    return {name: read_position(picture, view.target(name)) for name in names}


def see(scene: TableScene, renderer: Renderer, *, size: tuple[int, int] = (256, 256)) -> TableView:
    """The scene as it is now."""
    return TableView(scene, renderer=renderer, size=size)


def _nothing(reason: str, keyframe: Keyframe | None) -> Executed:
    return Executed(
        subtask=None,
        reading=None,
        calibration=None if keyframe is None else keyframe.calibration,
        used_picture=False,
        result=SkillResult(done=False, reason=reason, control_steps=0),
    )
