"""The simulated walk: Gymnasium's contract, equal seeds, states, commands that do nothing."""

import math

import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from emuworld.envs.rooms.commands import COMMANDS
from emuworld.envs.sim_env import MAGIC, ExploreSimEnv
from emuworld.envs.sim_state import StateError

SIZE = 32


@pytest.fixture
def env() -> ExploreSimEnv:
    return ExploreSimEnv(size=SIZE, renderer="rays")


def test_equal_seeds_give_equal_walks(env: ExploreSimEnv) -> None:
    other = ExploreSimEnv(size=SIZE, renderer="rays")
    for seed in (0, 1):
        first, info = env.reset(seed=seed)
        again, info_again = other.reset(seed=seed)
        np.testing.assert_array_equal(first, again)
        assert info == info_again
        for words in ("turn left", "", "move forward", "go to the red ball", "nonsense", ""):
            one, two = env.step(words), other.step(words)
            np.testing.assert_array_equal(one[0], two[0])
            assert one[1:] == two[1:]
    assert env.reset(seed=0)[1]["prompt"] != env.reset(seed=1)[1]["prompt"]


def test_a_saved_walk_goes_on_anywhere(env: ExploreSimEnv) -> None:
    env.reset(seed=3, options={"prompt": "a room with a red ball and a blue box"})
    env.step("turn left")
    frame, *_ = env.step("turn left")
    state = env.save_state()
    assert len(state) < 500
    elsewhere = ExploreSimEnv(size=SIZE, renderer="rays")
    restored, info = elsewhere.reset(seed=77, options={"state": state})
    np.testing.assert_array_equal(restored, frame)
    assert info["frame_index"] == 2 and info["prompt"] == "a room with a red ball and a blue box"
    for words in ("", "turn right", "", "move forward"):
        one, two = env.step(words), elsewhere.step(words)
        np.testing.assert_array_equal(one[0], two[0])
        assert one[4] == two[4]
    assert elsewhere.save_state() == env.save_state()


def test_a_fork_goes_its_own_way(env: ExploreSimEnv) -> None:
    env.reset(seed=4)
    state = env.save_state()
    fork = env.fork()
    fork.step("turn around")
    assert env.save_state() == state != fork.save_state()
    assert fork.scene is env.scene


def test_prompts_start_before_what_they_name(env: ExploreSimEnv) -> None:
    _, info = env.reset(seed=5, options={"prompt": "Explore a room with a green cone"})
    assert info["objects_in_view"] == ("green cone",)
    assert info["prompt"] == "Explore a room with a green cone"
    _, _, _, _, info = env.step("go to the green cone")
    assert not info["invalid_action"] and info["objects_in_view"] == ("green cone",)
    target = next(o for o in env.scene.objects if o.identity == "green cone")
    assert math.hypot(target.position[0] - env.pose.x_m, target.position[1] - env.pose.y_m) <= 3.7


@pytest.mark.parametrize(
    "action",
    ["fly", "go to the red dragon", "turn left\n\nturn left", "x" * 2000, "\ud800", None, 3, b"turn left"],
)
def test_what_is_no_command_changes_nothing_and_is_flagged(env: ExploreSimEnv, action: object) -> None:
    frame, _ = env.reset(seed=6)
    state = env.save_state()
    after, reward, terminated, truncated, info = env.step(action)  # type: ignore[arg-type]
    np.testing.assert_array_equal(after, frame)
    assert info["invalid_action"] and info["reason"]
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert env.save_state() == state


def test_any_unicode_text_is_executed_or_flagged(env: ExploreSimEnv) -> None:
    rng = np.random.Generator(np.random.Philox(8))
    env.reset(seed=6)
    state = env.save_state()
    for _ in range(300):
        text = "".join(chr(code) for code in rng.integers(33, 0x10FFFF, int(rng.integers(1, 30))))
        assert env.step(text)[4]["invalid_action"]
    assert env.save_state() == state


def test_every_command_of_the_table_is_understood(env: ExploreSimEnv) -> None:
    env.reset(seed=7)
    assert env.action_space.commands == tuple(command.phrase for command in COMMANDS)
    for command in COMMANDS:
        info = env.step(command.phrase)[4]
        assert not info["invalid_action"] and info["text"] == command.phrase


def test_a_free_step_says_what_it_did(env: ExploreSimEnv) -> None:
    env.reset(seed=8)
    info = env.step("")[4]
    assert info["command"] == "" and info["text"] in env.action_space.commands
    assert not info["invalid_action"] and info["frame_index"] == 1


def test_the_step_limit_truncates() -> None:
    env = ExploreSimEnv(size=SIZE, renderer="rays", max_episode_steps=2)
    for _ in range(2):
        env.reset(seed=9)
        assert [env.step("turn left")[3] for _ in range(2)] == [False, True]


@pytest.mark.parametrize("change", ["cut", "flip", "version", "foreign", "type"])
def test_damaged_states_are_refused(env: ExploreSimEnv, change: str) -> None:
    env.reset(seed=10)
    state: object = env.save_state()
    assert isinstance(state, bytes)
    broken = {
        "cut": state[:-3],
        "flip": state[:20] + bytes([state[20] ^ 1]) + state[21:],
        "version": MAGIC[:-1] + b"\x09" + state[8:],
        "foreign": b"EWSNAP\x00\x01" + state[8:],
        "type": "a string",
    }[change]
    with pytest.raises(StateError, match="not a usable simulator state"):
        env.reset(options={"state": broken})


def test_wrong_arguments_are_named(env: ExploreSimEnv) -> None:
    with pytest.raises(ResetNeeded):
        env.step("turn left")
    with pytest.raises(ValueError, match="cannot be built"):
        env.reset(seed=0, options={"prompt": "a castle"})
    with pytest.raises(ValueError, match="options"):
        env.reset(seed=0, options={"image": None})
    with pytest.raises(ValueError, match="split='dev'"):
        ExploreSimEnv(split="dev")
    with pytest.raises(ValueError, match="renderer='opengl' is unknown; expected one of auto, gl"):
        ExploreSimEnv(renderer="opengl")
    with pytest.raises(ValueError, match="size=5"):
        ExploreSimEnv(size=5)
    with pytest.raises(ValueError, match="render_mode"):
        ExploreSimEnv(render_mode="human")


def test_render_returns_the_picture_already_there() -> None:
    env = ExploreSimEnv(size=SIZE, renderer="rays", render_mode="rgb_array")
    frame, _ = env.reset(seed=11)
    shown = env.render()
    np.testing.assert_array_equal(shown, frame)
    assert shown is not frame
    line = ExploreSimEnv(size=SIZE, renderer="rays", render_mode="ansi")
    line.reset(seed=11)
    assert "->" in str(line.render())
