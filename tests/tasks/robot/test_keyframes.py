"""Keyframes read, carried out and scored, on frames of the simulator whose truth is known, and worse ones."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image, ImageFilter
from robot_tables import table

from emuworld.agents.agent import Step
from emuworld.envs.render import Renderer, make_renderer
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.subtasks import Subtask, canonical, parse
from emuworld.tasks.robot.calibration import Frame
from emuworld.tasks.robot.keyframe_execution import (
    execute_step,
    goal_position,
    read_goal,
    read_subtask,
    see,
    take_up,
)
from emuworld.tasks.robot.keyframe_readout import Reading
from emuworld.tasks.robot.keyframe_scores import score_keyframe
from emuworld.tasks.robot.table_view import TableView

PLACES = {
    "on the table": ("red cube", (0.50, 0.20), "table"),
    "behind a like colour": ("red cube", (0.33, -0.28), "table"),
    "on the plate": ("blue ball", (0.47, 0.26), "blue plate"),
    "in the bin": ("green cylinder", (0.56, -0.30), "wooden bin"),
    "on a cube": ("red cube", (0.60, -0.05), "yellow cube"),
}


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    drawing = make_renderer("rays")  # on every machine the same
    yield drawing
    drawing.close()


@pytest.fixture(scope="module")
def scene() -> TableScene:
    return table()


@pytest.fixture(scope="module")
def view(scene: TableScene, renderer: Renderer) -> TableView:
    scene.reset()
    return see(scene, renderer, size=(192, 192))


def shown_at(view: TableView, name: str, xy: tuple[float, float]) -> tuple[Frame, np.ndarray]:
    """A keyframe with the object elsewhere, and where that is."""
    spot = view.target(name).resting(*xy)
    assert spot is not None
    return view.drawn_with({name: spot[0]}), spot[0]


@pytest.mark.parametrize("case", PLACES)
def test_places_are_read_without_words(view: TableView, case: str) -> None:
    name, xy, on = PLACES[case]
    keyframe, truth = shown_at(view, name, xy)
    words = Subtask(skill="place", target=name)
    reading = read_goal(take_up(keyframe, view), view, words)
    assert reading is not None and reading.found and reading.on == on and len(reading.sightings) == 1
    assert np.linalg.norm(reading.position - truth) < 0.008
    assert goal_position(words, reading) is not None


def jpeg(frame: Frame) -> Frame:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=20)
    return np.array(Image.open(buffer).convert("RGB"))


def blurred(frame: Frame) -> Frame:
    return np.array(Image.fromarray(frame).filter(ImageFilter.GaussianBlur(1.5)))


def tinted(frame: Frame) -> Frame:
    return np.clip(frame * np.array([1.3, 0.8, 0.65]), 0, 255).astype(np.uint8)


def moved(frame: Frame) -> Frame:
    return np.roll(frame, (2, -3), axis=(0, 1))


def noisy(frame: Frame) -> Frame:
    return np.clip(frame + np.random.default_rng(0).normal(0, 20, frame.shape), 0, 255).astype(np.uint8)


def coarse(frame: Frame) -> Frame:
    """Half the pixels: what a model of another size draws."""
    return np.array(Image.fromarray(frame).resize((96, 96), Image.Resampling.BOX))


def all_of_it(frame: Frame) -> Frame:
    return jpeg(blurred(noisy(tinted(moved(frame)))))


@pytest.mark.parametrize("damage", [jpeg, blurred, tinted, moved, noisy, coarse, all_of_it])
@pytest.mark.parametrize("case", ["on the table", "in the bin"])
def test_damaged_pictures_are_read(view: TableView, damage: Callable[[Frame], Frame], case: str) -> None:
    name, xy, on = PLACES[case]
    keyframe, truth = shown_at(view, name, xy)
    reading = read_goal(take_up(damage(keyframe), view), view, Subtask(skill="place", target=name))
    assert reading is not None and reading.found and reading.on == on
    assert np.linalg.norm(reading.position - truth) < 0.02


def test_nothing_moved_and_nothing_there(view: TableView) -> None:
    words = Subtask(skill="place", target="blue ball")
    reading = read_goal(take_up(view.frame, view), view, words)
    assert reading is not None and reading.moved_m < 0.02 and goal_position(words, reading) is None
    (gone,) = view.target("blue ball").backgrounds
    reading = read_goal(take_up(gone, view), view, words)
    assert reading is not None and not reading.found and goal_position(words, reading) is None


def test_words_that_name_another_place_are_not_overruled(view: TableView) -> None:
    keyframe, _ = shown_at(view, "red cube", (0.50, 0.20))
    words = Subtask(skill="place", target="red cube", destination="blue plate", relation="on")
    reading = read_goal(take_up(keyframe, view), view, words)
    assert isinstance(reading, Reading) and reading.on == "table" and goal_position(words, reading) is None


@pytest.mark.parametrize(
    "text", ["press the button", "open the drawer", "put the pink cube on the blue plate"]
)
def test_words_without_a_place_to_read(view: TableView, text: str) -> None:
    subtask = parse(text)
    assert subtask is not None and read_goal(take_up(view.frame, view), view, subtask) is None


ORDERS = [
    Subtask(skill="place", target="blue ball", destination="blue plate", relation="on"),
    Subtask(skill="stack", target="red cube", destination="yellow cube"),
    Subtask(skill="push", target="red cube", relation="left"),
]


@pytest.mark.parametrize("order", ORDERS, ids=canonical)
def test_own_end_frames_are_carried_out(scene: TableScene, renderer: Renderer, order: Subtask) -> None:
    """What physics ended with, seen through the camera, is reached again from words and picture."""
    scene.reset()
    view = see(scene, renderer)
    before = scene.save()
    assert scene.execute(order).done
    truth, end = scene.state(order.target).position, see(scene, renderer).frame
    scene.restore(before)
    done = execute_step(scene, Step(text=canonical(order), keyframe=end), view=view)
    assert done.used_picture and (done.result.done or order.skill == "push")
    # A push turns a cube and lets it slip; what is held goes where it is put.
    assert np.linalg.norm(scene.state(order.target).position - truth) < (
        0.04 if order.skill == "push" else 0.02
    )


def test_the_keyframe_matters(scene: TableScene, renderer: Renderer) -> None:
    """A goal place that is only in the picture: words alone cannot reach it, the picture alone can."""
    scene.reset()
    before, view = scene.save(), see(scene, renderer)
    keyframe, goal = shown_at(view, "red cube", (0.50, 0.20))
    step = Step(text="put the red cube where the picture shows", keyframe=keyframe)
    missed = {}
    for use in ("both", "text", "keyframe"):
        scene.restore(before)
        executed = execute_step(scene, step, view=see(scene, renderer), use=use)
        missed[use] = float(np.linalg.norm(scene.state("red cube").position - goal))
        assert executed.used_picture == (use != "text")
    assert missed["both"] < 0.02 and missed["keyframe"] < 0.02 and missed["text"] > 0.1


def test_a_picture_in_which_nothing_moves_asks_for_nothing(scene: TableScene, renderer: Renderer) -> None:
    scene.reset()
    view = see(scene, renderer, size=(192, 192))
    assert read_subtask(take_up(view.frame, view), view) == (None, None)
    assert read_subtask(take_up(noisy(view.frame), view), view) == (None, None)


def test_words_that_mean_nothing_change_nothing(scene: TableScene, renderer: Renderer) -> None:
    scene.reset()
    before = scene.save()
    executed = execute_step(scene, Step(text="make tea"), view=see(scene, renderer, size=(64, 64)))
    assert executed.subtask is None and not executed.result.done and scene.save() == before
    with pytest.raises(ValueError, match="use="):
        execute_step(scene, Step(text=""), view=see(scene, renderer), use="luck")


def pasted(view: TableView, name: str, *, rows: int, columns: int) -> Frame:
    """The present frame with a second copy of an object, some pixels off the first."""
    frame, mask = view.frame.copy(), view.mask(name)
    where = np.nonzero(mask)
    frame[where[0] + rows, where[1] + columns] = view.frame[where]
    return frame


@pytest.mark.parametrize("damage", [lambda frame: frame, jpeg, tinted], ids=["clean", "jpeg", "tinted"])
def test_faults_of_a_keyframe_are_named(view: TableView, damage: Callable[[Frame], Frame]) -> None:
    right, _ = shown_at(view, "red cube", (0.50, 0.20))
    scores = score_keyframe(damage(right), view, moved=["red cube"])
    assert scores.is_clean and scores.num_seen == scores.num_expected == 5
    (gone,) = view.target("green cylinder").backgrounds
    assert score_keyframe(damage(gone), view).missing == ("green cylinder",)
    strayed, _ = shown_at(view, "blue ball", (0.50, 0.03))
    assert score_keyframe(damage(strayed), view).moved_bystanders == ("blue ball",)
    twice = pasted(view, "yellow cube", rows=-8, columns=42)
    assert score_keyframe(damage(twice), view).duplicated == ("yellow cube",)


def test_drift_comes_in_three_parts(view: TableView) -> None:
    clean = score_keyframe(view.frame, view).drift
    assert clean.photometric < 0.5 and clean.camera_px == 0.0 and clean.residual < 0.5 and clean.ssim > 0.999
    colour = score_keyframe(tinted(view.frame), view).drift
    expected = np.abs(np.array([1.3, 0.8, 0.65]) - 1).mean() * 128
    assert colour.photometric == pytest.approx(expected, rel=0.15) and colour.camera_px == 0.0
    off = score_keyframe(moved(view.frame), view).drift
    assert off.camera_px == pytest.approx(np.hypot(2, 3), abs=0.4) and off.photometric < 3.0
    rough = score_keyframe(noisy(view.frame), view).drift
    assert rough.residual > 8.0 and rough.photometric < 3.0 and rough.camera_px == 0.0
