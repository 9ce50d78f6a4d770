"""A world model that you step: text in, frames out. Importing registers the `EmuWorld/…` ids with Gymnasium.

The model's names are looked up when they are first used, because importing torch takes a second or two.
"""

from typing import TYPE_CHECKING, Any

from emuworld.envs.registration import register_all

if TYPE_CHECKING:
    from emuworld.world_model import Segment, WorldModel, WorldState, load

__all__ = ["Segment", "WorldModel", "WorldState", "load"]

register_all()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from emuworld import world_model  # the one import outside cli.py that has to wait until it is needed

    return getattr(world_model, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
