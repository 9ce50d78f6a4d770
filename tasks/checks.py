"""Settings that are refused in words before anything is run."""

from typing import Any


def check_amounts(settings: Any, least: int, *names: str) -> None:
    """ValueError where one of the named settings is less."""
    for name in names:
        if getattr(settings, name) < least:
            raise ValueError(f"{name}={getattr(settings, name)}; expected {least} or more")


def check_choices(settings: Any, **choices: tuple[str, ...]) -> None:
    """ValueError where a setting is none of its choices."""
    for name, known in choices.items():
        value = getattr(settings, name)
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; expected one of {', '.join(known)}")
