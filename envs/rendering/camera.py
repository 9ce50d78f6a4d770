"""The camera of every simulated frame, and how both renderers hand it to MuJoCo's scene."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Camera:
    """A pinhole camera: where it is and what it sees.

    `rotation` has the camera's axes as columns in world coordinates: x right, y up, z backward (MuJoCo's
    convention, the one of `data.cam_xmat`). `fovy_rad` is the vertical field of view; pixels are square.
    """

    position: NDArray[np.float64]  # [3] metres
    rotation: NDArray[np.float64]  # [3, 3]
    fovy_rad: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "position", np.array(self.position, np.float64))
        object.__setattr__(self, "rotation", np.array(self.rotation, np.float64))
        if self.position.shape != (3,) or self.rotation.shape != (3, 3):
            raise ValueError(
                f"Camera got position {self.position.shape} and rotation {self.rotation.shape}; "
                "expected shapes (3,) and (3, 3)"
            )
        if not 0.0 < self.fovy_rad < math.pi:
            raise ValueError(f"Camera got fovy_rad={self.fovy_rad}; expected an angle in (0, pi) radians")

    @classmethod
    def of_model(cls, model: mujoco.MjModel, data: mujoco.MjData, *, name: str) -> Camera:
        """The model's own named camera, where `data` has put it."""
        index = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, name)
        if index < 0:
            names = [model.camera(i).name for i in range(model.ncam)]
            raise ValueError(f"no camera called {name!r} in the model; it has {names}")
        rotation = data.cam_xmat[index].reshape(3, 3)
        fovy_rad = math.radians(float(model.cam_fovy[index]))
        return cls(position=data.cam_xpos[index], rotation=rotation, fovy_rad=fovy_rad)


def check_size(height: int, width: int) -> None:
    if height < 1 or width < 1:
        raise ValueError(f"a frame of {height} by {width} pixels was asked for; expected at least 1 by 1")


def clip_distances(model: mujoco.MjModel) -> tuple[float, float]:
    """The near and the far clipping plane in metres along the optical axis."""
    extent = float(model.stat.extent)
    return float(model.vis.map.znear) * extent, float(model.vis.map.zfar) * extent


def aim(scene: mujoco.MjvScene, model: mujoco.MjModel, camera: Camera) -> None:
    """Set the scene's OpenGL cameras directly: exact, and free of the model's own cameras."""
    near, far = clip_distances(model)
    top = near * math.tan(camera.fovy_rad / 2)
    up, forward = camera.rotation[:, 1], -camera.rotation[:, 2]
    for view in scene.camera:  # MuJoCo averages the two stereo cameras
        view.pos = camera.position
        view.forward = forward
        view.up = up
        view.frustum_center = 0.0
        view.frustum_width = 0.0  # 0: from the viewport's aspect ratio
        view.frustum_bottom, view.frustum_top = -top, top
        view.frustum_near, view.frustum_far = near, far
        view.orthographic = 0


def point_free_camera(free: mujoco.MjvCamera, camera: Camera) -> None:
    """Put MuJoCo's free camera where `camera` is, looking the same way; it has no roll and no fovy."""
    forward = -camera.rotation[:, 2]
    free.lookat = camera.position + forward
    free.distance = 1.0
    free.azimuth = math.degrees(math.atan2(forward[1], forward[0]))
    free.elevation = math.degrees(math.asin(min(1.0, max(-1.0, float(forward[2])))))
