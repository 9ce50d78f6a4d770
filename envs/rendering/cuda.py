"""MuJoCo frames on an NVIDIA GPU's compute cores: the pictures of `RayRenderer`, thousands a second.

For training data that is drawn on the GPU that trains: data-centre GPUs have little hardware for OpenGL, and
switching to it stalls whatever computes. One ray a pixel and four at edges, in float32, by the rules of the
modules that `rays.py` uses; figures of the difference are in `tests/envs/rendering/test_cuda.py`.

Not drawn, and refused with a ValueError: meshes of more than `meshes.MAX_FACES` faces (the Panda's), height
fields, more than 1,024 geoms. What `rays.py` leaves out is left out here too.
"""

from __future__ import annotations

import mujoco
import numpy as np
from numpy.typing import NDArray

from emuworld.envs.rendering.camera import Camera, check_size
from emuworld.envs.rendering.cuda_program import TILE, Arguments, Program
from emuworld.envs.rendering.cuda_scene import FRAME_BYTES, AssetCache, Assets, FramePacker

MAX_UPLOADS = 4  # sets of assets on the GPU at a time; rooms and table-tops share one


class CudaRenderer:
    """Draws with rays on a GPU. Deterministic on one kind of GPU.

    Raises ValueError where there is no NVIDIA GPU, driver or `cuda-bindings`. Compiles for some seconds
    when it is made; holds the device's primary context and a few megabytes until `close`.
    """

    def __init__(self, *, device: int = 0) -> None:
        self._program = Program(("draw_pixels", "smooth_edges", "find_pixels"), device=device)
        self._packer, self._cache = FramePacker(), AssetCache(MAX_UPLOADS)
        self._uploads: dict[Assets, tuple[int, int, int]] = {}
        self._host_frame = self._program.pinned(FRAME_BYTES)
        self._frame = self._program.allocate(FRAME_BYTES)
        self._num_pixels = 0
        self._surfaces = self._depths = self._pixels = 0
        self._host_pixels = np.zeros(0, np.uint8)

    def render(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, *, height: int, width: int
    ) -> NDArray[np.uint8]:
        arguments = self._begin(model, data, camera, height, width)
        self._launch("draw_pixels", height, width, arguments)
        self._launch("smooth_edges", height, width, arguments)
        num_bytes = 3 * height * width
        self._program.fetch(self._host_pixels, self._pixels, num_bytes)
        self._program.wait()
        return self._host_pixels[:num_bytes].reshape(height, width, 3).copy()

    def depth(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, *, height: int, width: int
    ) -> NDArray[np.float32]:
        geom_ids, depths = self._find(model, data, camera, height, width)
        return np.where(geom_ids >= 0, depths, np.float32(np.inf))

    def segmentation(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, *, height: int, width: int
    ) -> NDArray[np.int32]:
        return self._find(model, data, camera, height, width)[0]

    def close(self) -> None:
        """Free the GPU. A closed renderer draws no more."""
        self._program.close()
        self._uploads.clear()

    def _find(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, height: int, width: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Geom ids, -1 where nothing is, and depths, [height, width]."""
        self._launch("find_pixels", height, width, self._begin(model, data, camera, height, width))
        num_bytes = 4 * height * width
        found = []
        for address in (self._surfaces, self._depths):
            self._program.fetch(self._host_pixels, address, num_bytes)
            self._program.wait()
            found.append(self._host_pixels[:num_bytes].copy())
        geom_ids, depths = found
        return geom_ids.view(np.int32).reshape(height, width), depths.view(np.float32).reshape(height, width)

    def _begin(
        self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera, height: int, width: int
    ) -> Arguments:
        """Send a frame to the GPU; the arguments of the kernels that draw it."""
        check_size(height, width)
        self._program.enter()
        assets = self._cache.get(model)
        num_bytes = self._packer.pack(
            self._host_frame, model, data, camera, assets, height=height, width=width
        )
        self._reserve(height * width)
        uploads = self._upload(assets)
        self._program.send(self._frame, self._host_frame, num_bytes)
        return Arguments((self._frame, *uploads, self._surfaces, self._depths, self._pixels))

    def _launch(self, kernel: str, height: int, width: int, arguments: Arguments) -> None:
        grid = (-(-width // TILE), -(-height // TILE))
        self._program.launch(kernel, grid, (TILE, TILE), arguments)

    def _reserve(self, num_pixels: int) -> None:
        """Memory for a picture."""
        if num_pixels <= self._num_pixels:
            return
        if self._num_pixels:
            for address in (self._surfaces, self._depths, self._pixels):
                self._program.free(address)
            self._program.free_pinned(self._host_pixels)
        self._surfaces, self._depths, self._pixels = (
            self._program.allocate(size * num_pixels) for size in (4, 4, 3)
        )
        self._host_pixels = self._program.pinned(4 * num_pixels)
        self._num_pixels = num_pixels

    def _upload(self, assets: Assets) -> tuple[int, int, int]:
        """Addresses of a model's textures, texels and faces on the GPU."""
        addresses = self._uploads.pop(assets, None)
        if addresses is None:
            while len(self._uploads) >= MAX_UPLOADS:
                for address in self._uploads.pop(next(iter(self._uploads))):  # the one not used for longest
                    self._program.free(address)
            arrays = (assets.textures, assets.texels, assets.faces)
            textures, texels, faces = (self._program.allocate(array.nbytes) for array in arrays)
            addresses = textures, texels, faces
            for address, array in zip(addresses, arrays, strict=True):
                self._program.upload(address, array)
        self._uploads[assets] = addresses
        return addresses
