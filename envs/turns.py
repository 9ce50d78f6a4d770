"""What the rules of an imagined episode (`dream`) pass around: values that nothing changes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from emuworld.envs.starts import Frame
from emuworld.world_model import WorldState


@dataclass(frozen=True, kw_only=True, eq=False)
class Transition:
    """What a reward function sees: one executed command between two pictures."""

    prompt: str
    command: str
    text: str  # what stands in the answer: the command, or the model's own words after an empty command
    before: Frame
    after: Frame


RewardFunction = Callable[[Transition], float]


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """One imagined world between two commands. A value: nothing changes it, so branches are free."""

    world: WorldState | None  # None in t2i before the question; in x2i its last picture is what counts
    frame: Frame
    seed: int
    prompt: str
    frame_index: int = 0  # pictures since the world began; goes through save and restore
    num_steps: int = 0  # steps since the reset, whichever way that reset began
    terminated: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """What one row does next: `asks` goes to the model, `None` there leaves the episode as it is."""

    episode: Episode
    command: str = ""
    asks: tuple[WorldState, str | None] | None = None
    is_step: bool = False  # False for a reset
    invalid: bool = False
    paints: bool = False  # a reset whose first picture is painted by t2i


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a turn led to, in Gymnasium's terms."""

    episode: Episode
    reward: float
    terminated: bool
    truncated: bool
    info: dict[str, Any]
