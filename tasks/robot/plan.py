"""Command `plan`: imagine how a table-top task is done, carry the plan out in physics, and judge it.

It writes the plan as a file (`plan.json` with its keyframes), a strip of imagined beside executed keyframes,
a film and the verdict. `run=FOLDER` carries out a plan that is there already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from PIL import Image

from emuworld.agents.agent import Agent
from emuworld.agents.baselines import KnownPlan
from emuworld.agents.objectives import resized
from emuworld.agents.planner import PlannerConfig
from emuworld.agents.plans import Plan, load_plan, save_plan
from emuworld.envs.render import Renderer, make_renderer
from emuworld.envs.tabletop.franka import checked_arm
from emuworld.envs.tabletop.orders import draw_task, task_of_prompt
from emuworld.envs.tabletop.plans import Task
from emuworld.envs.tabletop.scene import TableScene
from emuworld.tasks.film import captioned, side_by_side, write_film
from emuworld.tasks.robot.agents import NEEDS_MODEL, Workplace, make_agent
from emuworld.tasks.robot.calibration import Frame
from emuworld.tasks.robot.episode import Outcome, RobotEpisode, run_agent
from emuworld.world_model import WorldModel, load

OnProgress = Callable[[str, int, int], None]

_FILM_EVERY = 5  # control steps of 40 ms: five pictures a second of the arm's time, shown twice as fast


@dataclass(frozen=True, kw_only=True)
class MakePlan:
    """Imagine how a table-top task is done, carry the plan out in physics, and judge it."""

    instruction: str | None = None  # one subtask that names its place; null = a task drawn from the split
    run: str | None = None  # folder of a plan to carry out again instead of imagining one
    agent: str = "planner"  # planner | text-only | scripted | oracle | random | none
    use: str = "both"  # both | text | keyframe: what is believed when it is carried out
    seed: int = 0  # of the table and of what is imagined
    split: str = "test"  # train | validation | test: which tables
    model: str = "small"  # a built-in name or a checkpoint folder
    device: str = "auto"  # auto | cpu | cuda
    size_px: int = 256  # height and width of what is seen
    num_plans: int = 4  # imagined side by side
    strategy: str = "sample"  # sample | beam
    max_pictures: int = 64  # imagined at most
    max_steps: int = 16  # subtasks carried out at most
    renderer: str = "auto"  # auto | gl | rays
    arm: str = "primitive"  # primitive | franka (the Panda's meshes, out of gymnasium-robotics)
    film: bool = True  # write film.mp4
    out: str = "outputs/plan"  # folder of plan.json, strip.png and film.mp4


def quiet(label: str, done: int, total: int) -> None:
    """No report of progress."""


def run(config: MakePlan, *, on_progress: OnProgress = quiet) -> Path:
    """Plan, carry out, judge, write; returns the path of `plan.json`."""
    given = None if config.run is None else load_plan(Path(config.run))
    task = _task(config, given)
    model = load(config.model, device=config.device) if _needs_model(config) else None
    renderer = make_renderer(config.renderer)
    try:
        scene, size = TableScene.from_dict(task.scene), (config.size_px, config.size_px)
        place = Workplace(task=task, scene=scene, renderer=renderer, size=size)
        agent = _agent(config, place, given, model)
        film: list[tuple[Frame, str]] = []
        episode = run_agent(
            task,
            agent,
            renderer=renderer,
            scene=scene,
            size=size,
            seed=config.seed,
            use=config.use,
            max_steps=config.max_steps,
            on_step=_told(config, on_progress),
            on_motion=_filming(config, renderer, film),
        )
    finally:
        renderer.close()
    path = _write(config, task, episode, film, _provenance(config, model, given))
    _say(episode, path)
    return path


def plan_of(task: Task, episode: RobotEpisode, *, provenance: dict[str, Any]) -> Plan:
    """What was done as a plan: steps with the keyframes that were imagined for them, and the verdict."""
    return Plan(
        instruction=task.instruction,
        frame=episode.first,
        steps=tuple(one.step for one in episode.outcomes),
        predicates=tuple((one.name, *one.args) for one in task.goal),
        scores=episode.outcomes[0].step.scores if episode.outcomes else {},
        task=task.to_dict(),
        provenance=provenance,
        verdict=episode.verdict(),
    )


def strip(episode: RobotEpisode) -> Frame:
    """Imagined keyframes above what came out, one column a step; grey where nothing was imagined."""
    blank = np.full_like(episode.first, 128)
    columns = [captioned(np.concatenate([blank, episode.first]), "start")]
    for one in episode.outcomes:
        imagined = blank if one.step.keyframe is None else resized(one.step.keyframe, blank.shape[:2])
        columns.append(captioned(np.concatenate([imagined, one.frame]), one.step.text))
    return side_by_side(columns)


def _task(config: MakePlan, given: Plan | None) -> Task:
    if given is not None:
        if not given.task:
            raise ValueError(f"the plan in {config.run} holds no task, so there is no table to do it on")
        return Task.from_dict(given.task)
    if config.instruction is None:
        task = draw_task(config.split, config.seed)
    else:
        task = task_of_prompt(config.instruction, config.split, config.seed)
    return replace(task, scene={**task.scene, "arm": checked_arm(config.arm)})


def _needs_model(config: MakePlan) -> bool:
    return config.run is None and config.agent in NEEDS_MODEL


def _agent(config: MakePlan, place: Workplace, given: Plan | None, model: WorldModel | None) -> Agent:
    if given is not None:
        return KnownPlan(given.steps)
    settings = PlannerConfig(
        num_plans=config.num_plans,
        strategy=config.strategy,
        max_pictures=config.max_pictures,
        max_steps=config.max_steps,
    )
    return make_agent(config.agent, place, model=model, config=settings)


def _told(config: MakePlan, on_progress: OnProgress) -> Callable[[Outcome], None]:
    done: list[Outcome] = []

    def tell(outcome: Outcome) -> None:
        done.append(outcome)
        on_progress(outcome.step.text, len(done), config.max_steps)

    return tell


def _filming(
    config: MakePlan, renderer: Renderer, film: list[tuple[Frame, str]]
) -> Callable[[TableScene], None] | None:
    if not config.film:
        return None
    steps = 0

    def shoot(scene: TableScene) -> None:
        nonlocal steps
        steps += 1
        if steps % _FILM_EVERY == 0:
            side = config.size_px
            shot = renderer.render(scene.model, scene.data, scene.camera(), height=side, width=side)
            film.append((shot, ""))

    return shoot


def _provenance(config: MakePlan, model: WorldModel | None, given: Plan | None) -> dict[str, Any]:
    made = {
        "agent": config.agent if given is None else "known plan",
        "use": config.use,
        "seed": config.seed,
        "mujoco": mujoco.__version__,
    }
    if model is not None:
        made |= {"model": config.model, "fingerprint": model.fingerprint.hex()}
    return made if given is None else made | {"plan": dict(given.provenance)}


def _write(
    config: MakePlan,
    task: Task,
    episode: RobotEpisode,
    film: list[tuple[Frame, str]],
    provenance: dict[str, Any],
) -> Path:
    out = Path(config.out)
    path = save_plan(out, plan_of(task, episode, provenance=provenance))
    Image.fromarray(strip(episode)).save(out / "strip.png")
    if film:
        write_film(out / "film.mp4", [(shot, task.instruction) for shot, _ in film], seconds_a_shot=0.1)
    return path


def _say(episode: RobotEpisode, path: Path) -> None:
    for number, one in enumerate(episode.outcomes, start=1):
        print(f"{number}. {one.step.text}: {one.executed.result.reason}")
    for fact, holds in episode.facts.items():
        print(f"   {'yes' if holds else 'no '} {fact}")
    print(f"{'Success' if episode.success else 'No success'}. The plan is in {path}")
