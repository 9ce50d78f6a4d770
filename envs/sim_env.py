"""MuJoCo's own walk through a room, with the spaces and commands of the imagined one."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack

import numpy as np

from emuworld.envs.rooms import commands as moves
from emuworld.envs.rooms.captions import View, caption
from emuworld.envs.rooms.commands import COMMANDS, Command, Outcome, Pose
from emuworld.envs.rooms.scenes import RoomScene
from emuworld.envs.sim_state import not_a_state, pack_state, unpack_state
from emuworld.envs.simulated import SimulatedArguments, SimulatedEnv, understood
from emuworld.envs.spaces import RENDER_MODES

MAGIC = b"EWSIM\x00\x00\x01"  # the last byte is the format's version
MAX_STATE_BYTES = 8192


@dataclass(frozen=True, kw_only=True)
class _Walk:
    """One moment of a walk. A value: nothing changes it."""

    scene: RoomScene
    pose: Pose
    prompt: str
    frame_index: int = 0


class ExploreSimEnv(SimulatedEnv):
    """A furnished room in MuJoCo, walked through by text commands, seen in the first person.

    The simulated twin of `EmuWorld/Explore-v0`: same spaces, same commands, and `info` with the same keys
    (and more), so that a dream can start from this environment's first frame and be compared with it step by
    step.

    ## Action space
    `CommandText`: any Unicode string of up to 1,000 characters; samples are the 15 movement and look
    commands of `emuworld.envs.rooms.commands.COMMANDS`. Case, extra spaces and a trailing dot do not matter.

    | command | does |
    |---|---|
    | move forward, move back, step left, step right | 0.5 m |
    | move forward one metre | 1 m |
    | turn left, turn right | 30 degrees; "... 45 degrees", "... 90 degrees" also |
    | turn around | 180 degrees |
    | look up, look down, look ahead | 20 degrees up or down (-50 to +30), level (-10) |
    | go to the red ball (any colour, shape) | faces it and walks straight to 1.5 m from its middle |
    | "" | a free step: the simulator draws a command that is not blocked; `info["text"]` says which |

    A walker is a disc of 0.25 m radius that stops where it touches (`info["blocked"]`). Any other text, or
    going to something that is not there or not to be reached, changes nothing and sets
    `info["invalid_action"]`; `info["reason"]` says why. `step` raises for no command.

    ## Observation space
    `Box(0, 255, (H, W, 3), uint8)`: the view from 1.2 m height, 70 degrees of vertical field of view; a new
    array every time.

    ## Rewards
    Always 0.0. Nothing here defines success.

    ## Starting state
    `reset(seed=...)` draws a room of the split and a start that looks at something. `options` may give:

    - `prompt`: a caption or walk prompt such as "a room with a red ball and a blue box"; the first view
      holds just the objects it names. ValueError for words that no room is built from.
    - `state`: bytes of `save_state`: the same walk goes on, in any process, for the same picture size.

    ## Episode end
    Never terminated. Truncated after `max_episode_steps` (40 when made by id, through `TimeLimit`).

    ## Info
    Only what equal seeds reproduce. As in the dream: `mode` ("explore"), `prompt`, `command` (as given),
    `text`, `thought` (""), `invalid_action`, `context_full` (False), `reward_source` ("none"),
    `frame_index`. Truths, none of which is a pose: `objects_in_view` (names by falling size), `caption`,
    `blocked`, `moved_m`, `reason`.

    ## Arguments
    `size` (pixels, a number or (height, width), default 256), `split` ("train", "validation" or "test";
    default "train": evaluations use "test", and training data seeds count up from 0 where rooms here draw
    62-bit seeds, so that these are neither), `renderer` ("auto", "gl", "rays", "cuda"), `max_episode_steps`
    (None: the limit is `gymnasium.make`'s), `render_mode` ("rgb_array" or "ansi").

    ## Version history
    - v0: first release.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 4}  # noqa: RUF012
    place = "room"
    option_names = ("prompt", "state")

    def __init__(self, **arguments: Unpack[SimulatedArguments]) -> None:
        super().__init__(tuple(command.phrase for command in COMMANDS), **arguments)
        self._walk: _Walk | None = None

    def save_state(self) -> bytes:
        """This walk in a few hundred bytes, for `reset(options={"state": ...})` anywhere."""
        walk = self._current
        pose = walk.pose
        fields = {
            "room": walk.scene.to_dict(),
            "pose": [pose.x_m, pose.y_m, pose.yaw_rad, pose.pitch_rad],
            "prompt": walk.prompt,
            "frame_index": walk.frame_index,
        }
        return pack_state(fields, magic=MAGIC)

    @property
    def scene(self) -> RoomScene:
        """The room: all truths about it."""
        return self._current.scene

    @property
    def pose(self) -> Pose:
        """Where the walker is."""
        return self._current.pose

    @property
    def _current(self) -> _Walk:
        if self._walk is None:
            raise self._needs_reset()
        return self._walk

    def _begin(self, options: Mapping[str, Any], seed: int) -> None:
        if "state" in options:
            self._walk = _restored(options["state"])
        elif "prompt" in options:
            scene = RoomScene.from_prompt(options["prompt"], split=self.split, seed=seed)
            self._walk = _Walk(scene=scene, pose=scene.start_pose(0), prompt=options["prompt"])
        else:
            scene = RoomScene.sample(self.split, seed)
            pose = scene.start_pose(0)
            self._walk = _Walk(scene=scene, pose=pose, prompt=caption(scene.view(pose)))
        self._look(Outcome(pose=self._walk.pose), command="", text="")

    def _carry_out(self, action: object, *, shown: str, free: bool) -> bool:
        walk = self._current
        command, reason = (_free_step(walk), "") if free else understood(action, moves.parse, "command")
        if command is None:
            outcome = Outcome(pose=walk.pose, possible=False, reason=reason)
        else:
            outcome = walk.scene.execute(walk.pose, command)
        if outcome.possible:
            self._walk = replace(walk, pose=outcome.pose, frame_index=walk.frame_index + 1)
        self._look(outcome, command=shown, text=command.phrase if command is not None and free else shown)
        return False

    def _told(self) -> tuple[str, str]:
        return self._info["command"], self._info["caption"]

    def _look(self, outcome: Outcome, *, command: str, text: str) -> None:
        """Draw the view, unless nothing changed, and gather `info`."""
        walk = self._current
        view = walk.scene.view(walk.pose)
        if outcome.possible:
            self._draw(walk.scene.model, walk.scene.data, walk.scene.camera(walk.pose))
        self._info = _info(walk, view, outcome, command=command, text=text)


def _restored(state: object) -> _Walk:
    fields = _parse_state(state)
    try:
        scene = RoomScene.from_dict(fields["room"])
    except (KeyError, TypeError, ValueError) as error:
        raise not_a_state(f"its room cannot be built ({error})") from error
    x, y, yaw, pitch = (float(value) for value in fields["pose"])
    pose = Pose(x_m=x, y_m=y, yaw_rad=yaw, pitch_rad=pitch)
    return _Walk(scene=scene, pose=pose, prompt=fields["prompt"], frame_index=fields["frame_index"])


def _free_step(walk: _Walk) -> Command:
    """A command drawn from the room and the step alone, so that a restored walk goes on as it would have."""
    rng = np.random.Generator(
        np.random.Philox(key=[zlib.crc32(repr(walk.scene.to_dict()).encode()), walk.frame_index])
    )
    command = moves.sample_command(rng, walk.scene.split)
    for _ in range(8):
        if not walk.scene.execute(walk.pose, command).blocked:
            break
        command = moves.sample_command(rng, walk.scene.split)
    return command


def _info(walk: _Walk, view: View, outcome: Outcome, *, command: str, text: str) -> dict[str, Any]:
    return {
        "mode": "explore",
        "prompt": walk.prompt,
        "command": command,
        "text": text,
        "thought": "",
        "invalid_action": not outcome.possible,
        "context_full": False,
        "reward_source": "none",
        "frame_index": walk.frame_index,
        "objects_in_view": tuple(item.identity for item in view.objects),
        "caption": caption(view),
        "blocked": outcome.blocked,
        "moved_m": round(outcome.moved_m, 6),
        "reason": outcome.reason,
    }


def _parse_state(state: object) -> dict[str, Any]:
    """The fields of a saved state. StateError for anything that `save_state` did not write like this."""
    fields = unpack_state(
        state, magic=MAGIC, names=("room", "pose", "prompt", "frame_index"), max_bytes=MAX_STATE_BYTES
    )
    pose, index = fields["pose"], fields["frame_index"]
    numbers = isinstance(pose, list) and len(pose) == 4 and all(isinstance(v, int | float) for v in pose)
    if not numbers or not all(math.isfinite(value) for value in pose):
        raise not_a_state(f"its pose is {pose!r}, expected four numbers")
    if not isinstance(fields["room"], dict) or not isinstance(fields["prompt"], str):
        raise not_a_state("its room or prompt is of the wrong type")
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise not_a_state(f"its frame_index is {index!r}, expected a number from 0")
    return fields
