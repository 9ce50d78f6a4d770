"""Movement and look commands: each defined once in words and once as a motion.

`COMMANDS` is the closed table (the action set of the Discrete ids), "go to the <colour> <shape>" an open
family beside it. `parse` reads what a user or a model wrote, `execute` moves a pose through a room. Not
here: what a room looks like (`emuworld.envs.rooms.scenes`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from emuworld.envs.palette import OBJECT_COLOURS, SHAPES
from emuworld.envs.rooms.collision import Obstacles

# People look slightly down as they walk, and so one sees objects on the floor from 1.2 m on.
LEVEL_PITCH_RAD = math.radians(-10)
PITCH_STEP_RAD = math.radians(20)
PITCH_LIMITS_RAD = (math.radians(-50), math.radians(30))
# Distance to an object's middle at which "go to" stops: nearer, an object on the floor leaves the level view.
STAND_OFF_M = 1.5


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Where the eyes are in plan and where they look: yaw counter-clockwise from +x, pitch upward.

    `rounded` poses lie on a grid of a micrometre and a millionth of a degree, so that twelve turns of 30
    degrees, or a step forward and one back, come home to equal numbers and equal pictures.
    """

    x_m: float
    y_m: float
    yaw_rad: float
    pitch_rad: float = LEVEL_PITCH_RAD

    def rounded(self) -> Pose:
        yaw = round(math.degrees(self.yaw_rad), 6) % 360.0
        yaw = yaw - 360.0 if yaw >= 180.0 else yaw
        return Pose(
            x_m=round(self.x_m, 6) + 0.0,
            y_m=round(self.y_m, 6) + 0.0,
            yaw_rad=math.radians(round(yaw, 6)),
            pitch_rad=math.radians(round(math.degrees(self.pitch_rad), 6)),
        )


@dataclass(frozen=True, kw_only=True)
class Motion:
    """A turn, or a straight way along `heading_rad` from where one looks; `pitch_rad` None = level."""

    turn_rad: float = 0.0
    heading_rad: float = 0.0
    way_m: float = 0.0
    pitch_rad: float | None = 0.0


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to do: a motion from the table, or an object to go to (`target`, "<colour> <shape>")."""

    phrase: str
    motion: Motion | None = None
    target: str | None = None


@dataclass(frozen=True, kw_only=True)
class Wording:
    """A command of the table in words: canonical phrase, more phrasings, those of the test split alone."""

    command: Command
    more: tuple[str, ...]
    held_out: tuple[str, ...]
    weight: float
    """Share in `sample_command`, before normalisation."""

    def phrases(self, split: str) -> tuple[str, ...]:
        """All phrasings that texts of a split may use, the canonical one first."""
        return (self.command.phrase, *self.more, *(self.held_out if split == "test" else ()))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a command did. `blocked`: not the whole way was free; not `possible`: nothing changed."""

    pose: Pose
    moved_m: float = 0.0
    blocked: bool = False
    possible: bool = True
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a target stands in plan and how wide it is."""

    x_m: float
    y_m: float
    radius_m: float


def _wording(
    phrase: str, motion: Motion, more: tuple[str, ...], held_out: tuple[str, ...], weight: float
) -> Wording:
    return Wording(command=Command(phrase=phrase, motion=motion), more=more, held_out=held_out, weight=weight)


def _walk(heading_deg: float, way_m: float) -> Motion:
    return Motion(heading_rad=math.radians(heading_deg), way_m=way_m)


def _turn(degrees: float) -> Motion:
    return Motion(turn_rad=math.radians(degrees))


WORDINGS: tuple[Wording, ...] = (
    _wording(
        "move forward", _walk(0, 0.5), ("go forward", "walk forward", "step forward"), ("move ahead",), 5
    ),
    _wording(
        "move forward one metre",
        _walk(0, 1.0),
        ("move forward one meter", "go forward one metre", "walk forward one metre"),
        ("step forward one metre",),
        3,
    ),
    _wording(
        "move back", _walk(180, 0.5), ("go back", "step back", "move backward"), ("walk backward",), 1.5
    ),
    _wording(
        "step left",
        _walk(90, 0.5),
        ("move left", "sidestep left", "step to the left"),
        ("move to the left",),
        1.5,
    ),
    _wording(
        "step right",
        _walk(-90, 0.5),
        ("move right", "sidestep right", "step to the right"),
        ("move to the right",),
        1.5,
    ),
    _wording(
        "turn left",
        _turn(30),
        ("rotate left", "turn to the left", "turn left 30 degrees"),
        ("rotate to the left",),
        5,
    ),
    _wording(
        "turn right",
        _turn(-30),
        ("rotate right", "turn to the right", "turn right 30 degrees"),
        ("rotate to the right",),
        5,
    ),
    _wording(
        "turn left 45 degrees", _turn(45), ("rotate left 45 degrees",), ("turn to the left 45 degrees",), 1
    ),
    _wording(
        "turn right 45 degrees",
        _turn(-45),
        ("rotate right 45 degrees",),
        ("turn to the right 45 degrees",),
        1,
    ),
    _wording(
        "turn left 90 degrees", _turn(90), ("rotate left 90 degrees",), ("turn to the left 90 degrees",), 1.5
    ),
    _wording(
        "turn right 90 degrees",
        _turn(-90),
        ("rotate right 90 degrees",),
        ("turn to the right 90 degrees",),
        1.5,
    ),
    _wording("turn around", _turn(180), ("turn back", "turn around 180 degrees"), ("rotate around",), 1),
    _wording("look up", Motion(pitch_rad=PITCH_STEP_RAD), ("tilt up",), ("tilt upward",), 0.7),
    _wording("look down", Motion(pitch_rad=-PITCH_STEP_RAD), ("tilt down",), ("tilt downward",), 0.7),
    _wording(
        "look ahead", Motion(pitch_rad=None), ("look straight ahead", "look level"), ("look forward",), 0.7
    ),
)
COMMANDS: tuple[Command, ...] = tuple(wording.command for wording in WORDINGS)
GO_TO_PHRASES = ("go to the {}", "walk to the {}", "move to the {}")
HELD_OUT_GO_TO_PHRASES = ("walk up to the {}",)

_BY_PHRASE = {phrase: wording.command for wording in WORDINGS for phrase in wording.phrases("test")}
_GO_TO = re.compile(
    "(?:"
    + "|".join(phrase.format("") for phrase in GO_TO_PHRASES + HELD_OUT_GO_TO_PHRASES)
    + f")({'|'.join(OBJECT_COLOURS)}) ({'|'.join(SHAPES)})"
)


def go_to(target: str) -> Command:
    """The command that walks to the object called `target`, "<colour> <shape>"."""
    return Command(phrase=GO_TO_PHRASES[0].format(target), target=target)


def parse(text: str) -> Command | None:
    """The command that a text means, or None. Case, extra spaces and a trailing dot do not matter."""
    words = " ".join(text.lower().split()).rstrip(".! ")
    known = _BY_PHRASE.get(words)
    if known is not None:
        return known
    match = _GO_TO.fullmatch(words)
    return None if match is None else go_to(f"{match[1]} {match[2]}")


def phrase(command: Command, rng: np.random.Generator, split: str) -> str:
    """Words for a command: the canonical phrase three times in five, else any of the split's."""
    if command.target is not None:
        templates = GO_TO_PHRASES + (HELD_OUT_GO_TO_PHRASES if split == "test" else ())
        phrases = tuple(template.format(command.target) for template in templates)
    else:
        phrases = next(w for w in WORDINGS if w.command == command).phrases(split)
    return phrases[0] if rng.random() < 0.6 else phrases[int(rng.integers(len(phrases)))]


def sample_command(rng: np.random.Generator, split: str, *, targets: tuple[str, ...] = ()) -> Command:
    """A command of the table by weight; with `targets`, in one case of eight "go to" one of them.

    All splits share the table; `split` is checked, so that callers say whose words they will use.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split={split!r} is unknown; expected train, validation or test")
    if targets and rng.random() < 0.125:
        return go_to(targets[int(rng.integers(len(targets)))])
    edges = np.cumsum([wording.weight for wording in WORDINGS])
    return COMMANDS[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))]


def _go(pose: Pose, place: Place, obstacles: Obstacles) -> Outcome:
    """Face a place and walk up to it, unless something stands in the way."""
    heading = math.atan2(place.y_m - pose.y_m, place.x_m - pose.x_m)
    way = max(0.0, math.hypot(place.x_m - pose.x_m, place.y_m - pose.y_m) - STAND_OFF_M)
    free = obstacles.free_way((pose.x_m, pose.y_m), heading, way)
    if free < way:
        return Outcome(pose=pose, blocked=True, possible=False, reason="the way is blocked")
    x, y = pose.x_m + way * math.cos(heading), pose.y_m + way * math.sin(heading)
    return Outcome(pose=Pose(x_m=x, y_m=y, yaw_rad=heading).rounded(), moved_m=way)


def execute(pose: Pose, command: Command, *, obstacles: Obstacles, places: Mapping[str, Place]) -> Outcome:
    """Do a command: walks stop where the body touches, "go to" is done whole or not at all.

    `places` says where the objects are that one may go to. Never raises for a command from `parse`.
    """
    if command.target is not None:
        place = places.get(command.target)
        if place is None:
            return Outcome(pose=pose, possible=False, reason=f"there is no {command.target}")
        return _go(pose, place, obstacles)
    motion = command.motion
    assert motion is not None
    heading = pose.yaw_rad + motion.heading_rad
    way = obstacles.free_way((pose.x_m, pose.y_m), heading, motion.way_m) if motion.way_m > 0 else 0.0
    pitch = LEVEL_PITCH_RAD if motion.pitch_rad is None else pose.pitch_rad + motion.pitch_rad
    low, high = PITCH_LIMITS_RAD
    moved = Pose(
        x_m=pose.x_m + way * math.cos(heading),
        y_m=pose.y_m + way * math.sin(heading),
        yaw_rad=pose.yaw_rad + motion.turn_rad,
        pitch_rad=min(high, max(low, pitch)),
    )
    return Outcome(pose=moved.rounded(), moved_m=way, blocked=way < motion.way_m - 1e-9)
