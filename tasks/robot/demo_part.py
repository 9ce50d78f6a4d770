"""The robot's part of the demo's page: one instruction planned, carried out in physics and judged there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from emuworld.agents.objectives import resized
from emuworld.agents.planner import PlannerConfig
from emuworld.envs.render import shared_renderer
from emuworld.envs.tabletop.plans import Task
from emuworld.envs.tabletop.scene import TableScene
from emuworld.tasks import page
from emuworld.tasks.film import write_film
from emuworld.tasks.robot.agents import make_agent
from emuworld.tasks.robot.episode import RobotEpisode, Workplace, run_agent
from emuworld.tasks.robot.plan_pictures import SECONDS_A_SHOT, ArmFilm
from emuworld.tasks.run_folder import PictureRow, Pictures
from emuworld.world_model import WorldModel

FILM_NAME = "robot.mp4"
_SIZE = (256, 256)
# A keyframe takes the small model some seconds on two cores.
_PLANNER = PlannerConfig(num_plans=2, max_pictures=16, max_steps=5)


def robot_part(model: WorldModel, task: Task, out: Path, *, seed: int) -> str:
    """The section of the page; writes the film into `out`.

    The world model plans if its checkpoint was trained for vla. If it was not, the task's own plan is carried
    out instead, and the page says so.
    """
    agent_name = "planner" if "vla" in model.manifest.modes else "oracle"
    scene, renderer = TableScene.from_dict(task.scene), shared_renderer()
    place = Workplace(task=task, scene=scene, renderer=renderer, size=_SIZE)
    agent = make_agent(agent_name, place, model=model, config=_PLANNER)
    film = ArmFilm(renderer, size=_SIZE)
    episode = run_agent(place, agent, seed=seed, on_step=film.tell, on_motion=film.shoot)
    if film.shots:
        write_film(out / FILM_NAME, film.shots, seconds_a_shot=SECONDS_A_SHOT)
    who = _who(model.manifest.modes, agent_name)
    return _section(
        task,
        episode,
        f"A table of the {task.scene['origin']['split']} split. {who}",
        has_film=bool(film.shots),
    )


def _section(task: Task, episode: RobotEpisode, about: str, *, has_film: bool) -> str:
    verdict = "Success" if episode.success else "No success"
    parts = [
        page.text(
            f"“{task.instruction}” {about} A simulated arm carries each step out by contact physics, and "
            f"MuJoCo's state, no picture, says what is true in the end: {verdict}."
        ),
        page.picture_rows(_pictures(episode)),
        page.table(
            head=["goal", "at the end"],
            rows=[[goal, "met" if holds else "missed"] for goal, holds in episode.facts.items()],
        ),
    ]
    if has_film:
        parts.append(page.video(FILM_NAME, caption="The arm at work, twice as fast as it was."))
    return page.section("A robot: planned, carried out, judged", *parts)


def _who(modes: Sequence[str], agent_name: str) -> str:
    if agent_name == "planner":
        return (
            f"The world model imagined {_PLANNER.num_plans} plans from the first view, each step with the "
            "picture at its end; the best is carried out, words and pictures together, or words alone where "
            "what was seen was another picture and none is left to imagine."
        )
    return (
        f"This checkpoint was trained for {' and '.join(modes)} only, so it has not planned this: the plan "
        "is the task's own, known one, and nothing was imagined. A checkpoint trained for vla plans here."
    )


def _pictures(episode: RobotEpisode) -> Pictures:
    """Imagined beside executed keyframes; the imagined row only where something was imagined."""
    columns = ["start", *(one.step.text for one in episode.outcomes)]
    notes = ["", *(one.executed.result.reason for one in episode.outcomes)]
    executed = PictureRow(
        name="executed", frames=[episode.first, *(one.frame for one in episode.outcomes)], notes=notes
    )
    keyframes = [one.step.keyframe for one in episode.outcomes]
    if all(one is None for one in keyframes):
        return Pictures(title="", columns=columns, rows=[executed])
    blank = np.full_like(episode.first, 128)
    imagined = [blank if one is None else resized(one, _SIZE) for one in keyframes]
    said = ["", *("the words alone" if one is None else "" for one in keyframes)]
    rows = [PictureRow(name="imagined", frames=[episode.first, *imagined], notes=said), executed]
    return Pictures(title="", columns=columns, rows=rows)
