"""Many imagined worlds as one vector environment: one model call a step, not one process a world."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium.spaces import Discrete
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from emuworld.envs.dream import Dream, DreamArguments
from emuworld.envs.spaces import RENDER_MODES, checked_render_mode, checked_table, command_at, frame_space
from emuworld.envs.starts import Frame
from emuworld.envs.turns import Episode, Outcome, Turn
from emuworld.envs.world_env import RENDER_FPS, render_outcome

Frames = npt.NDArray[np.uint8]  # [N, H, W, 3]
Flags = npt.NDArray[np.bool_]  # [N]
_ROW_OPTIONS = {"prompts": "prompt", "states": "state"}  # one entry a row; None in an entry = not given


class WorldVectorEnv(VectorEnv[Frames, Any, npt.NDArray[Any]]):
    """`num_envs` worlds of `WorldModelEnv`, stepped together; each row equals a single environment byte for
    byte.

    ## Spaces
    Actions are a sequence of `num_envs` strings (`Tuple` of `CommandText`), or with `discrete=True` of
    indices into `table` (`MultiDiscrete`), by default the mode's own commands. Observations are uint8
    [num_envs, H, W, 3].

    ## Autoreset
    `autoreset_mode` as in Gymnasium: NEXT_STEP (default; a finished row is reset by the next step, whose
    action it ignores, in the same model call), SAME_STEP (`info["final_obs"]`, `info["final_info"]`; a second
    model call for the finished rows), DISABLED (`reset(options={"reset_mask": bool [num_envs]})`; a
    terminated row that is stepped all the same stays as it is and is flagged as invalid).

    ## Reset
    `seed`: an int (row i gets seed + i) or one int or None a row. `options`, for the rows that are reset:

    - `prompt`, `image` (uint8 [H, W, 3]), `images` (a list of pictures), `state`: the same for every row, as
      Gymnasium's own vector environments do it;
    - `image` as uint8 [num_envs, H, W, 3], `prompts`, `states`: one a row, None in a list = drawn from the
      seed;
    - `reset_mask`: only these rows, in any autoreset mode.

    ## Info
    Gymnasium's vector format: every key of `WorldModelEnv` as an array, with a mask `_key` beside it.

    Arguments are those of `WorldModelEnv` and `num_envs`, `autoreset_mode`, `discrete`, `table`.
    `max_episode_steps` is counted here, because `gymnasium.make_vec` puts no `TimeLimit` around a native
    vector environment.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": list(RENDER_MODES),
        "render_fps": RENDER_FPS,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        discrete: bool = False,
        table: Sequence[str] | None = None,
        render_mode: str | None = None,
        **arguments: Unpack[DreamArguments],
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}, expected at least 1")
        self.dream = Dream(**arguments)
        self.num_envs = num_envs
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = checked_render_mode(render_mode)
        discrete = discrete or table is not None
        self.table = checked_table(self.dream.commands if table is None else table) if discrete else None
        self.single_action_space = (
            self.dream.action_space() if self.table is None else Discrete(len(self.table))
        )
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.single_observation_space = frame_space(self.dream.size)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._rngs: list[np.random.Generator | None] = [None] * num_envs
        self._outcomes: list[Outcome | None] = [None] * num_envs
        self._finished: Flags = np.zeros(num_envs, np.bool_)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Frames, dict[str, Any]]:
        """Begin the episodes of all rows, or of those in `options["reset_mask"]`; see "Reset" above."""
        seeds = self._row_seeds(seed)
        mask, row_options = self._row_options(options)
        rows = [int(row) for row in np.flatnonzero(mask)]
        for row in rows:
            if seeds[row] is not None:
                self._rngs[row], _ = seeding.np_random(seeds[row])
        infos: dict[str, Any] = {}
        for row, outcome in self._reset_rows(rows, row_options).items():
            infos = self._add_info(infos, dict(outcome.info), row)
        self._finished[mask] = False
        return self._frames(), infos

    def step(
        self, actions: Iterable[Any]
    ) -> tuple[Frames, npt.NDArray[np.float64], Flags, Flags, dict[str, Any]]:
        """Carry out one command a row, in one model call. ValueError if their number is not `num_envs`."""
        rows = self._row_actions(actions)
        resets = self._finished & (self.autoreset_mode is AutoresetMode.NEXT_STEP)
        episodes = self._episodes()
        turns = [
            self.dream.reset_turn(self._rng(row))
            if resets[row]
            else self.dream.step_turn(episodes[row], action)
            for row, action in enumerate(rows)
        ]
        outcomes = self.dream.resolve(turns)
        self._outcomes = list(outcomes)
        rewards = np.array([outcome.reward for outcome in outcomes], np.float64)
        terminated = np.array([outcome.terminated for outcome in outcomes], np.bool_)
        truncated = np.array([outcome.truncated for outcome in outcomes], np.bool_)
        terminated[resets] = truncated[resets] = (
            False  # a restored world may be over already; a reset never is
        )
        self._finished = terminated | truncated
        infos = self._step_infos(outcomes)
        return self._frames(), rewards, terminated, truncated, infos

    def _step_infos(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        restarted: dict[int, Outcome] = {}
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            restarted = self._reset_rows([int(row) for row in np.flatnonzero(self._finished)], {})
        for row, outcome in enumerate(outcomes):
            if row in restarted:
                final = {"final_obs": np.array(outcome.episode.frame), "final_info": dict(outcome.info)}
                infos = self._add_info(infos, final, row)
            infos = self._add_info(infos, dict(restarted.get(row, outcome).info), row)
        return infos

    def _reset_rows(self, rows: Sequence[int], options: Mapping[int, dict[str, Any]]) -> dict[int, Outcome]:
        turns: list[Turn] = [self.dream.reset_turn(self._rng(row), options.get(row)) for row in rows]
        outcomes = dict(zip(rows, self.dream.resolve(turns), strict=True))
        for row, outcome in outcomes.items():
            self._outcomes[row] = outcome
        return outcomes

    def save_states(self) -> tuple[bytes, ...]:
        """Every row's world as `WorldModelEnv.save_state` writes it; single environments restore them too."""
        return tuple(self.dream.save(episode) for episode in self._episodes())

    def fork(self, state: bytes, n: int | None = None) -> tuple[Frames, dict[str, Any]]:
        """Put the world of a snapshot in the first `n` rows (None = all); the other rows stay as they are.

        Returns observations and infos as a reset of these rows does. From here on each row goes its own way
        with the commands that it is given; equal commands give equal frames.
        """
        n = self.num_envs if n is None else n
        if not 1 <= n <= self.num_envs:
            raise ValueError(f"n is {n}, expected 1 to num_envs = {self.num_envs}")
        return self.reset(options={"state": state, "reset_mask": np.arange(self.num_envs) < n})

    def render(self) -> tuple[Frame | str, ...] | None:
        """One picture or line a row, already there; nothing is imagined."""
        if self.render_mode is None:
            gymnasium.logger.warn(f"render() needs render_mode={' or '.join(RENDER_MODES)} at construction")
            return None
        self._episodes()
        return tuple(render_outcome(outcome, self.render_mode) for outcome in self._outcomes if outcome)

    @property
    def np_random_seed(self) -> None:
        """None: each row has a generator of its own."""
        return None

    def _episodes(self) -> list[Episode]:
        episodes = [outcome.episode for outcome in self._outcomes if outcome is not None]
        if len(episodes) < self.num_envs:
            raise gymnasium.error.ResetNeeded("call reset() for all rows first: some rows have no world yet")
        return episodes

    def _frames(self) -> Frames:
        return np.stack([episode.frame for episode in self._episodes()])

    def _rng(self, row: int) -> np.random.Generator:
        rng = self._rngs[row]
        if rng is None:  # never seeded: fresh entropy, as in gymnasium.Env
            rng = self._rngs[row] = seeding.np_random()[0]
        return rng

    def _row_actions(self, actions: Iterable[Any]) -> list[object]:
        rows = [actions] if isinstance(actions, str) or not isinstance(actions, Iterable) else list(actions)
        if len(rows) != self.num_envs or isinstance(actions, str):
            raise ValueError(
                f"step() takes one action a row: a sequence of {self.num_envs}, got {type(actions).__name__} "
                f"of {len(rows)}"
            )
        return rows if self.table is None else [command_at(self.table, action) for action in rows]

    def _row_seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return [int(seed) + row for row in range(self.num_envs)]
        seeds = [None if entry is None else int(entry) for entry in seed]
        if len(seeds) != self.num_envs:
            raise ValueError(
                f"a list of seeds has one entry a row: got {len(seeds)} for num_envs={self.num_envs}"
            )
        return seeds

    def _row_options(self, options: Mapping[str, Any] | None) -> tuple[Flags, dict[int, dict[str, Any]]]:
        shared = dict(options or {})
        mask = self._reset_mask(shared.pop("reset_mask", None))
        per_row: dict[str, Sequence[Any]] = {}
        for plural, singular in _ROW_OPTIONS.items():
            if plural in shared:
                per_row[singular] = shared.pop(plural)
        if np.ndim(shared.get("image", 0)) == 4:
            per_row["image"] = shared.pop("image")
        for name, values in per_row.items():
            if len(values) != self.num_envs or isinstance(values, str | bytes) or name in shared:
                raise ValueError(
                    f"the rows' {name} options need one entry for each of {self.num_envs} rows and no shared "
                    f"{name!r} beside them; got {len(values)} entries"
                )
        rows = range(self.num_envs)
        return mask, {
            row: shared | {name: values[row] for name, values in per_row.items() if values[row] is not None}
            for row in rows
        }

    def _reset_mask(self, mask: Any) -> Flags:
        if mask is None:
            return np.ones(self.num_envs, np.bool_)
        mask = np.asarray(mask)
        if mask.dtype != np.bool_ or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"options['reset_mask'] is a boolean array [{self.num_envs}], True = reset, some True; "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        return mask


def discrete_vector_view(num_envs: int = 1, *, text_id: str, **arguments: Any) -> WorldVectorEnv:
    """The Discrete view of `text_id`'s worlds: the vector entry point of the …Discrete ids."""
    return WorldVectorEnv(num_envs, discrete=True, **(gymnasium.spec(text_id).kwargs | arguments))
