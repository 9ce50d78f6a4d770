"""One task at the table: an agent chooses subtasks, physics carries them out, and the goal is checked after
each.

It is what the command `plan` runs once and an evaluation runs many times; it draws and writes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from emuworld.agents.agent import Agent, Assignment, Step
from emuworld.envs.render import Renderer
from emuworld.envs.tabletop.plans import Task
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.scene import TableScene
from emuworld.tasks.robot.calibration import Frame
from emuworld.tasks.robot.keyframe_execution import Executed, execute_step, see

MAX_STEPS = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class Workplace:
    """Where an agent works: at a task, in its scene, seen as (height, width) through a renderer."""

    task: Task
    scene: TableScene
    renderer: Renderer
    size: tuple[int, int] = (256, 256)


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """One step, what became of it, what was seen after it, and which goals held then."""

    step: Step
    executed: Executed
    frame: Frame
    facts: dict[str, bool]


@dataclass(frozen=True, kw_only=True, eq=False)
class RobotEpisode:
    """What an agent did with a task. `facts` are the goals at the end, by their words."""

    first: Frame
    outcomes: tuple[Outcome, ...]
    facts: dict[str, bool]
    aims: tuple[str, ...]  # the goals that the task is about; the others guard bystanders

    @property
    def success(self) -> bool:
        """All goals hold at the end."""
        return all(self.facts.values())

    @property
    def once(self) -> bool:
        """All aims held after some step."""
        return any(all(one.facts[aim] for aim in self.aims) for one in self.outcomes)

    @property
    def share(self) -> float:
        """Of the goals that hold at the end."""
        return sum(self.facts.values()) / max(len(self.facts), 1)

    def verdict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "success": self.success,
            "success_once": self.once,
            "share_of_goals": self.share,
            "facts": self.facts,
            "steps": [
                {
                    "text": one.step.text,
                    "subtask": None if one.executed.subtask is None else one.executed.subtask.to_dict(),
                    "done": one.executed.result.done,
                    "reason": one.executed.result.reason,
                    "control_steps": one.executed.result.control_steps,
                    "used_picture": one.executed.used_picture,
                }
                for one in self.outcomes
            ],
        }


def run_agent(
    place: Workplace,
    agent: Agent,
    *,
    seed: int = 0,
    use: str = "both",
    max_steps: int = MAX_STEPS,
    on_step: Callable[[Outcome], None] | None = None,
    on_motion: Callable[[TableScene], None] | None = None,
) -> RobotEpisode:
    """Let an agent work at a task from its start; the scene is reset first.

    Args:
        use: of `keyframe_execution.USES`: what is believed, words, pictures or both.
        max_steps: subtasks after which it is over.
        on_step, on_motion: called after every subtask, and with the scene after every control step.
    """
    task, scene = place.task, place.scene
    scene.reset()
    moving = None if on_motion is None else functools.partial(on_motion, scene)
    view = see(scene, place.renderer, size=place.size)
    first = view.frame
    agent.begin(Assignment(instruction=task.instruction, frame=first, seed=seed))
    outcomes: list[Outcome] = []
    info: dict[str, Any] = {}
    while len(outcomes) < max_steps and (step := agent.act(view.frame, info)) is not None:
        executed = execute_step(scene, step, view=view, use=use, on_motion=moving)
        view = see(scene, place.renderer, size=place.size)
        outcome = Outcome(step=step, executed=executed, frame=view.frame, facts=facts_of(scene, task.goal))
        info = {
            "invalid_action": executed.subtask is None or executed.result.control_steps == 0,
            "subtask_done": executed.result.done,
            "reason": executed.result.reason,
        }
        outcomes.append(outcome)
        if on_step is not None:
            on_step(outcome)
    return RobotEpisode(
        first=first,
        outcomes=tuple(outcomes),
        facts=facts_of(scene, task.goal),
        aims=tuple(map(str, task.aims)),
    )


def facts_of(scene: TableScene, goal: tuple[Predicate, ...]) -> dict[str, bool]:
    """Which goals hold now, by their words."""
    return {str(one): scene.holds(one) for one in goal}
