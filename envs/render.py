"""MuJoCo frames on any machine: OpenGL where a probe finds it, our ray renderer elsewhere.

All back ends give colour, depth and segmentation of one `Camera`, and draw the same picture within the
tolerance that `tests/envs/test_render.py` states. Not an environment and not a scene: whoever holds a model
and its data asks for a frame. The OpenGL path uses MuJoCo's low-level renderer (`mjr_render`), the ray path
is in `rays.py`. `cuda.py` draws the ray renderer's pictures on an NVIDIA GPU, for whoever asks for it.

`EMUWORLD_RENDERER` = auto | gl | rays | cuda overrides the choice of `make_renderer("auto")`.

Scenes should use boxes for floors: a plane geom is a display list of its model, so every model with other
planes costs an upload of all assets, where rooms that share textures, materials and meshes share one.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Protocol

import mujoco
import numpy as np
from numpy.typing import NDArray

from emuworld.envs.rendering.camera import Camera
from emuworld.envs.rendering.cuda import CudaRenderer
from emuworld.envs.rendering.gl import GlRenderer
from emuworld.envs.rendering.rays import RayRenderer

BACKENDS = ("auto", "gl", "rays", "cuda")
ENVIRONMENT_VARIABLE = "EMUWORLD_RENDERER"
PROBE_TIMEOUT_S = 60.0


class Renderer(Protocol):
    """Draws a model. `data` must have been through `mj_forward` (or `mj_kinematics` with `mj_camlight`)."""

    def render(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, *, height: int, width: int
    ) -> NDArray[np.uint8]:
        """Colour, [height, width, 3] uint8, a new array."""
        ...

    def depth(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, *, height: int, width: int
    ) -> NDArray[np.float32]:
        """Metres along the optical axis at pixel centres, [height, width] float32, inf where nothing is."""
        ...

    def segmentation(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, *, height: int, width: int
    ) -> NDArray[np.int32]:
        """Geom ids at pixel centres, [height, width] int32, -1 where nothing is."""
        ...

    def close(self) -> None: ...


def make_renderer(backend: str = "auto") -> Renderer:
    """A renderer. "auto" is OpenGL where `probe_gl` finds it, else rays; never cuda.

    Raises ValueError for an unknown back end, for "gl" on a machine where no OpenGL works, or for "cuda"
    where there is no NVIDIA GPU.
    """
    choice = _choice(backend)
    if choice == "rays":
        return RayRenderer()
    if choice == "cuda":
        return CudaRenderer()
    platform = probe_gl()
    if platform is not None:
        return GlRenderer(platform)
    if choice == "gl":
        raise ValueError(
            "OpenGL was asked for, but neither EGL nor OSMesa draws a frame here. Install one (Debian: "
            "apt-get install libosmesa6, or libegl1 libgl1), or take renderer=rays, which needs nothing"
        )
    return RayRenderer()


@functools.cache
def shared_renderer(backend: str = "auto") -> Renderer:
    """The process's one renderer of a back end: a graphics context is expensive."""
    return make_renderer(backend)


def checked_backend(backend: str) -> str:
    """`backend` as it came. ValueError if it is none of `BACKENDS`; if it works here, drawing shows."""
    if backend not in BACKENDS:
        raise ValueError(f"renderer={backend!r} is unknown; expected one of {', '.join(BACKENDS)}")
    return backend


def _choice(backend: str) -> str:
    """The back end to use, after the environment variable, which speaks only where the caller said "auto"."""
    checked_backend(backend)
    override = os.environ.get(ENVIRONMENT_VARIABLE, "auto").strip().lower() or "auto"
    if override not in BACKENDS:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE}={override!r} is unknown; expected {', '.join(BACKENDS)} or nothing"
        )
    return override if backend == "auto" else backend


# Runs in a child, because a broken driver may abort the process and mujoco decides once, at import.
_PROBE = """
import importlib, sys
import mujoco, numpy as np
context = importlib.import_module("mujoco." + sys.argv[1]).GLContext(64, 64)
context.make_current()
model = mujoco.MjModel.from_xml_string('''<mujoco><visual><quality shadowsize="64"/></visual><worldbody>
  <light pos="0 0 3"/><geom type="sphere" size="1" rgba="1 0 0 1"/></worldbody></mujoco>''')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
render = mujoco.MjrContext(model, 100)
mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, render)
scene, camera = mujoco.MjvScene(model, 10), mujoco.MjvCamera()
mujoco.mjv_defaultFreeCamera(model, camera)
mujoco.mjv_updateScene(model, data, mujoco.MjvOption(), None, camera, 7, scene)
view = mujoco.MjrRect(0, 0, 64, 64)
mujoco.mjr_render(view, scene, render)
pixels = np.zeros((64, 64, 3), np.uint8)
mujoco.mjr_readPixels(pixels, None, view, render)
red, green, blue = pixels[32, 32].tolist()
right = red > green and red > blue and pixels[0, 0].max() == 0
print("drawn" if right else f"wrong {pixels[32, 32]}", flush=True)
import os
os._exit(0)  # the contexts' destructors print errors at interpreter exit
"""


@functools.cache
def probe_gl() -> str | None:
    """The OpenGL platform that draws a correct frame here: "egl", "osmesa" or None. Tried once a process.

    Honours what the process already decided: PyOpenGL's `PYOPENGL_PLATFORM` (mujoco sets it when `MUJOCO_GL`
    names a platform) leaves one candidate, and MUJOCO_GL=disable leaves none.
    """
    return next((platform for platform in _candidates() if _draws(platform)), None)


def _candidates() -> tuple[str, ...]:
    if os.environ.get("MUJOCO_GL", "").strip().lower() in ("disable", "disabled", "off", "false", "0"):
        return ()
    if sys.platform != "linux":
        return ()
    decided = os.environ.get("PYOPENGL_PLATFORM", "").strip().lower()
    if decided:
        return (decided,) if decided in ("egl", "osmesa") else ()
    return ("egl", "osmesa")


def _draws(platform: str) -> bool:
    """Whether a child process can draw with `platform`."""
    environment = {**os.environ, "MUJOCO_GL": platform, "PYOPENGL_PLATFORM": platform}
    command = [sys.executable, "-c", _PROBE, platform]
    try:
        child = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return child.returncode == 0 and child.stdout.strip().endswith("drawn")
