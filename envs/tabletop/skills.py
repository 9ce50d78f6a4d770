"""The arm's skills: pick, place, stack, push, open, close, press.

Each is a row of Cartesian keyposes, planned from the true state (`grasps.py`) and driven through real
contacts: things are held by friction between the pads and by nothing else. A skill refuses before the first
motion what cannot be done from the state it finds. Deterministic: equal states and requests end equally.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from emuworld.envs.tabletop import layout as sizes
from emuworld.envs.tabletop import spots
from emuworld.envs.tabletop.arm_body import PAD_HALF_HEIGHT_M
from emuworld.envs.tabletop.grasps import MARGIN_M, Carried, Grip, ahead, upright_yaw
from emuworld.envs.tabletop.hand import ATTEMPTS, FAST_M_S, SLOW_M_S, Failed, Hand, Refused
from emuworld.envs.tabletop.predicates import DIRECTIONS, MOVED_M, Predicate
from emuworld.envs.tabletop.robot import Arm, OutOfStepsError, StillError, Vector
from emuworld.envs.tabletop.spots import Spot

if TYPE_CHECKING:
    from emuworld.envs.tabletop.scene import TableScene

PUSH_M, PUSH_SPEED_M_S, PRESS_SPEED_M_S = (0.10, 0.085, 0.07, 0.06), 0.15, 0.1
HANDLE_OPENING_M = 0.034
_FACTS = {
    "on": "On",
    "in": "In",
    "left of": "LeftOf",
    "right of": "RightOf",
    "behind": "Behind",
    "in front of": "InFrontOf",
}


class Request(Protocol):
    """What is asked for; `emuworld.envs.tabletop.subtasks.Subtask` is one."""

    @property
    def skill(self) -> str: ...
    @property
    def target(self) -> str: ...
    @property
    def destination(self) -> str | None: ...
    @property
    def relation(self) -> str | None: ...


@dataclass(frozen=True, kw_only=True)
class SkillResult:
    """`done`: the skill reached what it is for, in physics. `reason` says why not, else "done"."""

    done: bool
    reason: str
    control_steps: int  # of 40 ms; 0 where nothing was changed


def execute(scene: TableScene, arm: Arm, request: Request, *, goal: Vector | None) -> SkillResult:
    """Run one request; what a planner may ask in vain is a result and no error."""
    run = _Run(Hand(scene, arm), goal)
    skills: dict[str, Callable[[Request], str]] = {
        "pick": run.pick,
        "place": run.place,
        "stack": run.place,
        "push": run.push,
        "open": lambda asked: run.slide(asked.target, share=1.0),
        "close": lambda asked: run.slide(asked.target, share=0.0),
        "press": run.press,
    }
    try:
        if request.skill not in skills:
            raise Refused(f"there is no skill {request.skill!r}")
        reason, done = skills[request.skill](request), True
    except (Refused, Failed, OutOfStepsError) as problem:
        reason, done = str(problem), False
        if arm.control_steps and not isinstance(problem, OutOfStepsError):
            run.hand.go_home()
    return SkillResult(done=done, reason=reason, control_steps=arm.control_steps)


def refusal(scene: TableScene, arm: Arm, request: Request, *, goal: Vector | None) -> str | None:
    """Why a request would be refused before the first motion; None where the arm would set out.

    `arm` must be made with `still=True`. The servos' commands may change: restore the scene afterwards.
    """
    try:
        result = execute(scene, arm, request, goal=goal)
    except StillError:
        return None
    return None if result.done else result.reason


class _Run:
    """One request's run. Every skill returns a reason or raises Refused or Failed."""

    def __init__(self, hand: Hand, goal: Vector | None) -> None:
        self.hand, self.goal = hand, goal
        self.scene, self.arm, self.planner = hand.scene, hand.arm, hand.planner

    def pick(self, request: Request) -> str:
        self.hand.need_object(request.target)
        if self.scene.held() == request.target:
            return "it is held already"
        self.hand.need_empty()
        self.hand.take(request.target)
        return "done"

    # Place and stack

    def place(self, request: Request) -> str:
        name = request.target
        self.hand.need_object(name)
        if self.scene.held() != name:
            self.hand.need_empty()
            # A place must exist before the first motion, for the grasp that is presumed.
            self._plan_release(request, self.planner.presumed(name, self.hand.plan_grasp(name)))
        for attempt in range(ATTEMPTS):
            try:
                if self.scene.held() != name:
                    self.hand.take(name)
                self._release(request)
                break
            except (Failed, Refused):
                if attempt + 1 == ATTEMPTS or not self.arm.control_steps:
                    raise
                self.hand.go_home()
        return "done"

    def _release(self, request: Request) -> None:
        name, hand, arm = request.target, self.hand, self.arm
        grip = self._plan_release(request, self.planner.carried(name))
        hand.rise(carried=name)
        arm.move(hand.above(grip.position, carried=name), grip.yaw_rad, speed_m_s=FAST_M_S, settle=2)
        if self.scene.held() != name:
            raise Failed(f"the {name} slipped out of the gripper")
        arm.move(grip.position, grip.yaw_rad, speed_m_s=SLOW_M_S, settle=3)
        arm.grip(grip.opening_m)
        hand.go_home()
        self._check_placed(request)

    def _plan_release(self, request: Request, carried: Carried) -> Grip:
        if self.goal is None and request.destination is None:
            raise Refused("it is not said where to put it")
        if request.destination == request.target:
            raise Refused(f"the {request.target} cannot be put on itself")
        align = 0.0
        if request.destination in self.hand.names:
            align = upright_yaw(self.scene.state(str(request.destination)).rotation)
        for spot in self._spots(request):
            ground = self.planner.support(request.target, spot.point)
            if not (spots.on_table(spot.point) and spot.low_m <= ground <= spot.high_m):
                continue
            found = self.planner.release(carried, spot.point, align_rad=align, drop_m=spot.drop_m)
            if found is not None:
                return found
        where = "there" if self.goal is not None else f"{request.relation or 'on'} the {request.destination}"
        raise Refused(f"there is no free place for the {request.target} {where}")

    def _spots(self, request: Request) -> Iterator[Spot]:
        if self.goal is None:
            return self._named_spots(request)
        if request.destination is None:
            return spots.near(self.goal)
        # A picture is read to a centimetre or so: where words name the place too, they have the last word.
        named = list(self._named_spots(request))
        state = self.scene.state(request.destination)
        shown = spots.agreeing(self.goal, named, state, request.relation or "on")
        return itertools.chain(shown, named)

    def _named_spots(self, request: Request) -> Iterator[Spot]:
        name, relation = str(request.destination), request.relation or "on"
        if name not in self.hand.names:
            raise Refused(f"there is no {name} on this table")
        state = self.scene.state(name)
        if relation not in ("on", "in"):
            return spots.beside(self.scene.state(request.target), state, relation)
        if relation == "in":
            if state.kind not in ("bin", "drawer"):
                raise Refused(f"nothing can be put in the {name}")
            if state.kind == "drawer" and self.scene.joint_share(name) < 0.7:
                raise Refused(f"the {name} is closed")
            return spots.inside(state)
        if state.kind not in ("plate", "cube", "cylinder"):
            raise Refused(f"nothing stays on the {name}")
        if state.kind != "plate":
            self.hand.need_free_top(name)
        return spots.onto(state)

    def _check_placed(self, request: Request) -> None:
        name = request.target
        if self.scene.held() == name:
            raise Failed(f"the {name} stuck to the gripper")
        if request.destination is None:
            assert self.goal is not None
            gap = float(np.linalg.norm(self.scene.state(name).position[:2] - self.goal[:2]))
            if gap > 0.04:
                raise Failed(f"the {name} came to rest {100 * gap:.0f} cm from its place")
            return
        relation = request.relation or "on"
        if not self.scene.holds(Predicate(_FACTS[relation], (name, str(request.destination)))):
            raise Failed(f"the {name} did not stay {relation} the {request.destination}")

    # Push

    def push(self, request: Request) -> str:
        """With both fingers around it: the trailing one pushes, the other stops what would roll on."""
        name, hand, arm = request.target, self.hand, self.arm
        hand.need_object(name)
        hand.need_empty()
        hand.need_free_top(name)
        way, grip = self._plan_push(request)
        direction = way / np.linalg.norm(way)
        last = grip.position + way + direction * (grip.opening_m - self._extent(name, direction)) / 2
        end = self.scene.state(name).position + way
        hand.descend(grip.position, grip.yaw_rad, opening_m=grip.opening_m)
        arm.move(last, grip.yaw_rad, speed_m_s=PUSH_SPEED_M_S, settle=4)
        arm.move(last - 0.004 * direction, grip.yaw_rad, speed_m_s=SLOW_M_S)
        hand.go_home()
        gap = float(np.linalg.norm(self.scene.state(name).position[:2] - end[:2]))
        if gap > 0.03:
            raise Failed(f"the {name} ended {100 * gap:.0f} cm from where it was pushed to")
        return "done"

    def _ways(self, request: Request) -> list[Vector]:
        """Vectors [3] to push along, best first: where a goal lies, if that is the way that was said."""
        if request.relation not in DIRECTIONS:
            raise Refused(f"it is not said where to push the {request.target}")
        said = np.array([*DIRECTIONS[request.relation], 0.0])
        ways = [distance * said for distance in PUSH_M]
        if self.goal is None:
            return ways
        shown = np.array([*(self.goal[:2] - self.scene.state(request.target).position[:2]), 0.0])
        along = float(shown @ said)
        agrees = along >= MOVED_M and along > float(np.linalg.norm(shown - along * said))
        return [shown, *ways] if agrees else ways

    def _plan_push(self, request: Request) -> tuple[Vector, Grip]:
        state = self.scene.state(request.target)
        for way in self._ways(request):
            direction = way / np.linalg.norm(way)
            width = self._extent(state.name, direction)
            yaw = ahead(state.position, math.atan2(direction[1], direction[0]) - math.pi / 2)
            for more in (0.02, 0.012):
                opening = min(width + more, 0.099)
                grip = Grip(position=state.position, yaw_rad=yaw, opening_m=opening)
                # The trailing finger first crosses the gap to the object.
                gap = direction * (opening - width) / 2
                if spots.on_table(state.position + way) and self._free_way(state.name, way, grip, gap):
                    return way, grip
        raise Refused(f"the way of the {request.target} is blocked")

    def _free_way(self, name: str, way: Vector, grip: Grip, gap: Vector) -> bool:
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            # Lifted a little: it slides on what is below.
            point = grip.position + share * way + np.array([0.0, 0.0, 0.001])
            angles = self.planner.reachable(point + (gap if share else 0.0), grip.yaw_rad)
            if angles is None or not self.planner.free(
                angles, grip.opening_m + MARGIN_M, moved={name: point}
            ):
                return False
        return True

    def _extent(self, name: str, direction: Vector) -> float:
        """Width of an object along a level direction."""
        state = self.scene.state(name)
        if state.kind != "cube":
            return 2 * state.half_m[0]
        return float(2 * np.abs(state.rotation.T @ direction) @ np.array(state.half_m))

    # Drawer and button

    def slide(self, name: str, *, share: float) -> str:
        """Draw or push the drawer by its handle to a share of its travel."""
        hand, arm = self.hand, self.arm
        state = hand.need_furniture(name, "drawer")
        hand.need_empty()
        along, now = state.rotation[:, 0], self.scene.joint_share(name)
        if abs(now - share) < 0.08:
            return f"it is {'open' if share else 'closed'} already"
        out = sizes.CABINET_DEPTH_M + 0.01 + sizes.HANDLE_OUT_M
        handle = state.position + out * along + np.array([0.0, 0.0, sizes.HANDLE_UP_M])
        # A little beyond, so that the drawer meets its stop.
        way = ((share - now) * sizes.DRAWER_TRAVEL_M + math.copysign(0.002, share - now)) * along
        yaw = ahead(handle, math.atan2(along[1], along[0]) - math.pi / 2)
        self._check_slide(name, handle, way, yaw)
        hand.descend(handle, yaw, opening_m=HANDLE_OPENING_M)
        arm.grip(0.0)
        arm.move(handle + way, yaw, speed_m_s=SLOW_M_S, settle=3)
        arm.grip(HANDLE_OPENING_M, control_steps=6)
        hand.go_home()
        reached = self.scene.joint_share(name)
        if abs(reached - share) > 0.1:
            raise Failed(f"the {name} came to {100 * reached:.0f} % of its way")
        return "done"

    def _check_slide(self, name: str, handle: Vector, way: Vector, yaw: float) -> None:
        inside = [o.name for o in self.scene.objects if self.scene.holds(Predicate("In", (o.name, name)))]
        before, after = self.planner.reachable(handle, yaw), self.planner.reachable(handle + way, yaw)
        if before is None or after is None or not self.planner.free(before, HANDLE_OPENING_M):
            raise Refused(f"the hand cannot get at the handle of the {name}")
        shift = way + np.array([0.0, 0.0, 0.001])
        moved = {item: self.scene.state(item).position + shift for item in inside}
        open_m = self.scene.joint_share(name) * sizes.DRAWER_TRAVEL_M
        along = float(way @ self.scene.state(name).rotation[:, 0])
        target = min(max(open_m + along, 0.0), sizes.DRAWER_TRAVEL_M)
        if not self.planner.free(after, HANDLE_OPENING_M, moved=moved, drawer=(name, target)):
            raise Refused(f"the way of the {name} is blocked")

    def press(self, request: Request) -> str:
        name, hand = request.target, self.hand
        state = hand.need_furniture(name, "button")
        hand.need_empty()
        top = state.position + state.rotation @ np.array(
            [-0.008, 0.0, sizes.BUTTON_TOP_M + PAD_HALF_HEIGHT_M]
        )
        yaw, ready = ahead(top, upright_yaw(state.rotation)), top + np.array([0.0, 0.0, 0.02])
        angles = self.planner.reachable(ready, yaw)
        if angles is None or not self.planner.free(angles, 0.0):
            raise Refused(f"the hand cannot get at the {name}")
        hand.descend(ready, yaw, opening_m=0.0)
        bottom = top - np.array([0.0, 0.0, sizes.BUTTON_TRAVEL_M])
        self.arm.move(
            bottom, yaw, speed_m_s=PRESS_SPEED_M_S, until=lambda: self.scene.joint_share(name) > 0.85
        )
        hand.go_home()
        if not self.scene.pressed(name):
            raise Failed(f"the {name} did not go down")
        return "done"
