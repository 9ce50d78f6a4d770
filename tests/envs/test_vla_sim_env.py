"""The simulated arm as an environment: equal seeds, states, forks, subtasks that do nothing, success."""

import base64
import json
from typing import Any

import numpy as np
import pytest
from gymnasium.error import ResetNeeded

from emuworld.envs.sim_env import ExploreSimEnv
from emuworld.envs.sim_state import StateError, pack_state
from emuworld.envs.tabletop.orders import draw_task, task_of_prompt
from emuworld.envs.tabletop.plans import sample_task
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.subtasks import Subtask
from emuworld.envs.vla_sim_env import MAGIC, VLASimEnv

SIZE = 32
ORDER = "Put the red cube on the blue plate."


@pytest.fixture
def env() -> VLASimEnv:
    return VLASimEnv(size=SIZE, renderer="rays")


def test_equal_seeds_give_equal_work(env: VLASimEnv) -> None:
    other = VLASimEnv(size=SIZE, renderer="rays")
    first, info = env.reset(seed=2)
    again, info_again = other.reset(seed=2)
    np.testing.assert_array_equal(first, again)
    assert info == info_again and info["prompt"] and info["success"] is info["is_success"] is False
    target = info["objects"][-1]
    for words in ("", f"pick up the {target}", "nonsense", ""):
        one, two = env.step(words), other.step(words)
        np.testing.assert_array_equal(one[0], two[0])
        assert one[1:] == two[1:]
    assert env.reset(seed=0)[1]["prompt"] != env.reset(seed=1)[1]["prompt"]


def test_an_order_is_carried_out_and_judged_by_physics(env: VLASimEnv) -> None:
    before, info = env.reset(seed=3, options={"prompt": ORDER})
    assert {"red cube"} <= set(info["objects"]) and not info["success"] and info["prompt"] == ORDER
    after, reward, terminated, truncated, info = env.step("Current step: put the red cube on the blue plate.")
    assert info["subtask_done"] and not info["invalid_action"] and info["frame_index"] == 1
    assert info["success"] and info["is_success"] and 0 < info["control_steps"] < 1000
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert (after != before).any() and env.scene.holds(Predicate("On", ("red cube", "blue plate")))
    # What was done already is no mistake, and the plan's only step has been said in words.
    _, _, terminated, _, info = env.step("")
    assert terminated and not info["invalid_action"] and info["success"] and info["text"] == ""


def test_the_hand_keeps_what_it_holds_between_steps_and_states(env: VLASimEnv) -> None:
    env.reset(seed=3, options={"prompt": ORDER})
    assert env.step("pick up the red cube")[4]["subtask_done"]
    elsewhere = VLASimEnv(size=SIZE, renderer="rays")
    restored, info = elsewhere.reset(seed=77, options={"state": env.save_state()})
    np.testing.assert_array_equal(restored, env.step("nonsense")[0])
    assert info["frame_index"] == 1 and info["prompt"] == ORDER and not info["success"]
    fork = env.fork()
    for words in ("put the red cube on the blue plate", "push the red cube away", ""):
        one, two, three = env.step(words), elsewhere.step(words), fork.step(words)
        np.testing.assert_array_equal(one[0], two[0])
        np.testing.assert_array_equal(one[0], three[0])
        assert one[4] == two[4] == three[4]
    assert elsewhere.save_state() == env.save_state() == fork.save_state()
    assert len(env.save_state()) < 16_000


def test_a_fork_goes_its_own_way(env: VLASimEnv) -> None:
    env.reset(seed=4, options={"prompt": "open the drawer"})
    state = env.save_state()
    fork = env.fork()
    assert fork.step("open the drawer")[4]["success"]
    assert env.save_state() == state != fork.save_state()
    assert env.scene is not fork.scene and not env.scene.holds(Predicate("Open", ("drawer",)))


@pytest.mark.parametrize(
    "action",
    [
        "fly",
        "pick up the green dragon",
        "pick up the black ball\n\npick up the black ball",
        "put the red cube where the picture shows",
        "pick up the pink cylinder",  # a good subtask of another table
        "close the drawer",
        "stack the red cube on the red cube",
        "x" * 2000,
        "\ud800",
        None,
        3,
        b"press the button",
    ],
)
def test_what_the_arm_cannot_begin_changes_nothing_and_is_flagged(env: VLASimEnv, action: Any) -> None:
    frame, info = env.reset(seed=6, options={"prompt": ORDER})
    assert "pink cylinder" not in info["objects"]
    state = env.save_state()
    after, reward, terminated, truncated, info = env.step(action)
    np.testing.assert_array_equal(after, frame)
    assert info["invalid_action"] and info["reason"] and not info["subtask_done"]
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert env.save_state() == state


def test_any_unicode_text_is_flagged(env: VLASimEnv) -> None:
    rng = np.random.Generator(np.random.Philox(8))
    env.reset(seed=6, options={"prompt": ORDER})
    state = env.save_state()
    for _ in range(200):
        text = "".join(chr(code) for code in rng.integers(33, 0x10FFFF, int(rng.integers(1, 30))))
        assert env.step(text)[4]["invalid_action"]
    assert env.save_state() == state


def test_free_steps_carry_out_the_plan_and_end(env: VLASimEnv) -> None:
    task = sample_task("open-put-close", "test", 1, variation="seen")
    _, info = env.reset(seed=0, options={"task": json.loads(json.dumps(task.to_dict()))})
    assert info["prompt"] == task.instruction and not info["success"]
    for count, step in enumerate(task.oracle, 1):
        _, _, terminated, _, info = env.step("")
        assert info["text"] == str(step) and info["command"] == "" and info["subtask_done"]
        assert not terminated and info["frame_index"] == count
    assert info["success"]
    frame, _, terminated, _, info = env.step("")
    assert terminated and not info["invalid_action"]
    with pytest.warns(UserWarning, match="after the episode terminated"):
        after, _, terminated, _, info = env.step("open the drawer")
    np.testing.assert_array_equal(after, frame)
    assert terminated and info["invalid_action"]
    _, info = env.reset(options={"task": task})
    assert not info["success"] and info["frame_index"] == 0


def test_a_goal_place_that_only_the_picture_shows_is_known_to_the_plan(env: VLASimEnv) -> None:
    task = next(
        task for seed in range(50) if (task := sample_task("pick-place", "train", seed)).goal_in_picture
    )
    env.reset(seed=0, options={"task": task})
    env.reset(seed=0, options={"state": env.save_state()})
    info = env.step("")[4]
    assert info["success"] and "where the picture shows" in info["text"]


def test_a_bare_scene_has_no_goal_and_no_plan(env: VLASimEnv) -> None:
    scene = task_of_prompt("press the button", "train", 5).scene
    _, info = env.reset(seed=0, options={"scene": scene})
    assert "success" not in info and info["prompt"] == ""
    assert env.step("press the button")[4]["subtask_done"]
    assert env.step("")[2]


def test_the_step_limit_truncates() -> None:
    env = VLASimEnv(size=SIZE, renderer="rays", max_episode_steps=2)
    for _ in range(2):
        env.reset(seed=9, options={"prompt": ORDER})
        assert [env.step("nonsense")[3] for _ in range(2)] == [False, True]


@pytest.mark.parametrize("change", ["cut", "flip", "version", "foreign", "type", "physics", "goal", "room"])
def test_damaged_states_are_refused(env: VLASimEnv, change: str) -> None:
    env.reset(seed=10, options={"prompt": ORDER})
    state = env.save_state()
    fields = json.loads(state[12:])
    infinite = base64.b64encode(np.full(len(base64.b64decode(fields["physics"])) // 8, np.inf).tobytes())
    room = ExploreSimEnv(size=SIZE, renderer="rays")
    room.reset(seed=0)
    broken: dict[str, object] = {
        "cut": state[:-3],
        "flip": state[:20] + bytes([state[20] ^ 1]) + state[21:],
        "version": MAGIC[:-1] + b"\x09" + state[8:],
        "foreign": room.save_state(),
        "type": "a string",
        "physics": pack_state({**fields, "physics": infinite.decode()}, magic=MAGIC),
        "goal": pack_state({**fields, "goal": [{"name": "Held", "args": ["red dragon"]}]}, magic=MAGIC),
        "room": pack_state({**fields, "scene": {"objects": [{"kind": "dragon"}]}}, magic=MAGIC),
    }
    with pytest.raises(StateError, match="not a usable simulator state"):
        env.reset(options={"state": broken[change]})


def test_wrong_arguments_are_named(env: VLASimEnv) -> None:
    with pytest.raises(ResetNeeded):
        env.step("press the button")
    with pytest.raises(ResetNeeded):
        VLASimEnv(render_mode="ansi").render()
    for prompt, message in (("a castle", "no table"), ("pick up the cube", "no colour")):
        with pytest.raises(ValueError, match=message):
            env.reset(seed=0, options={"prompt": prompt})
    with pytest.raises(ValueError, match="options"):
        env.reset(seed=0, options={"image": None})
    with pytest.raises(ValueError, match="options"):
        env.reset(seed=0, options={"prompt": ORDER, "scene": {}})
    with pytest.raises(ValueError, match="task"):
        env.reset(seed=0, options={"task": "sort"})
    with pytest.raises(ValueError, match="split='dev'"):
        VLASimEnv(split="dev")
    with pytest.raises(ValueError, match="size=5"):
        VLASimEnv(size=5)
    with pytest.raises(ValueError, match="render_mode"):
        VLASimEnv(render_mode="human")


def test_render_returns_the_picture_already_there() -> None:
    env = VLASimEnv(size=SIZE, renderer="rays", render_mode="rgb_array")
    frame, _ = env.reset(seed=11)
    shown = env.render()
    np.testing.assert_array_equal(shown, frame)
    assert shown is not frame
    line = VLASimEnv(size=SIZE, renderer="rays", render_mode="ansi")
    line.reset(seed=11)
    assert "->" in str(line.render())


@pytest.mark.parametrize(
    "prompt, goal",
    [
        ("pick up the red cube", "Held(red cube)"),
        ("Put the green ball in the drawer.", "In(green ball, drawer)"),
        ("put the red cube behind the cyan cylinder", "Behind(red cube, cyan cylinder)"),
        ("stack the red cube on the green cube", "Stack(red cube, green cube)"),
        ("push the white cylinder closer", "Moved(white cylinder, closer)"),
        ("close the drawer", "Closed(drawer)"),
        ("press the button", "Pressed(button)"),
    ],
)
def test_prompts_become_tasks_with_their_things(prompt: str, goal: str) -> None:
    task = task_of_prompt(prompt, "train", 1)
    assert [str(one) for one in task.goal] == [goal]
    assert set(task.goal[0].args) & set(task.names)
    assert len(task.oracle) == 1 and isinstance(task.oracle[0], Subtask)


def test_drawn_tasks_are_of_every_family() -> None:
    tasks = [draw_task("train", seed) for seed in range(80)]
    assert len({task.family for task in tasks}) == 10
    assert draw_task("train", 7).to_dict() == draw_task("train", 7).to_dict() != tasks[8].to_dict()
