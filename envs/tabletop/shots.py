"""Shots of table-tops: a plan as the camera sees it, and what edits need to know about that view.

Sights are counted by rays, so they do not depend on the renderer that draws the pictures.
"""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from emuworld.envs.palette import OBJECT_COLOURS
from emuworld.envs.rendering.rays import RayRenderer
from emuworld.envs.tabletop.captions import Sight, sights
from emuworld.envs.tabletop.layout import FurniturePlan, ObjectPlan, TablePlan
from emuworld.envs.tabletop.places import X_M, Y_M, Circle, circles_of, is_free
from emuworld.envs.tabletop.sampling import sample_plan
from emuworld.envs.tabletop.scene import TableScene, look_at

# Of 256 x 256: a thing that an instruction names covers at least so many. The smallest loose object, a ball
# of 5 cm at the far edge, covers 150.
CLEAR_PX = 120
SIGHT_PX = 128
QUIET_STEPS = 40  # 80 ms: what lies a millimetre over a plate has come to rest
Thing = ObjectPlan | FurniturePlan


@dataclass(frozen=True, kw_only=True)
class TableShot:
    """A table-top before anything happens, and the split whose words and colours it may have.

    `turned`: the camera is not where training's fixed front camera may be.
    """

    plan: TablePlan
    split: str
    turned: bool = False

    @functools.cached_property
    def scene(self) -> TableScene:
        """Compiled and settled; raises what `TableScene` raises."""
        return TableScene(self.plan, settle_steps=QUIET_STEPS)

    @functools.cached_property
    def sights(self) -> tuple[Sight, ...]:
        """Objects and furniture in view, by falling size."""
        camera = self.scene.camera()
        geoms = _rays().segmentation(
            self.scene.model, self.scene.data, camera, height=SIGHT_PX, width=SIGHT_PX
        )
        return sights(self.scene, geoms)

    def pixels(self) -> dict[str, int]:
        """Pixels (of 256 x 256) of each thing in view."""
        return {item.name: item.pixels for item in self.sights}

    def thing(self, name: str) -> Thing:
        return next(item for item in things_of(self.plan) if item.name == name)

    def with_plan(self, plan: TablePlan) -> TableShot:
        return replace(self, plan=plan)


def things_of(plan: TablePlan) -> list[Thing]:
    """Loose objects, then furniture."""
    return [*plan.objects, *plan.furniture]


@functools.cache
def _rays() -> RayRenderer:
    return RayRenderer()


def sample_table_shot(split: str, rng: np.random.Generator) -> TableShot:
    """A table-top of a split, seen by its front camera."""
    return TableShot(plan=sample_plan(split, int(rng.integers(2**62))), split=split)


def clear_things(shot: TableShot, kinds: Collection[str]) -> list[str]:
    """Names of the things of some kinds that are large in view."""
    known = {item.name: item.kind for item in things_of(shot.plan)}
    return [
        name for name, pixels in shot.pixels().items() if pixels >= CLEAR_PX and known.get(name, "") in kinds
    ]


def free_colours(plan: TablePlan) -> list[str]:
    """Colours that no thing with a colour in its name has: with them a colour keeps naming one thing."""
    taken = {item.name.split()[0] for item in things_of(plan) if " " in item.name}
    return [colour for colour in OBJECT_COLOURS if colour not in taken]


def stands_alone(plan: TablePlan, thing: Thing) -> bool:
    """Whether a thing carries nothing and lies on or in nothing."""
    x, y = thing.position[:2]
    if isinstance(thing, ObjectPlan):
        return thing.position[2] < thing.half_height_m + 0.002
    reach = next(c.radius_m for c in circles_of(plan) if (c.x_m, c.y_m) == (x, y))
    return not any(np.hypot(o.position[0] - x, o.position[1] - y) < reach for o in plan.objects)


def free_spot(plan: TablePlan, rng: np.random.Generator, radius_m: float) -> tuple[float, float] | None:
    """A free place for a thing on the table."""
    for _ in range(20):
        x, y = (round(float(rng.uniform(*side)), 4) for side in (X_M, Y_M))
        if free_at(plan, x, y, radius_m):
            return x, y
    return None


def free_at(plan: TablePlan, x_m: float, y_m: float, radius_m: float, *, but: str = "") -> bool:
    """Whether a thing may stand here beside all others (without the one named `but`)."""
    return is_free(Circle(x_m=x_m, y_m=y_m, radius_m=radius_m), circles_of(plan, but=but))


def column_of(plan: TablePlan, x_m: float, y_m: float) -> float:
    """Column (0 to 1) where the camera sees a point of the table."""
    camera = look_at(plan.camera)
    local: NDArray[np.float64] = (np.array([x_m, y_m, 0.02]) - camera.position) @ camera.rotation
    return float(0.5 + 0.5 * local[0] / -local[2] / np.tan(camera.fovy_rad / 2))


def exchanged(plan: TablePlan, name: str, new: Thing | None) -> TablePlan:
    """The plan with `new` in place of the thing `name`, or without it."""
    objects = [item for item in plan.objects if item.name != name]
    furniture = [item for item in plan.furniture if item.name != name]
    if isinstance(new, ObjectPlan):
        objects.append(new)
    elif new is not None:
        furniture.append(new)
    return replace(plan, objects=tuple(objects), furniture=tuple(furniture))
