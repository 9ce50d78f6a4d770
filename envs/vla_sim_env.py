"""A robot arm at a table in MuJoCo that carries out subtasks in words; the spaces are the imagined one's."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Unpack

import gymnasium
import numpy as np

from emuworld.envs.prompts import example_commands
from emuworld.envs.sim_state import not_a_state, pack_state, unpack_state
from emuworld.envs.simulated import SimulatedArguments, SimulatedEnv, understood
from emuworld.envs.spaces import RENDER_MODES
from emuworld.envs.tabletop.franka import checked_arm
from emuworld.envs.tabletop.layout import ARMS
from emuworld.envs.tabletop.orders import draw_task, task_of_prompt
from emuworld.envs.tabletop.plans import Task
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.scene import SkillResult, TableScene
from emuworld.envs.tabletop.subtasks import Subtask, canonical, parse

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


class VLASimEnv(SimulatedEnv):
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
    `renderer` ("auto", "gl", "rays", "cuda"), `arm` ("primitive", or "franka": the Panda's meshes, where the
    package gymnasium-robotics is installed, not for "cuda"; a `state` keeps the arm that it was saved with),
    `max_episode_steps` (None: the limit is `gymnasium.make`'s), `render_mode` ("rgb_array" or "ansi").

    ## Version history
    - v0: first release.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": 1}  # noqa: RUF012
    place = "table"
    option_names = ("prompt", "task", "scene", "state")

    def __init__(self, *, arm: str = ARMS[0], **arguments: Unpack[SimulatedArguments]) -> None:
        super().__init__(example_commands("vla"), **arguments)
        self._arm = checked_arm(arm)
        self._table: TableScene | None = None
        self._work = _Work()

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

    @property
    def scene(self) -> TableScene:
        """The table: all truths about it, and the physics. Changing it changes the episode."""
        if self._table is None:
            raise self._needs_reset()
        return self._table

    def _begin(self, options: Mapping[str, Any], seed: int) -> None:
        if "state" in options:
            self._table, self._work = _restored(options["state"])
        elif "scene" in options:
            self._table, self._work = self._set(options["scene"]), _Work()
        else:
            task = self._task(options, seed)
            self._table = self._set(task.scene)
            self._work = _Work(
                prompt=task.instruction, goal=task.goal, oracle=task.oracle, goal_position=task.goal_position
            )
        self._look()
        self._info = self._facts(SkillResult(done=False, reason="", control_steps=0), command="", text="")

    def _carry_out(self, action: object, *, shown: str, free: bool) -> bool:
        table, work = self.scene, self._work
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
        text = canonical(subtask) if free and subtask is not None else shown
        ended_now = self._work.ended and not work.ended
        self._info = self._facts(result, command=shown, text=text, ended_now=ended_now)
        return self._work.ended

    def _told(self) -> tuple[str, str]:
        info = self._info
        done = "done" if info["subtask_done"] else ", ".join(info["objects"])
        return info["text"], info["reason"] or done

    def _checked_options(self, options: Mapping[str, Any] | None) -> dict[str, Any]:
        given = super()._checked_options(options)
        if "scene" in given and not isinstance(given["scene"], Mapping):
            raise ValueError(
                f"options['scene'] is {type(given['scene']).__name__}; expected TableScene.to_dict()"
            )
        if "task" in given and not isinstance(given["task"], Task | Mapping):
            raise ValueError(
                f"options['task'] is {type(given['task']).__name__}; expected a Task or its to_dict()"
            )
        return given

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

    def _look(self) -> None:
        self._draw(self.scene.model, self.scene.data, self.scene.camera())

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


def _understood(action: object) -> tuple[Subtask | None, str]:
    """The subtask that an action means, or None and why not."""
    subtask, reason = understood(action, parse, "subtask")
    if subtask is not None and subtask.from_picture:
        return None, "its goal place is only in a picture, and a command holds none"
    return subtask, reason


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
