"""The imagined world as an environment: starts, commands, ends, snapshots; equal seeds give equal bytes."""

import pickle
from typing import Any

import gymnasium
import numpy as np
import pytest

from emuworld.envs.starts import BLANK_GREY
from emuworld.envs.turns import Transition
from emuworld.envs.world_env import WorldModelEnv

SIZE = 32  # pixels; four tokens, the smallest that the tiny model draws
WALK = ("turn left", "move forward", "look up")


@pytest.fixture
def env(tiny_folder: str) -> WorldModelEnv:
    return WorldModelEnv(model=tiny_folder, size=SIZE)


@pytest.fixture
def painter(tiny_folder: str) -> WorldModelEnv:
    return WorldModelEnv(model=tiny_folder, size=SIZE, mode="t2i")


def walk(env: WorldModelEnv, commands: tuple[str, ...] = WALK) -> list[tuple[bytes, dict[str, Any]]]:
    """Frames and infos of the commands, up to the end of the model's answer if a free step ends it."""
    steps = []
    for command in commands:
        frame, _, terminated, _, info = env.step(command)
        steps.append((frame.tobytes(), info))
        if terminated:
            break
    return steps


def picture(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("commands", [WALK, ("", "", "")])
def test_equal_seeds_give_equal_worlds(
    env: WorldModelEnv, tiny_folder: str, commands: tuple[str, ...]
) -> None:
    other = WorldModelEnv(model=tiny_folder, size=SIZE)
    for seed in (3, None):  # None: the episode after a seeded one follows the seed too
        frame, info = env.reset(seed=seed)
        twin, twin_info = other.reset(seed=seed)
        assert frame in env.observation_space
        np.testing.assert_array_equal(frame, twin)
        assert info == twin_info
        assert walk(env, commands) == walk(other, commands)


def test_other_seeds_give_other_worlds(env: WorldModelEnv) -> None:
    starts = [env.reset(seed=seed) for seed in range(4)]
    assert len({frame.tobytes() for frame, _ in starts}) > 1
    assert len({info["prompt"] for _, info in starts}) > 1


def test_options_do_not_move_later_episodes(env: WorldModelEnv) -> None:
    env.reset(seed=3)
    expected, _ = env.reset()
    env.reset(seed=3, options={"prompt": "a room with a blue box"})
    np.testing.assert_array_equal(env.reset()[0], expected)


def test_a_command_is_the_text_of_its_step(env: WorldModelEnv) -> None:
    env.reset(seed=0, options={"prompt": "a room with a red ball"})
    _, reward, terminated, truncated, info = env.step("turn left")
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info["prompt"] == "a room with a red ball"
    assert (info["command"], info["text"], info["invalid_action"]) == ("turn left", "turn left", False)
    assert (info["frame_index"], info["reward_source"], info["mode"]) == (1, "none", "explore")


@pytest.mark.parametrize("command", ["", "  \n"])
def test_an_empty_command_lets_the_model_walk_on(env: WorldModelEnv, command: str) -> None:
    env.reset(seed=0)
    info = env.step(command)[-1]
    assert not info["invalid_action"]
    assert info["command"] == command


def test_info_has_the_same_keys_everywhere(env: WorldModelEnv, painter: WorldModelEnv) -> None:
    infos = [env.reset(seed=0)[1], env.step("turn left")[-1], env.step("\ud800")[-1], env.step("")[-1]]
    infos += [painter.reset(seed=0)[1], painter.step("a red ball")[-1]]
    assert len({frozenset(info) for info in infos}) == 1
    for key in infos[0]:
        assert len({type(info[key]) for info in infos}) == 1, key


@pytest.mark.parametrize("action", ["x" * 1001, "\ud800", None, 7, b"turn left", np.zeros(3), ["turn left"]])
def test_an_unusable_command_changes_nothing(env: WorldModelEnv, action: Any) -> None:
    frame, _ = env.reset(seed=0)
    state = env.save_state()
    after, reward, terminated, truncated, info = env.step(action)
    np.testing.assert_array_equal(after, frame)
    assert after is not frame
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert info["invalid_action"] is True
    assert info["frame_index"] == 0
    assert env.save_state() == state


def test_the_episode_is_cut_when_the_context_is_full(env: WorldModelEnv) -> None:
    env.reset(seed=0)
    long = "".join(chr(0x4E00 + number) for number in range(330))  # three byte tokens a character
    info = env.step(long)[-1]
    while not info["invalid_action"]:  # until another long text does not fit, though a short one does
        assert not info["context_full"]
        info = env.step(long)[-1]
    longest = max(env.action_space.commands, key=len)
    truncated = False
    while not truncated:
        frame, _, terminated, truncated, info = env.step(longest)
        assert not terminated and not info["invalid_action"]
        assert truncated == info["context_full"]
    after, _, _, truncated, info = env.step(long)
    np.testing.assert_array_equal(after, frame)
    assert truncated and info["invalid_action"]
    assert env.step("")[3]


def test_snapshots_take_at_most_a_kilobyte_a_frame(tiny_folder: str) -> None:
    env = WorldModelEnv(model=tiny_folder, size=128, guidance=1.0)
    env.reset(seed=0)
    for frames in range(1, 4):
        assert len(env.save_state()) <= 1024 * frames
        env.step("turn left")


def test_the_own_step_limit_truncates(tiny_folder: str) -> None:
    env = WorldModelEnv(model=tiny_folder, size=SIZE, max_episode_steps=2)
    env.reset(seed=0)
    assert [env.step(command)[3] for command in ("turn left", "x" * 1001)] == [False, True]


def test_pictures_start_a_world(env: WorldModelEnv) -> None:
    start = picture(1)
    frame, info = env.reset(seed=0, options={"image": start})
    assert frame in env.observation_space
    assert (info["frame_index"], info["prompt"]) == (0, "")
    again, _ = env.reset(seed=0, options={"images": [start]})
    np.testing.assert_array_equal(frame, again)
    other, _ = env.reset(seed=0, options={"image": picture(2)})
    assert (other != frame).any()
    twin, *_ = env.step("turn left")
    assert twin in env.observation_space


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"promt": "a room"}, "unknown reset options"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"image": picture(1), "images": [picture(1)]}, "not both"),
        ({"image": np.zeros((32, 32, 3))}, "uint8"),
        ({"image": np.zeros((32, 32), np.uint8)}, "uint8"),
        ({"state": b"nonsense"}, "snapshot"),
        ({"state": b"nonsense", "prompt": "a room"}, "leave out"),
    ],
)
def test_unusable_options_say_why(env: WorldModelEnv, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        env.reset(seed=0, options=options)


def test_t2i_paints_the_prompt_once(painter: WorldModelEnv) -> None:
    blank, info = painter.reset(seed=0)
    assert (blank == BLANK_GREY).all()
    assert info["prompt"]
    state = painter.save_state()
    frame, _, terminated, truncated, info = painter.step("a red ball")
    assert (terminated, truncated, info["command"], info["frame_index"]) == (True, False, "a red ball", 1)
    assert (frame != blank).any()
    painter.reset(options={"state": state})
    np.testing.assert_array_equal(painter.step("a red ball")[0], frame)


def test_t2i_needs_words(painter: WorldModelEnv) -> None:
    blank, _ = painter.reset(seed=0)
    assert "" not in painter.action_space
    frame, _, terminated, _, info = painter.step("  ")
    np.testing.assert_array_equal(frame, blank)
    assert info["invalid_action"] and not terminated
    assert painter.step("a red ball")[2]


def test_a_step_after_termination_warns_and_changes_nothing(painter: WorldModelEnv) -> None:
    painter.reset(seed=0)
    frame, *_ = painter.step("a red ball")
    for _ in range(2):  # once as it stands, once restored
        with pytest.warns(UserWarning, match="after the episode terminated"):
            after, reward, terminated, _, info = painter.step("a blue box")
        np.testing.assert_array_equal(after, frame)
        assert (reward, terminated, info["invalid_action"]) == (0.0, True, True)
        painter.reset(options={"state": painter.save_state()})


def test_a_restored_world_goes_on_byte_for_byte(env: WorldModelEnv, tiny_folder: str) -> None:
    env.reset(seed=4, options={"prompt": "一个红球 🤖"})
    before = walk(env)
    state = env.save_state()
    future = walk(env)
    other = WorldModelEnv(model=tiny_folder, size=SIZE)
    for restorer in (other, env):
        frame, info = restorer.reset(options={"state": state})
        assert frame.tobytes() == before[-1][0]
        assert (info["prompt"], info["frame_index"]) == ("一个红球 🤖", len(WALK))
        assert restorer.save_state() == state
        assert walk(restorer) == future


def test_a_world_started_from_a_picture_is_restored(env: WorldModelEnv) -> None:
    frame, _ = env.reset(seed=4, options={"image": picture(3)})
    state = env.save_state()
    future = walk(env)
    np.testing.assert_array_equal(env.reset(options={"state": state})[0], frame)
    assert walk(env) == future


def test_a_snapshot_of_another_mode_or_size_is_refused(env: WorldModelEnv, painter: WorldModelEnv) -> None:
    painter.reset(seed=0)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="mode='explore'"):
        painter.reset(options={"state": env.save_state()})


def test_forks_share_the_weights_and_nothing_else(env: WorldModelEnv) -> None:
    env.reset(seed=0)
    env.step("turn left")
    state = env.save_state()
    branch = env.fork()
    assert branch.dream.model is env.dream.model
    branch.step("move forward")
    assert env.save_state() == state != branch.save_state()
    np.testing.assert_array_equal(env.fork().reset()[0], env.reset()[0])


def test_pickles_hold_no_weights(env: WorldModelEnv) -> None:
    env.reset(seed=0)
    data = pickle.dumps(env)
    assert len(data) < 100_000
    revived = pickle.loads(data)
    assert revived.dream.model is env.dream.model  # loaded once a process
    assert walk(revived) == walk(env)


def test_rewards_come_from_the_injected_function(tiny_folder: str) -> None:
    seen: list[Transition] = []

    def brightness(transition: Transition) -> float:
        seen.append(transition)
        return float(transition.after.mean())

    env = WorldModelEnv(model=tiny_folder, size=SIZE, reward_fn=brightness)
    start, info = env.reset(seed=0)
    assert info["reward_source"] == "brightness"
    frame, reward, *_ = env.step("turn left")
    assert reward == frame.mean()
    assert env.step("\ud800")[1] == 0.0
    assert len(seen) == 1
    np.testing.assert_array_equal(seen[0].before, start)
    assert WorldModelEnv(model=tiny_folder, size=SIZE, reward_fn=brightness, reward_name="light").reset()[1][
        "reward_source"
    ] == ("light")


def test_greedy_worlds_do_not_depend_on_the_seed(tiny_folder: str) -> None:
    env = WorldModelEnv(model=tiny_folder, size=SIZE, greedy=True)
    frames = [env.reset(seed=seed, options={"prompt": "a room with a red ball"})[0] for seed in (1, 2)]
    np.testing.assert_array_equal(*frames)


def test_rendering_shows_what_is_there(tiny_folder: str) -> None:
    env = WorldModelEnv(model=tiny_folder, size=SIZE, render_mode="rgb_array")
    env.reset(seed=0)
    frame, *_ = env.step("turn left")
    np.testing.assert_array_equal(env.render(), frame)
    teller = WorldModelEnv(model=tiny_folder, size=SIZE, render_mode="ansi")
    teller.reset(seed=0)
    teller.step("turn left")
    assert "turn left" in str(teller.render())


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "chat"},
        {"size": "auto"},
        {"size": "5:4"},
        {"size": 40},
        {"size": (32, 1024)},
        {"size": (32, 32, 3)},
        {"max_episode_steps": 0},
        {"greedy": True, "temperature": 1.0},
        {"render_mode": "human"},
        {"model": 3},
        {"size": 128.0},
        {"guidance": "high"},
        {"temperature": "low"},
        {"reward_fn": "brightness"},
    ],
)
def test_unusable_arguments_say_why(tiny_folder: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        WorldModelEnv(**({"model": tiny_folder, "size": SIZE} | arguments))


def test_a_step_needs_a_reset(env: WorldModelEnv) -> None:
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step("turn left")
