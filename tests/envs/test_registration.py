"""Every id: Gymnasium's own checker, equal spaces of dream and simulator, what registering must not cost."""

import subprocess
import sys
import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import OrderEnforcing, TimeLimit

import emuworld  # noqa: F401  importing registers the ids
from emuworld.envs.registration import EXPLORE_STEPS, STEPS, register_all
from emuworld.envs.vector_env import WorldVectorEnv

LIMITS = {
    "EmuWorld/T2I-v0": None,
    "EmuWorld/X2I-v0": STEPS["x2i"],
    "EmuWorld/Story-v0": STEPS["story"],
    "EmuWorld/HowTo-v0": STEPS["howto"],
    "EmuWorld/VLA-v0": STEPS["vla"],
    "EmuWorld/Explore-v0": EXPLORE_STEPS,
    "EmuWorld/ExploreDiscrete-v0": EXPLORE_STEPS,
}
DREAMS = tuple(LIMITS)
SIMS = ("EmuWorld/ExploreSim-v0", "EmuWorld/ExploreSimDiscrete-v0", "EmuWorld/VLASim-v0")
TWINS = (
    ("EmuWorld/Explore-v0", "EmuWorld/ExploreSim-v0"),
    ("EmuWorld/ExploreDiscrete-v0", "EmuWorld/ExploreSimDiscrete-v0"),
    ("EmuWorld/VLA-v0", "EmuWorld/VLASim-v0"),
)
# The checker asks for the innermost environment, which for a Discrete id is the text environment under it.
SIZE = 32  # pixels
HARMLESS = "is different from the unwrapped version"


def arguments(env_id: str, tiny_folder: str) -> dict[str, Any]:
    return {"size": SIZE} | ({"model": tiny_folder} if env_id in DREAMS else {})


@pytest.mark.parametrize("env_id", DREAMS + SIMS)
def test_gymnasium_finds_nothing_to_object_to(env_id: str, tiny_folder: str) -> None:
    env = gymnasium.make(env_id, disable_env_checker=True, **arguments(env_id, tiny_folder))
    while isinstance(env, TimeLimit | OrderEnforcing):
        env = env.env
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=f".*{HARMLESS}")
        check_env(env)


@pytest.mark.parametrize("env_id", DREAMS + SIMS)
def test_specs_can_be_written_and_made_again(env_id: str, tiny_folder: str) -> None:
    env = gymnasium.make(env_id, **arguments(env_id, tiny_folder))
    spec = EnvSpec.from_json(env.spec.to_json())
    again = gymnasium.make(spec)
    assert again.action_space == env.action_space
    assert again.observation_space == env.observation_space
    limits = LIMITS | {"EmuWorld/VLASim-v0": STEPS["vla"]}
    assert spec.max_episode_steps == limits.get(env_id, EXPLORE_STEPS)


@pytest.mark.parametrize("dream_id, sim_id", TWINS)
def test_dream_and_simulator_share_their_spaces(dream_id: str, sim_id: str, tiny_folder: str) -> None:
    dream = gymnasium.make(dream_id, model=tiny_folder, size=SIZE)
    sim = gymnasium.make(sim_id, size=SIZE)
    assert dream.action_space == sim.action_space
    assert dream.observation_space == sim.observation_space


@pytest.mark.parametrize("dream_id, sim_id", [TWINS[0], TWINS[2]])
def test_dream_and_simulator_tell_the_same_facts(dream_id: str, sim_id: str, tiny_folder: str) -> None:
    sim = gymnasium.make(sim_id, size=SIZE)
    dream = gymnasium.make(dream_id, model=tiny_folder, size=SIZE)
    first, facts = sim.reset(seed=0)
    _, dreamt = dream.reset(seed=0, options={"image": first, "prompt": facts["prompt"]})
    assert dreamt.keys() <= facts.keys()


@pytest.mark.parametrize("env_id", DREAMS)
def test_make_vec_takes_the_native_environment(env_id: str, tiny_folder: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        envs = gymnasium.make_vec(env_id, num_envs=2, model=tiny_folder, size=SIZE)
    assert isinstance(envs, WorldVectorEnv)
    frames, _ = envs.reset(seed=0)
    assert frames in envs.observation_space
    envs.action_space.seed(0)
    frames, *_ = envs.step(envs.action_space.sample())
    assert frames in envs.observation_space
    envs.close()


def test_make_and_make_vec_cut_after_the_same_steps(tiny_folder: str) -> None:
    env = gymnasium.make("EmuWorld/Explore-v0", max_episode_steps=2, model=tiny_folder, size=SIZE)
    envs = gymnasium.make_vec("EmuWorld/Explore-v0", max_episode_steps=2, model=tiny_folder, size=SIZE)
    env.reset(seed=0)
    envs.reset(seed=0)
    for expected in (False, True):
        frame, _, _, truncated, _ = env.step("turn left")
        frames, _, _, many_truncated, _ = envs.step(["turn left"])
        assert truncated == many_truncated[0] == expected
        np.testing.assert_array_equal(frames[0], frame)


@pytest.mark.parametrize("env_id", ["EmuWorld/Explore-v0", "EmuWorld/ExploreSim-v0"])
def test_a_refused_reset_leaves_a_usable_environment(env_id: str, tiny_folder: str) -> None:
    env = gymnasium.make(env_id, **arguments(env_id, tiny_folder))
    with pytest.raises(ValueError, match="promt"):
        env.reset(options={"promt": "a room with a red ball"})
    with pytest.raises(ValueError, match="options is str"):
        env.reset(options="a room with a red ball")  # type: ignore[arg-type]
    env.reset(seed=0)
    assert not env.step("turn left")[4]["invalid_action"]


def test_registering_again_changes_nothing() -> None:
    before = dict(gymnasium.registry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register_all()
    assert dict(gymnasium.registry) == before


def test_importing_is_light() -> None:
    program = (
        "import sys, emuworld, gymnasium; "
        "assert 'EmuWorld/Explore-v0' in gymnasium.registry; "
        "print([name for name in ('torch', 'transformers', 'mujoco') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
