"""One case of the robot suite: an agent at one frozen scene, or the pixel judges on one scene, as a record.

A record is JSON values that depend on the scene, the settings and the model alone. Runs in a worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from emuworld.agents.baselines import TextOnly
from emuworld.agents.guide import Guide
from emuworld.agents.objectives import resized
from emuworld.agents.planner import Imagines, Planner, PlannerConfig
from emuworld.envs.render import Renderer, make_renderer
from emuworld.envs.tabletop.plans import Task
from emuworld.envs.tabletop.scene import TableScene
from emuworld.tasks.robot.agents import make_agent
from emuworld.tasks.robot.blame import Tried, effect_of, first_failure
from emuworld.tasks.robot.calibration import Frame
from emuworld.tasks.robot.episode import Outcome, RobotEpisode, Workplace, run_agent
from emuworld.tasks.robot.keyframe_execution import see
from emuworld.tasks.robot.keyframe_faults import judge_the_judges, judged_keyframe
from emuworld.tasks.robot.plan_scores import goal_of
from emuworld.tasks.run_folder import Record
from emuworld.tasks.suites import RobotSuite
from emuworld.world_model import Sampling

SHOWN_PX = 160  # pictures for the page


@dataclass(frozen=True, kw_only=True)
class SceneCase:
    """What is asked of a worker: `kind` "scene" (an agent with the suite's `use`), "use both", "use text",
    "use keyframe" (the same with another), or "judges"."""

    kind: str
    index: int
    task: dict[str, Any] = field(repr=False)
    suite: RobotSuite = field(repr=False)
    sampling: Sampling | None = None  # of the world model, where the suite has settings of its own

    @property
    def use(self) -> str:
        return self.kind.removeprefix("use ") if self.kind.startswith("use ") else self.suite.use


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneResult:
    """A record and, of an episode, what was seen: the first view and one column a step, imagined above seen
    (grey where nothing was imagined)."""

    record: Record
    columns: tuple[str, ...] = ()
    imagined: Sequence[Frame] = ()
    seen: Sequence[Frame] = ()


def open_renderer(backend: str) -> Renderer:
    """A worker's renderer."""
    return make_renderer(backend)


def do_case(renderer: Renderer, case: SceneCase, model: Imagines | None) -> SceneResult:
    """Run one case."""
    if case.kind == "judges":
        task = Task.from_dict(case.task)
        judged = judge_the_judges(task, renderer=renderer, size=_size(case.suite), seed=case.index)
        return SceneResult(record={"kind": case.kind, "index": case.index, "family": task.family, **judged})
    results = [_run(renderer, case, model) for _ in range(case.suite.repeats if case.kind == "scene" else 1)]
    same = all(one.record == results[0].record for one in results)
    record = results[0].record | ({"same": same} if len(results) > 1 else {})
    return replace(results[0], record=record)


def spoken_task(task: Task, phrasing: str, index: int) -> tuple[Task, str]:
    """The task with the instruction that a phrasing gives, and of what sort that is: "plain", "other", or
    "held out" (no training text has it)."""
    last = len(task.instructions) - 1
    turn = {"plain": 0, "held-out": last, "turns": index % (last + 1)}[phrasing]
    sort = "plain" if turn == 0 else "held out" if turn == last else "other"
    return replace(task, instruction=task.instructions[turn]), sort


def _size(suite: RobotSuite) -> tuple[int, int]:
    return suite.size_px, suite.size_px


def _run(renderer: Renderer, case: SceneCase, model: Imagines | None) -> SceneResult:
    suite, size = case.suite, _size(case.suite)
    task, sort = spoken_task(Task.from_dict(case.task), suite.phrasing, case.index)
    scene = TableScene.from_dict(task.scene)
    start = scene.save()
    place = Workplace(task=task, scene=scene, renderer=renderer, size=size)
    settings = PlannerConfig(
        num_plans=suite.num_plans,
        in_words=suite.in_words,
        strategy=suite.strategy,
        max_pictures=suite.max_pictures,
        max_steps=suite.max_steps,
    )
    agent = make_agent(
        suite.agent, place, model=model, config=settings, sampling=case.sampling, seed=suite.seed
    )
    follower = _Follower(task, scene)
    episode = run_agent(
        place, agent, seed=suite.seed, use=case.use, max_steps=suite.max_steps, on_step=follower.on_step
    )
    end = scene.state_hash()
    steps = [
        _step_record(one, scene, before=before, effect=effect, renderer=renderer)
        for one, before, effect in zip(
            episode.outcomes, [start, *(one.state for one in follower.tried)], follower.reached, strict=False
        )
    ]
    planner = agent.agent if isinstance(agent, TextOnly) else agent
    failure = None if episode.success else first_failure(task, scene, start, follower.tried)
    record = {
        "kind": case.kind,
        "index": case.index,
        "family": task.family,
        "variation": task.variation,
        "tags": list(task.tags),
        "phrasing": sort,
        "goal_in_picture": task.goal_in_picture,
        "instruction": task.instruction,
        "use": case.use,
        "success": episode.success,
        "once": episode.once,
        "facts": episode.facts,
        "aims": list(episode.aims),
        "valid": bool(steps) and all(one["subtask"] is not None for one in steps),
        "executable": bool(steps) and all(one["executable"] for one in steps),
        "in_a_row": follower.in_a_row,
        "num_subtasks": len(task.oracle),
        "steps": steps,
        "failing_step": None if failure is None else failure.step,
        "blame": None if failure is None else failure.blame,
        "num_imagined": planner.num_pictures if isinstance(planner, Planner | Guide) else 0,
        "state_hash": end,
    }
    return _with_pictures(record, episode)


class _Follower:
    """Notes the state after every step, which of the task's own subtasks have come true in their order, and
    whether each step reached what it is for."""

    def __init__(self, task: Task, scene: TableScene) -> None:
        self._task, self._scene = task, scene
        self.in_a_row = 0
        self.tried: list[Tried] = []
        self.reached: list[bool] = []

    def on_step(self, outcome: Outcome) -> None:
        executed, scene = outcome.executed, self._scene
        place = executed.reading.position.tolist() if executed.used_picture and executed.reading else None
        self.tried.append(Tried(subtask=executed.subtask, place=place, state=scene.save()))
        own = self._task.oracle
        while self.in_a_row < len(own) and self._holds(effect_of(self._task, own[self.in_a_row])):
            self.in_a_row += 1
        goal = None if executed.subtask is None else goal_of(executed.subtask)
        self.reached.append(executed.result.done if goal is None else self._holds(goal))

    def _holds(self, fact: Any) -> bool:
        known = set(self._scene.names)
        if fact is None or any(name not in known for name in fact.things):
            return False
        return self._scene.holds(fact)


def _step_record(
    one: Outcome, scene: TableScene, *, before: bytes, effect: bool, renderer: Renderer
) -> Record:
    """What was said and done, and how good the keyframe is, against what physics made of it."""
    executed, result = one.executed, one.executed.result
    values: Record = {
        "text": one.step.text,
        "subtask": None if executed.subtask is None else executed.subtask.to_dict(),
        "executable": executed.subtask is not None and (result.done or result.control_steps > 0),
        "done": result.done,
        "reason": result.reason,
        "reached": effect,
        "control_steps": result.control_steps,
        "used_picture": executed.used_picture,
        "scores": {name: round(float(value), 4) for name, value in one.step.scores.items()},
        "keyframe": None,
    }
    if one.step.keyframe is not None:
        scene.restore(before)
        view = see(scene, renderer, size=one.frame.shape[:2])
        judged = judged_keyframe(one.step.keyframe, scene, view, subtask=executed.subtask)
        values["keyframe"] = judged.to_dict()
    return values


def _with_pictures(record: Record, episode: RobotEpisode) -> SceneResult:
    side = (SHOWN_PX, SHOWN_PX)
    blank = np.full((*side, 3), 128, np.uint8)
    frames = [one.step.keyframe for one in episode.outcomes]
    return SceneResult(
        record=record,
        columns=("start", *(one.step.text for one in episode.outcomes)),
        imagined=[blank, *(blank if one is None else resized(one, side) for one in frames)],
        seen=[resized(episode.first, side), *(resized(one.frame, side) for one in episode.outcomes)],
    )
