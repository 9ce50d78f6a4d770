"""`emuworld COMMAND key=value …`: the composition root, where settings meet the code that runs them.

Settings come from a dataclass (the schema and its defaults), then `configs/<command>.yaml`, then the
command line. This is the only file with imports inside functions: help must not wait for torch.
"""

import contextlib
import difflib
import gc
import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from emuworld.command_table import COMMANDS
from emuworld.files import write_text

ROOT = Path(__file__).resolve().parent  # the package; its configs/ is yaml only
DEBUG_VARIABLE = "EMUWORLD_DEBUG"  # set: errors come with their traceback
_TOGETHER = "parallel=tp"  # behind any command that opens a model: cut it among torchrun's processes
_SILENCE_S = 30.0  # after which work that is not done says how far it is, where there is no terminal

OnProgress = Callable[[str, int, int], None]


class UsageError(ValueError):
    """The command line cannot be understood; the message says what would be."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 for a run that failed, 2 for a line not
    understood.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = _dispatch(words)
        sys.stdout.flush()
        return status
    except UsageError as error:
        return _complain(error, status=2)
    except BrokenPipeError:  # whoever read our output has gone, as in "emuworld --help | head"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes at its end
        return 1
    except (ValueError, OSError) as error:
        if os.environ.get(DEBUG_VARIABLE):
            raise
        return _complain(error, status=1)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


def _complain(error: ValueError | OSError, *, status: int) -> int:
    hint = "" if status == 2 else f"\n(set {DEBUG_VARIABLE}=1 to see where)"
    said = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        places = [str(place) for place in (error.filename, error.filename2) if place is not None]
        said = f"{' -> '.join(places)}: {error.strerror}"
    print(f"emuworld: {said}{hint}", file=sys.stderr)
    return status


def _dispatch(words: list[str]) -> int:
    wants_help = not words or any(word in ("-h", "--help", "help") for word in words)
    words = [word for word in words if word not in ("-h", "--help", "help")]
    if not words:
        print(_help().overview())
        return 0
    if words[0] in ("--version", "-V"):
        from importlib.metadata import version

        print(f"emuworld {version('emuworld')}")
        return 0
    name, rest = words[0], words[1:]
    if name not in COMMANDS:
        raise UsageError(_no_such("command", name, COMMANDS) + "; see emuworld --help")
    choice, overrides = _split_choice(name, rest)
    if wants_help:
        print(_help().command_help(name, choice))
        return 0
    _run(name, choice, overrides)
    return 0


def _help() -> Any:
    from emuworld import command_help

    return command_help


def _split_choice(name: str, words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The chosen target ("" where a command has only one, None where it was not said) and the other
    key=value words.
    """
    command = COMMANDS[name]
    choice: str | None = None if command.choice else ""
    overrides = []
    for word in words:
        key, equals, value = word.partition("=")
        if command.choice and (key == command.choice or (not equals and choice is None)):
            choice = value if equals else word
            if choice not in command.targets:
                raise UsageError(_no_such(command.choice, choice, command.targets))
        elif not equals or not key:
            raise UsageError(f"expected key=value, got {word!r}; see emuworld {name} --help")
        else:
            overrides.append(word)
    return choice, overrides


def _run(name: str, choice: str | None, overrides: Sequence[str]) -> None:
    command = COMMANDS[name]
    if choice is None:
        raise UsageError(f"say which: {' or '.join(f'{command.choice}={one}' for one in command.targets)}")
    target = command.targets[choice]
    together = name != "train" and _TOGETHER in overrides
    config, values = compose(
        name, choice, [word for word in overrides if not (together and word == _TOGETHER)]
    )
    if together and _follow(config, name):
        _end_quietly()
    speaks = not target.in_every_process or _joined_as_first()
    run = getattr(_import(target.module, f"emuworld {name}"), target.run)
    # What is imported stays; with many worlds a full collection would look at it again and again, for 150 ms.
    gc.freeze()
    out = getattr(config, "out", None)
    with _stored(Path(out), name, choice, values) if out and speaks else contextlib.nullcontext():
        if target.handed_down:
            run(config, terms=_import(target.handed_down, f"emuworld {name}").terms())
        elif target.reports_progress:
            with _progress() as on_progress:
                run(config, on_progress=on_progress)
        else:
            run(config)
    if together:
        _end_together()
    if target.in_every_process:
        _leave()
        if not speaks:
            _end_quietly()


def _end_quietly() -> None:
    """Threads of PyTorch's end some processes that followed with an error when the interpreter goes."""
    sys.stdout.flush()
    os._exit(0)


def _joined_as_first() -> bool:
    """Join the processes that torchrun started, where it did; True in the first."""
    from emuworld import parallel

    parallel.join()
    return os.environ.get("RANK", "0") == "0"


def _leave() -> None:
    from emuworld import parallel

    parallel.leave()


def _follow(config: Any, name: str) -> bool:
    """Join the processes that torchrun started, to share one model; True where this one was a follower, and
    all is done.
    """
    from emuworld import parallel, world_model

    if not hasattr(config, "model"):
        raise UsageError(f"emuworld {name} opens no model; leave {_TOGETHER} out")
    if os.environ.get("WORLD_SIZE", "1") == "1":
        raise UsageError(
            f"{_TOGETHER} needs several processes: torchrun --nproc-per-node N -m emuworld.cli {name} ..."
        )
    parallel.join()
    if os.environ["RANK"] == "0":
        return False
    device, weights = getattr(config, "device", "auto"), getattr(config, "weights", "bf16")
    world_model.load(config.model, device=device, weights=weights).follow()
    return True


def _end_together() -> None:
    from emuworld import following

    following.end()


def compose(name: str, choice: str, overrides: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """The config instance of a command and its resolved plain values: dataclass, then yaml, then `overrides`.

    UsageError for an unknown key, with the nearest known one, and for a value of the wrong type.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from emuworld import schema

    target = COMMANDS[name].targets[choice]
    cls = getattr(_import(target.schema_module, f"emuworld {name}"), target.settings)
    path = f"{name}/{choice}" if choice else name
    try:
        literal, for_hydra = _literal_text(cls, overrides)
        values = _compose_values(path, schema.defaults(cls), for_hydra, literal)
        return schema.build(cls, values), values
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        said = " ".join(str(error).split())
        raise UsageError(f"{said}; see emuworld {path.replace('/', ' ')} --help") from error


def _literal_text(cls: type, overrides: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """Settings that are text, taken as typed (commas, quotes and brackets included), and the words for
    Hydra.
    """
    from emuworld import schema

    known = schema.flat_keys(schema.defaults(cls))
    literal: dict[str, str | None] = {}
    rest = []
    for word in overrides:
        key, _, value = word.partition("=")
        if key not in known:
            raise ValueError(schema.unknown_key(key, known))
        if schema.is_text(cls, key):
            literal[key] = None if value == "null" else value
        else:
            rest.append(word)
    return literal, rest


def _compose_values(
    path: str, defaults: Mapping[str, Any], overrides: Sequence[str], literal: Mapping[str, str | None]
) -> dict[str, Any]:
    """Plain values: the defaults, `configs/<path>.yaml` over them, `overrides` and texts over both."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from emuworld import schema

    group, _, node = f"schema/{path}".rpartition("/")
    ConfigStore.instance().store(group=group, name=node, node=dict(defaults), package="_global_")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = hydra_compose(config_name=path, overrides=list(overrides))
    for key, text in literal.items():  # before what the yaml says of them is worked out, as in "${agent}"
        OmegaConf.update(composed, key, "" if text and "$" in text else text)
    values = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(values, dict)
    plain = {str(key): value for key, value in values.items()}
    for key, text in literal.items():  # and as they were typed, "$" included
        schema.put(plain, key, text)
    return plain


def _import(module: str, purpose: str) -> Any:
    """The module, or a clear word where this installation lacks it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{purpose} needs {error.name}, which is not installed; run it through ./run, or uv sync"
        ) from error


@contextlib.contextmanager
def _stored(folder: Path, name: str, choice: str, values: Mapping[str, Any]) -> Iterator[None]:
    """Keep the resolved settings beside what the run writes, or the last run's where this one is refused."""
    from omegaconf import OmegaConf

    title = f"emuworld {name} {choice}".strip()
    # Stages may share a folder.
    path = folder / f"{'-'.join(title.replace('/', '-').split()[1:])}.config.yaml"
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    write_text(path, f"# {title}: the resolved settings of the last run\n{OmegaConf.to_yaml(dict(values))}")
    try:
        yield
    except ValueError:
        if before is not None:
            write_text(path, before)
        raise


@contextlib.contextmanager
def _progress() -> Iterator[OnProgress]:
    """A bar per label on a terminal; elsewhere a line when a label is done, and now and then before."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    tasks: dict[str, Any] = {}
    finished: set[str] = set()
    told_s = time.monotonic()
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def on_progress(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label, total=total)
            bar.update(tasks[label], completed=done, total=total)
            if console.is_terminal:
                return
            nonlocal told_s
            ends, long_silent = (
                done >= total and label not in finished,
                time.monotonic() - told_s > _SILENCE_S,
            )
            if ends or long_silent:
                told_s = time.monotonic()
                finished.update([label] if ends else [])
                print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)

        yield on_progress


def _no_such(kind: str, name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    return f"unknown {kind} {name!r}; {hint}"


if __name__ == "__main__":
    sys.exit(main())
