"""What every simulated world does alike: arguments, options, pictures, and the time of an episode.

A world says how an episode begins, what a command does and what is told of it; its class is the environment.
No model code is reached from here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Self, TypedDict, TypeVar

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray

from emuworld.envs.render import checked_backend, shared_renderer
from emuworld.envs.rendering.camera import Camera
from emuworld.envs.rooms.scenes import SPLITS
from emuworld.envs.spaces import (
    MAX_COMMAND_LENGTH,
    RENDER_MODES,
    CommandText,
    checked_render_mode,
    frame_space,
    is_unicode,
    picture_sides,
)

Frame = NDArray[np.uint8]  # [H, W, 3]
Meaning = TypeVar("Meaning")


class SimulatedArguments(TypedDict, total=False):
    """Constructor arguments of every simulated world; its docstring explains them."""

    size: int | tuple[int, int] | None
    split: str
    renderer: str
    max_episode_steps: int | None
    render_mode: str | None


class SimulatedEnv(gymnasium.Env[Any, str], ABC):
    """A world in MuJoCo with the spaces of the imagined one; `commands` are what its action space samples."""

    place: str  # what a reset makes, in one word
    option_names: tuple[str, ...]  # of which `reset` takes one

    def __init__(
        self,
        commands: Sequence[str],
        *,
        size: int | tuple[int, int] | None = None,
        split: str = "train",
        renderer: str = "auto",
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r} is unknown; expected one of {', '.join(SPLITS)}")
        self.render_mode = checked_render_mode(render_mode)
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ValueError(
                f"max_episode_steps={max_episode_steps}; expected at least 1, or None for no limit"
            )
        self.size = picture_sides(size)
        self.split = split
        self.max_episode_steps = max_episode_steps
        self._backend = checked_backend(renderer)
        self.action_space = CommandText(commands)
        self.observation_space = frame_space(self.size)
        self._frame: Frame | None = None
        self._info: dict[str, Any] = {}
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frame, dict[str, Any]]:
        """Begin an episode; see "Starting state" above. ValueError for options that cannot be used."""
        super().reset(seed=seed)
        options = self._checked_options(options)
        self._begin(options, int(self.np_random.integers(2**62)))
        self._steps = 0
        return self._observation(), dict(self._info)

    def step(self, action: str) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        """Carry out one command; see "Action space" above."""
        text = isinstance(action, str)
        shown = action if text and len(action) <= MAX_COMMAND_LENGTH and is_unicode(action) else ""
        terminated = self._carry_out(action, shown=shown, free=text and not action.strip())
        self._steps += 1
        truncated = self.max_episode_steps is not None and self._steps >= self.max_episode_steps
        return self._observation(), 0.0, terminated, truncated, dict(self._info)

    def render(self) -> Frame | str | None:
        """The picture already there ("rgb_array") or a line about it ("ansi")."""
        if self.render_mode is None:
            gymnasium.logger.warn(f"render() needs render_mode={' or '.join(RENDER_MODES)} at construction")
            return None
        frame, info = self._observation(), self._info
        if self.render_mode == "rgb_array":
            return frame
        said, seen = self._told()
        flag = " (unusable)" if info["invalid_action"] else ""
        return f"[{info['mode']}-sim {info['frame_index']}] {said or info['prompt']}{flag} -> {seen}"

    def fork(self) -> Self:
        """A second environment in the same state, step count and random generator too."""
        return deepcopy(self)

    @abstractmethod
    def _begin(self, options: Mapping[str, Any], seed: int) -> None:
        """Make a world by the options, or draw one from the seed, and look at it."""

    @abstractmethod
    def _carry_out(self, action: object, *, shown: str, free: bool) -> bool:
        """Do what an action asks and say whether the episode is over. `shown` is the command as `info`
        repeats it, "" for what is no command text at all; a `free` step has no command."""

    @abstractmethod
    def _told(self) -> tuple[str, str]:
        """What was said last, "" for nothing, and what is seen, both in words."""

    def _checked_options(self, options: Mapping[str, Any] | None) -> dict[str, Any]:
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(
                f"options is {type(options).__name__}; expected a dict, as {{'prompt': 'a room'}}"
            )
        given = dict(options or {})
        if set(given) - set(self.option_names) or len(given) > 1:
            names = ", ".join(self.option_names)
            raise ValueError(f"options {sorted(given)} cannot be used; give one of {names}, or none")
        if "prompt" in given and not isinstance(given["prompt"], str):
            raise ValueError(f"options['prompt'] is {type(given['prompt']).__name__}; expected a string")
        return given

    def _needs_reset(self) -> gymnasium.error.ResetNeeded:
        return gymnasium.error.ResetNeeded(f"call reset() first: there is no {self.place} yet")

    def _observation(self) -> Frame:
        if self._frame is None:
            raise self._needs_reset()
        return self._frame.copy()

    def _draw(self, model: mujoco.MjModel, data: mujoco.MjData, camera: Camera) -> None:
        height, width = self.size
        self._frame = shared_renderer(self._backend).render(model, data, camera, height=height, width=width)


def understood(
    action: object, parse: Callable[[str], Meaning | None], noun: str
) -> tuple[Meaning | None, str]:
    """What an action means by `parse`, or None and why not; `noun` is what it should have been."""
    if not isinstance(action, str):
        return None, "not a string"
    if len(action) > MAX_COMMAND_LENGTH:
        return None, f"longer than {MAX_COMMAND_LENGTH} characters"
    meaning = parse(action)
    return meaning, "" if meaning is not None else f"not a {noun} of this world"
