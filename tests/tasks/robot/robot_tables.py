"""A table for the tests of keyframes, the same every time: five things, a plate, a bin."""

from emuworld.envs.tabletop.layout import FurniturePlan, ObjectPlan, TablePlan
from emuworld.envs.tabletop.scene import TableScene


def thing(kind: str, colour: str, x: float, y: float) -> ObjectPlan:
    size = (0.025, 0.035) if kind == "cylinder" else (0.028,)
    return ObjectPlan(kind=kind, colour=colour, size_m=size, position=(x, y, size[-1]))


def table() -> TableScene:
    return TableScene(
        TablePlan(
            objects=(
                thing("cube", "red", 0.45, -0.10),
                thing("ball", "blue", 0.55, 0.12),
                thing("cylinder", "green", 0.40, 0.05),
                thing("cube", "yellow", 0.60, -0.05),
                thing("ball", "red", 0.38, -0.28),
            ),
            furniture=(
                FurniturePlan(kind="plate", colour="blue", position=(0.45, 0.28)),
                FurniturePlan(kind="bin", colour="wooden", position=(0.58, -0.28)),
            ),
        )
    )
