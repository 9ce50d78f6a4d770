"""The two spaces that every environment shares, a text command in and a picture out, and its render modes.

`gymnasium.spaces.Text` cannot serve as it is: its default charset has no space and no punctuation, any finite
charset rejects most languages, and its samples are random letters, which say nothing to a model or a
simulator.
"""

import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.spaces import Box, Text

MAX_COMMAND_LENGTH = 1_000  # characters; a published prompt is at most about 700, a movement command about 30
PRINTABLE = "".join(character for character in string.printable if character.isprintable())
DEFAULT_SIZE = (256, 256)  # pixels, height and width
SIDE_LIMITS_PX = (16, 1024)
RENDER_MODES = ("rgb_array", "ansi")
_PLACEHOLDER = "?"  # what `flatten` writes for a character outside the printable charset


class CommandText(Text):
    """Text that takes any Unicode string up to `max_length` and samples whole commands of a mode.

    Contained is every `str` of `min_length` to `max_length` characters that can be written as UTF-8 (a lone
    surrogate cannot). Samples come from `commands` alone. The charset, needed by `gymnasium.spaces.flatten`,
    holds the printable ASCII characters; `flatten` writes any other character as "?", so flattening is for
    features, not for storage.
    """

    commands: tuple[str, ...]

    def __init__(
        self,
        commands: Sequence[str],
        *,
        min_length: int = 0,
        max_length: int = MAX_COMMAND_LENGTH,
        seed: int | np.random.Generator | None = None,
    ) -> None:
        super().__init__(max_length, min_length=min_length, charset=PRINTABLE, seed=seed)
        self.commands = tuple(commands)
        strangers = [command for command in self.commands if not self.contains(command)]
        if not self.commands or strangers:
            raise ValueError(
                f"CommandText needs at least one command of {min_length} to {max_length} characters to "
                f"sample; got {len(self.commands)} commands, of which these do not fit: {strangers[:3]}"
            )

    def sample(self, mask: Any = None, probability: Any = None) -> str:
        """One of the mode's commands. ValueError for masks: they are over characters in `Text`."""
        if mask is not None or probability is not None:
            raise ValueError(
                "CommandText samples whole commands and takes no mask or probability over characters; "
                "use the Discrete id of this environment for masks over commands"
            )
        return self.commands[int(self.np_random.integers(len(self.commands)))]

    def contains(self, x: Any) -> bool:
        """Whether `x` is a string of fitting length that can be written as UTF-8."""
        return isinstance(x, str) and self.min_length <= len(x) <= self.max_length and is_unicode(x)

    def character_index(self, char: str) -> np.int32:
        """Index of `char` in the printable charset; of "?" for any other character."""
        return super().character_index(char if char in self.character_set else _PLACEHOLDER)

    def __eq__(self, other: object, /) -> bool:
        return (
            isinstance(other, CommandText)
            and (self.min_length, self.max_length) == (other.min_length, other.max_length)
            and self.commands == other.commands
        )

    def __repr__(self) -> str:
        return f"CommandText({self.min_length}, {self.max_length}, {len(self.commands)} commands)"


def is_unicode(text: str) -> bool:
    """Whether `text` can be written as UTF-8: false for lone surrogates, which Python strings may hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def frame_space(size: tuple[int, int]) -> Box:
    """Pictures of `size` (height, width) in pixels: `Box(0, 255, (H, W, 3), uint8)`."""
    return Box(low=0, high=255, shape=(*size, 3), dtype=np.uint8)


def picture_sides(size: int | tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of a simulator's pictures, `DEFAULT_SIZE` for None. ValueError unless both are whole
    numbers of pixels within `SIDE_LIMITS_PX`."""
    size = DEFAULT_SIZE if size is None else size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    low, high = SIDE_LIMITS_PX
    if len(sides) != 2 or not all(isinstance(side, int) and low <= side <= high for side in sides):
        raise ValueError(
            f"size={size!r}; expected a number of pixels or (height, width), each {low} to {high}"
        )
    return sides[0], sides[1]


def checked_render_mode(render_mode: str | None) -> str | None:
    """`render_mode` as it came. ValueError if it is neither None nor one of `RENDER_MODES`."""
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise ValueError(f"render_mode is {render_mode!r}, expected None or one of {list(RENDER_MODES)}")
    return render_mode


def checked_table(table: Sequence[str]) -> tuple[str, ...]:
    """`table` as a tuple. ValueError if it is empty, has no strings, or names a command twice."""
    commands = () if isinstance(table, str) else tuple(table)
    if not commands or not all(isinstance(command, str) for command in commands):
        raise ValueError(f"a command table is a sequence of one or more strings; got {table!r}")
    if len(set(commands)) < len(commands):
        raise ValueError("a command table names every command once; remove the repeated ones")
    return commands


def command_at(table: Sequence[str], action: object) -> str | None:
    """`table[action]`, or None for what is no index from 0: booleans, floats, negative or large numbers."""
    if isinstance(action, np.ndarray) and action.size == 1:
        action = action.reshape(())[()]  # some agents send array(3) or array([3])
    if isinstance(action, bool) or not isinstance(action, int | np.integer):
        return None
    return table[int(action)] if 0 <= action < len(table) else None
