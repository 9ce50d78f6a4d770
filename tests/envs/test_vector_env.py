"""Many worlds at once: frame for frame what Gymnasium's own vector environments make of single ones."""

import unicodedata
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit

from emuworld.envs.dream import MODES
from emuworld.envs.snapshot import Snapshot
from emuworld.envs.vector_env import WorldVectorEnv
from emuworld.envs.world_env import WorldModelEnv

SIZE = 32  # pixels; four tokens, the smallest that the tiny model draws
NUM_ENVS = 3
LIMIT = 3
COMMANDS = [
    ("turn left", "", "move forward"),
    ("move forward", "x" * 1001, ""),
    ("", "turn left", "turn right"),
    ("turn right", "move forward", "turn left"),
    ("turn left", "", "go to the red ball"),
]


def assert_same(ours: Any, theirs: Any) -> None:
    """Equal types, keys, shapes and values, through dictionaries, tuples and object arrays."""
    assert type(ours) is type(theirs), (ours, theirs)
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, tuple) or (isinstance(ours, np.ndarray) and ours.dtype == object):
        for mine, yours in zip(ours, theirs, strict=True):
            assert_same(mine, yours)
    elif isinstance(ours, np.ndarray):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    else:
        assert ours == theirs


def single(folder: str, mode: str, limit: int | None = LIMIT) -> gymnasium.Env[Any, Any]:
    env = WorldModelEnv(model=folder, size=SIZE, mode=mode)
    return env if limit is None else TimeLimit(env, limit)


def sync(folder: str, mode: str, autoreset: AutoresetMode) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: single(folder, mode)] * NUM_ENVS, autoreset_mode=autoreset)


def steps(envs: VectorEnv[Any, Any, Any], autoreset: AutoresetMode) -> Iterator[tuple[Any, ...]]:
    """A reset, five steps, and in DISABLED mode the resets that the caller owes."""
    yield envs.reset(seed=7)
    for commands in COMMANDS:
        result = envs.step(commands)
        yield result
        done = result[2] | result[3]
        if autoreset is AutoresetMode.DISABLED and done.any():
            yield envs.reset(options={"reset_mask": done})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("autoreset", list(AutoresetMode))
def test_equals_sync_vector_env(tiny_folder: str, mode: str, autoreset: AutoresetMode) -> None:
    ours = WorldVectorEnv(
        NUM_ENVS, model=tiny_folder, size=SIZE, mode=mode, max_episode_steps=LIMIT, autoreset_mode=autoreset
    )
    theirs = sync(tiny_folder, mode, autoreset)
    assert ours.action_space == theirs.action_space
    assert ours.observation_space == theirs.observation_space
    assert ours.metadata["autoreset_mode"] is theirs.metadata["autoreset_mode"]
    ends = 0
    for mine, yours in zip(steps(ours, autoreset), steps(theirs, autoreset), strict=True):
        assert_same(mine, yours)
        ends += len(mine) == 5 and int((mine[2] | mine[3]).sum())
    assert ends  # the run crossed the end of an episode


def test_equals_async_vector_env(tiny_folder: str) -> None:
    """One small walk, because every process loads torch; "spawn" because OpenMP does not survive a fork."""
    theirs = AsyncVectorEnv([lambda: single(tiny_folder, "explore")] * 2, context="spawn")
    ours = WorldVectorEnv(2, model=tiny_folder, size=SIZE, max_episode_steps=LIMIT)
    try:
        assert_same(ours.reset(seed=1), theirs.reset(seed=1))
        for commands in [row[:2] for row in COMMANDS]:
            assert_same(ours.step(commands), theirs.step(commands))
        snapshot = {"state": ours.save_states()[0]}
        assert_same(ours.reset(options=snapshot), theirs.reset(options=snapshot))
        assert_same(ours.step(COMMANDS[0][:2]), theirs.step(COMMANDS[0][:2]))
    finally:
        theirs.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_row_does_not_depend_on_the_rows_beside_it(tiny_folder: str, mode: str) -> None:
    """1, 2 and 8 rows: the first of them shows and tells the same, a free step included."""
    commands = ("turn left",) if mode == "t2i" else ("turn left", "")
    alone = WorldModelEnv(model=tiny_folder, size=SIZE, mode=mode)
    expected = [alone.reset(seed=27), *(alone.step(command) for command in commands)]
    for num_envs in (1, 2, 8):
        envs = WorldVectorEnv(
            num_envs, model=tiny_folder, size=SIZE, mode=mode, autoreset_mode=AutoresetMode.DISABLED
        )
        results = [envs.reset(seed=list(range(28 - num_envs, 28))[::-1])]
        for command in commands:
            results.append(envs.step([command] + ["move forward"] * (num_envs - 1)))
        for ours, theirs in zip(results, expected, strict=True):
            np.testing.assert_array_equal(ours[0][0], theirs[0])
            assert {key: ours[-1][key][0] for key in theirs[-1]} == theirs[-1]
            if len(theirs) == 5:
                assert [part[0] for part in ours[1:4]] == list(theirs[1:4])


def test_one_model_call_a_step(tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are reset and rows that step share the call in NEXT_STEP mode."""
    envs = WorldVectorEnv(NUM_ENVS, model=tiny_folder, size=SIZE, max_episode_steps=LIMIT)
    sizes: list[int] = []
    imagine_batch = envs.dream.model.imagine_batch

    def counted(worlds: list[Any], texts: list[Any], **settings: Any) -> Any:
        sizes.append(len(worlds))
        return imagine_batch(worlds, texts, **settings)

    monkeypatch.setattr(envs.dream.model, "imagine_batch", counted)
    envs.reset(seed=0)
    envs.step(COMMANDS[0])
    envs.reset(options={"reset_mask": np.array([True, False, False])})
    for commands in (COMMANDS[2], COMMANDS[3], COMMANDS[4]):  # rows 1 and 2 end, then are reset beside row 0
        envs.step(commands)
    assert sizes == [3, 3, 1, 3, 3, 3]


def test_options_for_every_row_and_for_each(tiny_folder: str) -> None:
    envs = WorldVectorEnv(2, model=tiny_folder, size=SIZE)
    _, infos = envs.reset(seed=0, options={"prompt": "a room with a red ball"})
    assert list(infos["prompt"]) == ["a room with a red ball"] * 2
    _, infos = envs.reset(seed=0, options={"prompts": ["a room with a blue box", None]})
    drawn = WorldModelEnv(model=tiny_folder, size=SIZE).reset(seed=1)[1]["prompt"]
    assert list(infos["prompt"]) == ["a room with a blue box", drawn]
    pictures = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    frames, _ = envs.reset(seed=0, options={"image": pictures})
    shared, _ = envs.reset(seed=0, options={"image": pictures[1]})
    np.testing.assert_array_equal(frames[1], shared[1])
    assert (frames[0] != shared[0]).any()


def test_states_travel_between_single_and_vector(tiny_folder: str) -> None:
    alone = WorldModelEnv(model=tiny_folder, size=SIZE)
    envs = WorldVectorEnv(2, model=tiny_folder, size=SIZE)
    alone.reset(seed=5)
    frame, *_ = alone.step("turn left")
    frames, infos = envs.reset(seed=0, options={"states": [alone.save_state(), None]})
    np.testing.assert_array_equal(frames[0], frame)
    assert list(infos["frame_index"]) == [1, 0]
    after = envs.step(["move forward", ""])[0]
    np.testing.assert_array_equal(alone.step("move forward")[0], after[0])
    np.testing.assert_array_equal(alone.reset(options={"state": envs.save_states()[1]})[0], after[1])


def test_fork_puts_one_world_in_many_rows(tiny_folder: str) -> None:
    envs = WorldVectorEnv(3, model=tiny_folder, size=SIZE)
    envs.reset(seed=0)
    envs.step(["turn left", "turn right", "move forward"])
    states = envs.save_states()
    frames, infos = envs.fork(states[0], 2)
    assert list(infos["_mode"]) == [True, True, False]
    assert envs.save_states() == (states[0], states[0], states[2])
    np.testing.assert_array_equal(frames[0], frames[1])
    envs.fork(states[1])
    after = envs.step(["turn left", "turn left", "turn right"])[0]
    np.testing.assert_array_equal(after[0], after[1])
    with pytest.raises(ValueError, match="num_envs"):
        envs.fork(states[0], 4)


def test_a_terminated_row_waits_for_its_reset(tiny_folder: str) -> None:
    envs = WorldVectorEnv(2, model=tiny_folder, size=SIZE, mode="t2i", autoreset_mode="Disabled")
    envs.reset(seed=0)
    frames, _, terminated, *_ = envs.step(["a red ball", ""])
    assert list(terminated) == [True, False]
    after, _, terminated, _, infos = envs.step(["a blue box", "a blue box"])
    np.testing.assert_array_equal(after[0], frames[0])
    assert list(terminated) == [True, True]
    assert list(infos["invalid_action"]) == [True, False]


def test_two_thousand_unicode_commands(tiny_folder: str) -> None:
    """Each is executed or flagged, none raises: any plane, control tokens, surrogates, any length."""
    rng = np.random.default_rng(0)
    envs = WorldVectorEnv(16, model=tiny_folder, size=SIZE, guidance=1.0, max_episode_steps=8)
    envs.reset(seed=0)
    handled = executed = 0
    resetting = np.zeros(16, bool)  # rows whose command Gymnasium's NEXT_STEP mode ignores
    while handled < 2_000:
        commands = [random_text(rng) for _ in range(16)]
        before = [episode_age(state) for state in envs.save_states()]
        _, _, terminated, truncated, infos = envs.step(commands)
        for row in np.flatnonzero(~resetting):
            handled += 1
            text = unicodedata.normalize("NFC", commands[row])  # as tokenizers of this family read it
            grown = infos["frame_index"][row] - before[row]
            if infos["invalid_action"][row]:
                assert grown == 0
            elif text.strip():
                executed += 1
                assert (infos["text"][row], grown) == (text, 1)
        resetting = terminated | truncated
    assert executed > 500


def episode_age(state: bytes) -> int:
    return Snapshot.from_bytes(state).frame_index


def random_text(rng: np.random.Generator) -> str:
    """Letters, any code point, pieces of the token language, or far too much of something."""
    kind = rng.choice(5, p=(0.25, 0.4, 0.24, 0.01, 0.1))  # long ones are rare because they fill the context
    length = int(rng.integers(0, 12))
    if kind == 0:
        return "".join(chr(int(code)) for code in rng.integers(32, 127, length))
    if kind == 1:
        return "".join(chr(int(code)) for code in rng.integers(0, 0x110000, length))  # with surrogates
    if kind == 2:
        pieces = ["<|image start|>", "<|extra_203|>", "2*2", "\n", "\0", "👩‍👩‍👧", "向左转", "<|endoftext|>"]
        return "".join(str(piece) for piece in rng.choice(pieces, length % 4))
    if kind == 3:
        return "é" * int(rng.integers(900, 1_100))
    return str(rng.choice(["", " ", "turn left", "go to the red ball"]))


def test_discrete_rows_resolve_their_commands(tiny_folder: str) -> None:
    table = ("turn left", "move forward")
    envs = WorldVectorEnv(2, model=tiny_folder, size=SIZE, table=table)
    words = WorldVectorEnv(2, model=tiny_folder, size=SIZE)
    assert envs.action_space == gymnasium.spaces.MultiDiscrete([2, 2])
    envs.reset(seed=0)
    words.reset(seed=0)
    frames, *_, infos = envs.step(np.array([1, 0]))
    assert list(infos["command"]) == ["move forward", "turn left"]
    np.testing.assert_array_equal(frames, words.step(["move forward", "turn left"])[0])
    assert list(envs.step([5, -1])[-1]["invalid_action"]) == [True, True]


def test_unusable_calls_say_why(tiny_folder: str) -> None:
    envs = WorldVectorEnv(2, model=tiny_folder, size=SIZE)
    with pytest.raises(gymnasium.error.ResetNeeded):
        envs.step(["turn left", "turn left"])
    with pytest.raises(gymnasium.error.ResetNeeded):
        envs.reset(options={"reset_mask": np.array([True, False])})
    envs.reset(seed=0)
    for call in (
        lambda: envs.step(["turn left"]),
        lambda: envs.step("go"),
        lambda: envs.reset(seed=[1]),
        lambda: envs.reset(options={"states": [None]}),
        lambda: envs.reset(options={"prompts": ["a", "b"], "prompt": "c"}),
        lambda: envs.reset(options={"reset_mask": np.array([False, False])}),
        lambda: envs.reset(options={"reset_mask": [0, 1]}),
        lambda: envs.step(None),  # type: ignore[arg-type]
        lambda: WorldVectorEnv(0, model=tiny_folder, size=SIZE),
        lambda: WorldVectorEnv(2, model=tiny_folder, size=SIZE, table=[]),
    ):
        with pytest.raises(ValueError):
            call()
