"""A table-top as the camera sees it: the present frame, what is what in it, and what it would be without a
thing or with it elsewhere.

It turns the known scene into what `keyframe_readout` asks for. Drawing never changes the scene: other states
are set up in a second `MjData`.
"""

from __future__ import annotations

import copy
import functools
import math

import mujoco
import numpy as np
from numpy.typing import NDArray

from emuworld.envs.render import Renderer
from emuworld.envs.rendering.camera import Camera
from emuworld.envs.tabletop.model import TABLE_HALF_M, TABLE_X_M
from emuworld.envs.tabletop.robot import HOME_RAD
from emuworld.envs.tabletop.scene import TableScene
from emuworld.tasks.robot.calibration import Frame, Mask
from emuworld.tasks.robot.keyframe_readout import Floats, Position, Support, Target

_AWAY = (0.0, 0.0, -20.0)  # out of every picture and shadow
_FROM_ABOVE_M, _DOWN = 0.8, np.array([0.0, 0.0, -1.0])
_SHADES = (0.55, 0.8, 1.0)  # of a colour on an object's sides and top, where none of it is in view
_MIN_SEEN_PX = 20
_TABLE_DIPS_M = 0.05  # what is lower is floor
_EDGE_M = 0.02  # an object's middle lies at least so far inside the table's edge


class TableView:
    """The scene at this moment, drawn at one size. Make a new one after every subtask.

    Args:
        scene: the physics; only read.
        renderer: draws it.
        size: (height, width) in pixels of every picture.
    """

    def __init__(self, scene: TableScene, *, renderer: Renderer, size: tuple[int, int] = (256, 256)) -> None:
        self.scene = scene
        self.size = size
        self._renderer = renderer
        self._model: mujoco.MjModel = scene.model
        self._scratch = mujoco.MjData(self._model)
        self._targets: dict[str, Target] = {}

    @property
    def camera(self) -> Camera:
        return self.scene.camera()

    @property
    def names(self) -> tuple[str, ...]:
        """Loose objects, as the scene lists them."""
        return tuple(item.name for item in self.scene.objects)

    @functools.cached_property
    def frame(self) -> Frame:
        """What is seen now."""
        return self._draw(self._copied())

    @functools.cached_property
    def geoms(self) -> NDArray[np.int32]:
        """Geom ids of what is seen now, [H, W], -1 where nothing is."""
        return self._renderer.segmentation(self._model, self._copied(), self.camera, **self._sides)

    def mask(self, name: str) -> Mask:
        """Pixels that show a loose object now."""
        return np.asarray(np.isin(self.geoms, self._geoms_of(name)))

    def robot_mask(self) -> Mask:
        """Pixels that show the arm now."""
        return np.asarray(np.isin(self.geoms, list(self._robot_geoms)))

    def position(self, name: str) -> Position:
        """Where the object's middle is, [3] metres."""
        body = self._model.body(f"object/{name}").id
        return np.array(self.scene.data.xpos[body])

    def target(self, name: str) -> Target:
        """The object and the scene around it, ready to be looked for."""
        if name not in self._targets:
            self._targets[name] = self._target(name)
        return self._targets[name]

    def _target(self, name: str) -> Target:
        backgrounds = self._without(name)
        depth = self._renderer.depth(
            self._model, self._copied(without=name, at_rest=True), self.camera, **self._sides
        )
        half_x, half_y = (half - _EDGE_M for half in TABLE_HALF_M)
        return Target(
            name=name,
            position=self.position(name),
            points=self._surface(name),
            colours=self._colours(name),
            backgrounds=backgrounds,
            depth=depth,
            camera=self.camera,
            area=(TABLE_X_M - half_x, TABLE_X_M + half_x, -half_y, half_y),
            support=self._support_without(name),
            draw=lambda position: self.drawn_with({name: position}),
        )

    def drawn_with(self, positions: dict[str, Position]) -> Frame:
        """The scene with these objects elsewhere and the arm at rest."""
        data = self._copied(at_rest=True)
        for name, position in positions.items():
            self._put(data, name, position)
        return self._draw(self._forwarded(data))

    # ---- inside --------------------------------------------------------------------------------

    @property
    def _sides(self) -> dict[str, int]:
        return {"height": self.size[0], "width": self.size[1]}

    def _draw(self, data: mujoco.MjData) -> Frame:
        return self._renderer.render(self._model, data, self.camera, **self._sides)

    def _copied(self, *, without: str | None = None, at_rest: bool = False) -> mujoco.MjData:
        """The present state in the scratch data, without one object and with the arm at rest if asked."""
        data = self._scratch
        data.qpos[:] = self.scene.data.qpos
        if without is not None:
            self._put(data, without, np.array(_AWAY))
        if at_rest:
            data.qpos[self._arm_addresses] = HOME_RAD
        return self._forwarded(data)

    def _forwarded(self, data: mujoco.MjData) -> mujoco.MjData:
        mujoco.mj_kinematics(self._model, data)
        mujoco.mj_camlight(self._model, data)
        return data

    def _put(self, data: mujoco.MjData, name: str, position: Position) -> None:
        address = int(self._model.joint(f"object/{name}").qposadr[0])
        data.qpos[address : address + 3] = position

    @functools.cached_property
    def _arm_addresses(self) -> list[int]:
        """Where the seven joints of the arm are in qpos."""
        return [
            int(self._model.joint(f"robot/joint{number}").qposadr[0])
            for number in range(1, len(HOME_RAD) + 1)
        ]

    @functools.cached_property
    def _robot_geoms(self) -> frozenset[int]:
        return frozenset(self._geoms_of("robot"))

    def _geoms_of(self, name: str) -> list[int]:
        return [index for index in range(self._model.ngeom) if self.scene.identity_of_geom(index) == name]

    def _without(self, name: str) -> tuple[Frame, ...]:
        """The scene without the object: with the arm at rest and, where it is not, with the arm as it is."""
        rest = self._draw(self._copied(without=name, at_rest=True))
        moved = np.abs(self.scene.data.qpos[self._arm_addresses] - HOME_RAD).max() > 0.05
        return (rest, self._draw(self._copied(without=name))) if moved else (rest,)

    @functools.cached_property
    def _support(self) -> Support:
        """Height of the uppermost thing under (x, y) that is no part of the arm, and what it is."""
        data = copy.copy(self._copied())  # its own: the scratch data goes on changing
        return functools.cache(lambda x, y: self._uppermost(data, x, y))

    def _support_without(self, name: str) -> Support:
        """The same without an object; only what lies on or under that has to be looked for anew."""
        data = copy.copy(self._copied(without=name))

        def support(x: float, y: float) -> tuple[float, str]:
            found = self._support(x, y)
            return self._uppermost(data, x, y) if found[1] == name else found

        return support

    def _uppermost(self, data: mujoco.MjData, x: float, y: float) -> tuple[float, str]:
        point, hit = np.array([x, y, _FROM_ABOVE_M]), np.zeros(1, dtype=np.int32)
        for _ in range(12):
            way = mujoco.mj_ray(self._model, data, point, _DOWN, None, 1, -1, hit)
            if way < 0:
                break
            point[2] -= way
            geom, height = int(hit[0]), float(point[2])
            if geom not in self._robot_geoms:
                on_table = height > -_TABLE_DIPS_M
                return (height, self.scene.identity_of_geom(geom) or "") if on_table else (math.nan, "")
            point[2] -= 1e-4
        return math.nan, ""

    def _surface(self, name: str) -> Floats:
        """Points on the object's surface about its middle, turned as it is now, [N, 3] metres."""
        (geom,) = self._geoms_of(name)
        rotation = self.scene.data.geom_xmat[geom].reshape(3, 3)
        return np.asarray(
            _surface(int(self._model.geom_type[geom]), self._model.geom_size[geom]) @ rotation.T
        )

    def _colours(self, name: str) -> Floats:
        """Three colours that it shows, dark to light, of 255."""
        pixels = self.frame[self.mask(name)].astype(np.float64)
        if len(pixels) < _MIN_SEEN_PX:
            rgb = self._model.geom_rgba[self._geoms_of(name)[0]][:3] * 255
            return np.array([shade * rgb for shade in _SHADES])
        ordered = pixels[np.argsort(pixels.sum(axis=1))]
        return np.array([part.mean(axis=0) for part in np.array_split(ordered, 3)])


def _surface(kind: int, size: Floats) -> Floats:
    if kind == int(mujoco.mjtGeom.mjGEOM_BOX):
        corners = np.indices((2, 2, 2)).reshape(3, -1).T * 2.0 - 1.0
        return np.asarray(corners * size)
    angles = np.arange(24) * 2 * math.pi / 24
    ring = np.stack([np.cos(angles), np.sin(angles), np.zeros(24)], axis=1)
    if kind == int(mujoco.mjtGeom.mjGEOM_CYLINDER):
        return np.concatenate([ring * size[0] + [0, 0, sign * size[1]] for sign in (-1, 1)])
    assert kind == int(mujoco.mjtGeom.mjGEOM_SPHERE), kind
    levels = np.radians([-90, -60, -30, 0, 30, 60, 90])
    return np.concatenate([size[0] * (ring * math.cos(level) + [0, 0, math.sin(level)]) for level in levels])
