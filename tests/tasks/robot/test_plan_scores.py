"""Objectives that know the scene: plans whose worth is known by construction."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from robot_tables import table

from emuworld.agents.agent import Assignment, Step
from emuworld.agents.objectives import ImaginedPlan
from emuworld.envs.render import make_renderer
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.scene import TableScene
from emuworld.tasks.robot.plan_scores import PlanScores, goals_in_words
from emuworld.tasks.robot.table_view import TableView

SIZE = (128, 128)
WORDS = "Put the red cube on the blue plate."


@pytest.fixture(scope="module")
def judged() -> Iterator[tuple[TableScene, TableView, PlanScores]]:
    renderer, scene = make_renderer("rays"), table()
    yield (
        scene,
        TableView(scene, renderer=renderer, size=SIZE),
        PlanScores(scene, renderer=renderer, size=SIZE),
    )
    renderer.close()


def plan(view: TableView, *steps: tuple[str, str, tuple[float, float]], words: str = WORDS) -> ImaginedPlan:
    """Steps as a text, the object that its picture has elsewhere, and where; pictures add up."""
    places: dict[str, np.ndarray] = {}
    made = []
    for text, name, xy in steps:
        spot = view.target(name).resting(*xy)
        assert spot is not None
        places[name] = spot[0]
        made.append(Step(text=text, keyframe=view.drawn_with(places)))
    return ImaginedPlan(
        assignment=Assignment(instruction=words, frame=view.frame),
        frame=view.frame,
        steps=tuple(made),
        complete=True,
    )


Judged = tuple[TableScene, TableView, PlanScores]


def test_words_and_picture_make_the_goal(judged: Judged) -> None:
    _, view, scores = judged
    said = "put the red cube on the blue plate"
    both = plan(view, (said, "red cube", (0.45, 0.28)))
    elsewhere = plan(view, (said, "red cube", (0.50, 0.15)))
    neither = plan(view, ("push the blue ball away", "blue ball", (0.45, 0.12)))
    assert [scores.goal(one) for one in (both, elsewhere, neither)] == [1.0, 0.5, 0.0]


def test_beside_is_read_off_the_picture(judged: Judged) -> None:
    _, view, scores = judged
    words = "Put the green cylinder to the left of the yellow cube."
    right = plan(view, (words, "green cylinder", (0.60, -0.16)), words=words)
    wrong = plan(view, (words, "green cylinder", (0.60, 0.06)), words=words)
    assert (scores.goal(right), scores.goal(wrong)) == (1.0, 0.5)


def test_later_pictures_are_read_from_the_state_before_them(judged: Judged) -> None:
    """The cube is stacked on one that the first step has moved: at its old place nothing would carry it."""
    _, view, scores = judged
    words = "Put the yellow cube on the blue plate, then stack the red cube on the yellow cube."
    moved = view.target("yellow cube").resting(0.45, 0.28)
    assert moved is not None
    top = moved[0] + [0.0, 0.0, 0.056]
    steps = (
        Step(
            text="put the yellow cube on the blue plate", keyframe=view.drawn_with({"yellow cube": moved[0]})
        ),
        Step(
            text="stack the red cube on the yellow cube",
            keyframe=view.drawn_with({"yellow cube": moved[0], "red cube": top}),
        ),
    )
    made = ImaginedPlan(
        assignment=Assignment(instruction=words, frame=view.frame),
        frame=view.frame,
        steps=steps,
        complete=True,
    )
    assert scores.goal(made) == 1.0 and scores.plausible(made) > 0.8


def test_what_cannot_stand_is_not_plausible(judged: Judged) -> None:
    """A cube on the slope of a ball falls; on the table it stays; one that is nowhere cannot be put there."""
    scene, view, scores = judged
    before = scene.save()
    words = "put the red cube where the picture shows"
    stands = plan(view, (words, "red cube", (0.33, 0.15)))
    falls = plan(view, (words, "red cube", (0.565, 0.13)))
    (gone,) = view.target("red cube").backgrounds
    nowhere = ImaginedPlan(
        assignment=stands.assignment,
        frame=view.frame,
        steps=(Step(text=words, keyframe=gone),),
        complete=True,
    )
    assert scores.plausible(stands) > 0.9 and scores.plausible(falls) < 0.5
    assert scores.plausible(nowhere) == 0.0
    assert scene.save() == before  # judging leaves the scene as it was


def test_kept_counts_bystanders(judged: Judged) -> None:
    _, view, scores = judged
    said = "put the red cube on the blue plate"
    good = plan(view, (said, "red cube", (0.45, 0.28)))
    (gone,) = view.target("green cylinder").backgrounds
    bad = ImaginedPlan(
        assignment=good.assignment, frame=view.frame, steps=(Step(text=said, keyframe=gone),), complete=True
    )
    assert scores.kept(good) == 1.0 and scores.kept(bad) == pytest.approx(3 / 4)


@pytest.mark.parametrize(
    "words, goals",
    [
        (WORDS, [Predicate("On", ("red cube", "blue plate"))]),
        (
            "Open the drawer, put the red cube in it, and close the drawer.",
            [Predicate("Closed", ("drawer",)), Predicate("In", ("red cube", "drawer"))],
        ),
        (
            "Pick up the red ball and put it behind the white cube.",
            [Predicate("Behind", ("red ball", "white cube"))],
        ),
        (
            "Press the button, then push the red cube to the left.",
            [Predicate("Pressed", ("button",)), Predicate("Moved", ("red cube", "left"))],
        ),
        ("Pick up the red ball.", [Predicate("Held", ("red ball",))]),
        ("Put the red cube where the picture shows.", []),
        ("Tidy up!", []),
    ],
)
def test_goals_in_words(words: str, goals: list[Predicate]) -> None:
    assert list(goals_in_words(words)) == goals


def test_done_is_what_the_words_ask_for_and_the_table_shows() -> None:
    scene = table()
    renderer = make_renderer("rays")
    scores = PlanScores(scene, renderer=renderer, size=SIZE)
    assert scores.is_done(WORDS) is False
    plate = scene.state("blue plate").position
    scene.place_object("red cube", [float(plate[0]), float(plate[1]), float(plate[2]) + 0.05])
    scene.settle(0.5)
    assert scores.is_done(WORDS) is True
    assert scores.is_done(f"{WORDS} Then push the blue ball away.") is False
    assert scores.is_done("put every cube on the blue plate") is None  # which ones, the rules cannot tell
    assert scores.is_done("tidy up") is None
    renderer.close()


def test_spells_out_what_the_words_name_and_what_is_still_to_be_done() -> None:
    scene = table()
    renderer = make_renderer("rays")
    scores = PlanScores(scene, renderer=renderer, size=SIZE)
    more = f"{WORDS} Then push the blue ball away."
    assert scores.spelled_out(more) == ("put the red cube on the blue plate", "push the blue ball away")
    plate = scene.state("blue plate").position
    scene.place_object("red cube", [float(plate[0]), float(plate[1]), float(plate[2]) + 0.05])
    scene.settle(0.5)
    assert scores.spelled_out(more) == ("push the blue ball away",)
    assert scores.spelled_out("put the red cube where the picture shows") == (
        "put the red cube where the picture shows",
    )
    assert scores.spelled_out("put every cube on the blue plate") == ()
    assert scores.spelled_out("put the green cube on the blue plate") == ()  # there is none
    assert scores.spelled_out("tidy up") == ()
    renderer.close()
