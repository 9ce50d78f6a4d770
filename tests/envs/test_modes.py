"""All six modes by one rule: how each begins, what a command and an empty one do, how it ends."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emuworld.checkpoint_folder import find, open_parts
from emuworld.envs.dream import INTERLEAVED_MODES, MODES
from emuworld.envs.snapshot import Snapshot
from emuworld.envs.starts import BLANK_GREY, fit_picture
from emuworld.envs.vector_env import WorldVectorEnv
from emuworld.envs.world_env import WorldModelEnv
from emuworld.state import Segment
from emuworld.world_model import ContextFull, Stop, WorldModel, WorldState, load

SIZE = 32  # pixels; four tokens, the smallest that the tiny model draws
COMMANDS = ("pick up the red ball", "put it down", "turn left")


def make(folder: str, mode: str, **arguments: Any) -> WorldModelEnv:
    return WorldModelEnv(**({"model": folder, "size": SIZE, "mode": mode} | arguments))


def picture(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def world_of(env: WorldModelEnv) -> WorldState:
    return WorldState.from_bytes(Snapshot.from_bytes(env.save_state()).world)


def future(env: WorldModelEnv) -> list[tuple[bytes, Any]]:
    """What the commands lead to, up to the end of the episode."""
    steps = []
    for command in COMMANDS:
        frame, *rest = env.step(command)
        steps.append((frame.tobytes(), rest))
        if rest[1]:
            break
    return steps


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_begins_with_a_picture_and_steps_by_words(tiny_folder: str, mode: str) -> None:
    env = make(tiny_folder, mode)
    frame, info = env.reset(seed=3)
    assert frame in env.observation_space
    assert (frame == BLANK_GREY).all() == (mode == "t2i")
    assert (info["mode"], info["frame_index"], info["command"]) == (mode, 0, "")
    assert info["prompt"]
    after, reward, terminated, truncated, info = env.step("pick up the red ball")
    assert after in env.observation_space
    assert (after != frame).any()
    assert (reward, terminated, truncated) == (0.0, mode == "t2i", False)
    assert (info["frame_index"], info["invalid_action"]) == (1, False)
    assert info["text"] == ("pick up the red ball" if mode in INTERLEAVED_MODES else "")


@pytest.mark.parametrize("mode", MODES)
def test_commands_of_the_mode_are_sampled(tiny_folder: str, mode: str) -> None:
    env = make(tiny_folder, mode)
    assert ("" in env.action_space) == (mode in INTERLEAVED_MODES)
    env.reset(seed=0)
    env.action_space.seed(0)
    assert not env.step(env.action_space.sample())[-1]["invalid_action"]


@pytest.mark.parametrize("mode", MODES)
def test_equal_seeds_restores_and_forks_go_on_alike(tiny_folder: str, mode: str) -> None:
    env, other = make(tiny_folder, mode), make(tiny_folder, mode)
    first, info = env.reset(seed=5)
    twin, twin_info = other.reset(seed=5)
    np.testing.assert_array_equal(first, twin)
    assert info == twin_info
    if mode != "t2i":
        assert env.step("turn left")[0].tobytes() == other.step("turn left")[0].tobytes()
    state, branch = env.save_state(), env.fork()
    expected = future(env)
    load(tiny_folder).caches.clear()
    assert future(other) == expected
    assert future(branch) == expected
    frame, _ = other.reset(options={"state": state})
    assert frame in env.observation_space
    assert other.save_state() == state
    assert future(other) == expected
    many = WorldVectorEnv(2, model=tiny_folder, size=SIZE, mode=mode)
    many.reset(seed=0)
    frames, _ = many.fork(state)
    np.testing.assert_array_equal(frames, [frame, frame])
    assert [one.tobytes() for one in many.step([COMMANDS[0]] * 2)[0]] == [expected[0][0]] * 2


def test_an_edit_sees_all_pictures_and_then_the_last_one(tiny_folder: str) -> None:
    env = make(tiny_folder, "x2i")
    model = env.dream.model
    starts = [picture(1), picture(2)]
    frame, info = env.reset(seed=0, options={"images": starts})
    held = model.encode([fit_picture(one, (SIZE, SIZE)) for one in starts])
    np.testing.assert_array_equal(frame, model.decode(held)[1])
    assert info["prompt"] == ""
    references: list[Any] = held
    for index, instruction in enumerate(("make it red", "make it red", "make it blue")):
        before = world_of(env)
        frame, _, terminated, _, info = env.step(instruction)
        assert not terminated
        assert info["frame_index"] == index + 1
        # The same edit by hand, on the model itself.
        state = model.begin(
            mode="x2i", prompt=instruction, images=references, seed=before.seed, size=(SIZE, SIZE)
        )
        state = dataclasses.replace(state, step=before.step)
        state, segment = model.imagine(state, "")
        np.testing.assert_array_equal(frame, segment.image)
        assert state == world_of(env)
        references = model.picture_codes(state)[-1:]


def test_equal_edits_draw_other_random_numbers(tiny_folder: str) -> None:
    """One seed must not draw every edit alike: the world's step counts on."""
    env = make(tiny_folder, "x2i")
    env.reset(seed=0, options={"image": picture(1)})
    steps = []
    for _ in range(3):
        env.step("make it red")
        steps.append(world_of(env).step)
    assert steps == [1, 2, 3]


@pytest.mark.parametrize("mode", ["x2i", "vla"])
def test_a_missing_picture_is_painted_from_the_prompt(tiny_folder: str, mode: str) -> None:
    env = make(tiny_folder, mode)
    model = env.dream.model
    frame, info = env.reset(seed=4, options={"prompt": "a room with a red ball"})
    world = world_of(env)
    painting = model.begin(mode="t2i", prompt="a room with a red ball", seed=world.seed, size=(SIZE, SIZE))
    painting, segment = model.imagine(painting, "")
    np.testing.assert_array_equal(frame, segment.image)
    assert (world.mode, world.step, world.answer_ids) == (mode, 1, ())
    np.testing.assert_array_equal(model.picture_codes(world), model.picture_codes(painting))
    assert info["prompt"] == "a room with a red ball"


@pytest.mark.parametrize("mode", ["story", "howto"])
def test_the_first_picture_is_that_of_the_models_own_words(tiny_folder: str, mode: str) -> None:
    env = make(tiny_folder, mode)
    model = env.dream.model
    said = set()
    for seed in range(30):
        frame, info = env.reset(seed=seed, options={"prompt": "a red ball"})
        world = world_of(env)
        begun = model.begin(mode=mode, prompt="a red ball", seed=world.seed, size=(SIZE, SIZE))
        after, segment = model.imagine(begun)
        if segment.image is None:  # it ended at once: then the picture comes without words
            after, segment = model.imagine(begun, "")
        np.testing.assert_array_equal(frame, segment.image)
        assert (world, info["text"]) == (after, segment.text)
        said.add(bool(info["text"]))
    assert said == {True, False}, "the tiny model does both"


@pytest.mark.parametrize("mode", ["explore", "story", "howto", "vla"])
def test_the_models_own_end_terminates(tiny_folder: str, mode: str) -> None:
    env = make(tiny_folder, mode)
    for seed in range(20):
        env.reset(seed=seed, options={"image": picture(seed)})
        frame, _, terminated, truncated, info = env.step("")
        if terminated:
            break
    assert terminated and not truncated
    assert frame in env.observation_space
    assert not info["context_full"]
    with pytest.warns(UserWarning, match="after the episode terminated"):
        assert env.step("")[-1]["invalid_action"]


def test_an_answer_that_a_limit_closed_is_truncated(
    tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make(tiny_folder, "story")
    env.reset(seed=0)
    imagine_batch = WorldModel.imagine_batch

    def closed(self: WorldModel, states: Any, texts: Any, **settings: Any) -> Any:
        [(state, segment)] = imagine_batch(self, states, texts, **settings)
        state = dataclasses.replace(state, ended=True)
        return [(state, dataclasses.replace(segment, image=None, ended=True, stop_reason=Stop.TEXT_LIMIT))]

    monkeypatch.setattr(WorldModel, "imagine_batch", closed)
    _, _, terminated, truncated, info = env.step("")
    assert (terminated, truncated, info["context_full"]) == (False, True, True)
    state = env.save_state()
    env.reset(options={"state": state})
    _, _, terminated, truncated, info = env.step("go on")
    assert (terminated, truncated, info["invalid_action"]) == (False, True, True)


def test_an_instruction_too_long_for_the_context_changes_nothing(
    tiny_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make(tiny_folder, "x2i")
    frame, _ = env.reset(seed=0)
    state = env.save_state()

    def full(*_: Any, **__: Any) -> WorldState:
        raise ContextFull("full")

    monkeypatch.setattr(WorldModel, "begin", full)
    after, _, terminated, truncated, info = env.step("make it red")
    np.testing.assert_array_equal(after, frame)
    assert info["invalid_action"] and not terminated and not truncated
    assert env.save_state() == state


@pytest.mark.parametrize("mode", ["x2i", "vla"])
def test_a_prompt_too_long_is_refused_before_anything_is_painted(
    tiny_folder: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make(tiny_folder, mode, size=256)  # two pictures of 279 tokens, of a context of 4,096
    painted: list[Any] = []
    monkeypatch.setattr(WorldModel, "imagine_batch", lambda *_, **__: painted.append(1))
    with pytest.raises(ContextFull):
        env.reset(options={"prompt": "🤖" * 900})
    assert not painted


def test_a_checkpoint_without_the_mode_warns_once(tiny_folder: str, tmp_path: Path) -> None:
    folder = tmp_path / "narrow"
    shutil.copytree(tiny_folder, folder)
    manifest = json.loads((folder / "emuworld.json").read_text())
    (folder / "emuworld.json").write_text(json.dumps(manifest | {"modes": ["explore", "t2i"]}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for mode in ("explore", "story", "t2i", "story", "vla"):
            env = make(str(folder), mode)
            for _ in range(2):
                env.reset(seed=0)
        many = WorldVectorEnv(2, model=str(folder), size=SIZE, mode="story")
        many.reset(seed=0)
    told = [str(warning.message) for warning in caught]
    assert [message.split(": ")[0] for message in told] == [
        "this checkpoint was trained for explore, t2i, not for story",
        "this checkpoint was trained for explore, t2i, not for vla",
    ]
    assert {Path(warning.filename).name for warning in caught} == {"test_modes.py"}


def test_a_snapshot_whose_world_is_of_another_mode_is_refused(tiny_folder: str) -> None:
    story, vla = make(tiny_folder, "story"), make(tiny_folder, "vla")
    story.reset(seed=0)
    vla.reset(seed=0)
    foreign = Snapshot.from_bytes(story.save_state())
    mixed = dataclasses.replace(Snapshot.from_bytes(vla.save_state()), world=foreign.world)
    with pytest.raises(ValueError, match="does not fit the mode"):
        vla.reset(options={"state": mixed.to_bytes()})


def test_named_sizes_and_earlier_pictures_on_a_checkpoint_without_a_size(tiny_folder: str) -> None:
    model = free_model(tiny_folder)
    env = make("", "x2i", model=model, size="16:9")
    assert env.observation_space.shape == (144, 256, 3)  # at most 256 px a side: sqrt(36864 * 9 / 16) = 144
    env = make("", "x2i", model=model, size=(64, 96))
    frame, _ = env.reset(seed=0, options={"images": [picture(1, 40, 60), picture(2, 50, 50)]})
    assert frame.shape == (64, 96, 3)
    shapes = [codes.shape for codes in model.picture_codes(world_of(env))]
    assert shapes == [(13, 20), (4, 6)]  # 256 x 256 px at 3:2: 208 by 320; the observation's own size
    assert env.step("put the first into the second")[0].shape == (64, 96, 3)


def free_model(folder: str) -> WorldModel:
    """The tiny checkpoint as one that sees and draws pictures of any size."""
    parts = open_parts(find(folder), device=torch.device("cpu"))
    manifest = dataclasses.replace(parts.manifest, default_size=None)
    return WorldModel(dataclasses.replace(parts, manifest=manifest))


def test_a_thought_before_the_answer_is_told(tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    env = make(tiny_folder, "story")
    imagine_batch = WorldModel.imagine_batch

    def thinking(self: WorldModel, states: Any, texts: Any, **settings: Any) -> Any:
        segments: list[tuple[WorldState, Segment]] = imagine_batch(self, states, texts, **settings)
        return [
            (state, dataclasses.replace(segment, answer_thought="a plan", thought="a ball"))
            for state, segment in segments
        ]

    monkeypatch.setattr(WorldModel, "imagine_batch", thinking)
    assert env.reset(seed=0)[1]["thought"] == "a plan\na ball"
