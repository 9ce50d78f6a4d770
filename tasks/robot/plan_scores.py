"""What makes an imagined plan good where the scene is known: does it do what the words ask, could it stand in
physics, are all things kept?

These are objectives for `emuworld.agents.planner.Planner`. They know what a robot would know: instruction,
present state of the table, physics. They do not know the task's goal predicates: what is asked is read off
the instruction by the rules of language.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from emuworld.agents.agent import Step
from emuworld.agents.baselines import subtask_clauses
from emuworld.agents.objectives import ImaginedPlan, Objective
from emuworld.envs.render import Renderer
from emuworld.envs.tabletop.predicates import DIRECTIONS, Predicate
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.subtasks import Subtask, canonical, parse
from emuworld.tasks.robot.keyframe_execution import (
    PLACING,
    Keyframe,
    goal_position,
    read_all,
    read_goal,
    take_up,
)
from emuworld.tasks.robot.keyframe_readout import Position, Reading
from emuworld.tasks.robot.keyframe_scores import scores_of
from emuworld.tasks.robot.table_view import TableView

BESIDE = {"left of": "LeftOf", "right of": "RightOf", "behind": "Behind", "in front of": "InFrontOf"}
SETTLE_S = 0.5
_WAYS = {"LeftOf": "left", "RightOf": "right", "Behind": "away", "InFrontOf": "closer"}
_SETTLED_M, _FALLEN_M = 0.01, 0.06  # moved so little in settling: stands; so much: does not
_NEAR_M = 0.2  # beside something


def goals_in_words(instruction: str) -> tuple[Predicate, ...]:
    """What should be true in the end as far as the words say it clause by clause; () where they do not."""
    goals: dict[tuple[str, str], Predicate] = {}
    for clause in subtask_clauses(instruction):
        subtask = parse(clause)
        if subtask is None or (goal := goal_of(subtask)) is None:
            continue
        goals = {key: one for key, one in goals.items() if one.name != "Held"}  # the hand has moved on
        goals["joint" if subtask.skill in ("open", "close") else "place", subtask.target] = goal
    return tuple(goals.values())


def goal_of(subtask: Subtask) -> Predicate | None:
    """What is true once a subtask is done; None where the goal place is only in the picture."""
    target, relation = subtask.target, subtask.relation
    if subtask.skill == "push":
        return Predicate("Moved", (target, str(relation)))
    if subtask.skill in ("open", "close", "press", "pick"):
        name = {"open": "Open", "close": "Closed", "press": "Pressed", "pick": "Held"}[subtask.skill]
        return Predicate(name, (target,))
    if subtask.destination is None:
        return None
    name = {"on": "On", "in": "In", **BESIDE}[str(relation)]
    return Predicate(name, (target, subtask.destination))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Look:
    """What was understood of a plan.

    `subtasks`: of its steps, None where the words are none; `shown`: the last place that pictures show of a
    thing, what it rests on, and where it was before; `stands`: how well each new place stands in physics;
    `kept`: share of the bystanders that are as they should be in the last picture; `begins`: whether the arm
    would set out on the first step.
    """

    subtasks: tuple[Subtask | None, ...]
    shown: Mapping[str, tuple[Reading, Position]]
    stands: tuple[float, ...]
    kept: float
    begins: bool


class PlanScores:
    """Objectives that share one look at each plan. The scene is read when a plan is scored, and left as it
    was.

    Args:
        scene: the physics in its present state.
        renderer, size: draw what pictures are compared with.
    """

    def __init__(self, scene: TableScene, *, renderer: Renderer, size: tuple[int, int] = (256, 256)) -> None:
        self._scene = scene
        self._renderer = renderer
        self._size = size
        self._state = b""
        self._looks: list[tuple[tuple[Step, ...], _Look]] = []

    def objectives(self) -> Mapping[str, Objective]:
        """By name, for `Planner(objectives=...)`."""
        return {"goal": self.goal, "plausible": self.plausible, "kept": self.kept}

    def goal(self, plan: ImaginedPlan) -> float:
        """Share of what the words ask for that the plan says and, where a place can be seen, shows; 1 where
        the words ask for nothing that can be checked."""
        goals = goals_in_words(plan.assignment.instruction)
        look = self._look(plan)
        return float(np.mean([self._reached(goal, look) for goal in goals])) if goals else 1.0

    def plausible(self, plan: ImaginedPlan) -> float:
        """Whether the places that the pictures show could stand: 1 less how far things move when physics is
        let go there, 0 from 6 cm on and where a step's picture has its thing nowhere that it could be put;
        the mean over the steps that put something somewhere, 1 where none does."""
        stands = self._look(plan).stands
        return float(np.mean(stands)) if stands else 1.0

    def kept(self, plan: ImaginedPlan) -> float:
        """Share of the bystanders of the last step that the last picture shows once, where they were."""
        return self._look(plan).kept

    def can_begin(self, plan: ImaginedPlan) -> bool:
        """Whether the arm, asked for the first step with its picture now, would set out; see
        `TableScene.refusal`."""
        return self._look(plan).begins

    def is_done(self, instruction: str) -> bool | None:
        """Whether all that the words ask for holds now; None where they ask for nothing that can be checked
        on this table."""
        goals = goals_in_words(instruction)
        if not goals or not self._are_here(goals):
            return None
        return all(self._scene.holds(goal) for goal in goals)

    def spelled_out(self, instruction: str) -> tuple[str, ...]:
        """The subtasks that the words name one by one, from the first on whose effect is not there yet; none
        where a part of the words is no subtask, or names what is not on this table."""
        subtasks = [parse(clause) for clause in subtask_clauses(instruction)]
        known = [one for one in subtasks if one is not None]
        if len(known) < len(subtasks):
            return ()
        goals = [goal_of(one) for one in known]
        if not self._are_here([goal for goal in goals if goal is not None]):
            return ()
        ahead = itertools.dropwhile(
            lambda pair: pair[1] is not None and self._scene.holds(pair[1]), zip(known, goals, strict=True)
        )
        return tuple(canonical(subtask) for subtask, _ in ahead)

    # ---- inside --------------------------------------------------------------------------------

    def _are_here(self, goals: Sequence[Predicate]) -> bool:
        return {name for goal in goals for name in goal.things} <= set(self._scene.names)

    def _look(self, plan: ImaginedPlan) -> _Look:
        """One look at each plan of this moment; a plan is known by its very steps."""
        state = self._scene.save()
        if state != self._state:
            self._state, self._looks = state, []
        for steps, look in self._looks:
            if steps is plan.steps:
                return look
        try:
            look = self._follow(plan.steps)
        finally:
            self._scene.restore(state)
        self._looks.append((plan.steps, look))
        return look

    def _follow(self, steps: tuple[Step, ...]) -> _Look:
        """Read one picture after the other, each against the scene as the pictures before have left it."""
        view, kept = self._view(), 1.0
        subtasks: list[Subtask | None] = []
        shown: dict[str, tuple[Reading, Position]] = {}
        stands: list[float] = []
        begins = False
        for index, step in enumerate(steps):
            subtask = parse(step.text)
            subtasks.append(subtask)
            if step.keyframe is None:
                begins = begins or (index == 0 and self._sets_out(subtask, None))
                continue
            keyframe = take_up(step.keyframe, view)
            if index == len(steps) - 1:
                kept = _kept(keyframe, view, subtask)
            reading = None if subtask is None else read_goal(keyframe, view, subtask)
            place = None if subtask is None else goal_position(subtask, reading)
            begins = begins or (index == 0 and self._sets_out(subtask, place))
            if subtask is None or subtask.skill not in PLACING:
                continue
            if reading is None or place is None:
                stands.append(0.0)
                continue
            shown[subtask.target] = reading, self._scene.state(subtask.target).position
            stands.append(self._put(subtask.target, place))
            view = self._view()
        return _Look(subtasks=tuple(subtasks), shown=shown, stands=tuple(stands), kept=kept, begins=begins)

    def _view(self) -> TableView:
        return TableView(self._scene, renderer=self._renderer, size=self._size)

    def _sets_out(self, subtask: Subtask | None, place: Position | None) -> bool:
        if subtask is None:
            return False
        goal = None if place is None else place.tolist()
        return self._scene.refusal(subtask, goal_position=goal) is None

    def _put(self, name: str, place: Position) -> float:
        """Put a thing where a picture has it and let physics go: 1 where it stays, 0 where it falls."""
        self._scene.place_object(name, place.tolist())
        self._scene.settle(SETTLE_S)
        moved = float(np.linalg.norm(self._scene.state(name).position - place))
        return float(np.clip((_FALLEN_M - moved) / (_FALLEN_M - _SETTLED_M), 0.0, 1.0))

    def _reached(self, goal: Predicate, look: _Look) -> float:
        """Half for words that say it, half for a picture that shows it (where it can be seen at all)."""
        said = any(subtask is not None and goal_of(subtask) == goal for subtask in look.subtasks)
        if goal.name not in ("On", "In", "Moved", *_WAYS):
            return float(said)
        return (float(said) + float(self._shows(goal, look))) / 2

    def _shows(self, goal: Predicate, look: _Look) -> bool:
        target, other = goal.args
        if target not in look.shown:
            return False
        reading, before = look.shown[target]
        if goal.name in ("On", "In"):
            return reading.on == other
        if goal.name == "Moved":
            return _lies(reading.position - before, other)
        if other in look.shown:
            anchor = look.shown[other][0].position
        elif other in self._scene.names:
            anchor = self._scene.state(other).position
        else:
            return False
        gap = reading.position - anchor
        return float(np.linalg.norm(gap[:2])) < _NEAR_M and _lies(gap, _WAYS[goal.name])


def _kept(keyframe: Keyframe, view: TableView, subtask: Subtask | None) -> float:
    moved = () if subtask is None else (subtask.target,)
    bystanders = [name for name in view.names if name not in moved]
    if not bystanders:
        return 1.0
    # The moved thing is read too: else one of its colour would take it for a double of itself.
    found = scores_of(keyframe, view, read_all(keyframe.picture, view, view.names), moved=moved)
    bad = {*found.missing, *found.duplicated, *found.moved_bystanders}.difference(moved)
    return 1.0 - len(bad) / len(bystanders)


def _lies(gap: Position, direction: str) -> bool:
    """Whether a gap goes more in a direction than across it."""
    along = float(gap[:2] @ np.array(DIRECTIONS[direction]))
    across = float(np.sqrt(max(float(gap[:2] @ gap[:2]) - along**2, 0.0)))
    return along > 0.0 and along > across
