"""Episodes and the command `plan`: oracle, words alone, nothing, and a plan that is run from its file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emuworld.agents.agent import Frame
from emuworld.agents.baselines import KnownPlan
from emuworld.agents.plans import load_plan
from emuworld.envs.render import Renderer, make_renderer
from emuworld.envs.tabletop.orders import task_of_prompt
from emuworld.envs.tabletop.plans import Task
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.subtasks import canonical
from emuworld.tasks.robot.agents import AGENTS, make_agent
from emuworld.tasks.robot.episode import RobotEpisode, Workplace, run_agent
from emuworld.tasks.robot.keyframe_execution import USES
from emuworld.tasks.robot.plan import MakePlan, run
from emuworld.tasks.robot.plan_pictures import ArmFilm, strip
from emuworld.tasks.robot.table_view import TableView
from emuworld.tasks.suites import RobotSuite
from emuworld.world_model import Sampling, Segment, WorldState

WORDS = "put the red cube on the blue plate"
SIDE = 128


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    drawing = make_renderer("rays")
    yield drawing
    drawing.close()


@pytest.fixture(scope="module")
def place(renderer: Renderer) -> Workplace:
    task = task_of_prompt(WORDS, "test", 4)
    scene = TableScene.from_dict(task.scene)
    return Workplace(task=task, scene=scene, renderer=renderer, size=(SIDE, SIDE))


class Dreams:
    """A world model that imagines the right subtask and the simulator's own drawing of its end, or a wrong
    one, by turns; the second segment ends the answer."""

    def __init__(self, place: Workplace, task: Task) -> None:
        view = TableView(place.scene, renderer=place.renderer, size=place.size)
        plate = place.scene.state("blue plate").position
        spot = view.target("red cube").resting(float(plate[0]), float(plate[1]))
        assert spot is not None
        self.keyframes = (view.drawn_with({"red cube": spot[0]}), view.frame)
        self.texts = (canonical(task.oracle[0]), "push the red cube away")
        self.seeds: list[int] = []

    def begin(
        self, *, mode: str, prompt: str = "", images: Iterable[Frame] = (), seed: int = 0
    ) -> WorldState:
        return WorldState(
            mode=mode, prompt_ids=(), answer_ids=(), seed=seed, step=0, size=None, ended=False,
            fingerprint=b"",
        )  # fmt: skip

    def imagine_batch(
        self,
        states: Sequence[WorldState],
        texts: Sequence[str | None],
        *,
        sampling: Sampling | None = None,
    ) -> list[tuple[WorldState, Segment]]:
        return [self._next(state) for state in states]

    def imagine_words(
        self, state: WorldState, *, sampling: Sampling | None = None, temperature: float | None = None
    ) -> str | None:
        segment = self._next(state)[1]
        return None if segment.image is None else segment.text

    def _next(self, state: WorldState) -> tuple[WorldState, Segment]:
        if state.seed not in self.seeds:
            self.seeds.append(state.seed)
        which = (self.seeds.index(state.seed) + 1) % 2  # the wrong one first
        over = state.step > 0
        segment = Segment(
            text="" if over else self.texts[which],
            image=None if over else self.keyframes[which],
            thought=None,
            ended=over,
        )
        return replace(state, step=state.step + 1, ended=over), segment


def work(place: Workplace, name: str, *, use: str = "both") -> RobotEpisode:
    model = Dreams(place, place.task)
    agent = make_agent(name, place, model=model)
    return run_agent(place, agent, use=use)


def test_oracle_and_scripted_succeed(place: Workplace) -> None:
    for name in ("oracle", "scripted"):
        episode = work(place, name)
        assert episode.success and episode.once and episode.share == 1.0, name
    verdict = episode.verdict()
    assert verdict["steps"][0]["done"] and json.loads(json.dumps(verdict)) == verdict


def test_nothing_and_random_do_not(place: Workplace) -> None:
    nothing = work(place, "none")
    assert not nothing.success and not nothing.once and nothing.outcomes == ()
    assert not work(place, "random").success


def test_planner_takes_the_good_dream_and_succeeds(place: Workplace) -> None:
    episode = work(place, "planner")
    assert [one.step.text for one in episode.outcomes] == [WORDS] and episode.success
    (outcome,) = episode.outcomes
    assert outcome.executed.used_picture and outcome.step.scores["goal"] == 1.0
    assert not work(place, "text-only").outcomes[0].executed.used_picture


def test_pictures_alone(place: Workplace) -> None:
    assert work(place, "planner", use="keyframe").success


class Guides(Dreams):
    """The same as a guide: the things first, then the right subtask in a sentence."""

    def _next(self, state: WorldState) -> tuple[WorldState, Segment]:
        texts = ("You need a red cube and a blue plate.", f"{self.texts[0].capitalize()}.")
        over = state.step >= len(texts)
        segment = Segment(
            text="" if over else texts[state.step],
            image=None if over else self.keyframes[(state.step + 1) % 2],
            thought=None,
            ended=over,
        )
        return replace(state, step=state.step + 1, ended=over), segment


@pytest.mark.parametrize("use", USES)
def test_a_good_guide_succeeds_with_its_words_and_with_its_pictures(place: Workplace, use: str) -> None:
    agent = make_agent("guide", place, model=Guides(place, place.task))
    episode = run_agent(place, agent, use=use)
    (outcome,) = episode.outcomes
    assert outcome.step.text == "Put the red cube on the blue plate." and episode.success
    assert outcome.executed.used_picture == (use != "text")


def test_a_bad_guide_is_followed_too(place: Workplace) -> None:
    """The same dream that the planner does not take."""
    episode = work(place, "guide")
    assert [one.step.text for one in episode.outcomes] == ["push the red cube away"] and not episode.success


def test_agents_are_checked(place: Workplace) -> None:
    with pytest.raises(ValueError, match="unknown"):
        make_agent("luck", place)
    with pytest.raises(ValueError, match="world model"):
        make_agent("planner", place)
    assert {"planner", "guide", "oracle", "none"} <= set(AGENTS)
    assert [RobotSuite(agent=name).agent for name in AGENTS] == list(AGENTS)


def test_command_writes_a_plan_that_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = MakePlan(
        instruction=WORDS, agent="oracle", seed=4, size_px=SIDE, renderer="rays", out=str(tmp_path / "a")
    )
    path = run(settings)
    assert path == tmp_path / "a" / "plan.json" and "Success" in capsys.readouterr().out
    assert {one.name for one in path.parent.iterdir()} == {"plan.json", "first.png", "strip.png", "film.mp4"}
    (tmp_path / "b").mkdir()
    for left in ("keyframe-07.png", "film.mp4"):  # of a longer plan with a film
        (tmp_path / "b" / left).write_bytes(b"")
    known = replace(settings, instruction=None, run=str(path.parent), film=False, out=str(tmp_path / "b"))
    again = run(known)
    assert {one.name for one in again.parent.iterdir()} == {"plan.json", "first.png", "strip.png"}
    one, other = load_plan(path), load_plan(again)
    assert one.verdict == other.verdict and one.verdict["success"]
    assert np.array_equal(one.frame, other.frame) and other.provenance["plan"] == one.provenance
    assert one.predicates == (("On", "red cube", "blue plate"),)
    with pytest.raises(ValueError, match="another out"):  # a shorter run would overwrite the plan
        replace(known, out=str(path.parent))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"use": "words"}, "use='words' is unknown; expected one of both"),
        ({"agent": "luck"}, "agent='luck' is unknown"),
        ({"strategy": "dfs"}, "strategy='dfs' is unknown; expected one of sample, beam"),
        ({"renderer": "opengl"}, "renderer='opengl' is unknown"),
        ({"num_plans": 0}, "num_plans=0; expected 1 or more"),
        ({"instruction": "make me a sandwich"}, "no subtask that names its place"),
        ({"instruction": WORDS, "run": "outputs/elsewhere"}, "leave instruction out"),
    ],
)
def test_what_cannot_be_planned_is_refused_at_once(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MakePlan(**wrong)


@pytest.mark.parametrize("words", ["make tea", "put the red cube where the picture shows"])
def test_words_for_which_no_table_can_be_laid(words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="put the red cube on the blue plate"):
        run(MakePlan(instruction=words, agent="oracle", out=str(tmp_path)))


def test_a_strip_has_a_row_for_what_was_imagined(place: Workplace) -> None:
    imagined, known = work(place, "planner"), work(place, "oracle")
    (planned,) = imagined.outcomes
    above, below = strip(imagined), strip(known)
    column = slice(SIDE + 8, 2 * SIDE + 8)  # the second, after a gap
    assert np.array_equal(above[:SIDE, column], planned.step.keyframe)
    assert np.array_equal(above[SIDE : 2 * SIDE, column], planned.frame)
    assert np.array_equal(below[:SIDE, column], known.outcomes[0].frame)


def test_a_film_says_what_is_done(place: Workplace) -> None:
    film = ArmFilm(place.renderer, size=(64, 64))
    agent = KnownPlan([WORDS, "open the drawer"])
    run_agent(replace(place, size=(64, 64)), agent, on_step=film.tell, on_motion=film.shoot)
    said = [words for _, words in film.shots]
    assert set(said[:-1]) == {WORDS} and len(said) > 20
    assert said[-1] == "open the drawer: there is no drawer on this table"
