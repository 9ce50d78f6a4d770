"""The Discrete view of a text environment."""

from typing import Any

import gymnasium
import numpy as np
import pytest

from emuworld.envs.world_env import WorldModelEnv
from emuworld.envs.wrappers import CommandTable

SIZE = 32  # pixels


@pytest.fixture
def env(tiny_folder: str) -> CommandTable:
    return CommandTable(WorldModelEnv(model=tiny_folder, size=SIZE), ("turn left", "move forward"))


def test_an_index_sends_its_command(env: CommandTable, tiny_folder: str) -> None:
    words = WorldModelEnv(model=tiny_folder, size=SIZE)
    assert env.action_space == gymnasium.spaces.Discrete(2)
    env.reset(seed=0)
    words.reset(seed=0)
    frame, *_, info = env.step(1)
    assert info["command"] == info["text"] == "move forward"
    np.testing.assert_array_equal(frame, words.step("move forward")[0])


@pytest.mark.parametrize("action", [2, -1, 1.0, "turn left", None, np.zeros(2, int)])
def test_other_actions_are_flagged(env: CommandTable, action: Any) -> None:
    frame, _ = env.reset(seed=0)
    after, *_, info = env.step(action)
    assert info["invalid_action"]
    np.testing.assert_array_equal(after, frame)


def test_the_default_table_is_what_the_space_samples(tiny_folder: str) -> None:
    base = WorldModelEnv(model=tiny_folder, size=SIZE)
    env = CommandTable(base)
    assert env.get_wrapper_attr("table") == base.action_space.commands
    assert env.action_space == gymnasium.spaces.Discrete(len(base.action_space.commands))


def test_snapshots_pass_through(env: CommandTable) -> None:
    env.reset(seed=0)
    env.step(0)
    state = env.get_wrapper_attr("save_state")()
    frame, *_ = env.step(1)
    env.reset(options={"state": state})
    np.testing.assert_array_equal(env.step(1)[0], frame)
