"""A table-top in MuJoCo: an arm, things to move, and the truth about all of them.

`TableScene.sample(split, seed)` draws one that depends on nothing but its arguments; `from_dict` makes one
from its description. The scene executes subtasks by contact physics, measures, and evaluates predicates; it
asks nothing, keeps no time and draws no pictures (`emuworld.envs.render` does).
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np

from emuworld.envs.palette import HELD_OUT_PAIRS
from emuworld.envs.rendering.camera import Camera
from emuworld.envs.tabletop import layout as sizes
from emuworld.envs.tabletop import skills
from emuworld.envs.tabletop.grasps import upright_yaw
from emuworld.envs.tabletop.layout import TablePlan
from emuworld.envs.tabletop.model import LAMP_OFF, LAMP_ON, compile_table
from emuworld.envs.tabletop.predicates import Predicate, ThingState, holds
from emuworld.envs.tabletop.robot import Arm, Vector
from emuworld.envs.tabletop.sampling import sample_plan
from emuworld.envs.tabletop.skills import Request, SkillResult

__all__ = ["SkillResult", "TableObject", "TableScene"]

_STATE = int(mujoco.mjtState.mjSTATE_INTEGRATION)
_SETTLE_STEPS = 250
PRESSED_SHARE = 0.7  # of a button's travel


@dataclass(frozen=True, kw_only=True)
class TableObject:
    """Truth about a loose object: `position` is its middle in world coordinates, metres."""

    name: str
    kind: str
    colour: str
    position: tuple[float, float, float]
    held_out: bool  # no training scene has this colour and kind together


class TableScene:
    """A compiled table-top: `model`, `data` (settled), its plan and its truths.

    Equal plans give equal scenes in any process, and equal subtasks equal states. Implements
    `predicates.Truth`.
    """

    def __init__(self, plan: TablePlan, *, settle_steps: int = _SETTLE_STEPS) -> None:
        """`settle_steps`: of physics at each reset; few are enough where nothing is to be moved."""
        # As its JSON form has it, so that a stored scene is the same to the bit.
        self.plan = plan = TablePlan.from_dict(plan.to_dict())
        self.model, self._identities = compile_table(plan)
        self.data = mujoco.MjData(self.model)
        self._plans = {item.name: item for item in plan.objects}
        self._furniture = {item.name: item for item in plan.furniture}
        self._geoms: dict[str, set[int]] = {}
        for geom, identity in enumerate(self._identities):
            self._geoms.setdefault(identity, set()).add(geom)
        pads = (("left", "pad_left", "stem_left"), ("right", "pad_right", "stem_right"))
        self._fingers = [{self.model.geom(f"robot/{name}").id for name in names} for _, *names in pads]
        self._buttons = [item.name for item in plan.furniture if item.kind == "button"]
        self._settle_steps = settle_steps
        self.reset()

    @classmethod
    def sample(
        cls,
        split: str,
        seed: int,
        *,
        kinds: Sequence[str] | None = None,
        num_distractors: int | None = None,
        novel: Collection[str] = (),
    ) -> TableScene:
        """The table-top of a split and a seed; see `table_sampling.sample_plan` for the arguments."""
        return cls(sample_plan(split, seed, kinds=kinds, num_distractors=num_distractors, novel=novel))

    @classmethod
    def from_dict(cls, spec: Mapping[str, Any]) -> TableScene:
        """The scene that `to_dict` describes."""
        return cls(TablePlan.from_dict(spec))

    def to_dict(self) -> dict[str, Any]:
        """Everything that defines the scene's start (JSON types)."""
        return self.plan.to_dict()

    def scene_hash(self) -> str:
        """Of the scene's description: 16 hexadecimal digits, the same in every process."""
        description = {key: value for key, value in self.to_dict().items() if key != "origin"}
        text = json.dumps(description, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def state_hash(self) -> str:
        """Of the physics state, bit for bit: 16 hexadecimal digits."""
        return hashlib.sha256(self.save()).hexdigest()[:16]

    # State

    def reset(self) -> None:
        """Back to the start: everything in its place and settled, the arm at rest."""
        mujoco.mj_resetData(self.model, self.data)
        Arm(self.model, self.data).set_home()
        for piece in self.plan.furniture:
            if piece.kind == "drawer":
                self.data.qpos[self._joint(piece.name)] = piece.open_m
        mujoco.mj_step(self.model, self.data, nstep=self._settle_steps)
        self.data.time = 0.0
        self._refresh()
        self._start = {name: self.state(name).position for name in self._plans}

    def save(self) -> bytes:
        """The physics state; `restore` continues from it to the bit."""
        state = np.empty(mujoco.mj_stateSize(self.model, _STATE))
        mujoco.mj_getState(self.model, self.data, state, _STATE)
        return state.tobytes()

    def restore(self, state: bytes) -> None:
        """Take up a state that `save` gave, of this scene or one with an equal plan."""
        values = np.frombuffer(state)
        size = mujoco.mj_stateSize(self.model, _STATE)
        if values.shape != (size,):
            raise ValueError(
                f"a state of {values.size} numbers came, this scene's have {size}; is it another's?"
            )
        if not np.isfinite(values).all():
            raise ValueError("the state has numbers that are not finite; give what `save` returned")
        mujoco.mj_setState(self.model, self.data, values, _STATE)
        self._refresh()

    def settle(self, seconds: float = 0.5) -> None:
        """Let physics run with the arm held still."""
        mujoco.mj_step(self.model, self.data, nstep=max(1, round(seconds / self.model.opt.timestep)))
        self._refresh()

    def place_object(self, name: str, position: Sequence[float], *, yaw_rad: float | None = None) -> None:
        """Put an object's middle somewhere without physics: for judging what a picture claims.

        It stands upright (turned by `yaw_rad`, by default as it was); call `settle` to see whether it stays.
        """
        address, velocity = self._object_addresses(name)
        state = self.state(name)
        yaw = upright_yaw(state.rotation) if yaw_rad is None else yaw_rad
        self.data.qpos[address : address + 3] = position
        self.data.qpos[address + 3 : address + 7] = (np.cos(yaw / 2), 0.0, 0.0, np.sin(yaw / 2))
        self.data.qvel[velocity : velocity + 6] = 0.0
        self._refresh()

    def restyled(self, plan: TablePlan) -> TableScene:
        """The scene of a plan that differs in colours, look and camera alone, in this one's state and with
        this one's start.
        """
        twin = TableScene(plan, settle_steps=1)
        twin._start = dict(zip(twin._plans, self._start.values(), strict=True))
        twin.restore(self.save())
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> TableScene:
        """A scene of its own in the same state."""
        twin = TableScene(self.plan)
        twin.restore(self.save())
        return twin

    def _refresh(self) -> None:
        mujoco.mj_forward(self.model, self.data)
        self._light_lamps()

    def _light_lamps(self) -> None:
        for latch, name in enumerate(self._buttons):
            share = self.data.qpos[self._joint(name)] / sizes.BUTTON_TRAVEL_M
            if share > PRESSED_SHARE:
                self.data.userdata[latch] = 1.0
            lit = self.data.userdata[latch] > 0
            self.model.geom(f"lamp/{name}").rgba = LAMP_ON if lit else LAMP_OFF

    def _joint(self, name: str) -> int:
        return int(self.model.joint(f"joint/{name}").qposadr[0])

    def _object_addresses(self, name: str) -> tuple[int, int]:
        self._known(name, self._plans)
        joint = self.model.joint(f"object/{name}")
        return int(joint.qposadr[0]), int(joint.dofadr[0])

    # Truths

    @property
    def objects(self) -> tuple[TableObject, ...]:
        """The loose objects with their positions now."""
        found = []
        for item in self.plan.objects:
            x, y, z = (float(value) for value in self.state(item.name).position)
            shape = "box" if item.kind == "cube" else item.kind
            found.append(
                TableObject(
                    name=item.name,
                    kind=item.kind,
                    colour=item.colour,
                    position=(x, y, z),
                    held_out=(item.colour, shape) in HELD_OUT_PAIRS,
                )
            )
        return tuple(found)

    @functools.cached_property
    def furniture(self) -> tuple[str, ...]:
        """Names of plates, bins, drawer and button (a mark has none)."""
        return tuple(name for name, piece in self._furniture.items() if piece.kind != "mark")

    @property
    def names(self) -> tuple[str, ...]:
        """Of all that words can name: the loose objects, then the furniture."""
        return (*(item.name for item in self.plan.objects), *self.furniture)

    def identity_of_geom(self, geom: int) -> str | None:
        """What a geom belongs to: "red cube", "drawer", "cabinet", "table", "robot", ...; None for -1."""
        return self._identities[geom] if geom >= 0 else None

    def state(self, name: str) -> ThingState:
        """Where a thing is now; raises ValueError for a name the scene does not have."""
        if name in self._plans:
            item = self._plans[name]
            body = self.data.body(f"object/{name}")
            side = item.size_m[0]
            half = (side, side, item.half_height_m)
            position, rotation = np.array(body.xpos), np.array(body.xmat).reshape(3, 3)
            return ThingState(name=name, kind=item.kind, position=position, rotation=rotation, half_m=half)
        self._known(name, self._furniture)
        piece = self._furniture[name]
        cos, sin = np.cos(piece.yaw_rad), np.sin(piece.yaw_rad)
        along = self.data.qpos[self._joint(name)] if piece.kind == "drawer" else 0.0
        position = np.array([piece.position[0] + along * cos, piece.position[1] + along * sin, 0.0])
        half = _FURNITURE_HALF_M[piece.kind]
        rotation = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
        return ThingState(name=name, kind=piece.kind, position=position, rotation=rotation, half_m=half)

    def start(self, name: str) -> Vector:
        self._known(name, self._start)
        return self._start[name]

    def touching(self, first: str, second: str) -> bool:
        """Whether two things touch; "table", "robot" and "cabinet" are things here."""
        return any({first, second} == pair for pair in self.contacts())

    def contacts(self) -> list[set[str]]:
        """Pairs of things that touch."""
        geoms = self.data.contact.geom
        return [{self._identities[a], self._identities[b]} for a, b in geoms.tolist()]

    def held(self) -> str | None:
        """The object that both fingers touch and that stands on nothing; None if there is none."""
        sides: list[set[str]] = [set(), set()]
        supported = set()
        for a, b in self.data.contact.geom.tolist():
            for geom, other in ((a, b), (b, a)):
                name = self._identities[geom]
                if name not in self._plans:
                    continue
                for side, fingers in zip(sides, self._fingers, strict=True):
                    if other in fingers:
                        side.add(name)
                if self._identities[other] != "robot":
                    supported.add(name)
        between = sorted((sides[0] & sides[1]) - supported)
        return between[0] if between else None

    def joint_share(self, name: str) -> float:
        self._known(name, self._furniture)
        kind = self._furniture[name].kind
        travel = {"drawer": sizes.DRAWER_TRAVEL_M, "button": sizes.BUTTON_TRAVEL_M}.get(kind)
        if travel is None:
            raise ValueError(f"{name} has no moving part; a drawer and a button have")
        return min(max(float(self.data.qpos[self._joint(name)]) / travel, 0.0), 1.0)

    def pressed(self, name: str) -> bool:
        if name not in self._buttons:
            raise ValueError(
                f"{name!r} is no button of this scene; it has {', '.join(self._buttons) or 'none'}"
            )
        return bool(self.data.userdata[self._buttons.index(name)] > 0)

    def holds(self, predicate: Predicate) -> bool:
        """Whether a predicate is true now; raises ValueError for things the scene does not have."""
        return holds(predicate, self)

    def measure(self) -> dict[str, Any]:
        """Named truths (JSON types) about the state now."""
        return {
            "objects": {
                item.name: {
                    "position_m": [round(value, 5) for value in item.position],
                    "moved_m": round(
                        float(np.linalg.norm(np.array(item.position) - self._start[item.name])), 5
                    ),
                }
                for item in self.objects
            },
            "held": self.held(),
            "drawers": {n: self.joint_share(n) for n, p in self._furniture.items() if p.kind == "drawer"},
            "pressed": {name: self.pressed(name) for name in self._buttons},
            "gripper_m": [round(float(value), 5) for value in self.data.site("robot/tcp").xpos],
        }

    def camera(self) -> Camera:
        """The fixed front camera."""
        return look_at(self.plan.camera)

    # Acting

    def execute(
        self,
        subtask: Request,
        *,
        goal_position: Sequence[float] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> SkillResult:
        """Execute a subtask (`skill`, `target`, `destination`, `relation`) by contact physics.

        `goal_position` [3], metres: where the target's middle is to be put (place, stack) or pushed to; its
        height comes from what is below. Where the words name the place too, it is kept as far as it agrees.
        `on_step` is called after every control step (40 ms): for films.
        A subtask that cannot be done from this state changes nothing: `done` is False and `reason` says why.
        """

        def after_step() -> None:
            self._light_lamps()
            if on_step is not None:
                on_step()

        arm = Arm(self.model, self.data, on_step=after_step)
        result = skills.execute(self, arm, subtask, goal=_as_goal(goal_position))
        self._refresh()
        return result

    def refusal(self, subtask: Request, *, goal_position: Sequence[float] | None = None) -> str | None:
        """Why `execute` would refuse the same before the first motion; None where the arm would set out.

        Nothing changes. An arm that sets out may still fail.
        """
        state = self.save()
        try:
            arm = Arm(self.model, self.data, still=True)
            return skills.refusal(self, arm, subtask, goal=_as_goal(goal_position))
        finally:
            self.restore(state)

    def _known(self, name: str, known: Mapping[str, Any]) -> None:
        if name not in known:
            names = ", ".join((*self._plans, *self._furniture))
            raise ValueError(f"{name!r} is not what is asked for, or not on this table; it has {names}")


def _as_goal(goal_position: Sequence[float] | None) -> Vector | None:
    goal = None if goal_position is None else np.array(goal_position, np.float64)
    if goal is not None and (goal.shape != (3,) or not np.isfinite(goal).all()):
        raise ValueError(f"goal_position is {goal_position}; expected x, y and z in metres")
    return goal


_FURNITURE_HALF_M = {
    "plate": (sizes.PLATE_RADIUS_M, sizes.PLATE_RADIUS_M, sizes.PLATE_HEIGHT_M / 2),
    "bin": (sizes.BIN_INNER_M, sizes.BIN_INNER_M, sizes.BIN_HEIGHT_M / 2),
    "drawer": (sizes.CABINET_DEPTH_M, sizes.CABINET_WIDTH_M, sizes.CABINET_HEIGHT_M / 2),
    "mark": (sizes.MARK_RADIUS_M, sizes.MARK_RADIUS_M, 0.001),
    "button": (sizes.BUTTON_HALF_M, sizes.BUTTON_HALF_M, sizes.BUTTON_TOP_M / 2),
}


def look_at(plan: sizes.CameraPlan) -> Camera:
    """The camera of a plan, upright."""
    position, target = np.array(plan.position), np.array(plan.target)
    forward = (target - position) / np.linalg.norm(target - position)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(right, forward), -forward], axis=1)
    return Camera(position=position, rotation=rotation, fovy_rad=float(np.radians(plan.fovy_deg)))
