"""The ids of the environments. Entry points are strings: registering imports neither model nor simulator."""

import gymnasium

# The small model's context holds at least 48 frames: the walk, its start and some long commands.
EXPLORE_STEPS = 40
# Steps of the other modes: robots take 3 to 13 subtasks, and about 15 pictures of 720 x 720 pixels fill the
# published model's context (fact sheet, 11.3 and 4.4); an answer that is still going on then is cut.
STEPS = {"x2i": 10, "story": 20, "howto": 20, "vla": 20}
_NAMES = {"x2i": "X2I", "story": "Story", "howto": "HowTo", "vla": "VLA"}

_WORLD = "emuworld.envs.world_env:WorldModelEnv"
_WORLDS = "emuworld.envs.vector_env:WorldVectorEnv"
_DISCRETE = "emuworld.envs.wrappers:discrete_view"
_DISCRETE_WORLDS = "emuworld.envs.vector_env:discrete_vector_view"
_SIM = "emuworld.envs.sim_env:ExploreSimEnv"
_VLA_SIM = "emuworld.envs.vla_sim_env:VLASimEnv"


def register_all() -> None:
    """Register every `EmuWorld/…` id with Gymnasium. Ids that are there already are left alone."""
    # T2I has no step limit: it terminates by itself, and a limit of one step would report truncation instead.
    _register("EmuWorld/T2I-v0", entry_point=_WORLD, vector_entry_point=_WORLDS, mode="t2i")
    _register(
        "EmuWorld/Explore-v0",
        entry_point=_WORLD,
        vector_entry_point=_WORLDS,
        max_episode_steps=EXPLORE_STEPS,
        mode="explore",
    )
    for mode, name in _NAMES.items():
        _register(
            f"EmuWorld/{name}-v0",
            entry_point=_WORLD,
            vector_entry_point=_WORLDS,
            max_episode_steps=STEPS[mode],
            mode=mode,
        )
    _register(
        "EmuWorld/ExploreDiscrete-v0",
        entry_point=_DISCRETE,
        vector_entry_point=_DISCRETE_WORLDS,
        max_episode_steps=EXPLORE_STEPS,
        text_id="EmuWorld/Explore-v0",
    )
    _register("EmuWorld/ExploreSim-v0", entry_point=_SIM, max_episode_steps=EXPLORE_STEPS)
    _register(
        "EmuWorld/ExploreSimDiscrete-v0",
        entry_point=_DISCRETE,
        max_episode_steps=EXPLORE_STEPS,
        text_id="EmuWorld/ExploreSim-v0",
    )
    # No Discrete id: which subtasks there are depends on what stands on the table.
    _register("EmuWorld/VLASim-v0", entry_point=_VLA_SIM, max_episode_steps=STEPS["vla"])


def _register(
    env_id: str,
    *,
    entry_point: str,
    vector_entry_point: str | None = None,
    max_episode_steps: int | None = None,
    **arguments: str,
) -> None:
    if env_id not in gymnasium.registry:
        gymnasium.register(
            env_id,
            entry_point=entry_point,
            vector_entry_point=vector_entry_point,
            max_episode_steps=max_episode_steps,
            # Gymnasium's passive checker (1.4) fails every step behind a first reset that was refused, as one
            # with a misspelt option is. The tests run the whole checker on every id instead.
            disable_env_checker=True,
            kwargs=arguments,
        )
