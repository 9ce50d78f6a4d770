"""Spaces: what is contained, what is sampled, and that Gymnasium's machinery takes them."""

import copy
import pickle

import numpy as np
import pytest
from gymnasium.spaces import Tuple, flatten, flatten_space, unflatten
from gymnasium.vector.utils import batch_space, iterate

from emuworld.envs.spaces import (
    MAX_COMMAND_LENGTH,
    CommandText,
    checked_table,
    command_at,
    frame_space,
)

COMMANDS = ("turn left", "move forward", "go to the red ball")


TEXTS = ("", " ", "turn left", "向左转", "🤖 naïve\n\t", "x" * MAX_COMMAND_LENGTH, "\0")
OTHERS = ("x" * (MAX_COMMAND_LENGTH + 1), "\ud800", None, 3, b"turn left", ["turn left"])


@pytest.mark.parametrize("text", TEXTS)
def test_any_unicode_string_is_a_command(text: str) -> None:
    assert text in CommandText(COMMANDS)


@pytest.mark.parametrize("thing", OTHERS)
def test_other_things_are_not(thing: object) -> None:
    assert thing not in CommandText(COMMANDS)


def test_a_minimum_length_excludes_the_empty_command() -> None:
    assert "" not in CommandText(COMMANDS, min_length=1)


def test_samples_are_commands_and_follow_the_seed() -> None:
    first, second = CommandText(COMMANDS, seed=5), CommandText(COMMANDS)
    second.seed(5)
    samples = [first.sample() for _ in range(50)]
    assert set(samples) == set(COMMANDS)
    assert samples == [second.sample() for _ in range(50)]
    with pytest.raises(ValueError, match="whole commands"):
        first.sample(mask=(3, None))


def test_equality_is_by_commands_and_lengths() -> None:
    space = CommandText(COMMANDS)
    assert space == CommandText(COMMANDS, seed=1)
    assert space != CommandText(COMMANDS[:2])
    assert space != CommandText(COMMANDS, max_length=50)
    assert pickle.loads(pickle.dumps(space)) == copy.deepcopy(space) == space


def test_batches_are_tuples_of_commands() -> None:
    batch = batch_space(CommandText(COMMANDS), 3)
    assert isinstance(batch, Tuple)
    batch.seed(2)
    assert batch.sample() in batch
    assert ("turn left", "向左转", "") in batch
    assert list(iterate(batch, ("a", "b", "c"))) == ["a", "b", "c"]


def test_flatten_keeps_printable_text_and_marks_the_rest() -> None:
    space = CommandText(COMMANDS, max_length=20)
    assert flatten(space, "turn left!") in flatten_space(space)
    assert unflatten(space, flatten(space, "turn left!")) == "turn left!"
    assert unflatten(space, flatten(space, "向左 now")) == "?? now"


@pytest.mark.parametrize("commands", [(), ("",), ("x" * 30,)])
def test_commands_must_fit_the_space(commands: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="at least one command"):
        CommandText(commands, min_length=1, max_length=20)


def test_frames_are_uint8_pictures() -> None:
    space = frame_space((32, 48))
    assert space.shape == (32, 48, 3)
    assert np.zeros((32, 48, 3), np.uint8) in space
    assert np.zeros((32, 48, 3), np.float32) not in space


@pytest.mark.parametrize(
    ("action", "command"),
    [
        (0, "turn left"),
        (np.int64(2), "go to the red ball"),
        (np.array([1]), "move forward"),
        (np.array(1), "move forward"),
        (3, None),
        (-1, None),
        (True, None),
        (0.0, None),
        ("turn left", None),
        (None, None),
    ],
)
def test_only_an_index_names_a_command(action: object, command: str | None) -> None:
    assert command_at(COMMANDS, action) == command


@pytest.mark.parametrize("table", [(), "turn left", ("turn left", 3), ("turn left", "turn left")])
def test_a_table_names_each_command_once(table: object) -> None:
    with pytest.raises(ValueError, match="command table"):
        checked_table(table)  # type: ignore[arg-type]
