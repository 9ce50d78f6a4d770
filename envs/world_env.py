"""An imagined world as a Gymnasium environment: text in, picture out, the world model in between."""

from copy import deepcopy
from typing import Any, Unpack

import gymnasium
import numpy as np

from emuworld.envs.dream import Dream, DreamArguments
from emuworld.envs.spaces import RENDER_MODES, checked_render_mode, frame_space
from emuworld.envs.starts import Frame
from emuworld.envs.turns import Episode, Outcome

RENDER_FPS = 4  # a picture is a step of about half a metre or 30 degrees; 4 a second reads as a walk


class WorldModelEnv(gymnasium.Env[Any, str]):
    """A world that a model imagines, one picture a step.

    ## Action space
    `CommandText`: any Unicode string of up to 1,000 characters; samples are the mode's own commands.

    | mode | a command is | "" means |
    |---|---|---|
    | explore | a movement, "turn left", or anything in words | walk freely: the model writes the command |
    | t2i | the whole prompt of one picture | unusable |
    | x2i | an instruction to edit the last picture | unusable |
    | story, howto, vla | the next line, instruction or subtask | the model goes on by itself |

    In explore, story, howto and vla the command is written into the answer as it stands, and the model draws
    the picture that belongs to it; after an empty command the model writes the words too.

    An unusable command (no string, over 1,000 characters, not writable as UTF-8, no room left in the context,
    empty where text is needed) changes nothing and sets `info["invalid_action"]`; `step` raises for no
    command.

    ## Observation space
    `Box(0, 255, (H, W, 3), uint8)`: the newest picture, decoded from the model's tokens; a new array every
    time. 256 x 256 with the built-in model unless `size` says otherwise; with the published one 880 x 1168 in
    t2i and x2i, 624 x 832 elsewhere.

    ## Rewards
    0.0, or what `reward_fn` says of each executed command; its name is `info["reward_source"]`.

    ## Starting state
    `reset(seed=…)` draws a prompt from the seed and imagines the first view. `options` may give:

    - `prompt`: the world in words, or the question ("" if only pictures are given, which then speak for
      themselves);
    - `image` or `images`: uint8 [H, W, 3], cropped and scaled to the observation's size (where the checkpoint
      has no size of its own, all but the last keep their ratio). The first observation is then the last of
      them as the model holds it, that is through its tokenizer (a simulator's first frame makes a twin of
      that simulator);
    - `state`: bytes of `save_state`. The same world goes on, in any process, single or vector; its step count
      starts at zero, as `TimeLimit`'s does. `info["frame_index"]` keeps the age of the world.

    Without pictures the modes begin like this:

    | mode | the first observation |
    |---|---|
    | explore | the model's first view, drawn without words |
    | story, howto | the picture of the model's first words, which are in `info["text"]` |
    | x2i, vla | a picture that t2i paints from the prompt; the world goes on from it as from a given one |
    | t2i | mid-grey (128, 128, 128), no model call; `info["prompt"]` suggests a prompt |

    In x2i the first edit sees all given pictures, every later one the last picture alone. Unusable options
    raise ValueError. A checkpoint that was not trained for the mode is used all the same; `reset` says so
    once a process (UserWarning).

    ## Episode end
    - terminated: t2i after its picture; explore, story, howto and vla when the model ends its answer (after
      an empty command only).
    - truncated: at the step limit (by `TimeLimit`: 40 in explore, 10 in x2i, 20 in story, howto and vla), or
      when nothing can follow (`info["context_full"]`): the longest command of the mode would no longer fit
      the model's context, or the answer was closed because the model's words grew too long.

    A step after termination changes nothing, warns, and is flagged as invalid.

    ## Info
    The same keys at every reset and step, and only what equal seeds reproduce: `mode`, `prompt`, `command`
    (as given), `text` (the segment's text: the command as the model reads it, Unicode NFC, or the model's own
    words), `thought` (the model's chain of thought or ""), `invalid_action`, `context_full`, `reward_source`,
    `frame_index` (pictures since the first).

    ## Arguments
    `model` ("small", a checkpoint folder, or a `WorldModel`), `mode`, `size` (pixels, a number or (height,
    width), or a ratio like "16:9"), `max_episode_steps` (None: the limit is `gymnasium.make`'s),
    `temperature`, `guidance`, `image_guidance`, `passes`, `draft_window`, `greedy`, `reward_fn`,
    `reward_name`, `render_mode` ("rgb_array" or "ansi"). `emuworld.envs.dream.Dream` explains each.

    ## Same seed, same world
    Each reset draws the world's seed from `np_random`; each picture's random numbers come from that seed and
    the picture's index. Frames are byte-equal alone, in a batch, after a restore and in another process (on
    the CPU).

    ## Version history
    - v0: first release.
    """

    metadata: dict[str, Any] = {"render_modes": list(RENDER_MODES), "render_fps": RENDER_FPS}  # noqa: RUF012

    def __init__(self, *, render_mode: str | None = None, **arguments: Unpack[DreamArguments]) -> None:
        self.dream = Dream(**arguments)
        self.render_mode = checked_render_mode(render_mode)
        self.action_space = self.dream.action_space()
        self.observation_space = frame_space(self.dream.size)
        self._outcome: Outcome | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frame, dict[str, Any]]:
        """Begin an episode; see "Starting state" above."""
        super().reset(seed=seed)
        [self._outcome] = self.dream.resolve([self.dream.reset_turn(self.np_random, options)])
        return self._frame(), dict(self._outcome.info)

    def step(self, action: str) -> tuple[Frame, float, bool, bool, dict[str, Any]]:
        """Carry out one command; see "Action space" above."""
        if self._episode.terminated:
            gymnasium.logger.warn(
                "step() was called after the episode terminated: nothing changes until reset()"
            )
        [outcome] = self.dream.resolve([self.dream.step_turn(self._episode, action)])
        self._outcome = outcome
        return self._frame(), outcome.reward, outcome.terminated, outcome.truncated, dict(outcome.info)

    def render(self) -> Frame | str | None:
        """The picture already there ("rgb_array") or a line about it ("ansi"); nothing is imagined."""
        if self.render_mode is None:
            gymnasium.logger.warn(f"render() needs render_mode={' or '.join(RENDER_MODES)} at construction")
            return None
        return render_outcome(self._shown_outcome, self.render_mode)

    def save_state(self) -> bytes:
        """This world as bytes, at most 1 kB a frame, for `reset(options={"state": …})` anywhere."""
        return self.dream.save(self._episode)

    def fork(self) -> "WorldModelEnv":
        """A second environment in the same state, step count and random generator too; weights are shared."""
        return deepcopy(self)

    @property
    def _shown_outcome(self) -> Outcome:
        if self._outcome is None:
            raise gymnasium.error.ResetNeeded("call reset() first: there is no world yet")
        return self._outcome

    @property
    def _episode(self) -> Episode:
        return self._shown_outcome.episode

    def _frame(self) -> Frame:
        return np.array(self._episode.frame)


def render_outcome(outcome: Outcome, render_mode: str) -> Frame | str:
    """A copy of the outcome's picture, or one line of text about it."""
    if render_mode == "rgb_array":
        return np.array(outcome.episode.frame)
    info = outcome.info
    flag = " (unusable)" if info["invalid_action"] else ""
    return (
        f"[{info['mode']} {info['frame_index']}] {info['command'] or info['prompt']}{flag} -> {info['text']}"
    )
