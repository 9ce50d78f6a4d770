"""Shots: a room and where one looks from, and what edits and tales need to know about such a view."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import numpy as np

from emuworld.envs.rooms.captions import View
from emuworld.envs.rooms.collision import Obstacles
from emuworld.envs.rooms.commands import Pose
from emuworld.envs.rooms.floorplan import ObjectPlan, RoomPlan
from emuworld.envs.rooms.scenes import RoomScene

CLEAR_PX = 250  # of 256 x 256: an object that an instruction names covers at least so many, about 16 x 16
_GAP_M = 0.12


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A room and where one looks from: what a picture is made of."""

    scene: RoomScene
    pose: Pose

    @functools.cached_property
    def view(self) -> View:
        return self.scene.view(self.pose)

    def pixels(self) -> dict[str, int]:
        """Pixels (of 256 x 256) of each object in view."""
        return {item.identity: item.pixels for item in self.view.objects}

    def clear(self, *, least_px: int = CLEAR_PX) -> list[str]:
        """Objects that an instruction may name: large, and not cut in two by the picture's edge."""
        return [item.identity for item in self.view.named if item.pixels >= least_px]

    def column(self, identity: str) -> float:
        """Column of an object's middle, 0 to 1; ValueError where it is out of view."""
        for item in self.view.objects:
            if item.identity == identity:
                return item.column
        raise ValueError(f"{identity!r} is out of view; expected one of {list(self.pixels())}")


def sample_shot(scene: RoomScene, rng: np.random.Generator) -> Shot:
    """A view that is worth an edit: one to four objects, one of them large, no wall before the nose."""
    best, best_score = Shot(scene=scene, pose=scene.random_pose(rng)), -math.inf
    for _ in range(10):
        shot = Shot(scene=scene, pose=scene.random_pose(rng))
        clear = len(shot.clear())
        score = min(clear, 2) - 0.4 * max(0, len(shot.view.objects) - 3) - 8.0 * shot.view.near_share
        if score > best_score:
            best, best_score = shot, score
        if score >= 1.0 and rng.random() < 0.5:
            break
    return best


def rest_kept(before: Shot, after: Shot, but: set[str]) -> bool:
    pixels = after.pixels()
    return all(pixels.get(name, 0) >= count / 2 for name, count in before.pixels().items() if name not in but)


def item_of(shot: Shot, name: str) -> ObjectPlan:
    return next(item for item in shot.scene.plan.objects if item.identity == name)


def others(plan: RoomPlan, name: str) -> tuple[ObjectPlan, ...]:
    return tuple(item for item in plan.objects if item.identity != name)


def exchanged(plan: RoomPlan, name: str, item: ObjectPlan) -> RoomPlan:
    """The plan with another object in place of `name`."""
    return replace(plan, objects=tuple(item if old.identity == name else old for old in plan.objects))


def standing_without(shot: Shot, name: str) -> Obstacles:
    """All that stands in the room but one object."""
    plan = shot.scene.plan
    return replace(plan, objects=others(plan, name)).obstacles()


def free_spot(shot: Shot, rng: np.random.Generator, radius_m: float) -> tuple[float, float] | None:
    """A place on the free floor before the camera, with a free way to it."""
    pose, obstacles = shot.pose, shot.scene.obstacles
    for _ in range(12):
        heading = pose.yaw_rad + float(rng.uniform(-0.5, 0.5))
        way = float(rng.uniform(1.7, 3.6))
        x, y = pose.x_m + way * math.cos(heading), pose.y_m + way * math.sin(heading)
        free = float(obstacles.distance(np.array([[x, y]]))[0]) > radius_m + _GAP_M
        if free and obstacles.free_way((pose.x_m, pose.y_m), heading, way, 0.1) >= way:
            return x, y
    return None
