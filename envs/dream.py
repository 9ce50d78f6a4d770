"""The rules of an imagined episode: what a reset begins, what a command does, when it ends, what is told.

This is not an environment: it holds no current episode and no random generator. An `Episode` is a value, a
`Turn` is what one row does next, and `Dream.resolve` asks the model once for any number of turns. The single
and the vector environment are two interfaces to these same rules, so they agree by construction.

One rule serves all modes. In the interleaved modes (explore, story, howto, vla) a command becomes the next
segment's text and the model draws the picture; an empty command lets the model write the text too. In t2i and
x2i the command is the whole question and the picture its answer; x2i asks it of the last picture, again and
again.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np

from emuworld.envs.prompts import draw_prompt, example_commands
from emuworld.envs.rooms.commands import COMMANDS
from emuworld.envs.snapshot import Snapshot
from emuworld.envs.spaces import MAX_COMMAND_LENGTH, CommandText, is_unicode
from emuworld.envs.starts import Frame, Opened, Worlds, checked_options, frame_size
from emuworld.envs.turns import Episode, Outcome, RewardFunction, Transition, Turn
from emuworld.world_model import (
    ContextFull,
    Sampling,
    Segment,
    SnapshotError,
    Stop,
    WorldModel,
    WorldState,
    load,
)

INTERLEAVED_MODES = ("explore", "story", "howto", "vla")
MODES = ("t2i", "x2i", *INTERLEAVED_MODES)
# Modes that go on from a picture which is there already: where none is given, t2i paints it from the prompt.
_FROM_A_PICTURE = ("x2i", "vla")


class DreamArguments(TypedDict, total=False):
    """Constructor arguments common to the single and the vector environment; `Dream` explains each."""

    model: str | os.PathLike[str] | WorldModel
    mode: str
    size: int | str | tuple[int, int] | None
    max_episode_steps: int | None
    temperature: float | None
    guidance: float | None
    image_guidance: float | None
    passes: int | None
    draft_window: int | None
    greedy: bool
    reward_fn: RewardFunction | None
    reward_name: str | None


class Dream:
    """The rules of one mode on one model. Immutable: copies share it, pickles name the model and hold no
    weights.

    Arguments (keyword only; `WorldModelEnv` and `WorldVectorEnv` pass them on):
        model: "small", a checkpoint folder, or a loaded `WorldModel`. One name is loaded once a process.
        mode: one of `MODES`.
        size: pixels of a picture, a number or (height, width), multiples of 16, or a ratio like "16:9" (see
            `WorldModel.begin`); None = "default", which is the model's own size where it has one.
        max_episode_steps: truncate after so many steps since the reset; None = no limit of its own, because
            `gymnasium.make` puts a `TimeLimit` outside.
        temperature, guidance, image_guidance, passes, draft_window: replace the model's own (temperature: for
            text and pictures; the others as in `Sampling`; a window without `passes` draws token by token);
            greedy: always the likeliest token.
        reward_fn: `Transition -> float`, asked after every executed command; None = 0.0.
        reward_name: what `info["reward_source"]` says; None = the function's `__name__`, or "none" without
        one.
    """

    def __init__(
        self,
        *,
        model: str | os.PathLike[str] | WorldModel = "small",
        mode: str = "explore",
        size: int | str | tuple[int, int] | None = None,
        max_episode_steps: int | None = None,
        temperature: float | None = None,
        guidance: float | None = None,
        image_guidance: float | None = None,
        passes: int | None = None,
        draft_window: int | None = None,
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
            guidance=guidance, image_guidance=image_guidance, passes=passes, draft_window=draft_window,
            greedy=greedy, reward_fn=reward_fn, reward_name=reward_name,
        )  # fmt: skip
        self.mode = mode
        self.model = load(model) if isinstance(model, str | os.PathLike) else model
        if not isinstance(self.model, WorldModel):
            raise ValueError(
                f"model is {type(model).__name__}; expected 'small', a checkpoint folder, or what "
                "emuworld.load returned"
            )
        if reward_fn is not None and not callable(reward_fn):
            raise ValueError(f"reward_fn is {reward_fn!r}; expected a function of a Transition, or None")
        self.size = frame_size(self.model, size, mode=mode)
        self._worlds = Worlds(model=self.model, mode=mode, size=self.size)
        changes = {"guidance": guidance, "image_guidance": image_guidance, "passes": passes}
        changes["draft_window"] = draft_window
        if draft_window and passes is None:
            changes["passes"] = 0  # a window is of token by token, whatever the model draws with
        self._sampling = {
            name: _changed(
                self.model.default_sampling(name), changes, mode=name, temperature=temperature, greedy=greedy
            )
            for name in (mode, "t2i")
        }
        self.model.manifest.check_sampling(self._sampling[mode])
        own = self.model.commands(mode)
        self.commands = movement_commands() if mode == "explore" else own or example_commands(mode)
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
        """Commands of the mode; t2i and x2i need some text, elsewhere "" lets the model go on by itself."""
        return CommandText(self.commands, min_length=int(self.mode not in INTERLEAVED_MODES))

    def open_pictures(self, pictures: Sequence[Sequence[Frame]]) -> list[Opened]:
        """Pictures of many resets, for `reset_turn(..., opened=...)`: together they are opened faster."""
        return self._worlds.opened(pictures)

    def reset_turn(
        self,
        rng: np.random.Generator,
        options: Mapping[str, Any] | None = None,
        *,
        opened: Opened | None = None,
    ) -> Turn:
        """Begin an episode: from a snapshot, from given pictures, from a given prompt, or from a drawn one.

        Takes exactly one number from `rng`, whatever the options, so that later episodes do not depend on
        them. `opened`: the options' pictures, where they are open already. ValueError for options that cannot
        be used.
        """
        seed = int(rng.integers(1 << 63))
        self._worlds.warn_if_untrained()
        options = checked_options(options)
        if "state" in options:
            return Turn(episode=self.restore(options["state"]))
        pictures: list[Frame] = options["images"]
        # Pictures speak for themselves: an invented prompt beside them would describe another room.
        drawn = "" if pictures else draw_prompt(np.random.default_rng(seed), mode=self.mode)
        prompt = options.get("prompt", drawn)
        start = Episode(world=None, frame=self._worlds.blank(), seed=seed, prompt=prompt)
        if self.mode == "t2i":
            if pictures:
                raise ValueError(
                    "t2i paints from words alone: leave out options['image'] and options['images']"
                )
            return Turn(episode=start)
        if pictures:
            if opened is not None:
                world = self._worlds.begin(prompt, seed=seed, images=opened.codes)
                return Turn(episode=replace(start, world=world, frame=opened.shown))
            world = self._worlds.from_pictures(prompt, seed=seed, pictures=pictures)
            return Turn(episode=replace(start, world=world, frame=self._worlds.shown(world)))
        if self.mode in _FROM_A_PICTURE:
            world = self._worlds.painting(prompt, seed=seed)
            return Turn(episode=replace(start, world=world), asks=(world, ""), paints=True)
        world = self._worlds.begin(prompt, seed=seed)
        # A walk begins with a view and no words; elsewhere the model begins its answer as it likes.
        text = "" if self.mode == "explore" else None
        return Turn(episode=replace(start, world=world), asks=(world, text))

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
        world = episode.world
        if self.mode in INTERLEAVED_MODES:
            assert world is not None  # only t2i begins without a world
            return (world, text or None) if self.model.fits(world, text or None) else None
        if not text:
            return None
        try:
            if world is None:
                return self._worlds.begin(text, seed=episode.seed), ""
            return self._worlds.edit(text, world=world), ""
        except ContextFull:
            return None

    def resolve(self, turns: Sequence[Turn]) -> list[Outcome]:
        """Ask the model once for all turns that need it; outcomes in the order of the turns."""
        answers = self._answers([turn.asks for turn in turns])
        # A reset shows a picture: an answer that ended before its first one begins with it, without words.
        again = [
            (turn.asks[0], "") if turn.asks and answer and _lacks_picture(turn, answer[1]) else None
            for turn, answer in zip(turns, answers, strict=True)
        ]
        if any(again):
            retried = self._answers(again)
            answers = [new or old for new, old in zip(retried, answers, strict=True)]
        return [self._outcome(turn, answer) for turn, answer in zip(turns, answers, strict=True)]

    def _answers(
        self, asked: Sequence[tuple[WorldState, str | None] | None]
    ) -> list[tuple[WorldState, Segment] | None]:
        """What the model answers, in one call; None where nothing is asked."""
        asks = [ask for ask in asked if ask is not None]
        worlds, texts = [world for world, _ in asks], [text for _, text in asks]
        sampling = [self._sampling[world.mode] for world in worlds]
        answers = iter(self.model.imagine_batch(worlds, texts, sampling=sampling) if asks else [])
        return [None if ask is None else next(answers) for ask in asked]

    def _outcome(self, turn: Turn, answer: tuple[WorldState, Segment] | None) -> Outcome:
        before = turn.episode
        episode = replace(before, num_steps=before.num_steps + turn.is_step)
        text = thought = ""
        reward = 0.0
        if answer is not None:
            world, segment = answer
            text = segment.text
            thought = "\n".join(filter(None, (segment.answer_thought, segment.thought)))
            if turn.paints:
                world = self._worlds.from_painting(episode.prompt, painting=world)
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
            # An answer that was closed at a limit is no end that the model has chosen: it truncates.
            terminated=is_step and (self.mode == "t2i" or segment.stop_reason is Stop.END),
        )

    def _context_full(self, episode: Episode) -> bool:
        """Whether the longest of the mode's commands would no longer fit; until then all of them do."""
        if self.mode not in INTERLEAVED_MODES or episode.world is None or episode.terminated:
            return False  # every question of t2i and x2i has a context of its own
        return not self.model.fits(episode.world, self._longest_command)

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
        frame = self._worlds.blank() if world is None else self._worlds.shown(world)
        if frame.shape[:2] != self.size or (world is not None and world.mode != self.mode):
            raise SnapshotError(
                "this snapshot's world does not fit the mode and size it names: it was changed"
            )
        return Episode(
            world=world,
            frame=frame,
            seed=snapshot.seed,
            prompt=snapshot.prompt,
            frame_index=snapshot.frame_index,
            terminated=snapshot.terminated,
        )


def movement_commands() -> tuple[str, ...]:
    """What explore samples, whatever the checkpoint: dream and simulator share their action space."""
    return tuple(command.phrase for command in COMMANDS)


def _lacks_picture(turn: Turn, segment: Segment) -> bool:
    """Whether a reset let the model begin its answer, and it ended that without a picture."""
    return not turn.is_step and turn.asks is not None and turn.asks[1] is None and segment.image is None


def _changed(
    sampling: Sampling,
    changes: Mapping[str, float | None],
    *,
    mode: str,
    temperature: float | None,
    greedy: bool,
) -> Sampling:
    """A checkpoint's own sampling with the given settings in place of its own; None leaves one as it is."""
    if greedy and temperature is not None:
        raise ValueError(
            "greedy=True takes the likeliest token: leave out temperature, which would do nothing"
        )
    temperature = 0.0 if greedy else temperature
    if temperature is not None:
        text = replace(sampling.text, temperature=temperature)
        sampling = replace(sampling, text=text, image=replace(sampling.image, temperature=temperature))
    given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
    if mode not in INTERLEAVED_MODES:
        given["max_new_tokens"] = None  # the one picture is the answer, and its size is known
    return replace(sampling, **given)


def _rebuild(arguments: DreamArguments) -> Dream:
    return Dream(**arguments)
