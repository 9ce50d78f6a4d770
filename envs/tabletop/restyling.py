"""The same task in other colours, another look and from another camera: what physics does to it stays.

Carrying a task out costs ten times what a picture of it costs, so training data tells each roll-out several
times: geometry and physics states are those of the original, names and words are the new ones.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from emuworld.envs.palette import OBJECT_COLOURS
from emuworld.envs.tabletop.drafts import HELD_OUT_TABLE_PAIRS
from emuworld.envs.tabletop.layout import TablePlan
from emuworld.envs.tabletop.looks import sample_camera, sample_look
from emuworld.envs.tabletop.plans import Task
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.subtasks import Subtask

_COLOUR_WORDS = re.compile(rf"\b({'|'.join(OBJECT_COLOURS)})\b")


class Recolouring:
    """Colours for colours, one to one, in plans and in words.

    Outside of the test split no thing gets a colour that is held out for it.
    """

    def __init__(self, plan: TablePlan, rng: np.random.Generator, *, split: str) -> None:
        names = list(OBJECT_COLOURS)
        pairs = {(item.colour, item.kind) for item in plan.objects}
        for _ in range(200):
            self.colours = dict(zip(names, map(str, rng.permutation(names)), strict=True))
            after = {(self.colours[colour], kind) for colour, kind in pairs}
            if split == "test" or not after & HELD_OUT_TABLE_PAIRS:
                return
        self.colours = {name: name for name in names}

    def words(self, text: str) -> str:
        return _COLOUR_WORDS.sub(lambda match: self.colours[match[1]], text)

    def step(self, step: Subtask) -> Subtask:
        destination = None if step.destination is None else self.words(step.destination)
        return replace(step, target=self.words(step.target), destination=destination)

    def plan(self, plan: TablePlan, rng: np.random.Generator) -> TablePlan:
        """The plan in other colours, with another look and camera of those that training has."""
        return replace(
            plan,
            objects=tuple(replace(item, colour=self.colours[item.colour]) for item in plan.objects),
            furniture=tuple(
                replace(piece, colour=self.colours.get(piece.colour, piece.colour))
                if piece.kind in ("plate", "bin")
                else piece
                for piece in plan.furniture
            ),
            look=sample_look(rng),
            camera=sample_camera(rng),
        )

    def task(self, task: Task, rng: np.random.Generator) -> Task:
        """The task on that table, in the words that go with it."""
        scene: dict[str, Any] = self.plan(TablePlan.from_dict(task.scene), rng).to_dict()
        return replace(
            task,
            scene=scene,
            instruction=self.words(task.instruction),
            instructions=tuple(map(self.words, task.instructions)),
            goal=tuple(Predicate(one.name, tuple(map(self.words, one.args))) for one in task.goal),
            oracle=tuple(map(self.step, task.oracle)),
        )
