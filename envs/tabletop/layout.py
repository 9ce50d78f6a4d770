"""What stands on a table and where: the plan of a table-top as plain values, and how plans are drawn.

A `TablePlan` is all that defines a scene; `to_dict` and `from_dict` are its JSON form, which suites freeze
and picture edits change. World axes: the robot's base is the origin, the table's top is z = 0, x points to
the camera. As the camera sees it, left is -y, right +y, closer +x, away -x.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from emuworld.envs.palette import OBJECT_COLOURS, RGB

OBJECT_KINDS = ("cube", "ball", "cylinder")
FURNITURE_KINDS = ("plate", "bin", "drawer", "button", "mark")
ARMS = ("primitive", "franka")
NAMED_BY_KIND = ("drawer", "button", "mark")
BIN_LOOKS: dict[str, RGB] = {"wooden": (0.72, 0.52, 0.33)}  # beside the object colours

# Half sizes and heights, metres.
PLATE_RADIUS_M, PLATE_HEIGHT_M = 0.085, 0.008
BIN_INNER_M, BIN_WALL_M, BIN_HEIGHT_M, BIN_FLOOR_M = 0.085, 0.005, 0.05, 0.006
CABINET_DEPTH_M, CABINET_WIDTH_M, CABINET_HEIGHT_M = 0.09, 0.09, 0.11  # half, half, whole
MARK_RADIUS_M = 0.05
DRAWER_TRAVEL_M, HANDLE_OUT_M, HANDLE_UP_M = 0.13, 0.042, 0.055
BUTTON_HALF_M, BUTTON_TOP_M, BUTTON_TRAVEL_M = 0.045, 0.055, 0.012


@dataclass(frozen=True, kw_only=True)
class ObjectPlan:
    """A loose object.

    `size_m`: half edge of a cube, radius of a ball, radius and half height of a cylinder.
    """

    kind: str
    colour: str
    size_m: tuple[float, ...]
    position: tuple[float, float, float]  # its middle
    yaw_rad: float = 0.0
    distractor: bool = False

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def half_height_m(self) -> float:
        return self.size_m[-1]

    @property
    def radius_m(self) -> float:
        """Of the circle around its footprint."""
        return self.size_m[0] * (math.sqrt(2) if self.kind == "cube" else 1.0)


@dataclass(frozen=True, kw_only=True)
class FurniturePlan:
    """A plate, bin, drawer (in its cabinet) or button, fixed to the table, or a mark painted on it.

    No subtask's words name a mark: it shows a goal place in the picture alone.
    """

    kind: str
    colour: str
    position: tuple[float, float]
    yaw_rad: float = 0.0
    open_m: float = 0.0  # of a drawer, at the start

    @property
    def name(self) -> str:
        return self.kind if self.kind in NAMED_BY_KIND else f"{self.colour} {self.kind}"

    @property
    def rgb(self) -> RGB:
        return BIN_LOOKS.get(self.colour) or OBJECT_COLOURS[self.colour]

    @property
    def along(self) -> tuple[float, float]:
        """Where a drawer opens to, a unit vector."""
        return math.cos(self.yaw_rad), math.sin(self.yaw_rad)


@dataclass(frozen=True, kw_only=True)
class Look:
    """Table, room and light: colours in 0..1, materials of `palette.MATERIALS`."""

    table: str = "planks_slim"
    table_rgb: RGB = (0.72, 0.52, 0.33)
    floor: str = "matte"
    floor_rgb: RGB = (0.55, 0.55, 0.56)
    wall: str = "matte"
    wall_rgb: RGB = (0.87, 0.87, 0.85)
    lamp: tuple[float, float, float] = (1.1, -0.2, 1.8)  # metres
    lamp_rgb: RGB = (0.65, 0.65, 0.65)
    ambient: float = 0.36
    headlight: float = 0.15


@dataclass(frozen=True, kw_only=True)
class CameraPlan:
    """The fixed front camera: where it is, the point it looks at (metres), its vertical field of view."""

    position: tuple[float, float, float] = (1.20, 0.0, 0.86)
    target: tuple[float, float, float] = (0.42, 0.0, 0.04)
    fovy_deg: float = 42.0


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """Everything that defines a table-top. `arm`: of `ARMS`, how the robot looks (`franka.py`)."""

    objects: tuple[ObjectPlan, ...] = ()
    furniture: tuple[FurniturePlan, ...] = ()
    look: Look = field(default_factory=Look)
    camera: CameraPlan = field(default_factory=CameraPlan)
    arm: str = ARMS[0]
    origin: Mapping[str, Any] = field(default_factory=dict)  # how it was drawn; changes nothing

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise ValueError(f"arm={self.arm!r} is unknown; expected one of {', '.join(ARMS)}")
        groups: tuple[tuple[str, tuple[str, ...], tuple[ObjectPlan | FurniturePlan, ...]], ...] = (
            ("object", OBJECT_KINDS, self.objects),
            ("furniture", FURNITURE_KINDS, self.furniture),
        )
        for kind, known, items in groups:
            for item in items:
                if item.kind not in known:
                    raise ValueError(
                        f"{kind} kind {item.kind!r} is unknown; expected one of {', '.join(known)}"
                    )
                if item.colour not in OBJECT_COLOURS and item.colour not in BIN_LOOKS:
                    raise ValueError(
                        f"colour {item.colour!r} of a {item.kind} is unknown; expected one of "
                        f"{', '.join((*OBJECT_COLOURS, *BIN_LOOKS))}"
                    )
        names = [item.name for item in self.objects] + [item.name for item in self.furniture]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"{', '.join(twice)} would stand on the table twice; give each thing its own name"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON types; `from_dict` gives an equal plan. The default arm is left out, as in frozen scenes."""
        return _plain(
            {
                "objects": [{"name": item.name, **dataclasses.asdict(item)} for item in self.objects],
                "furniture": [{"name": item.name, **dataclasses.asdict(item)} for item in self.furniture],
                "look": dataclasses.asdict(self.look),
                "camera": dataclasses.asdict(self.camera),
                "origin": dict(self.origin),
                **({} if self.arm == ARMS[0] else {"arm": self.arm}),
            }
        )

    @classmethod
    def from_dict(cls, spec: Mapping[str, Any]) -> TablePlan:
        """The plan that `to_dict` wrote; raises ValueError for keys, kinds or colours it does not know."""
        unknown = sorted(set(spec) - {item.name for item in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(
                f"a table-top has no {', '.join(unknown)}; expected objects, furniture, look, camera"
            )
        return cls(
            objects=tuple(_read(ObjectPlan, item) for item in spec.get("objects", ())),
            furniture=tuple(_read(FurniturePlan, item) for item in spec.get("furniture", ())),
            look=_read(Look, spec.get("look", {})),
            camera=_read(CameraPlan, spec.get("camera", {})),
            origin=dict(spec.get("origin", {})),
            arm=str(spec.get("arm", ARMS[0])),
        )


def _plain(value: Any) -> Any:
    """Tuples as lists, numbers rounded to a hundredth of a millimetre, so that JSON gives back the same."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


def _read(cls: Any, spec: Mapping[str, Any]) -> Any:
    values = {key: value for key, value in spec.items() if key != "name"}
    try:
        made = cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
    except TypeError as error:
        raise ValueError(f"{cls.__name__} cannot be read from {dict(spec)}: {error}") from None
    if spec.get("name", getattr(made, "name", None)) != getattr(made, "name", None):
        raise ValueError(
            f"{spec['name']!r} is described as a {made.name}; change colour and kind with the name"
        )
    return made
