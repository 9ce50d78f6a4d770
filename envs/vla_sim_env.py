"""A robot arm at a table in MuJoCo that carries out subtasks in words; the spaces are the imagined one's."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from emuworld.envs.prompts import example_commands
from emuworld.envs.render import shared_renderer
from emuworld.envs.rooms.scenes import SPLITS
from emuworld.envs.sim_state import not_a_state, pack_state, unpack_state
from emuworld.envs.spaces import MAX_COMMAND_LENGTH, CommandText, frame_space, is_unicode, picture_sides
from emuworld.envs.tabletop.franka import checked_arm
from emuworld.envs.tabletop.layout import ARMS
from emuworld.envs.tabletop.orders import draw_task, task_of_prompt
from emuworld.envs.tabletop.plans import Task
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.scene import SkillResult, TableScene
from emuworld.envs.tabletop.subtasks import Subtask, canonical, parse

Frame = NDArray[np.uint8]  # [H, W, 3]

RENDER_MODES = ("rgb_array", "ansi")
OPTIONS = ("prompt", "task", "scene", "state")
MAGIC = b"EWVLA\x00\x00\x01"  # the last byte is the format's version
MAX_STATE_BYTES = 1 << 16
_FIELDS = (
    "scene", "physics", "prompt", "goal", "oracle", "goal_position", "num_done", "frame_index", "ended",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Work:
    """What is asked at the table and how far it is. A value; the scene beside it holds the physics."""

    prompt: str = ""
    goal: tuple[Predicate, ...] = ()
    oracle: tuple[Subtask, ...] = ()
    goal_position: tuple[float, float, float] | None = None  # of a goal place that no words name, metres
    num_done: int = 0  # steps of the oracle plan that were carried out
    frame_index: int = 0
    ended: bool = False

    @property
    def next_step(self) -> Subtask | None:
        """The oracle plan's next step; None after its last one, and where nobody gave a plan."""
        return self.oracle[self.num_done] if self.num_done < len(self.oracle) else None


class VLASimEnv(gymnasium.Env[Any, str]):
    """A table-top with a 7-joint arm in MuJoCo: subtasks in words, the picture at the end of each.

    The simulated twin of `EmuWorld/VLA-v0`: same spaces, same commands, and `info` with the same keys (and
    more), so that an imagined plan can start from this environment's first frame and be carried out in it.

    ## Action space
    `CommandText`: any Unicode string of up to 1,000 characters; samples are subtasks of
    `emuworld.envs.tabletop.subtasks`, most of them about things that another table has. Case, extra spaces,
    a last dot and "Current step:" before it do not matter. What is put or stacked is picked up first if it
    is not held.

    | command | does |
    |---|---|
    | pick up the red cube | grasps and lifts it |
    | put the red cube on the blue plate (in the wooden bin, to the left of the ...) | places it there |
    | stack the red cube on the green cube | places it on top |
    | push the red cube to the left (right, away, closer) | slides it, as the camera sees the direction |
    | open the drawer, close the drawer, press the button | works the furniture |
    | "" | the next step of the oracle plan; with none left the episode terminates |

    Everything is contact physics under bounded control: `info["control_steps"]` says how many steps a subtask
    took. A subtask that was carried out and failed (a ball that rolled away) is no invalid action;
    `info["subtask_done"]` and `info["reason"]` tell. Any other text, things that are not there, and what the
    arm cannot begin change nothing and set `info["invalid_action"]`. `step` raises for no command.

    ## Observation space
    `Box(0, 255, (H, W, 3), uint8)`: the view of the fixed front camera; a new array every time.

    ## Rewards
    Always 0.0. `info["success"]` says whether the goal holds.

    ## Starting state
    `reset(seed=...)` draws a task of the split: a table, an instruction, a goal. `options` may give one of:

    - `prompt`: an instruction that is one subtask, "Put the red cube on the blue plate."; the table holds
      what it names, and the goal is what it asks for. ValueError for other words.
    - `task`: a `Task` of `emuworld.envs.tabletop.plans`, or its `to_dict()`: scene, instruction, goal, plan.
    - `scene`: a `TableScene.to_dict()`; no instruction, no goal.
    - `state`: bytes of `save_state`: the same work goes on, in any process.

    ## Episode end
    Terminated by an empty command where the oracle plan has no step left: success alone ends nothing.
    Truncated after `max_episode_steps` (20 when made by id, through `TimeLimit`). A step after termination
    changes nothing, warns, and is flagged as invalid.

    ## Info
    Only what equal seeds reproduce. As in the dream: `mode` ("vla"), `prompt`, `command` (as given), `text`
    (the subtask as it was given or chosen), `thought` (""), `invalid_action`, `context_full` (False),
    `reward_source` ("none"), `frame_index`. Truths: `subtask_done`, `reason`, `control_steps`, `objects`
    (names), and `success`, `is_success` (the same) where a goal is known.

    ## Arguments
    `size` (pixels, a number or (height, width), default 256), `split` ("train", "validation" or "test"),
    `renderer` ("auto", "gl", "rays"), `arm` ("primitive", or "franka": the Panda's meshes, where the package
    gymnasium-robotics is installed; a `state` keeps the arm that it was saved with), `max_episode_steps`
    (None: the limit is `gymnasium.make`'s), `render_mode` ("rgb_array" or "ansi").

    ## Version history
    - v0: first release.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 1}  # noqa: RUF012

    def __init__(
        self,
        *,
        size: int | tuple[int, int] | None = None,
        split: str = "train",
        renderer: str = "auto",
        arm: str = ARMS[0],
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; expected one of {', '.join(SPLITS)}")
        if render_mode is not None and render_mode not in RENDER_MODES:
            raise ValueError(f"render_mode is {render_mode!r}, expected None or one of {list(RENDER_MODES)}")
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ValueError(
                f"max_episode_steps={max_episode_steps}; expected at least 1, or None for no limit"
            )
        self.size = picture_sides(size)
        self.split = split
        self.render_mode = render_mode
        self.max_episode_steps = max_episode_steps
        self._backend = renderer
        self._arm = checked_arm(arm)
        self.action_space = CommandText(example_commands("vla"))
        self.observation_space = frame_space(self.size)
        self._table: TableScene | None = None
        self._work = _Work()
        self._frame: Frame | None = None
        self._info: dict[str, Any] = {}
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frame, dict[str, Any]]:
        """Begin an episode; see "Starting state" above. ValueError for options that cannot be used."""
        super().reset(seed=seed)
        options = _checked_options(options)
        task_seed = int(self.np_random.integers(2**62))
        if "state" in options:
            self._table, self._work = _restored(options["state"])
        elif "scene" in options:
            self._table, self._work = self._set(options["scene"]), _Work()
        else:
            task = self._task(options, task_seed)
            self._table = self._set(task.scene)
            self._work = _Work(
                prompt=task.instruction, goal=task.goal, oracle=task.oracle, goal_position=task.goal_position
            )
        self._steps = 0
        self._look()
        self._info = self._facts(SkillResult(done=False, reason="", control_steps=0), command="", text="")
        return self._observation(), dict(self._info)

    def step(self, action: str) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        """Carry out one subtask; see "Action space" above."""
        table, work = self.scene, self._work
        given = _shown(action)
        free = isinstance(action, str) and not action.strip()
        subtask, reason = (work.next_step, "") if free else _understood(action)
        if work.ended:
            gymnasium.logger.warn(
                "step() was called after the episode terminated: nothing changes until reset()"
            )
            subtask, reason = None, "the episode has ended"
        elif free and subtask is None:
            self._work = replace(work, ended=True)
        result = SkillResult(done=False, reason=reason, control_steps=0)
        if subtask is not None:
            goal = work.goal_position if subtask.from_picture else None
            result = table.execute(subtask, goal_position=goal)
        if _carried_out(result):
            on_plan = subtask == work.next_step and result.done
            self._work = replace(work, num_done=work.num_done + on_plan, frame_index=work.frame_index + 1)
            self._look()
        text = canonical(subtask) if free and subtask is not None else given
        ended_now = self._work.ended and not work.ended
        self._info = self._facts(result, command=given, text=text, ended_now=ended_now)
        self._steps += 1
        truncated = self.max_episode_steps is not None and self._steps >= self.max_episode_steps
        return self._observation(), 0.0, self._work.ended, truncated, dict(self._info)

    def render(self) -> Frame | str | None:
        """The picture already there ("rgb_array") or a line about it ("ansi")."""
        if self.render_mode is None:
            gymnasium.logger.warn(f"render() needs render_mode={' or '.join(RENDER_MODES)} at construction")
            return None
        if self.render_mode == "rgb_array":
            return self._observation()
        info = self._info
        flag = " (unusable)" if info["invalid_action"] else ""
        outcome = info["reason"] or ("done" if info["subtask_done"] else ", ".join(info["objects"]))
        return f"[vla-sim {info['frame_index']}] {info['text'] or info['prompt']}{flag} -> {outcome}"

    def save_state(self) -> bytes:
        """The table, its physics and the task in a few kilobytes, for `reset(options={"state": ...})`."""
        table, work = self.scene, self._work
        fields = {
            "scene": table.to_dict(),
            "physics": base64.b64encode(table.save()).decode("ascii"),
            "prompt": work.prompt,
            "goal": [predicate.to_dict() for predicate in work.goal],
            "oracle": [subtask.to_dict() for subtask in work.oracle],
            "goal_position": work.goal_position,
            "num_done": work.num_done,
            "frame_index": work.frame_index,
            "ended": work.ended,
        }
        return pack_state(fields, magic=MAGIC)

    def fork(self) -> VLASimEnv:
        """A second environment in the same state, step count and random generator too."""
        return deepcopy(self)

    @property
    def scene(self) -> TableScene:
        """The table: all truths about it, and the physics. Changing it changes the episode."""
        if self._table is None:
            raise gymnasium.error.ResetNeeded("call reset() first: there is no table yet")
        return self._table

    def _task(self, options: Mapping[str, Any], seed: int) -> Task:
        if "task" in options:
            task = options["task"]
            return task if isinstance(task, Task) else Task.from_dict(task)
        if "prompt" in options:
            return task_of_prompt(options["prompt"], self.split, seed)
        return draw_task(self.split, seed)

    def _set(self, scene: Mapping[str, Any]) -> TableScene:
        """The table of a description; one that names its arm keeps it."""
        return TableScene.from_dict({"arm": self._arm, **scene})

    def _observation(self) -> Frame:
        assert self._frame is not None
        return self._frame.copy()

    def _look(self) -> None:
        table, (height, width) = self.scene, self.size
        self._frame = shared_renderer(self._backend).render(
            table.model, table.data, table.camera(), height=height, width=width
        )

    def _facts(
        self, result: SkillResult, *, command: str, text: str, ended_now: bool = True
    ) -> dict[str, Any]:
        table, work = self.scene, self._work
        info = {
            "mode": "vla",
            "prompt": work.prompt,
            "command": command,
            "text": text,
            "thought": "",
            "invalid_action": not (_carried_out(result) or ended_now),
            "context_full": False,
            "reward_source": "none",
            "frame_index": work.frame_index,
            "subtask_done": result.done,
            "reason": result.reason,
            "control_steps": result.control_steps,
            "objects": tuple(item.name for item in table.objects),
        }
        if work.goal:
            info["success"] = info["is_success"] = _succeeds(table, work)
        return info


def _carried_out(result: SkillResult) -> bool:
    """Whether a subtask was begun, or was done already; an impossible one takes no control step."""
    return result.done or result.control_steps > 0


def _succeeds(table: TableScene, work: _Work) -> bool:
    return all(table.holds(predicate) for predicate in work.goal)


def _shown(action: object) -> str:
    """The command as `info` repeats it: "" for what is no command text at all."""
    if isinstance(action, str) and len(action) <= MAX_COMMAND_LENGTH and is_unicode(action):
        return action
    return ""


def _understood(action: object) -> tuple[Subtask | None, str]:
    """The subtask that an action means, or None and why not."""
    if not isinstance(action, str):
        return None, "not a string"
    if len(action) > MAX_COMMAND_LENGTH:
        return None, f"longer than {MAX_COMMAND_LENGTH} characters"
    subtask = parse(action)
    if subtask is not None and subtask.from_picture:
        return None, "its goal place is only in a picture, and a command holds none"
    return subtask, "" if subtask is not None else "not a subtask of this world"


def _checked_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    given = dict(options or {})
    if set(given) - set(OPTIONS) or len(given) > 1:
        raise ValueError(f"options {sorted(given)} cannot be used; give one of {', '.join(OPTIONS)}, or none")
    if "prompt" in given and not isinstance(given["prompt"], str):
        raise ValueError(f"options['prompt'] is {type(given['prompt']).__name__}; expected a string")
    if "scene" in given and not isinstance(given["scene"], Mapping):
        raise ValueError(
            f"options['scene'] is {type(given['scene']).__name__}; expected TableScene.to_dict()"
        )
    if "task" in given and not isinstance(given["task"], Task | Mapping):
        raise ValueError(
            f"options['task'] is {type(given['task']).__name__}; expected a Task or its to_dict()"
        )
    return given


def _restored(state: object) -> tuple[TableScene, _Work]:
    fields = unpack_state(state, magic=MAGIC, names=_FIELDS, max_bytes=MAX_STATE_BYTES)
    for name in ("num_done", "frame_index"):
        if not isinstance(fields[name], int) or isinstance(fields[name], bool) or fields[name] < 0:
            raise not_a_state(f"its {name} is {fields[name]!r}, expected a number from 0")
    if not isinstance(fields["prompt"], str) or not isinstance(fields["ended"], bool):
        raise not_a_state("its prompt or end is of the wrong type")
    try:
        table = TableScene.from_dict(fields["scene"])
        physics = base64.b64decode(fields["physics"], validate=True)
        if not np.isfinite(np.frombuffer(physics)).all():
            raise ValueError("its physics has numbers that are not finite")
        table.restore(physics)
        work = _Work(
            prompt=fields["prompt"],
            goal=tuple(Predicate.from_dict(item) for item in fields["goal"]),
            oracle=tuple(Subtask.from_dict(item) for item in fields["oracle"]),
            goal_position=_point(fields["goal_position"]),
            num_done=fields["num_done"],
            frame_index=fields["frame_index"],
            ended=fields["ended"],
        )
        _succeeds(table, work)  # a goal about things that are not there is an error now, not in `step`
    except (KeyError, TypeError, AttributeError, binascii.Error, ValueError) as error:
        raise not_a_state(f"its table cannot be built ({error})") from error
    return table, work


def _point(value: object) -> tuple[float, float, float] | None:
    """Three finite numbers, or None for None. ValueError for anything else."""
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, int | float) for v in value):
        raise ValueError(f"goal_position is {value!r}, expected three numbers or none")
    x, y, z = map(float, value)
    if not all(map(math.isfinite, (x, y, z))):
        raise ValueError(f"goal_position is {value!r}, expected finite numbers")
    return x, y, z
