"""Furnished rooms in MuJoCo: the truth behind every frame.

`RoomScene.sample(split, seed)` draws a room that depends on nothing but its arguments,
`RoomScene.from_prompt` one that shows what a prompt names. A scene measures (what is where, what is in view
from a pose) and executes commands; it keeps no time, asks nothing and draws no pictures
(`emuworld.envs.render` does).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from emuworld.envs.palette import HELD_OUT_PAIRS, OBJECT_COLOURS
from emuworld.envs.render import Camera
from emuworld.envs.rooms import commands as moves
from emuworld.envs.rooms.captions import NAMED_SHARE, CaptionContent, View, caption, read_caption
from emuworld.envs.rooms.collision import BODY_RADIUS_M
from emuworld.envs.rooms.commands import LEVEL_PITCH_RAD, Command, Outcome, Place, Pose
from emuworld.envs.rooms.floorplan import HELD_OUT_LAYOUTS, LAYOUTS, RoomPlan, Wish
from emuworld.envs.rooms.model import compile_room
from emuworld.envs.rooms.placement import MAX_WISHED_OBJECTS, NUM_OBJECTS, NoRoomError, sample_plan
from emuworld.envs.rooms.visibility import Lookout

SPLITS = ("train", "validation", "test")
EYE_HEIGHT_M = 1.2
FOVY_RAD = math.radians(70)


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """Truth about one salient object: `position` is its middle in world coordinates, metres."""

    identity: str
    colour: str
    shape: str
    position: tuple[float, float, float]
    height_m: float
    radius_m: float
    held_out: bool


def generator(split: str, seed: int, *stream: int) -> np.random.Generator:
    """The counter-based generator of a split, a seed and a purpose; other splits' streams never meet it."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; expected one of {', '.join(SPLITS)}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed={seed} is out of range; expected an integer from 0 to 2**63 - 1")
    sequence = np.random.SeedSequence([SPLITS.index(split), seed & 0xFFFFFFFF, seed >> 32, *stream])
    return np.random.Generator(np.random.Philox(sequence))


class RoomScene:
    """A compiled room: `model`, `data` (forwarded once; nothing moves), its plan and its truths.

    Make one with `sample` or `from_prompt`; equal arguments give equal rooms in any process.
    """

    def __init__(self, plan: RoomPlan, *, origin: Mapping[str, Any]) -> None:
        self.plan = plan
        self._origin = dict(origin)
        self.model, self._identities = compile_room(plan)
        self.data = mujoco.MjData(self.model)
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        self.obstacles = plan.obstacles()
        self._places = {
            item.identity: Place(x_m=item.x_m, y_m=item.y_m, radius_m=item.radius_m) for item in plan.objects
        }
        self._lookout = Lookout(self.model, self.data, plan, self._identities)

    @classmethod
    def sample(
        cls, split: str, seed: int, *, num_objects: int | None = None, layout: str | None = None
    ) -> RoomScene:
        """The room of a split and a seed. `num_objects` 0 to 8 (default 3 to 8 at random), `layout` from
        `LAYOUTS`.

        Raises ValueError for an unknown split or layout or a number of objects out of range.
        """
        if num_objects is not None and not 0 <= num_objects <= NUM_OBJECTS[1]:
            raise ValueError(
                f"num_objects={num_objects}; expected 0 to {NUM_OBJECTS[1]}, or None for a random number"
            )
        known = LAYOUTS + HELD_OUT_LAYOUTS
        if layout is not None and layout not in known:
            raise ValueError(f"layout={layout!r} is unknown; expected one of {', '.join(known)}")
        plan = sample_plan(generator(split, seed, 0), split=split, num_objects=num_objects, layout=layout)
        origin = {"split": split, "seed": seed, "num_objects": num_objects, "layout": layout}
        return cls(plan, origin=origin)

    @classmethod
    def from_prompt(cls, prompt: str, *, split: str, seed: int) -> RoomScene:
        """A room whose start pose sees what a caption or walk prompt names, and no other salient object.

        A prompt without objects ("Explore a room") gives a room like `sample`'s, one that says "empty" an
        empty view.
        Raises ValueError for words outside the captions' grammar, an object named twice, or too many objects.
        """
        content = _content(prompt)
        origin = {"split": split, "seed": seed, "prompt": prompt}
        if not content.objects and not content.empty and not content.walls and not content.landmarks:
            return cls(sample_plan(generator(split, seed, 0), split=split), origin=origin)
        wish = Wish(
            objects=content.left_to_right or content.objects,
            ordered=bool(content.left_to_right),
            wall=content.walls[0] if content.walls else None,
            all_walls=len(content.walls) == 1 and content.empty,
            furniture=content.landmarks,
        )
        for attempt in range(200):
            try:
                plan = sample_plan(generator(split, seed, 1, attempt), split=split, wish=wish)
            except NoRoomError:
                continue
            scene = cls(plan, origin=origin)
            view = scene.view(scene.start_pose(0))
            wanted = {" ".join(pair) for pair in content.objects}
            shown = wanted == {item.identity for item in view.objects} == {one.identity for one in view.named}
            around = {name for name, share in (*view.landmarks, *view.walls) if share > NAMED_SHARE}
            # Furniture and walls are wishes of second rank: half of the draws insist on them.
            if shown and (attempt >= 100 or around.issuperset((*content.landmarks, *content.walls))):
                return scene
        raise ValueError(
            f"none of 200 rooms shows just the {len(content.objects)} objects of prompt {prompt!r}; "
            "name fewer objects, or use another seed"
        )

    @classmethod
    def from_dict(cls, origin: Mapping[str, Any]) -> RoomScene:
        """The scene that `to_dict` describes. ValueError for an edited one: its values do not say how."""
        if origin.get("edited"):
            raise ValueError(f"a room that was edited is not made again from {dict(origin)}; edit it again")
        split, seed = str(origin["split"]), int(origin["seed"])
        if "prompt" in origin:
            return cls.from_prompt(str(origin["prompt"]), split=split, seed=seed)
        return cls.sample(split, seed, num_objects=origin.get("num_objects"), layout=origin.get("layout"))

    def to_dict(self) -> dict[str, Any]:
        """The few values from which `from_dict` makes this scene again (JSON types)."""
        return {key: value for key, value in self._origin.items() if value is not None}

    def edited(self, plan: RoomPlan) -> RoomScene:
        """This room after an edit: another plan, the same split and seed."""
        return RoomScene(plan, origin={**self._origin, "edited": True})

    def __deepcopy__(self, memo: dict[int, Any]) -> RoomScene:
        """Itself: a scene never changes, so forks of an environment share it."""
        return self

    @property
    def split(self) -> str:
        return str(self._origin["split"])

    @functools.cached_property
    def objects(self) -> tuple[SceneObject, ...]:
        """The salient objects, positions from MuJoCo's data."""
        found = []
        for item in self.plan.objects:
            geom = self.model.geom(f"object/{item.identity}").id
            x, y, z = (float(value) for value in self.data.geom_xpos[geom])
            found.append(
                SceneObject(
                    identity=item.identity,
                    colour=item.colour,
                    shape=item.shape,
                    position=(x, y, z),
                    height_m=item.height_m,
                    radius_m=item.radius_m,
                    held_out=(item.colour, item.shape) in HELD_OUT_PAIRS,
                )
            )
        return tuple(found)

    @property
    def held_out(self) -> tuple[str, ...]:
        """What of this room no training room has: "layout alcove", "object green ball", ..."""
        layout = (f"layout {self.plan.layout}",) if self.plan.layout in HELD_OUT_LAYOUTS else ()
        return layout + tuple(f"object {item.identity}" for item in self.objects if item.held_out)

    def identity_of_geom(self, geom: int) -> str | None:
        """What a geom belongs to: "red ball", "table", "green wall", "floor", ...; None for -1."""
        return self._identities[geom] if geom >= 0 else None

    def measure(self) -> dict[str, Any]:
        """Named truths (JSON types): layout, size, objects, furniture, walls, floor, what is held out."""
        plan = self.plan
        return {
            "layout": plan.layout,
            "size_m": list(plan.size_m),
            "objects": [
                {
                    "identity": o.identity,
                    "position_m": list(o.position),
                    "height_m": o.height_m,
                    "radius_m": o.radius_m,
                }
                for o in self.objects
            ],
            "furniture": [spot.piece.noun for spot in plan.furniture],
            "walls": [wall.colour for wall in plan.walls],
            "floor": plan.floor[0],
            "held_out": list(self.held_out),
        }

    def camera(self, pose: Pose) -> Camera:
        """The walker's eyes at a pose."""
        return Camera(
            position=np.array([pose.x_m, pose.y_m, EYE_HEIGHT_M]), rotation=rotation(pose), fovy_rad=FOVY_RAD
        )

    def view(self, pose: Pose) -> View:
        """What is in view in a square picture, counted by rays at 256 px."""
        return self._lookout.view(np.array([pose.x_m, pose.y_m, EYE_HEIGHT_M]), rotation(pose), FOVY_RAD)

    def caption(self, pose: Pose, rng: np.random.Generator | None = None) -> str:
        """A sentence about the view, in the phrasings of the scene's split."""
        return caption(self.view(pose), rng, split=self.split)

    def execute(self, pose: Pose, command: Command) -> Outcome:
        """Where a command leads from a pose, stopped by walls, furniture and objects."""
        return moves.execute(pose, command, obstacles=self.obstacles, places=self._places)

    def clearance_m(self, pose: Pose) -> float:
        """Distance from the pose to the nearest thing that stops a walker; negative inside."""
        return float(self.obstacles.distance(np.array([[pose.x_m, pose.y_m]]))[0])

    def start_pose(self, index: int = 0) -> Pose:
        """The `index`-th start: free floor, something salient or a landmark in view, not nose to a wall.

        Index 0 of a scene from a prompt is the pose that sees what the prompt names.
        """
        if index == 0 and self.plan.start is not None:
            x, y, yaw = self.plan.start
            return Pose(x_m=x, y_m=y, yaw_rad=yaw).rounded()
        rng = generator(self.split, int(self._origin["seed"]), 2, index)
        best, best_score = Pose(x_m=0.0, y_m=0.0, yaw_rad=0.0), -math.inf
        # Past twelve candidates the best one so far is good enough.
        for _ in range(12):
            pose = self.random_pose(rng)
            view = self.view(pose)
            large = sum(share > 0.03 for _, share in view.landmarks)
            score = min(len(view.objects), 2) + 0.5 * min(large, 2) - 8.0 * view.near_share
            score += 1.0 if view.objects and view.objects[0].pixels > 400 else 0.0
            if score > best_score:
                best, best_score = pose, score
            if score >= 2.5:
                break
        return best

    def random_pose(self, rng: np.random.Generator) -> Pose:
        """A level pose on free floor with at least 1 m free ahead where a few draws find one."""
        width, depth, _ = self.plan.size_m
        points = rng.uniform(-0.5, 0.5, (64, 2)) * (width - 0.7, depth - 0.7)
        clear = np.flatnonzero(self.obstacles.distance(points) > BODY_RADIUS_M + 0.08)
        yaws = rng.uniform(-math.pi, math.pi, 64)
        if not len(clear):  # a room so full that 64 points all touch something: its emptiest one
            clear = np.array([int(np.argmax(self.obstacles.distance(points)))])
        for index in clear[:8]:
            if self.obstacles.free_way((points[index, 0], points[index, 1]), yaws[index], 1.0) >= 1.0:
                break
        x, y, yaw = float(points[index, 0]), float(points[index, 1]), float(yaws[index])
        return Pose(x_m=x, y_m=y, yaw_rad=yaw, pitch_rad=LEVEL_PITCH_RAD).rounded()


def rotation(pose: Pose) -> NDArray[np.float64]:
    """Camera axes of a pose as columns, [3, 3]: x right, y up, z backward."""
    cos, sin = math.cos(pose.yaw_rad), math.sin(pose.yaw_rad)
    up, level = math.sin(pose.pitch_rad), math.cos(pose.pitch_rad)
    forward = (level * cos, level * sin, up)
    return np.array(
        [[sin, -up * cos, -forward[0]], [-cos, -up * sin, -forward[1]], [0.0, level, -forward[2]]],
        dtype=np.float64,
    )


def _content(prompt: str) -> CaptionContent:
    content = read_caption(prompt)
    if content is None:
        raise ValueError(
            f"prompt {prompt!r} cannot be built as a room; write it as captions are, for example "
            "'a room with a red ball and a blue box' or 'Explore a room': colours "
            f"{', '.join(OBJECT_COLOURS)}; see emuworld.envs.palette for shapes, walls and furniture"
        )
    if len(set(content.objects)) != len(content.objects):
        raise ValueError(f"prompt {prompt!r} names an object twice; a room holds each colour and shape once")
    if len(content.objects) > MAX_WISHED_OBJECTS:
        raise ValueError(
            f"prompt {prompt!r} names {len(content.objects)} objects; "
            f"at most {MAX_WISHED_OBJECTS} fit one view"
        )
    return content
