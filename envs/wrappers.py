"""A finite menu of commands in front of an environment that takes text, for agents that choose by number."""

from collections.abc import Sequence
from typing import Any

import gymnasium
from gymnasium.envs.registration import load_env_creator
from gymnasium.spaces import Discrete

from emuworld.envs.spaces import CommandText, checked_table, command_at


class CommandTable(gymnasium.Wrapper[Any, Any, Any, Any], gymnasium.utils.RecordConstructorArgs):
    """Discrete view of a text environment: action `i` sends `table[i]`, which `info["command"]` then shows.

    Without a table it is the list of commands that the environment's action space samples. It can be read as
    `env.get_wrapper_attr("table")`. Whatever is not an index into it is sent on as None, which the
    environment flags as unusable, so `step` raises for no action.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], table: Sequence[str] | None = None) -> None:
        gymnasium.Wrapper.__init__(self, env)
        if table is None:
            assert isinstance(env.action_space, CommandText), env.action_space
            table = env.action_space.commands
        self.table = checked_table(table)
        gymnasium.utils.RecordConstructorArgs.__init__(self, table=list(self.table))  # as JSON reads it
        self.action_space = Discrete(len(self.table))

    def step(self, action: object) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Send the command that stands at `action` in the table."""
        return self.env.step(command_at(self.table, action))


def discrete_view(*, text_id: str, table: Sequence[str] | None = None, **arguments: Any) -> CommandTable:
    """The Discrete view of the registered text environment `text_id`: entry point of the …Discrete ids."""
    spec = gymnasium.spec(text_id)
    assert isinstance(spec.entry_point, str)  # registered by name, so that specs can be written to JSON
    env = load_env_creator(spec.entry_point)(**(spec.kwargs | arguments))
    assert isinstance(env, gymnasium.Env), env
    return CommandTable(env, table)
