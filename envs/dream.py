"""The rules of an imagined episode: what a reset begins, what a command does, when it ends, what is told.

This is not an environment: it holds no current episode and no random generator. An `Episode` is a value, a
`Turn` is what one row does next, and `Dream.resolve` asks the model once for any number of turns. The single
and the vector environment are two interfaces to these same rules, so they agree by construction.

One rule serves all modes. In the interleaved modes (explore, story, howto, vla) a command becomes the next
segment's text and the model draws the picture; an empty command lets the model write the text too. In t2i the
command is the whole question and the picture its answer.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from emuworld.envs.commands import COMMANDS
from emuworld.envs.prompts import draw_prompt, example_prompts
from emuworld.envs.snapshot import Snapshot
from emuworld.envs.spaces import MAX_COMMAND_LENGTH, CommandText, is_unicode
from emuworld.world_model import ContextFull, Sampling, Segment, WorldModel, WorldState, load

Frame = npt.NDArray[np.uint8]  # [H, W, 3]

INTERLEAVED_MODES = ("explore", "story", "howto", "vla")
MODES = ("t2i", *INTERLEAVED_MODES)
DEFAULT_SIZE = (256, 256)  # pixels, where neither the caller nor the checkpoint says: the standard size
BLANK_GREY = 128  # mid-grey: what t2i shows before the question

_RESET_OPTIONS = ("prompt", "image", "images", "state")


@dataclass(frozen=True, kw_only=True, eq=False)
class Transition:
    """What a reward function sees: one executed command between two pictures."""

    prompt: str
    command: str
    text: str  # what stands in the answer: the command, or the model's own words after an empty command
    before: Frame
    after: Frame


RewardFunction = Callable[[Transition], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """One imagined world between two commands. A value: nothing changes it, so branches are free."""

    world: WorldState | None  # None in t2i before the question
    frame: Frame
    seed: int
    prompt: str
    frame_index: int = 0  # pictures since the world began; goes through save and restore
    num_steps: int = 0  # steps since the reset, whichever way that reset began
    terminated: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """What one row does next: `asks` goes to the model, `None` there leaves the episode as it is."""

    episode: Episode
    command: str = ""
    asks: tuple[WorldState, str | None] | None = None
    is_step: bool = False  # False for a reset
    invalid: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a turn led to, in Gymnasium's terms."""

    episode: Episode
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]


class DreamArguments(TypedDict, total=False):
    """Constructor arguments common to the single and the vector environment; `Dream` explains each."""

    model: str | os.PathLike[str] | WorldModel
    mode: str
    size: int | tuple[int, int] | None
    max_episode_steps: int | None
    temperature: float | None
    guidance: float | None
    greedy: bool
    reward_fn: RewardFunction | None
    reward_name: str | None


class Dream:
    """The rules of one mode on one model. Immutable: copies share it, pickles name the model and hold no
    weights.

    Arguments (keyword only; `WorldModelEnv` and `WorldVectorEnv` pass them on):
        model: "small", a checkpoint folder, or a loaded `WorldModel`. One name is loaded once a process.
        mode: one of `MODES`.
        size: pixels of a picture, a number or (height, width), multiples of 16; None = the model's own size.
        max_episode_steps: truncate after so many steps since the reset; None = no limit of its own, because
            `gymnasium.make` puts a `TimeLimit` outside.
        temperature, guidance: replace the model's own, for text and pictures; greedy: always the likeliest
        token.
        reward_fn: `Transition -> float`, asked after every executed command; None = 0.0.
        reward_name: what `info["reward_source"]` says; None = the function's `__name__`, or "none" without
        one.
    """

    def __init__(
        self,
        *,
        model: str | os.PathLike[str] | WorldModel = "small",
        mode: str = "explore",
        size: int | tuple[int, int] | None = None,
        max_episode_steps: int | None = None,
        temperature: float | None = None,
        guidance: float | None = None,
        greedy: bool = False,
        reward_fn: RewardFunction | None = None,
        reward_name: str | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(
                f"mode {mode!r} is not one that can be stepped; choose one of {', '.join(MODES)}"
            )
        if max_episode_steps is not None and max_episode_steps < 1:
            raise ValueError(f"max_episode_steps is {max_episode_steps}, expected at least 1 or None")
        self.arguments = DreamArguments(
            model=model, mode=mode, size=size, max_episode_steps=max_episode_steps, temperature=temperature,
            guidance=guidance, greedy=greedy, reward_fn=reward_fn, reward_name=reward_name,
        )  # fmt: skip
        self.mode = mode
        self.model = load(model) if isinstance(model, str | os.PathLike) else model
        manifest = self.model.manifest
        if mode not in manifest.modes:
            raise ValueError(f"this checkpoint was trained for the modes {manifest.modes}, not for {mode!r}")
        self.size = _sides((manifest.default_size or DEFAULT_SIZE) if size is None else size)
        manifest.check_size(self.size)
        sampling = manifest.sampling_for(mode)
        self.sampling = _changed(sampling, temperature=temperature, guidance=guidance, greedy=greedy)
        self.commands = (
            movement_commands() if mode == "explore" else (self.model.commands(mode) or example_prompts(mode))
        )
        self._longest_command = max(self.commands, key=len)
        self._max_episode_steps = max_episode_steps
        self._reward_fn = reward_fn
        unnamed = "none" if reward_fn is None else type(reward_fn).__name__
        self._reward_name = reward_name or getattr(reward_fn, "__name__", unnamed)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Dream":
        return self

    def __reduce__(self) -> tuple[Callable[..., "Dream"], tuple[DreamArguments]]:
        return _rebuild, (self.arguments,)

    def action_space(self) -> CommandText:
        """Commands of the mode; t2i needs some text, elsewhere "" lets the model go on by itself."""
        return CommandText(self.commands, min_length=int(self.mode == "t2i"))

    def reset_turn(self, rng: np.random.Generator, options: Mapping[str, Any] | None = None) -> Turn:
        """Begin an episode: from a snapshot, from given pictures, from a given prompt, or from a drawn one.

        Takes exactly one number from `rng`, whatever the options, so that later episodes do not depend on
        them. ValueError for options that cannot be used.
        """
        seed = int(rng.integers(1 << 63))
        options = _checked_options(options)
        if "state" in options:
            return Turn(episode=self.restore(options["state"]))
        pictures = [fit_picture(picture, self.size) for picture in options["images"]]
        # Pictures speak for themselves: an invented prompt beside them would describe another room.
        drawn = "" if pictures else draw_prompt(np.random.default_rng(seed), mode=self.mode)
        prompt = options.get("prompt", drawn)
        if self.mode == "t2i":
            if pictures:
                raise ValueError(
                    "t2i paints from words alone: leave out options['image'] and options['images']"
                )
            return Turn(episode=Episode(world=None, frame=self._blank(), seed=seed, prompt=prompt))
        world = self.model.begin(mode=self.mode, prompt=prompt, images=pictures, seed=seed, size=self.size)
        episode = Episode(world=world, frame=self._shown(world), seed=seed, prompt=prompt)
        return Turn(episode=episode, asks=None if pictures else (world, ""))

    def step_turn(self, episode: Episode, action: object) -> Turn:
        """What a command asks of the model. Never raises: an unusable command becomes an invalid turn."""
        if not isinstance(action, str):
            return Turn(episode=episode, is_step=True, invalid=True)
        if len(action) > MAX_COMMAND_LENGTH or not is_unicode(action):
            command = action[:MAX_COMMAND_LENGTH].encode(errors="replace").decode()
            return Turn(episode=episode, command=command, is_step=True, invalid=True)
        command = str(action)  # a vector environment's array holds np.str_
        asks = None if episode.terminated else self._question(episode, command)
        return Turn(episode=episode, command=command, is_step=True, asks=asks, invalid=asks is None)

    def _question(self, episode: Episode, command: str) -> tuple[WorldState, str | None] | None:
        text = command if command.strip() else ""
        if self.mode == "t2i":
            if not text:
                return None
            try:
                return self.model.begin(mode=self.mode, prompt=text, seed=episode.seed, size=self.size), ""
            except ContextFull:
                return None
        assert episode.world is not None  # only t2i begins without a world
        return (episode.world, text or None) if self.model.fits(episode.world, text or None) else None

    def resolve(self, turns: Sequence[Turn]) -> list[Outcome]:
        """Ask the model once for all turns that need it; outcomes in the order of the turns."""
        asks = [turn.asks for turn in turns if turn.asks is not None]
        worlds, texts = [world for world, _ in asks], [text for _, text in asks]
        answers = iter(self.model.imagine_batch(worlds, texts, sampling=self.sampling) if asks else [])
        return [self._outcome(turn, None if turn.asks is None else next(answers)) for turn in turns]

    def _outcome(self, turn: Turn, answer: tuple[WorldState, Segment] | None) -> Outcome:
        before = turn.episode
        episode = replace(before, num_steps=before.num_steps + turn.is_step)
        text = thought = ""
        reward = 0.0
        if answer is not None:
            world, segment = answer
            text, thought = segment.text, segment.thought or ""
            episode = self._after(episode, world, segment, is_step=turn.is_step)
            if turn.is_step and self._reward_fn is not None:
                transition = Transition(
                    prompt=before.prompt,
                    command=turn.command,
                    text=text,
                    before=before.frame,
                    after=episode.frame,
                )
                reward = float(self._reward_fn(transition))
        context_full = self._context_full(episode)
        limit = self._max_episode_steps
        out_of_time = limit is not None and episode.num_steps >= limit
        info = {
            "mode": self.mode,
            "prompt": episode.prompt,
            "command": turn.command,
            "text": text,
            "thought": thought,
            "invalid_action": turn.invalid,
            "context_full": context_full,
            "reward_source": self._reward_name,
            "frame_index": episode.frame_index,
        }
        return Outcome(
            episode=episode,
            reward=reward,
            terminated=episode.terminated,
            truncated=out_of_time or (context_full and not episode.terminated),
            info=info,
        )

    def _after(self, episode: Episode, world: WorldState, segment: Segment, *, is_step: bool) -> Episode:
        frame = episode.frame if segment.image is None else np.array(segment.image)
        shown = int(is_step and segment.image is not None)
        return replace(
            episode,
            world=world,
            frame=frame,
            frame_index=episode.frame_index + shown,
            terminated=segment.ended or (is_step and self.mode == "t2i"),
        )

    def _context_full(self, episode: Episode) -> bool:
        """Whether the longest of the mode's commands would no longer fit; until then all of them do."""
        if self.mode == "t2i" or episode.world is None or episode.terminated:
            return False
        return not self.model.fits(episode.world, self._longest_command)

    def _shown(self, world: WorldState) -> Frame:
        """The picture that the world ends with, as the model holds it: decoded from its tokens."""
        frame = self.model.last_image(world)
        return self._blank() if frame is None else frame

    def _blank(self) -> Frame:
        return np.full((*self.size, 3), BLANK_GREY, np.uint8)

    def save(self, episode: Episode) -> bytes:
        """The episode as bytes, at most 1 kB a frame, for environments of the same mode, size and model."""
        return Snapshot(
            mode=self.mode,
            prompt=episode.prompt,
            size=self.size,
            seed=episode.seed,
            frame_index=episode.frame_index,
            terminated=episode.terminated,
            world=b"" if episode.world is None else episode.world.to_bytes(),
        ).to_bytes()

    def restore(self, data: bytes) -> Episode:
        """The episode that `save` wrote, its step count at zero. ValueError if it cannot continue here."""
        snapshot = Snapshot.from_bytes(data)
        if (snapshot.mode, snapshot.size) != (self.mode, self.size):
            raise ValueError(
                f"this snapshot is of mode {snapshot.mode!r} and size {snapshot.size}, this environment of "
                f"{self.mode!r} and {self.size}; make one with mode={snapshot.mode!r}, size={snapshot.size}"
            )
        world = WorldState.from_bytes(snapshot.world) if snapshot.world else None
        if world is None and self.mode != "t2i":
            raise ValueError(f"this snapshot holds no world, which mode {self.mode!r} needs: it was changed")
        return Episode(
            world=world,
            frame=self._blank() if world is None else self._shown(world),
            seed=snapshot.seed,
            prompt=snapshot.prompt,
            frame_index=snapshot.frame_index,
            terminated=snapshot.terminated,
        )


def movement_commands() -> tuple[str, ...]:
    """What explore samples, whatever the checkpoint: dream and simulator share their action space."""
    return tuple(command.phrase for command in COMMANDS)


def fit_picture(picture: Any, size: tuple[int, int]) -> Frame:
    """A user's picture, uint8 [H, W, 3] of any size, cropped around its centre and scaled to `size`."""
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(
            f"a start picture is uint8 [H, W, 3]; got {array.dtype} {list(array.shape)}. "
            "Convert it with numpy.asarray(image.convert('RGB'))"
        )
    if array.shape[:2] == size:
        return np.array(array)
    height, width = size
    return np.asarray(ImageOps.fit(Image.fromarray(array), (width, height), Image.Resampling.LANCZOS))


def _checked_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Reset options, `images` always a list. ValueError for unknown, contradictory or badly typed ones."""
    options = dict(options or {})
    unknown = options.keys() - set(_RESET_OPTIONS)
    if unknown:
        raise ValueError(
            f"unknown reset options {sorted(unknown)}; this environment takes {list(_RESET_OPTIONS)}"
        )
    if "state" in options and len(options) > 1:
        raise ValueError(
            f"options['state'] holds the whole world; leave out {sorted(options.keys() - {'state'})}"
        )
    if "image" in options and "images" in options:
        raise ValueError("give options['image'] (one picture) or options['images'] (a list), not both")
    pictures = [options["image"]] if "image" in options else list(options.get("images", ()))
    prompt = options.get("prompt", "")
    if not isinstance(prompt, str) or not is_unicode(prompt) or len(prompt) > MAX_COMMAND_LENGTH:
        raise ValueError(
            f"options['prompt'] is text of at most {MAX_COMMAND_LENGTH} characters that UTF-8 can write; "
            f"got {type(prompt).__name__} of length {len(prompt) if isinstance(prompt, str) else '-'}"
        )
    return {**options, "images": pictures}


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)  # a list where a spec came from JSON
    if len(sides) != 2:
        raise ValueError(f"size is {size}, expected a number of pixels or (height, width)")
    return sides[0], sides[1]


def _changed(
    sampling: Sampling, *, temperature: float | None, guidance: float | None, greedy: bool
) -> Sampling:
    """A checkpoint's own sampling with the given settings in place of its own."""
    if greedy and temperature is not None:
        raise ValueError(
            "greedy=True takes the likeliest token: leave out temperature, which would do nothing"
        )
    temperature = 0.0 if greedy else temperature
    if temperature is not None:
        text = replace(sampling.text, temperature=temperature)
        sampling = replace(sampling, text=text, image=replace(sampling.image, temperature=temperature))
    return sampling if guidance is None else replace(sampling, guidance=guidance)


def _rebuild(arguments: DreamArguments) -> Dream:
    return Dream(**arguments)
