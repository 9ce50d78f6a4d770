"""MuJoCo's classic OpenGL renderer without a window, for frames by the thousand.

The low-level calls (`mjr_render`) instead of `mujoco.Renderer`, which would make a context, upload all assets
and draw a shadow map of 4096 pixels for every model. Whether a platform works here is `render.probe_gl`'s
question.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import os
import pkgutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from emuworld.envs.rendering.camera import Camera, aim, check_size, clip_distances, point_free_camera

PLATFORMS = ("egl", "osmesa")
MAX_CONTEXTS = 4  # asset sets kept in one OpenGL context; a set is 10 to 100 MB of graphics memory
MIN_SCENE_GEOMS = 1024
SAMPLES = 4  # multisampling; the ray renderer's edge samples imitate this number
SHADOW_SIZE_PX = 2048  # the largest shadow map; a model with a smaller `quality.shadowsize` keeps its own


class GlRenderer:
    """MuJoCo's classic renderer with shadows and 4-fold multisampling, offscreen.

    All instances of a thread share one OpenGL context. Uploaded assets (textures, meshes, shadow maps) are
    found again by their content, so that thousands of rooms built from one asset list cost one upload; assets
    of a model object that was drawn before must not be edited in place. Start worker processes with "spawn":
    OpenGL does not survive a fork. `platform` "egl" or "osmesa" spares workers the probe, which costs a
    second or two. On Mesa with as many processes as cores set LP_NUM_THREADS=1.
    """

    def __init__(self, platform: str) -> None:
        if platform not in PLATFORMS:
            raise ValueError(f"platform={platform!r} is unknown; expected one of {', '.join(PLATFORMS)}")
        self._platform = platform
        self._option = mujoco.MjvOption()
        self._option.sitegroup[:] = 0  # sites are marks for programs, and the ray renderer has none
        self._option.tendongroup[:] = 0
        self._free_camera = mujoco.MjvCamera()
        self._geoms_only = int(mujoco.mjtCatBit.mjCAT_STATIC) | int(mujoco.mjtCatBit.mjCAT_DYNAMIC)

    def render(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, *, height: int, width: int
    ) -> NDArray[np.uint8]:
        shared, view = self._draw(model, data, camera, height=height, width=width, segment=False)
        pixels = shared.pixels(height, width)
        mujoco.mjr_readPixels(pixels, None, view, shared.assets.context)
        return pixels[::-1].copy()  # OpenGL's first row is the lowest

    def depth(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, *, height: int, width: int
    ) -> NDArray[np.float32]:
        shared, view = self._draw(model, data, camera, height=height, width=width, segment=True)
        raw = np.empty((height, width), np.float32)
        mujoco.mjr_readPixels(None, raw, view, shared.assets.context)
        near, far = clip_distances(model)
        # Reversed z: 1 at the near plane, 0 at the far plane and where nothing was drawn.
        with np.errstate(divide="ignore"):
            metres = near * far / (near + raw[::-1].astype(np.float64) * (far - near))
        return np.where(raw[::-1] > 0, metres, np.inf).astype(np.float32)

    def segmentation(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, *, height: int, width: int
    ) -> NDArray[np.int32]:
        shared, view = self._draw(model, data, camera, height=height, width=width, segment=True)
        pixels = shared.pixels(height, width)
        mujoco.mjr_readPixels(pixels, None, view, shared.assets.context)
        scene = shared.assets.scene
        geom_ids = np.full(scene.ngeom + 1, -1, np.int32)  # index 0 is the background
        for slot in range(scene.ngeom):
            geom = scene.geoms[slot]
            if geom.objtype == int(mujoco.mjtObj.mjOBJ_GEOM):
                geom_ids[geom.segid + 1] = geom.objid
        colour = pixels[::-1].astype(np.int32)
        return geom_ids[colour[..., 0] + 256 * colour[..., 1] + 65536 * colour[..., 2]]

    def close(self) -> None:
        """Nothing to do: the context belongs to the thread and is freed with it."""

    def _draw(
        self,
        model: mujoco.MjModel,
        data: mujoco.MjData,
        camera: Camera,
        *,
        height: int,
        width: int,
        segment: bool,
    ) -> tuple[_GlThread, mujoco.MjrRect]:
        check_size(height, width)
        shared = _gl_thread(self._platform)
        shared.context.make_current()  # another library in this thread may have made its own current
        assets = shared.bind(model, height=height, width=width)
        scene, view = assets.scene, mujoco.MjrRect(0, 0, width, height)
        # The update places the headlight and infinite planes by its own camera; ours is the same, but exact.
        point_free_camera(self._free_camera, camera)
        mujoco.mjv_updateScene(model, data, self._option, None, self._free_camera, self._geoms_only, scene)
        aim(scene, model, camera)
        scene.flags[_SEGMENT] = scene.flags[_ID_COLOUR] = segment
        scene.flags[_REFLECTION] = False  # the ray renderer has no mirrors
        mujoco.mjr_render(view, scene, assets.context)
        return shared, view


_SEGMENT = int(mujoco.mjtRndFlag.mjRND_SEGMENT)
_ID_COLOUR = int(mujoco.mjtRndFlag.mjRND_IDCOLOR)
_REFLECTION = int(mujoco.mjtRndFlag.mjRND_REFLECTION)


# The arrays that MjrContext uploads or bakes into display lists.
_ASSET_ARRAYS = (
    "tex_type",
    "tex_height",
    "tex_width",
    "tex_nchannel",
    "tex_colorspace",
    "tex_data",
    "mat_texid",
    "mat_texrepeat",
    "mat_texuniform",
    "mesh_vertadr",
    "mesh_vert",
    "mesh_normaladr",
    "mesh_normal",
    "mesh_faceadr",
    "mesh_face",
    "mesh_facenormal",
    "mesh_texcoordadr",
    "mesh_texcoord",
    "mesh_facetexcoord",
    "hfield_nrow",
    "hfield_ncol",
    "hfield_size",
    "hfield_data",
)


def _signature(model: mujoco.MjModel) -> tuple[Any, ...]:
    """What an `MjrContext` depends on, cheap parts first; equal signatures can share one."""
    quality, fog, haze = model.vis.quality, model.vis.rgba.fog, model.vis.rgba.haze
    planes = np.flatnonzero(model.geom_type == int(mujoco.mjtGeom.mjGEOM_PLANE))
    per_model: tuple[Any, ...] = ()
    if len(planes):
        per_model = (
            model.geom_size[planes].tobytes(),
            model.geom_matid[planes].tobytes(),
            *clip_distances(model),
        )
    if model.nskin or model.nflex:
        per_model = (*per_model, id(model))  # their buffers belong to one model; bind() keeps it alive
    return (
        (quality.numslices, quality.numstacks, quality.numquads, min(quality.shadowsize, SHADOW_SIZE_PX)),
        (fog.tobytes(), haze.tobytes(), model.vis.map.haze, per_model),
        tuple(getattr(model, name).tobytes() for name in _ASSET_ARRAYS),
    )


@dataclass
class _Assets:
    """An uploaded asset set with a scene to draw it in."""

    signature: tuple[Any, ...]
    context: mujoco.MjrContext
    scene: mujoco.MjvScene
    model: mujoco.MjModel  # the last one drawn: the same object needs no comparison


class _GlThread:
    """One thread's OpenGL context, its uploaded assets and its pixel buffer."""

    def __init__(self, platform: str) -> None:
        self.process_id = os.getpid()
        _load_triton_first()
        # By name: importing mujoco.egl or mujoco.osmesa loads system libraries and binds PyOpenGL to them.
        self.context = pkgutil.resolve_name(f"mujoco.{platform}:GLContext")(64, 64)
        self.context.make_current()
        self.uploaded: list[_Assets] = []  # most recently used first
        self._pixels = np.empty((0, 0, 3), np.uint8)
        atexit.register(self.close)  # PyOpenGL cannot free a context once modules are gone

    @property
    def assets(self) -> _Assets:
        return self.uploaded[0]

    def pixels(self, height: int, width: int) -> NDArray[np.uint8]:
        if self._pixels.shape[:2] != (height, width):
            self._pixels = np.empty((height, width, 3), np.uint8)
        return self._pixels

    def bind(self, model: mujoco.MjModel, *, height: int, width: int) -> _Assets:
        """Make the context of the model's assets the current one, at least height by width pixels large."""
        assets = self._find(model, height=height, width=width)
        context = assets.context
        if context.offHeight < height or context.offWidth < width:
            mujoco.mjr_resizeOffscreen(max(width, context.offWidth), max(height, context.offHeight), context)
        if assets.model is not model:
            assets.model = model
            if assets.scene.maxgeom < model.ngeom + MIN_SCENE_GEOMS // 2:
                assets.scene = _new_scene(model)
        # These two belong to the model, not to its assets, and MjrContext copied them from another model.
        context.shadowClip = model.stat.extent * model.vis.map.shadowclip
        context.shadowScale = model.vis.map.shadowscale
        return assets

    def _find(self, model: mujoco.MjModel, *, height: int, width: int) -> _Assets:
        if self.uploaded and self.assets.model is model:
            return self.assets
        signature = _signature(model)
        found = next((i for i, assets in enumerate(self.uploaded) if assets.signature == signature), None)
        if found is None:
            with _own_quality(model, height=height, width=width):
                context = mujoco.MjrContext(model, 100)
            context.readDepthMap = int(mujoco.mjtDepthMap.mjDEPTH_ZEROFAR)
            self.uploaded.insert(0, _Assets(signature, context, _new_scene(model), model))
            for old in self.uploaded[MAX_CONTEXTS:]:
                old.context.free()
            del self.uploaded[MAX_CONTEXTS:]
        else:
            self.uploaded.insert(0, self.uploaded.pop(found))
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self.assets.context)
        return self.assets

    def close(self) -> None:
        if self.process_id != os.getpid():
            return  # a forked child must not touch its parent's context
        with contextlib.suppress(Exception):  # at exit the driver may be gone already; nothing is lost then
            for assets in self.uploaded:
                assets.context.free()
            self.context.free()
        self.uploaded = []


@functools.cache
def _load_triton_first() -> None:
    """Load Triton's library, where it is installed, before Mesa's.

    Mesa's software renderer makes the symbols of its LLVM global. Triton has another LLVM inside and, loaded
    after it, takes Mesa's functions for its own: the first `torch.optim.Adam` after the first frame would
    crash the process. In this order both work. Costs 20 ms; nothing is imported.
    """
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        with contextlib.suppress(OSError):  # no such file in this build of Triton, or not for this machine
            ctypes.CDLL(str(Path(triton.origin).parent / "_C" / "libtriton.so"))


def _new_scene(model: mujoco.MjModel) -> mujoco.MjvScene:
    return mujoco.MjvScene(model, max(MIN_SCENE_GEOMS, 2 * model.ngeom))


@contextlib.contextmanager
def _own_quality(model: mujoco.MjModel, *, height: int, width: int) -> Iterator[None]:
    """Let `MjrContext` see our buffer size, samples and shadow map; the model is as before afterwards."""
    glob, quality = model.vis.global_, model.vis.quality
    before = (glob.offheight, glob.offwidth, quality.offsamples, quality.shadowsize)
    glob.offheight, glob.offwidth = max(height, 256), max(width, 256)
    quality.offsamples, quality.shadowsize = SAMPLES, min(quality.shadowsize, SHADOW_SIZE_PX)
    try:
        yield
    finally:
        glob.offheight, glob.offwidth, quality.offsamples, quality.shadowsize = before


_threads = threading.local()


def _gl_thread(platform: str) -> _GlThread:
    """This thread's OpenGL state. Raises RuntimeError in a forked child of a process that has drawn."""
    mine: _GlThread | None = getattr(_threads, "gl", None)
    if mine is None:
        mine = _threads.gl = _GlThread(platform)
    if mine.process_id != os.getpid():
        raise RuntimeError(
            "this process was forked from one that had drawn with OpenGL, which does not survive a fork: "
            "start workers with multiprocessing.get_context('spawn') (gymnasium.make_vec takes "
            "vector_kwargs={'context': 'spawn'}), or draw with renderer='rays' in them"
        )
    return mine
