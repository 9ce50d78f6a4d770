"""Command `plan`: imagine how a table-top task is done, carry the plan out in physics, and judge it.

It writes the plan as a file (`plan.json` with its keyframes), a strip of imagined beside executed keyframes,
a film and the verdict. `run=FOLDER` carries out a plan that is there already.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mujoco
from PIL import Image

from emuworld.agents.agent import Agent
from emuworld.agents.baselines import KnownPlan
from emuworld.agents.planner import STRATEGIES, PlannerConfig
from emuworld.agents.plans import Plan, load_plan, save_plan
from emuworld.envs.render import checked_backend, make_renderer
from emuworld.envs.rooms.scenes import SPLITS
from emuworld.envs.tabletop.franka import checked_arm
from emuworld.envs.tabletop.orders import draw_task, task_of_prompt
from emuworld.envs.tabletop.plans import Task
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.subtasks import parse
from emuworld.tasks.checks import check_amounts, check_choices
from emuworld.tasks.film import write_film
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.robot.agents import AGENTS, NEEDS_MODEL, make_agent
from emuworld.tasks.robot.episode import Outcome, RobotEpisode, Workplace, run_agent
from emuworld.tasks.robot.keyframe_execution import USES
from emuworld.tasks.robot.plan_pictures import SECONDS_A_SHOT, ArmFilm, strip
from emuworld.world_model import WorldModel, load


@dataclass(frozen=True, kw_only=True)
class MakePlan:
    """Imagine how a table-top task is done, carry the plan out in physics, and judge it."""

    instruction: str | None = None  # one subtask that names its place; null = a task drawn from the split
    run: str | None = None  # folder of a plan to carry out again instead of imagining one
    # planner | guide (mode howto's illustrated steps, followed as they stand) | text-only | scripted | oracle
    # | random | none
    agent: str = "planner"
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
    renderer: str = "auto"  # auto | gl | rays | cuda
    arm: str = "primitive"  # primitive | franka (the Panda's meshes, out of gymnasium-robotics)
    film: bool = True  # write film.mp4
    out: str = "outputs/plan"  # folder of plan.json, strip.png and film.mp4

    def __post_init__(self) -> None:
        """ValueError for what cannot be done, before a picture is imagined."""
        check_choices(self, agent=AGENTS, use=USES, split=tuple(SPLITS), strategy=STRATEGIES)
        check_amounts(self, 1, "size_px", "num_plans", "max_pictures", "max_steps")
        checked_backend(self.renderer)
        if self.run is not None:
            if self.instruction is not None:
                raise ValueError(
                    "run=FOLDER carries out a plan that has its instruction; leave instruction out"
                )
            place = Path(self.run)
            if (place.parent if place.suffix == ".json" else place).resolve() == Path(self.out).resolve():
                raise ValueError(
                    f"run and out are both {self.out}: the plan would be overwritten; give another out=FOLDER"
                )
        elif self.instruction is not None:
            step = parse(self.instruction)
            if step is None or step.from_picture:
                raise ValueError(
                    f"instruction={self.instruction!r} is no subtask that names its place, so no table can "
                    "be laid for it; say, for example, 'put the red cube on the blue plate', 'stack the "
                    "green cube on the red cube', 'push the blue cylinder to the left' or 'open the drawer', "
                    "or leave it out: then a task of the split is drawn"
                )


def run(config: MakePlan, *, on_progress: OnProgress = quiet) -> Path:
    """Plan, carry out, judge, write; returns the path of `plan.json`."""
    given = None if config.run is None else load_plan(Path(config.run))
    task = _task(config, given)
    model = load(config.model, device=config.device) if _needs_model(config) else None
    if model is not None and (mode := NEEDS_MODEL[config.agent]) not in model.manifest.modes:
        print(untrained(model, mode), file=sys.stderr)
    renderer = make_renderer(config.renderer)
    try:
        scene, size = TableScene.from_dict(task.scene), (config.size_px, config.size_px)
        place = Workplace(task=task, scene=scene, renderer=renderer, size=size)
        agent = _agent(config, place, given, model)
        film = ArmFilm(renderer, size=size)

        def tell(outcome: Outcome) -> None:
            film.tell(outcome)
            done.append(outcome)
            on_progress("subtasks", len(done), config.max_steps)

        done: list[Outcome] = []
        episode = run_agent(
            place,
            agent,
            seed=config.seed,
            use=config.use,
            max_steps=config.max_steps,
            on_step=tell,
            on_motion=film.shoot if config.film else None,
        )
    finally:
        renderer.close()
    path = _write(config, task, episode, film, _provenance(config, model, given))
    _say(task, episode, path)
    return path


def untrained(model: WorldModel, mode: str) -> str:
    """What is said of plans by a model that was never shown the mode that they are asked in."""
    modes = ", ".join(model.manifest.modes)
    return (
        f"This model was trained for {modes}, not for {mode}: what it plans for a robot means little. "
        "agent=oracle and agent=scripted plan without a model"
    )


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
    film: ArmFilm,
    provenance: dict[str, Any],
) -> Path:
    out = Path(config.out)
    path = save_plan(out, plan_of(task, episode, provenance=provenance))
    Image.fromarray(strip(episode)).save(out / "strip.png")
    (out / "film.mp4").unlink(missing_ok=True)  # of an earlier plan
    if config.film and film.shots:
        write_film(out / "film.mp4", film.shots, seconds_a_shot=SECONDS_A_SHOT)
    return path


def _say(task: Task, episode: RobotEpisode, path: Path) -> None:
    print(f"“{task.instruction}”")
    if not episode.outcomes:
        print("   the agent had nothing to do or say")
    for number, one in enumerate(episode.outcomes, start=1):
        print(f"{number}. {one.step.text}: {one.executed.result.reason}")
    for fact, holds in episode.facts.items():
        print(f"   {'yes' if holds else 'no '} {fact}")
    print(f"{'Success' if episode.success else 'No success'}. The plan is in {path}, pictures beside it")
