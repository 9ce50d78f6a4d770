"""Agents for the table by name: what the command line and evaluations choose from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from emuworld.agents.agent import Agent, Step
from emuworld.agents.baselines import KnownPlan, LanguageRules, NoPlan, TextOnly
from emuworld.agents.guide import Guide, how_to
from emuworld.agents.planner import Imagines, Planner, PlannerConfig
from emuworld.envs.tabletop.plans import random_plan
from emuworld.envs.tabletop.subtasks import Subtask, canonical, only_names_things, parse
from emuworld.tasks.robot.episode import Workplace
from emuworld.tasks.robot.plan_scores import PlanScores
from emuworld.tasks.robot.table_view import TableView
from emuworld.world_model import Sampling

AGENTS = ("planner", "guide", "text-only", "scripted", "oracle", "random", "none")
# Agents that ask a world model, and the mode that they ask it in.
NEEDS_MODEL: Mapping[str, str] = {"planner": "vla", "guide": "howto", "text-only": "vla"}


def make_agent(
    name: str,
    place: Workplace,
    *,
    model: Imagines | None = None,
    config: PlannerConfig | None = None,
    question: Callable[[str], str] = str,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> Agent:
    """The agent called `name`, one of `AGENTS`.

    Args:
        model: a `WorldModel`; needed by `NEEDS_MODEL`.
        config: of the planner; the guide keeps its limits of steps and pictures.
        question: what the world model is asked for an instruction: the small model has learnt the bare
            instruction, the published one `emuworld.questions.vla_question`. The guide's is asked about
            "How to …", where the published one has learnt `emuworld.questions.howto_question`.
        sampling: how the world model draws; None: as it does in the agent's mode.
        seed: of the random agent; with 0, 1 and 2 it fails at every task of the suite (checked there).
    """
    if name not in AGENTS:
        raise ValueError(f"agent={name!r} is unknown; expected one of {', '.join(AGENTS)}")
    if name == "oracle":
        return KnownPlan([_own_step(step, place) for step in place.task.oracle])
    if name == "scripted":
        return LanguageRules()
    if name == "none":
        return NoPlan()
    if name == "random":
        task = place.task
        steps = random_plan(task.names, max(1, len(task.oracle)), seed=task.seed + seed)
        return KnownPlan([canonical(step) for step in steps])
    if model is None:
        raise ValueError(f"agent={name} plans with a world model; give one")
    if name == "guide":
        limits = config or PlannerConfig()
        return Guide(
            model,
            question=lambda instruction: question(how_to(instruction)),
            is_opening=only_names_things,
            max_steps=limits.max_steps,
            max_pictures=limits.max_pictures,
            sampling=sampling,
        )
    scores = PlanScores(place.scene, renderer=place.renderer, size=place.size)
    planner = Planner(
        model,
        question=question,
        config=config,
        objectives=scores.objectives(),
        is_valid=functools.partial(_is_there, place),
        can_begin=scores.can_begin,
        is_done=scores.is_done,
        spelled_out=scores.spelled_out,
        sampling=sampling,
    )
    return planner if name == "planner" else TextOnly(planner)


def _is_there(place: Workplace, text: str) -> bool:
    """Whether a text is a subtask with things that are on this table."""
    subtask = parse(text)
    if subtask is None:
        return False
    return {subtask.target, subtask.destination} <= {*place.scene.names, None}


def _own_step(step: Subtask, place: Workplace) -> Step:
    """A step of the task's own plan; with a drawing of the goal place where words do not name it."""
    goal = place.task.goal_position
    if not step.from_picture or goal is None:
        return Step(text=canonical(step))
    view = TableView(place.scene, renderer=place.renderer, size=place.size)
    spot = view.target(step.target).resting(goal[0], goal[1])
    keyframe = None if spot is None else view.drawn_with({step.target: spot[0]})
    return Step(text=canonical(step), keyframe=keyframe)
