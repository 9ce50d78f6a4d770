"""Where shards lie: in a folder and in those below it."""

from __future__ import annotations

import time
from pathlib import Path

from emuworld.files import files_below

_SUFFIX = ".stories"


def find_shards(folder: str | Path) -> list[Path]:
    """The shards in a folder and in those below it, one for each `data build`, by their names; links to
    folders are followed. ValueError where two have one name: it is what they are told apart by.
    """
    found: dict[str, Path] = {}
    for path in files_below(folder):
        if path.suffix != _SUFFIX:
            continue
        other = found.setdefault(path.stem, path)
        if other is not path and other.resolve() != path.resolve():
            raise ValueError(f"two shards have one name, {other} and {path}; rename one, or leave it out")
    return [found[name] for name in sorted(found)]


def wait_for_shards(folder: str | Path, *, at_least: int = 1, timeout_s: float = 0.0) -> None:
    """Return when `at_least` shards are in `folder`; ValueError after `timeout_s` (0: at once) says how to
    make them.
    """
    deadline = time.monotonic() + timeout_s
    while (found := len(find_shards(folder))) < at_least:
        if time.monotonic() >= deadline:
            raise ValueError(
                f"{folder} holds {found} shards (*{_SUFFIX}), expected at least {at_least}; "
                f"make them with "
                f"'emuworld data build out={folder}'"
            )
        time.sleep(0.5)
