"""Both renderers on the table-top and the arm: against geometry, and against each other."""

import numpy as np
import pytest
from numpy.typing import NDArray

from emuworld.envs.render import GlRenderer, RayRenderer, Renderer, probe_gl
from emuworld.envs.rendering.camera import Camera
from emuworld.envs.tabletop.orders import task_of_prompt
from emuworld.envs.tabletop.plans import sample_task
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.subtasks import Subtask

# Measured 2026-11 against Mesa 22.3 (llvmpipe) and mujoco 4.0.0 at 256 px over 12 tables before and after a
# subtask: mean absolute difference 0.38 to 0.78 of 255 levels, 0.3 % to 1.7 % of pixels off by more than 16,
# geom ids equal in 99.7 % and more. What is left are edges: OpenGL draws round shapes as polyhedra and
# shadows from a map of 1024 px, and an arm has more of both than a room.
PARITY_MEAN_LEVELS, PARITY_SHARE_OVER_16, PARITY_SEGMENTS = 0.9, 0.02, 0.995
SIZE = 256


@pytest.fixture(scope="module")
def gl() -> Renderer:
    platform = probe_gl()
    if platform is None:
        pytest.skip("neither EGL nor OSMesa draws a frame on this machine")
    return GlRenderer(platform)


@pytest.fixture(params=["rays", "gl"], scope="module")
def renderer(request: pytest.FixtureRequest) -> Renderer:
    return request.getfixturevalue("gl") if request.param == "gl" else RayRenderer()


def set_table(prompt: str, seed: int = 0) -> TableScene:
    return TableScene.from_dict(task_of_prompt(prompt, "train", seed).scene)


def segmentation(renderer: Renderer, scene: TableScene, size: int = SIZE) -> NDArray[np.int32]:
    return renderer.segmentation(scene.model, scene.data, scene.camera(), height=size, width=size)


def picture(renderer: Renderer, scene: TableScene) -> NDArray[np.uint8]:
    return renderer.render(scene.model, scene.data, scene.camera(), height=SIZE, width=SIZE)


def pixel_of(camera: Camera, point: NDArray[np.float64]) -> tuple[int, int]:
    """Row and column of a point in world coordinates."""
    right, up, back = (point - camera.position) @ camera.rotation
    focal = SIZE / 2 / np.tan(camera.fovy_rad / 2)
    return int(SIZE / 2 + focal * up / back), int(SIZE / 2 - focal * right / back)


@pytest.mark.parametrize("seed", range(3))
def test_things_are_where_geometry_says(renderer: Renderer, seed: int) -> None:
    scene = TableScene.from_dict(sample_task("pick-place", "train", seed).scene)
    ids, camera = segmentation(renderer, scene), scene.camera()
    pixels = picture(renderer, scene)
    for item in scene.objects:
        row, column = pixel_of(camera, np.array(item.position))
        assert scene.identity_of_geom(int(ids[row, column])) == item.name
        if item.colour in ("red", "green", "blue"):
            channel = ("red", "green", "blue").index(item.colour)
            assert pixels[row, column].argmax() == channel
    row, column = pixel_of(camera, np.array([0.0, 0.0, 0.1]))
    assert scene.identity_of_geom(int(ids[row, column])) == "robot"


@pytest.mark.parametrize(
    "prompt, skill, target",
    [
        ("put the red cube on the blue plate", "pick", "red cube"),
        ("put the green ball in the wooden bin", "place", "green ball"),
        ("open the drawer", "open", "drawer"),
        ("press the button", "press", "button"),
    ],
)
def test_rays_draw_what_opengl_draws(gl: Renderer, prompt: str, skill: str, target: str) -> None:
    rays = RayRenderer()
    scene = set_table(prompt)
    if skill == "place":
        step = Subtask(skill=skill, target=target, destination="wooden bin", relation="in")
    else:
        step = Subtask(skill=skill, target=target)
    for done in (False, True):
        if done:
            assert scene.execute(step).done
        levels = np.abs(picture(gl, scene).astype(int) - picture(rays, scene))
        assert levels.mean() < PARITY_MEAN_LEVELS
        assert (levels.max(axis=-1) > 16).mean() < PARITY_SHARE_OVER_16
        assert (segmentation(gl, scene) == segmentation(rays, scene)).mean() > PARITY_SEGMENTS


def test_a_pressed_button_lights_its_lamp(renderer: Renderer) -> None:
    scene = set_table("press the button")
    lamp = scene.model.geom("lamp/button").id
    shown = segmentation(renderer, scene) == lamp
    assert shown.sum() >= 4
    before = picture(renderer, scene)[shown].mean(axis=0)
    assert scene.execute(Subtask(skill="press", target="button")).done
    after = picture(renderer, scene)[segmentation(renderer, scene) == lamp].mean(axis=0)
    assert after[1] > before[1] + 60 and after[1] > after[0] + 30


def test_a_renderer_keeps_tables_apart(renderer: Renderer) -> None:
    scenes = [set_table("press the button", seed) for seed in range(3)]
    first = [picture(renderer, scene) for scene in scenes]
    assert (first[0] != first[1]).any() and (first[1] != first[2]).any()
    for scene, before in reversed(list(zip(scenes, first, strict=True))):
        np.testing.assert_array_equal(picture(renderer, scene), before)
