"""The two renderers against analytic truth and against each other."""

import math
import os
import subprocess
import sys

import mujoco
import numpy as np
import pytest
from numpy.typing import NDArray

from emuworld.envs.render import Camera, GlRenderer, RayRenderer, Renderer, make_renderer, probe_gl
from emuworld.envs.rendering import first_hits, shadows
from emuworld.envs.rendering import gl as gl_module

# Measured 2026-11 against Mesa 22.3 (llvmpipe, the same through EGL and OSMesa), mujoco 4.0.0, on `ROOM` at
# 256 px for both views: mean absolute difference 0.45 and 0.61 of 255 levels, and 0.23 % and 0.31 % of pixels
# off by more than 16. What is left are edges: OpenGL draws round shapes as polyhedra, and shadows from a map
# of 2048 px.
PARITY_MEAN_LEVELS = 0.9
PARITY_SHARE_OVER_16 = 0.01

ROOM = """
<mujoco>
  <visual><headlight active="0"/><quality shadowsize="2048"/><map shadowscale="1"/></visual>
  <statistic extent="4"/>
  <asset>
    <texture name="floor" type="2d" builtin="checker" rgb1=".8 .7 .6" rgb2=".5 .4 .35" width="128"
             height="128" mark="edge" markrgb=".2 .2 .2"/>
    <texture name="checker" type="cube" builtin="checker" rgb1=".8 .7 .6" rgb2=".5 .4 .35" width="64"
             height="64"/>
    <texture name="gradient" type="cube" builtin="gradient" rgb1=".9 .8 .5" rgb2=".4 .5 .8" width="64"
             height="64"/>
    <texture name="noise" type="cube" builtin="flat" rgb1=".7 .3 .3" rgb2=".3 .3 .7" random=".05"
             mark="random" markrgb="1 1 1" width="64" height="64"/>
    <texture name="sky" type="skybox" builtin="gradient" rgb1=".5 .7 1" rgb2=".1 .2 .4" width="128"
             height="128"/>
    <material name="floor" texture="floor" texrepeat="4 4" specular=".2" shininess=".3"/>
    <material name="gradient" texture="gradient" specular="0"/>
    <material name="noise" texture="noise" specular=".1"/>
    <material name="checker" texture="checker" specular=".1"/>
    <material name="shiny" rgba=".2 .4 .9 1" specular=".9" shininess=".6"/>
    <mesh name="pyramid" vertex="-.3 -.3 0  .3 -.3 0  .3 .3 0  -.3 .3 0  0 0 .6"/>
  </asset>
  <worldbody>
    <light name="sun" type="directional" pos="1 -1 4" dir="-.3 .4 -1" diffuse=".5 .5 .45" specular=".2 .2 .2"
           castshadow="true"/>
    <light name="lamp" pos="0 0 2.3" dir="0 0 -1" cutoff="90" exponent="0" attenuation="1 .1 0"
           diffuse=".4 .4 .45" specular=".3 .3 .3" ambient=".35 .35 .35" castshadow="false"/>
    <geom name="floor" type="box" size="3 3 .05" pos="0 0 -.05" material="floor"/>
    <geom name="north" type="box" size="3 .05 1.25" pos="0 3 1.25" material="gradient"/>
    <geom name="west" type="box" size=".05 3 1.25" pos="-3 0 1.25" material="noise"/>
    <geom name="east" type="box" size=".05 3 1.25" pos="3 0 1.25" rgba=".7 .8 .7 1"/>
    <geom name="ball" type="sphere" size=".3" pos="-.8 .9 .3" rgba=".9 .2 .2 1"/>
    <geom name="cylinder" type="cylinder" size=".25 .4" pos=".2 1.6 .4" material="shiny"/>
    <geom name="capsule" type="capsule" size=".15 .3" pos="1 .6 .45" euler="20 10 0"
          rgba=".2 .8 .3 1"/>
    <geom name="ellipsoid" type="ellipsoid" size=".4 .2 .25" pos="1.6 1.8 .25" euler="0 0 30"
          rgba=".9 .8 .2 1"/>
    <geom name="crate" type="box" size=".25 .3 .35" pos="-1.6 1.9 .35" euler="0 0 25"
          material="checker"/>
    <geom name="cube" type="box" size=".2 .2 .2" pos="-.2 .2 .2" euler="0 0 50" rgba=".6 .3 .8 1"/>
    <geom name="pyramid" type="mesh" mesh="pyramid" pos="-2 .6 .0" rgba=".3 .8 .8 1"/>
  </worldbody>
</mujoco>
"""

SHAPES = """
<mujoco>
  <visual><headlight active="0"/></visual>
  <asset>
    <texture name="t" type="{texture}" builtin="checker" rgb1=".9 .3 .2" rgb2=".2 .3 .9" width="64"
             height="64" mark="edge" markrgb="1 1 1"/>
    <material name="m" texture="t" texrepeat="2 3" texuniform="{uniform}" rgba="1 1 1 1" specular=".3"/>
  </asset>
  <worldbody>
    <light pos="-2 -3 3" dir="2 3 -3" castshadow="false" ambient=".3 .3 .3"/>
    <geom type="sphere" size=".5" pos="-1.3 0 0" euler="20 30 10" material="m"/>
    <geom type="cylinder" size=".4 .5" euler="30 10 20" material="m"/>
    <geom type="capsule" size=".3 .4" pos="1.2 0 0" euler="30 -20 0" material="m"/>
    <geom type="ellipsoid" size=".5 .3 .4" pos="-1.2 0 1.2" euler="30 10 0" material="m"/>
    <geom type="box" size=".4 .5 .3" pos="0 0 1.3" euler="30 10 40" material="m"/>
    <geom type="box" size=".4 .3 .5" pos="1.3 0 1.3" euler="150 10 120" material="m"/>
  </worldbody>
</mujoco>
"""

WALL = """
<mujoco>
  <visual><headlight active="{headlight}" ambient=".2 .2 .2" diffuse=".6 .6 .6" specular="0 0 0"/></visual>
  <asset>{asset}</asset>
  <worldbody>
    {light}
    <geom name="wall" type="box" size="5 .1 5" pos="0 3.1 0" rgba=".5 .25 1 1" {material}/>
    {more}
  </worldbody>
</mujoco>
"""


def load(xml: str) -> tuple[mujoco.MjModel, mujoco.MjData]:
    model = mujoco.MjModel.from_xml_string(xml)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


def wall(
    *, headlight: int = 0, light: str = "", more: str = "", asset: str = "", material: str = ""
) -> tuple[mujoco.MjModel, mujoco.MjData]:
    return load(WALL.format(headlight=headlight, light=light, more=more, asset=asset, material=material))


def look(position: tuple[float, ...], target: tuple[float, ...], *, fovy_deg: float = 60.0) -> Camera:
    forward = np.subtract(target, position) / np.linalg.norm(np.subtract(target, position))
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(right, forward), -forward], axis=1)
    return Camera(position=np.array(position), rotation=rotation, fovy_rad=math.radians(fovy_deg))


NORTH = look((0.0, 0.0, 0.0), (0.0, 1.0, 0.0))
VIEWS = (look((0, -2.5, 1.4), (0, 1, 0.4), fovy_deg=70), look((-2, -2, 1.8), (1, 1.5, 0.2)))


@pytest.fixture(scope="module")
def gl() -> Renderer:
    platform = probe_gl()
    if platform is None:
        pytest.skip("neither EGL nor OSMesa draws a frame on this machine")
    return GlRenderer(platform)


@pytest.fixture(params=["rays", "gl", pytest.param("cuda", marks=pytest.mark.gpu)], scope="module")
def renderer(request: pytest.FixtureRequest) -> Renderer:
    if request.param == "cuda":
        try:
            return make_renderer("cuda")
        except ValueError as error:
            pytest.skip(str(error))
    return request.getfixturevalue("gl") if request.param == "gl" else RayRenderer()


def difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> tuple[float, float]:
    """Mean absolute difference in levels, and the share of pixels off by more than 16 in some channel."""
    levels = np.abs(a.astype(int) - b.astype(int))
    return float(levels.mean()), float((levels.max(axis=-1) > 16).mean())


# ---------- analytic truth


def test_depth_is_along_the_optical_axis(renderer: Renderer) -> None:
    model, data = wall()
    depth = renderer.depth(model, data, NORTH, height=32, width=48)
    assert depth.dtype == np.float32 and depth.shape == (32, 48)
    np.testing.assert_allclose(
        depth, 3.0, rtol=2e-4
    )  # the same in the corners, although those are further away


def test_depth_of_a_sphere(renderer: Renderer) -> None:
    model, data = load(
        "<mujoco><worldbody><geom type='sphere' size='.5' pos='.3 2 -.2'/></worldbody></mujoco>"
    )
    height, width = 64, 80
    depth = renderer.depth(model, data, NORTH, height=height, width=width)
    half = math.tan(NORTH.fovy_rad / 2)
    x = (np.arange(width) + 0.5 - width / 2) * 2 * half / height
    z = (height / 2 - np.arange(height) - 0.5) * 2 * half / height
    rays = np.stack([*np.meshgrid(x, z), np.ones((height, width))], axis=-1)[..., [0, 2, 1]]
    centre = np.array([0.3, 2.0, -0.2])
    a, b = (rays**2).sum(-1), rays @ centre
    discriminant = b**2 - a * (centre @ centre - 0.25)
    hit = discriminant > 0
    truth = np.where(hit, (b - np.sqrt(np.maximum(discriminant, 0))) / a, np.inf)
    assert (np.isinf(depth) == ~hit).mean() > 0.985  # OpenGL's sphere is a polyhedron inside of the true one
    inside = discriminant > 0.2
    tolerance = 1e-5 if isinstance(renderer, RayRenderer) else 0.01
    np.testing.assert_allclose(depth[inside], truth[inside], atol=tolerance)


def test_segmentation_gives_geom_ids(renderer: Renderer) -> None:
    model, data = wall(more="<geom name='ball' type='sphere' size='.4' pos='0 2 0'/>")
    segmentation = renderer.segmentation(model, data, NORTH, height=65, width=65)
    assert segmentation.dtype == np.int32
    assert segmentation[32, 32] == model.geom("ball").id and segmentation[0, 0] == model.geom("wall").id
    # The outline of a sphere is seen at angle asin(r / distance).
    radius_px = math.tan(math.asin(0.4 / 2)) / math.tan(NORTH.fovy_rad / 2) * 65 / 2
    area_px = (segmentation == model.geom("ball").id).sum()
    assert area_px == pytest.approx(math.pi * radius_px**2, rel=0.04)
    backwards = look((0.0, 0.0, 0.0), (0.0, -1.0, 0.0))
    assert (renderer.segmentation(model, data, backwards, height=8, width=8) == -1).all()
    assert np.isinf(renderer.depth(model, data, backwards, height=8, width=8)).all()


def test_camera_convention(renderer: Renderer) -> None:
    """A ball right of and above the axis is in the upper right, at the pixel that a pinhole gives."""
    model, data = load(
        "<mujoco><worldbody><geom type='sphere' size='.05' pos='.8 2 .5'/></worldbody></mujoco>"
    )
    height, width = 120, 160
    rows, columns = np.nonzero(renderer.segmentation(model, data, NORTH, height=height, width=width) == 0)
    focal_px = height / 2 / math.tan(NORTH.fovy_rad / 2)
    assert columns.mean() + 0.5 == pytest.approx(width / 2 + focal_px * 0.8 / 2, abs=0.3)
    assert rows.mean() + 0.5 == pytest.approx(height / 2 - focal_px * 0.5 / 2, abs=0.3)


def test_camera_rolls(renderer: Renderer) -> None:
    model, data = load("<mujoco><worldbody><geom type='sphere' size='.1' pos='.8 2 0'/></worldbody></mujoco>")
    right, up, back = NORTH.rotation.T
    rolled = Camera(position=NORTH.position, rotation=np.stack([up, -right, back], axis=1), fovy_rad=1.2)
    rows, columns = np.nonzero(renderer.segmentation(model, data, rolled, height=64, width=64) == 0)
    assert rows.mean() > 45 and abs(columns.mean() - 31.5) < 1  # what was right is below


def test_light_is_lambertian_and_shadows_take_it(renderer: Renderer) -> None:
    sun = (
        "<light type='directional' pos='0 0 0' dir='{dir}' diffuse='.6 .6 .6' specular='0 0 0'/>"
        "<light type='directional' dir='0 -1 0' diffuse='0 0 0' ambient='.2 .2 .2' specular='0 0 0' "
        "castshadow='false'/>"
    )
    frontal = wall(light=sun.format(dir="0 1 0"))
    slanted = wall(light=sun.format(dir="0 .5 -.8660254"))
    colour = np.array([0.5, 0.25, 1.0]) * 255
    for (model, data), cosine in ((frontal, 1.0), (slanted, 0.5)):
        pixel = renderer.render(model, data, NORTH, height=32, width=32)[16, 16]
        np.testing.assert_allclose(pixel, colour * (0.2 + 0.6 * cosine), atol=1.5)
    model, data = wall(
        light=sun.format(dir="0 1 0"), more="<geom type='box' size='.5 .05 .5' pos='1 1 0' rgba='1 1 1 1'/>"
    )
    shaded = renderer.render(model, data, look((0, 0, 0), (1.0, 3.0, 2.0)), height=33, width=33)
    np.testing.assert_allclose(shaded[16, 16], colour * 0.8, atol=1.5)  # above the shadow
    beside = look((1.0, 2.0, 0.0), (1.0, 3.0, 0.0))  # between the box and its shadow
    np.testing.assert_allclose(
        renderer.render(model, data, beside, height=33, width=33)[16, 16], colour * 0.2, atol=1.5
    )


def test_headlight_follows_the_camera(renderer: Renderer) -> None:
    model, data = wall(headlight=1)
    colour = np.array([0.5, 0.25, 1.0]) * 255
    for target in ((0.0, 3.0, 0.0), (1.5, 3.0, 1.0), (-2.0, 3.0, -1.0)):
        cosine = 3.0 / np.linalg.norm(target)
        pixel = renderer.render(model, data, look((0, 0, 0), target), height=33, width=33)[16, 16]
        np.testing.assert_allclose(pixel, colour * (0.2 + 0.6 * cosine), atol=1.5)


def test_cube_texture_shows_the_right_face(renderer: Renderer) -> None:
    """Six flat faces of different colour: the wall's south side shows the texture's -y face."""
    model, data = wall(
        headlight=1,
        asset="<texture name='t' type='cube' builtin='flat' width='8' height='48'/>"
        "<material name='m' texture='t'/>",
        material="material='m'",
    )
    faces = model.tex_data.reshape(6, 8, 8, 3)
    faces[:] = (np.arange(6) * 40 + 15)[:, None, None, None]
    model.vis.headlight.ambient, model.vis.headlight.diffuse = (1, 1, 1), (0, 0, 0)
    pixel = renderer.render(model, data, NORTH, height=16, width=16)[8, 8]
    np.testing.assert_allclose(pixel, np.array([0.5, 0.25, 1.0]) * (3 * 40 + 15), atol=1.5)


def test_background_is_black_without_a_skybox(renderer: Renderer) -> None:
    model, data = load("<mujoco><worldbody><geom type='sphere' size='.1' pos='0 -5 0'/></worldbody></mujoco>")
    assert not renderer.render(model, data, NORTH, height=16, width=24).any()


# ---------- the two against each other


@pytest.mark.parametrize("view", VIEWS)
def test_rays_draw_what_opengl_draws(gl: Renderer, view: Camera) -> None:
    model, data = load(ROOM)
    rays = RayRenderer()
    mean, share = difference(
        gl.render(model, data, view, height=256, width=256),
        rays.render(model, data, view, height=256, width=256),
    )
    assert mean < PARITY_MEAN_LEVELS and share < PARITY_SHARE_OVER_16
    segmentations = [r.segmentation(model, data, view, height=256, width=256) for r in (gl, rays)]
    same = segmentations[0] == segmentations[1]
    assert same.mean() > 0.999
    depths = [np.where(same, r.depth(model, data, view, height=256, width=256), 0) for r in (gl, rays)]
    finite = np.isfinite(depths[1])
    assert (np.isfinite(depths[0]) == finite).all()
    assert np.median(np.abs(depths[0][finite] - depths[1][finite])) < 1e-4


@pytest.mark.parametrize("texture", ["2d", "cube"])
@pytest.mark.parametrize("uniform", ["false", "true"])
def test_textures_lie_as_in_opengl(gl: Renderer, texture: str, uniform: str) -> None:
    model, data = load(SHAPES.format(texture=texture, uniform=uniform))
    view = look((0.3, -3.5, 1.0), (0, 0, 0.6), fovy_deg=55)
    frames = [r.render(model, data, view, height=160, width=160) for r in (gl, RayRenderer())]
    mean, share = difference(*frames)
    assert mean < 0.8 and share < 0.012


def test_models_with_equal_assets_share_an_upload(gl: Renderer) -> None:
    frames = []
    for x in (-0.5, 0.0, 0.5, -0.5):
        model, data = load(ROOM.replace('pos="-.8 .9 .3"', f'pos="{x} .9 .3"'))
        frames.append(gl.render(model, data, VIEWS[0], height=48, width=64))
    uploaded = gl_module._threads.gl.uploaded
    assert sum(assets.context.ntexture == model.ntex for assets in uploaded) == 1
    assert (frames[0] == frames[3]).all() and (frames[0] != frames[1]).any()
    assert len(uploaded) <= gl_module.MAX_CONTEXTS


def test_renderer_leaves_the_model_alone(gl: Renderer) -> None:
    model, data = load(ROOM)
    model.vis.quality.offsamples, model.vis.global_.offwidth = 1, 77
    before = repr(model.vis)
    gl.render(model, data, VIEWS[0], height=48, width=48)
    assert repr(model.vis) == before


# ---------- frames as values


def test_frames_are_new_and_the_same_every_time(renderer: Renderer) -> None:
    model, data = load(ROOM)
    first = renderer.render(model, data, VIEWS[0], height=96, width=80)
    kept = first.copy()
    other = renderer.render(model, data, VIEWS[1], height=48, width=48)
    again = renderer.render(model, data, VIEWS[0], height=96, width=80)
    assert first.dtype == np.uint8 and first.shape == (96, 80, 3) and other.shape == (48, 48, 3)
    assert first.flags.c_contiguous and first.flags.writeable and first is not again
    assert (first == kept).all() and (first == again).all()


def test_rays_do_not_depend_on_the_renderer_object() -> None:
    frames = [RayRenderer().render(*load(ROOM), VIEWS[1], height=64, width=64) for _ in range(2)]
    assert (frames[0] == frames[1]).all()


def test_antialiasing_comes_closer_to_supersampling() -> None:
    model, data = load(ROOM)
    size = 96
    many = RayRenderer(antialias=False).render(model, data, VIEWS[0], height=8 * size, width=8 * size)
    truth = many.reshape(size, 8, size, 8, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    rough, smooth = (
        difference(RayRenderer(antialias=flag).render(model, data, VIEWS[0], height=size, width=size), truth)
        for flag in (False, True)
    )
    assert smooth[0] < 0.75 * rough[0] and smooth[1] < 0.7 * rough[1]


@pytest.mark.parametrize("size", [(0, 8), (8, -1)])
def test_bad_sizes_are_named(renderer: Renderer, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="pixels"):
        renderer.render(*wall(), NORTH, height=size[0], width=size[1])


def test_bad_cameras_are_named() -> None:
    with pytest.raises(ValueError, match="shapes"):
        Camera(position=np.zeros(2), rotation=np.eye(3), fovy_rad=1.0)
    with pytest.raises(ValueError, match="fovy_rad"):
        Camera(position=np.zeros(3), rotation=np.eye(3), fovy_rad=60.0)


def test_a_models_own_camera() -> None:
    model, data = wall(more="<camera name='eye' pos='0 1 0' xyaxes='1 0 0 0 0 1' fovy='40'/>")
    camera = Camera.of_model(model, data, name="eye")
    assert camera.fovy_rad == pytest.approx(math.radians(40))
    assert RayRenderer().depth(model, data, camera, height=4, width=4)[1, 1] == pytest.approx(2.0)
    with pytest.raises(ValueError, match="eye"):
        Camera.of_model(model, data, name="nose")


def test_the_shortcuts_find_what_mujocos_rays_find(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes in a depth buffer, shadow rays left out: the same as with a ray for every pixel and light."""
    model, data = load(ROOM)
    inside = look((-1.9, 1.2, 0.2), (0.5, 1.0, 0.3), fovy_deg=90)  # shapes beside and behind the camera
    rays = RayRenderer(antialias=False)
    for view in (*VIEWS, inside):
        directions = rays._pixel_directions(view, 96, 128)
        quick = first_hits.trace_grid(model, data, view, directions, height=96, width=128)
        slow = first_hits.trace(model, data, view, directions)
        assert (quick.geom_ids == slow.geom_ids).mean() > 0.9995  # but where two geoms touch
        same = (quick.geom_ids == slow.geom_ids) & (slow.geom_ids >= 0)
        np.testing.assert_allclose(quick.depths[same], slow.depths[same], rtol=1e-4)
    frame = rays.render(model, data, inside, height=96, width=128)
    everything = lambda self, geoms, exempt_owner: np.ones(len(geoms), bool)  # noqa: E731
    monkeypatch.setattr(shadows._CoarseMap, "behind", everything)
    assert (frame == rays.render(model, data, inside, height=96, width=128)).all()


def test_frames_grow_and_shrink(gl: Renderer) -> None:
    """A buffer that was made for small frames serves larger ones, of any shape."""
    model, data = load(ROOM)
    small = gl.render(model, data, VIEWS[0], height=64, width=64)
    for height, width in ((300, 528), (512, 128), (128, 512)):
        frame = gl.render(model, data, VIEWS[0], height=height, width=width)
        rays = RayRenderer().render(model, data, VIEWS[0], height=height, width=width)
        assert difference(frame, rays)[0] < PARITY_MEAN_LEVELS
    assert (small == gl.render(model, data, VIEWS[0], height=64, width=64)).all()


# ---------- choosing a back end


def test_unknown_back_ends_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="vulkan"):
        make_renderer("vulkan")
    monkeypatch.setenv("EMUWORLD_RENDERER", "opengl")
    with pytest.raises(ValueError, match="EMUWORLD_RENDERER"):
        make_renderer()


def test_environment_variable_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMUWORLD_RENDERER", "rays")
    assert isinstance(make_renderer(), RayRenderer)


_BARE = """
from emuworld.envs.render import RayRenderer, make_renderer, probe_gl
assert probe_gl() is None
assert isinstance(make_renderer(), RayRenderer)
try:
    make_renderer("gl")
except ValueError as error:
    print(error)
"""


def test_a_process_without_opengl_still_draws() -> None:
    environment = {**os.environ, "MUJOCO_GL": "disable"}
    environment.pop("EMUWORLD_RENDERER", None)
    child = subprocess.run(
        [sys.executable, "-c", _BARE], env=environment, capture_output=True, text=True, timeout=600
    )
    assert child.returncode == 0, child.stderr
    assert "libosmesa6" in child.stdout
