"""Files that are there whole or not at all, and where they lie. Uses nothing of ours, so all may use it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


def _mode_of_new_files() -> int:
    """What the process's umask leaves of rw for all."""
    umask = os.umask(0o022)
    os.umask(umask)
    return 0o666 & ~umask


_MODE = _mode_of_new_files()


@contextlib.contextmanager
def written(path: str | os.PathLike[str], *, suffix: str = ".part") -> Iterator[Path]:
    """A place beside `path` for the block to write to: it becomes `path` at the end of the block, and goes
    where the block fails. Folders are made.

    Its name is this process's own. It ends in `suffix` and not as `path` does, so that nobody takes it for
    done; some writers must see what kind of file it is.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
    try:
        yield beside
        with contextlib.suppress(PermissionError):  # of file systems without modes
            beside.chmod(_MODE)  # some writers (safetensors) make files that nobody else can read
        beside.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a write for which there is no room
            error.filename = str(path)
        raise
    except SafetensorError as error:  # which is no OSError where there is no room either
        raise OSError(f"{path} cannot be written ({error})") from error
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """UTF-8 text as a file."""
    with written(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Bytes as a file."""
    with written(path) as beside:
        beside.write_bytes(data)


def files_below(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Every file in a folder and in those below it, in no order; links to folders are followed, each once."""
    entered = {Path(folder).resolve()}  # a link may lead back
    for where, below, names in os.walk(folder, followlinks=True):
        ahead = {name: real for name in below if (real := Path(where, name).resolve()) not in entered}
        below[:] = ahead
        entered.update(ahead.values())
        yield from (Path(where, name) for name in names)
