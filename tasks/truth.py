"""What really happens: cases rendered by the simulator, in worker processes that load no model.

Each case is a pure function of its request, so any worker may make it and a resumed run makes the same.
Poses and commands come from `emuworld.envs.rooms.scenes`; nothing here knows what a dream made of them.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from emuworld.envs.palette import HELD_OUT_PAIRS, OBJECT_COLOURS, SHAPES
from emuworld.envs.render import Renderer, make_renderer
from emuworld.envs.rooms.captions import asked_caption
from emuworld.envs.rooms.commands import COMMANDS, Command, Pose, phrase, sample_command
from emuworld.envs.rooms.scenes import RoomScene
from emuworld.tasks.metrics import Frame, seen_before_mask

COLOUR_NAMES = tuple(OBJECT_COLOURS)
DETECTED_SHAPES = (*SHAPES, "plate", "bin")  # a table-top's cube is a box
LABEL_STRIDE = 4  # labels are one for each 4 x 4 pixels, as the detector gives them
TURN_COMMAND, TURN_STEPS = "turn left", 12  # 30 degrees each: a full turn
CLOSING_RANGE_DEG, CLOSING_STEP_DEG, CLOSING_PX = 45, 3, 64

Bytes2 = NDArray[np.uint8]  # [N, h, w] label maps


@dataclass(frozen=True, kw_only=True)
class Request:
    """One case to render."""

    index: int
    seed: int
    split: str
    size_px: int
    renderer: str = "auto"
    num_steps: int = 0
    num_branches: int = 0
    phrasing: str = "canonical"  # canonical | split: the words that commands are given in


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """Truth per cell of LABEL_STRIDE x LABEL_STRIDE pixels: shape [N, h, w] (0 = none, s + 1 = SHAPES[s]),
    colour index.
    """

    shapes: Bytes2
    colours: Bytes2


@dataclass(frozen=True, kw_only=True, eq=False)
class StartTruth:
    """A short random walk: K commands, K + 1 frames."""

    index: int
    prompt: str
    commands: tuple[str, ...]
    other_commands: tuple[str, ...]  # at each step another command than the true one
    frames: NDArray[np.uint8]  # [K + 1, H, W, 3]
    seen: NDArray[np.bool_]  # [K, H, W], True = this pixel's surface point was in view in an earlier frame
    given: NDArray[np.bool_]  # [K, H, W], True = it was in view in the first frame, which alone is given
    moved: tuple[bool, ...]  # whether the command changed the pose
    labels: Labels  # of the K + 1 frames
    branch_commands: tuple[str, ...]
    branch_frames: NDArray[np.uint8]  # [branches, H, W, 3]
    branch_given: tuple[float, ...]  # of each branch's view the share that was in view at the start


@dataclass(frozen=True, kw_only=True, eq=False)
class WalkTruth:
    """A long walk out and back, or a full turn."""

    index: int
    prompt: str
    commands: tuple[str, ...]
    frames: NDArray[np.uint8]  # [K + 1, H, W, 3]
    labels: Labels
    around_deg: tuple[float, ...] = ()  # of a full turn: yaws around the start, counter-clockwise
    around: NDArray[np.uint8] | None = None  # and the views there, [len(around_deg), 64, 64, 3]


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptTruth:
    """A caption of a true view that shows one or two objects."""

    index: int
    prompt: str
    pairs: tuple[tuple[str, str], ...]
    held_out: bool  # whether one of the pairs appears in no training room
    frame: Frame
    labels: Labels  # of the one frame


@functools.lru_cache(maxsize=1)
def shared_renderer(backend: str) -> Renderer:
    """One renderer a process: a graphics context is expensive."""
    return make_renderer(backend)


@contextmanager
def render_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Worker processes, started afresh: a fork of a process that holds a GPU or threads may hang."""
    pool = ProcessPoolExecutor(max_workers=workers, mp_context=get_context("spawn"))
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# Cases ----------------------------------------------------------------------------------------------------


def make_start(request: Request) -> StartTruth:
    """A room of the split, a start that shows something, random commands, and branches that lead to
    different poses.
    """
    scene, rng, start, prompt = _begin(request)
    commands = [sample_command(rng, request.split) for _ in range(request.num_steps)]
    poses = _poses(scene, start, commands)
    frames, depths, labels = _look(scene, poses, request, with_depth=True)
    cameras = [scene.camera(pose) for pose in poses]
    looks = list(zip(depths, cameras, strict=True))
    seen = [seen_before_mask(*looks[step], looks[:step]) for step in range(1, len(poses))]
    given = [seen_before_mask(*look, looks[:1]) for look in looks[1:]]
    branches = _branches(scene, start, request, rng)
    reached = [scene.execute(start, command).pose for command in branches]
    branch_frames, branch_depths, _ = _look(scene, reached, request, with_depth=True)
    branch_looks = zip(branch_depths, (scene.camera(pose) for pose in reached), strict=True)
    return StartTruth(
        index=request.index,
        prompt=prompt,
        commands=_words(commands, request, rng),
        other_commands=_words(_others(commands, request, rng), request, rng),
        frames=frames,
        seen=np.stack(seen),
        given=np.stack(given),
        moved=tuple(a != b for a, b in pairwise(poses)),
        labels=labels,
        branch_commands=_words(branches, request, rng),
        branch_frames=branch_frames,
        branch_given=tuple(float(seen_before_mask(*look, looks[:1]).mean()) for look in branch_looks),
    )


def make_walk(request: Request) -> WalkTruth:
    """A walk whose second half undoes the first, command by command, so that it looks back at what it saw."""
    scene, rng, start, prompt = _begin(request)
    out: list[Command] = []
    pose = start
    for _ in range(request.num_steps // 2):
        for _ in range(50):  # a blocked step cannot be undone; a room leaves at least the turns
            command = sample_command(rng, request.split)
            there = scene.execute(pose, command)
            back = undo(command)
            if back is not None and scene.execute(there.pose, back).pose == pose:
                break
        out.append(command)
        pose = scene.execute(pose, command).pose
    commands = out + [undo(command) or command for command in reversed(out)]
    frames, _, labels = _look(scene, _poses(scene, start, commands), request)
    words = _words(commands, request, rng)
    return WalkTruth(index=request.index, prompt=prompt, commands=words, frames=frames, labels=labels)


def make_turn(request: Request) -> WalkTruth:
    """A full turn on the spot, with the views around the start to measure by how much a dream misses it."""
    scene, _, start, prompt = _begin(request)
    turn = next(command for command in COMMANDS if command.phrase == TURN_COMMAND)
    poses = _poses(scene, start, [turn] * TURN_STEPS)
    assert poses[-1] == start, "twelve turns of 30 degrees come home"
    frames, _, labels = _look(scene, poses, request)
    degrees = tuple(range(-CLOSING_RANGE_DEG, CLOSING_RANGE_DEG + 1, CLOSING_STEP_DEG))
    renderer = shared_renderer(request.renderer)
    around = [
        renderer.render(
            scene.model, scene.data, scene.camera(_turned(start, d)), height=CLOSING_PX, width=CLOSING_PX
        )
        for d in degrees
    ]
    return WalkTruth(
        index=request.index,
        prompt=prompt,
        commands=(TURN_COMMAND,) * TURN_STEPS,
        frames=frames,
        labels=labels,
        around_deg=tuple(float(d) for d in degrees),
        around=np.stack(around),
    )


def make_prompt(request: Request) -> PromptTruth:
    """A caption from the split of a view with one object (even index) or two, each at least one token
    large.
    """
    wanted = 1 + request.index % 2
    for attempt in range(200):
        rng = np.random.default_rng([request.seed, attempt])
        scene = RoomScene.sample(request.split, int(rng.integers(2**31)))
        poses = [scene.random_pose(rng) for _ in range(12)]
        for pose in poses:
            view = scene.view(pose)
            objects = view.named
            # Nothing else in view, and each object at least one token (of 256 x 256 pixels) large.
            if len(objects) != wanted or objects != view.objects or min(o.pixels for o in objects) < 256:
                continue
            frames, _, labels = _look(scene, [pose], request)
            pairs = tuple((o.colour, o.shape) for o in objects)
            return PromptTruth(
                index=request.index,
                prompt=asked_caption(view, rng, split=request.split),
                pairs=pairs,
                held_out=any(pair in HELD_OUT_PAIRS for pair in pairs),
                frame=frames[0],
                labels=labels,
            )
    raise ValueError(
        f"no view with {wanted} objects in 200 rooms of the {request.split} split; use another seed"
    )


def make_views(request: Request) -> tuple[NDArray[np.uint8], Labels]:
    """`num_steps` views of one room with their labels, three in four of them with an object in view."""
    scene = RoomScene.sample(request.split, request.seed)
    rng = np.random.default_rng(request.seed)
    poses: list[Pose] = []
    while len(poses) < request.num_steps:
        pose = scene.random_pose(rng)
        pitch = math.radians(float(rng.choice([-30.0, -10.0, -10.0, 10.0])))
        pose = Pose(x_m=pose.x_m, y_m=pose.y_m, yaw_rad=pose.yaw_rad, pitch_rad=pitch)
        if scene.view(pose).objects or rng.random() < 0.25:
            poses.append(pose)
    frames, _, labels = _look(scene, poses, request)
    return frames, labels


# Parts of a case ------------------------------------------------------------------------------------------


def _begin(request: Request) -> tuple[RoomScene, np.random.Generator, Pose, str]:
    scene = RoomScene.sample(request.split, request.seed)
    rng = np.random.default_rng(request.seed)
    start = scene.start_pose(0)
    return scene, rng, start, scene.caption(start, rng)


def _poses(scene: RoomScene, start: Pose, commands: Sequence[Command]) -> list[Pose]:
    poses = [start]
    for command in commands:
        poses.append(scene.execute(poses[-1], command).pose)
    return poses


def _look(
    scene: RoomScene, poses: Sequence[Pose], request: Request, *, with_depth: bool = False
) -> tuple[NDArray[np.uint8], list[NDArray[np.float32]], Labels]:
    """Frames, depths (on demand) and labels of the views from some poses."""
    renderer, size, cells = (
        shared_renderer(request.renderer),
        request.size_px,
        request.size_px // LABEL_STRIDE,
    )
    shape_of, colour_of = _label_tables(scene)
    frames, depths, shapes, colours = [], [], [], []
    for pose in poses:
        camera = scene.camera(pose)
        frames.append(renderer.render(scene.model, scene.data, camera, height=size, width=size))
        if with_depth:
            depths.append(renderer.depth(scene.model, scene.data, camera, height=size, width=size))
        geoms = renderer.segmentation(scene.model, scene.data, camera, height=cells, width=cells)
        shapes.append(shape_of[geoms])
        colours.append(colour_of[geoms])
    return np.stack(frames), depths, Labels(shapes=np.stack(shapes), colours=np.stack(colours))


def _label_tables(scene: RoomScene) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Shape label and colour index of each geom id; the last entry answers for -1, nothing."""
    shape_of = np.zeros(scene.model.ngeom + 1, np.uint8)
    colour_of = np.zeros(scene.model.ngeom + 1, np.uint8)
    pairs = {item.identity: item for item in scene.objects}
    for geom in range(scene.model.ngeom):
        item = pairs.get(scene.identity_of_geom(geom) or "")
        if item is not None:
            shape_of[geom] = 1 + SHAPES.index(item.shape)
            colour_of[geom] = COLOUR_NAMES.index(item.colour)
    return shape_of, colour_of


def _branches(scene: RoomScene, start: Pose, request: Request, rng: np.random.Generator) -> list[Command]:
    """Different commands that lead to different poses, none of which stays."""
    chosen: list[Command] = []
    reached = [start]
    for index in rng.permutation(len(COMMANDS)):
        pose = scene.execute(start, COMMANDS[index]).pose
        if len(chosen) < request.num_branches and pose not in reached:
            chosen.append(COMMANDS[index])
            reached.append(pose)
    return chosen


def _others(commands: Sequence[Command], request: Request, rng: np.random.Generator) -> list[Command]:
    """At each step a random command that is not the true one."""
    others = []
    for command in commands:
        other = command
        while other == command:
            other = sample_command(rng, request.split)
        others.append(other)
    return others


def _words(commands: Sequence[Command], request: Request, rng: np.random.Generator) -> tuple[str, ...]:
    if request.phrasing == "canonical":
        return tuple(command.phrase for command in commands)
    return tuple(phrase(command, rng, request.split) for command in commands)


def undo(command: Command) -> Command | None:
    """The command of the table that takes back another one, where there is one."""
    done = command.motion
    if done is None or done.pitch_rad is None:
        return None
    for other in COMMANDS:
        motion = other.motion
        if motion is None or motion.pitch_rad is None:
            continue
        turns = math.isclose(math.remainder(motion.turn_rad + done.turn_rad, math.tau), 0.0, abs_tol=1e-9)
        ways = math.isclose(motion.way_m, done.way_m)
        apart = math.remainder(motion.heading_rad - done.heading_rad - math.pi, math.tau)
        opposite = done.way_m == 0.0 or math.isclose(apart, 0.0, abs_tol=1e-9)
        if turns and ways and opposite and math.isclose(motion.pitch_rad, -done.pitch_rad, abs_tol=1e-9):
            return other
    return None


def _turned(pose: Pose, degrees: float) -> Pose:
    yaw = pose.yaw_rad + math.radians(degrees)
    return Pose(x_m=pose.x_m, y_m=pose.y_m, yaw_rad=yaw, pitch_rad=pose.pitch_rad)
