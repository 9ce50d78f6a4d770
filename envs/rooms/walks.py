"""Where a walker goes: the policy behind training walks, which decides what a model can learn from them.

A walk is made of patterns: single steps and turns, runs of turns, visits to objects seen before, look-backs
(left k times, then right k times; a full turn; walking away and back) that only a memory can draw right, and
glances up and down. Single commands are tried against the view they lead to, so that few frames stare at a
wall. No pictures here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from emuworld.envs.palette import object_pairs
from emuworld.envs.rooms.captions import View
from emuworld.envs.rooms.commands import (
    COMMANDS,
    LEVEL_PITCH_RAD,
    Command,
    Outcome,
    Pose,
    go_to,
    sample_command,
)
from emuworld.envs.rooms.scenes import RoomScene

_BY_PHRASE = {command.phrase: command for command in COMMANDS}
FORWARD, FURTHER, BACK = (_BY_PHRASE[p] for p in ("move forward", "move forward one metre", "move back"))
STEP_LEFT, STEP_RIGHT = _BY_PHRASE["step left"], _BY_PHRASE["step right"]
LEFT, RIGHT, AROUND = (_BY_PHRASE[p] for p in ("turn left", "turn right", "turn around"))
LEFT_45, RIGHT_45 = _BY_PHRASE["turn left 45 degrees"], _BY_PHRASE["turn right 45 degrees"]
LEFT_90, RIGHT_90 = _BY_PHRASE["turn left 90 degrees"], _BY_PHRASE["turn right 90 degrees"]
UP, DOWN, AHEAD = (_BY_PHRASE[p] for p in ("look up", "look down", "look ahead"))

MEMORY_STEPS = 12  # an object seen this long ago may still be asked for
POOR_NEAR_SHARE = 0.3
_TRIES = 4


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a walk: what was commanded, what came of it, and what is in view then."""

    command: Command | None
    outcome: Outcome
    view: View


@dataclass
class _Walker:
    """The state of one walk."""

    scene: RoomScene
    rng: np.random.Generator
    pose: Pose
    view: View
    plan: list[Command] = field(default_factory=list)
    last_seen: dict[str, int] = field(default_factory=dict)
    """Object -> step at which it was last in view."""
    step: int = 0
    side: int = 1

    def remember(self) -> None:
        for item in self.view.objects:
            self.last_seen[item.identity] = self.step

    def targets(self) -> list[str]:
        """Objects seen lately that are worth a walk, those in view three times as likely."""
        names = []
        for name, step in sorted(self.last_seen.items()):
            if self.step - step <= MEMORY_STEPS:
                names += [name] * (3 if step == self.step else 1)
        return names


def walk(scene: RoomScene, start: Pose, rng: np.random.Generator, *, num_frames: int) -> list[Step]:
    """A walk of `num_frames` views; the first has no command."""
    walker = _Walker(scene=scene, rng=rng, pose=start, view=scene.view(start))
    walker.remember()
    steps = [Step(command=None, outcome=Outcome(pose=start), view=walker.view)]
    while len(steps) < num_frames:
        walker.step += 1
        step = _planned(walker) if walker.plan else None
        step = step or _fresh(walker, left=num_frames - len(steps))
        walker.pose, walker.view = step.outcome.pose, step.view
        walker.remember()
        steps.append(step)
    return steps


def _try(walker: _Walker, command: Command) -> Step:
    outcome = walker.scene.execute(walker.pose, command)
    view = walker.view if outcome.pose == walker.pose else walker.scene.view(outcome.pose)
    return Step(command=command, outcome=outcome, view=view)


def _planned(walker: _Walker) -> Step | None:
    """The next command of a pattern; a blocked one ends the pattern without being done."""
    command = walker.plan.pop(0)
    step = _try(walker, command)
    if step.outcome.blocked or not step.outcome.possible:
        walker.plan.clear()
        return None
    return step


def _fresh(walker: _Walker, *, left: int) -> Step:
    """A new pattern or single command, the first of a few draws whose view is worth a frame.

    One in seven is any command at all, unscreened: users and evaluations walk like that too.
    """
    if walker.rng.random() < 1 / 7:
        targets = tuple(walker.targets())
        return _try(walker, sample_command(walker.rng, walker.scene.split, targets=targets))
    for _ in range(_TRIES):
        plan = _pattern(walker, left)
        step = _try(walker, plan[0])
        blocked = step.outcome.blocked or not step.outcome.possible
        poor = step.view.near_share > POOR_NEAR_SHARE or step.view.bare
        # Now and then one does walk into things: a model must know what happens.
        if (blocked and walker.rng.random() < 0.5) or (poor and walker.rng.random() < 0.8):
            continue
        walker.plan = plan[1:]
        return step
    # Nothing better was found: turn on, away from the wall.
    walker.plan = []
    return _try(walker, (LEFT_90, RIGHT_90)[int(walker.rng.integers(2))])


def _pattern(walker: _Walker, left: int) -> list[Command]:
    """Draw a pattern; `left` frames remain, and a look-back that would be cut off is not begun."""
    rng = walker.rng
    if walker.pose.pitch_rad != LEVEL_PITCH_RAD and rng.random() < 0.3:
        return [AHEAD]
    edges = np.cumsum([weight for _, weight in _PATTERNS])
    for _ in range(8):
        make = _PATTERNS[int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))][0]
        plan = make(walker)
        if 0 < len(plan) <= max(1, left):
            return plan
    return [LEFT if rng.random() < 0.5 else RIGHT]


def _forward(walker: _Walker) -> list[Command]:
    return [FORWARD] * int(walker.rng.integers(1, 3))


def _further(walker: _Walker) -> list[Command]:
    return [FURTHER]


def _turn(walker: _Walker) -> list[Command]:
    """One to four turns one way; the same way as last time more often than not, so that rooms are seen
    round.
    """
    if walker.rng.random() < 0.35:
        walker.side = -walker.side
    return [LEFT if walker.side > 0 else RIGHT] * int(walker.rng.integers(1, 4))


def _wide_turn(walker: _Walker) -> list[Command]:
    choices = (LEFT_45, RIGHT_45, LEFT_90, RIGHT_90, LEFT_90, RIGHT_90, AROUND)
    return [choices[int(walker.rng.integers(len(choices)))]]


def _aside(walker: _Walker) -> list[Command]:
    """A step aside, half the time with the step back home."""
    there, home = (STEP_LEFT, STEP_RIGHT) if walker.rng.random() < 0.5 else (STEP_RIGHT, STEP_LEFT)
    return [there, home] if walker.rng.random() < 0.5 else [there]


def _back(walker: _Walker) -> list[Command]:
    return [BACK] * int(walker.rng.integers(1, 3))


def _visit(walker: _Walker) -> list[Command]:
    targets = walker.targets()
    return [go_to(targets[int(walker.rng.integers(len(targets)))])] if targets else []


def _ask_in_vain(walker: _Walker) -> list[Command]:
    """Go to something that is not in the room: nothing may happen."""
    there = {item.identity for item in walker.scene.objects}
    pairs = [" ".join(pair) for pair in object_pairs(walker.scene.split)]
    absent = [name for name in pairs if name not in there]
    return [go_to(absent[int(walker.rng.integers(len(absent)))])]


def _look_back(walker: _Walker) -> list[Command]:
    """Turn away and back again by the same turns."""
    turn, back = (
        (LEFT, RIGHT),
        (RIGHT, LEFT),
        (LEFT_45, RIGHT_45),
        (LEFT_90, RIGHT_90),
        (RIGHT_90, LEFT_90),
    )[int(walker.rng.integers(5))]
    times = int(walker.rng.integers(1, 5)) if turn in (LEFT, RIGHT) else int(walker.rng.integers(1, 3))
    return [turn] * times + [back] * times


def _full_turn(walker: _Walker) -> list[Command]:
    turn, times = ((LEFT, 12), (RIGHT, 12), (LEFT_45, 8), (RIGHT_45, 8), (LEFT_90, 4), (RIGHT_90, 4))[
        int(walker.rng.integers(6))
    ]
    return [turn] * times


def _about_face(walker: _Walker) -> list[Command]:
    return [AROUND, AROUND]


def _there_and_back(walker: _Walker) -> list[Command]:
    """Walk away and come back, backward or after turning around."""
    times = int(walker.rng.integers(1, 4))
    if walker.rng.random() < 0.5:
        return [FORWARD] * times + [BACK] * times
    return [FORWARD] * times + [AROUND] + [FORWARD] * times + [AROUND]


def _glance(walker: _Walker) -> list[Command]:
    """Look up or down, mostly level again after a moment."""
    first = UP if walker.rng.random() < 0.5 else DOWN
    return [first, AHEAD] if walker.rng.random() < 0.6 else [first]


_PATTERNS: tuple[tuple[Callable[[_Walker], list[Command]], float], ...] = (
    (_forward, 5.0),
    (_further, 3.0),
    (_turn, 6.0),
    (_wide_turn, 2.5),
    (_aside, 1.3),
    (_back, 1.0),
    (_visit, 2.5),
    (_ask_in_vain, 0.12),
    (_look_back, 1.3),
    (_full_turn, 0.35),
    (_about_face, 0.4),
    (_there_and_back, 0.8),
    (_glance, 1.3),
)
