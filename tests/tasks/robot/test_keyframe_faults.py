"""Judges of pictures against planted faults, and settling as the judge of places."""

import numpy as np
import pytest
from robot_tables import table

from emuworld.envs.render import make_renderer
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.subtasks import Subtask
from emuworld.tasks.robot.keyframe_execution import see
from emuworld.tasks.robot.keyframe_faults import falls, hidden_by, judge_the_judges, judged_keyframe
from emuworld.tasks.robot.suite import load_suite


@pytest.fixture(scope="module")
def scene() -> TableScene:
    return table()


def test_planted_faults_are_found_where_the_scene_is_easy() -> None:
    judged = judge_the_judges(load_suite()[0], renderer=make_renderer("rays"), size=(256, 256), seed=0)
    pictures = {one["name"]: one for one in judged["pictures"]}
    assert {"true frame", "missing", "moved", "duplicated", "hovering"} <= set(pictures)
    assert not any(pictures["true frame"]["found"].values())
    for fault in ("missing", "moved", "duplicated"):
        assert pictures[fault]["there"][fault] == pictures[fault]["found"][fault] != []
    assert judged["place_error_m"] < 0.01


def test_what_has_no_ground_falls(scene: TableScene) -> None:
    x, y, z = scene.state("red cube").position
    assert not falls(scene, "red cube", np.array([x, y, z]))
    scene.reset()
    assert falls(scene, "red cube", np.array([x, y, z + 0.1]))
    scene.reset()


def test_a_picture_of_a_cube_on_a_ball_is_one_that_falls(scene: TableScene) -> None:
    """The place is read off the picture, and physics does not keep the cube there."""
    view = see(scene, make_renderer("rays"))
    x, y, _ = scene.state("blue ball").position
    spot = view.target("red cube").resting(float(x), float(y) + 0.005)
    assert spot is not None and spot[1] == "blue ball"
    step = Subtask(skill="place", target="red cube")
    before = scene.save()
    judged = judged_keyframe(view.drawn_with({"red cube": spot[0]}), scene, view, subtask=step)
    assert judged.unsupported == ("red cube",) and scene.save() == before
    right = view.target("red cube").resting(0.50, 0.20)
    assert right is not None
    judged = judged_keyframe(view.drawn_with({"red cube": right[0]}), scene, view, subtask=step)
    assert judged.unsupported == () and judged.scores.is_clean


def test_what_is_held_or_shut_away_need_not_be_seen(scene: TableScene) -> None:
    assert hidden_by(scene, Subtask(skill="pick", target="red cube")) == ("red cube",)
    assert hidden_by(scene, Subtask(skill="close", target="drawer")) == ()
    assert hidden_by(scene, Subtask(skill="stack", target="red cube", destination="yellow cube")) == (
        "yellow cube",
    )
    assert hidden_by(scene, None) == ()
