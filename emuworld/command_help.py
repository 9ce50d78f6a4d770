"""What `emuworld --help` and `emuworld COMMAND --help` say: read from the table, the schemas' source and
the yaml.
"""

import ast
import contextlib
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf

from emuworld import schema
from emuworld.command_table import COMMANDS, Target

ROOT = Path(__file__).resolve().parent  # the package; its configs/ is yaml only
_MEANING_COLUMN = 37  # where what a setting means begins


def overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = ["A world model that you step: imagined worlds beside MuJoCo's.", ""]
    lines += ["usage: emuworld COMMAND [key=value ...]", ""]
    lines += [f"  {name:<{width}}{command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "emuworld COMMAND --help says more. Start with: emuworld demo"]
    return "\n".join(lines)


def command_help(name: str, choice: str | None) -> str:
    command = COMMANDS[name]
    lines = [f"emuworld {name}: {command.summary}", ""]
    if command.choice and choice is None:
        lines += [f"usage: emuworld {name} {command.choice}=NAME [key=value ...]", ""]
        width = max(map(len, command.targets)) + 2
        for one, target in command.targets.items():
            lines.append(f"  {command.choice}={one:<{width}}{_about(target)}")
        lines.append(
            f"\nThe settings of one: emuworld {name} {command.choice}={next(iter(command.targets))} --help"
        )
    else:
        chosen = f" {command.choice}={choice}" if choice else ""
        lines += [f"usage: emuworld {name}{chosen} [key=value ...]", "", *_settings_help(name, choice or "")]
    lines += ["", "examples:", *(f"  {example}" for example in _examples(name, choice))]
    return "\n".join(lines)


def _examples(name: str, choice: str | None) -> list[str]:
    """All of a command, or those of one choice; the plain line where there are none."""
    command = COMMANDS[name]
    if not choice:
        return list(command.examples)
    said = {choice, f"{command.choice}={choice}"}
    own = [example for example in command.examples if said & set(example.split())]
    return own or [f"emuworld {name} {command.choice}={choice}"]


def _about(target: Target) -> str:
    if target.about:
        return target.about
    with contextlib.suppress(FileNotFoundError):
        name = "" if target.explained_by_module else target.settings
        words = schema.first_paragraph(target.schema_module, name, root=ROOT.parent)
        _, colon, rest = words.partition("`: ")  # "Stage `tokenizer`: what it does"
        return f"{rest[:1].upper()}{rest[1:]}" if colon else words
    return "(not in this installation)"


def _settings_help(name: str, choice: str) -> list[str]:
    lines = [_about(COMMANDS[name].targets[choice]), "", "settings (key=default):"]
    for one in settings(name, choice):
        lines += _laid_out(f"{one.key}={one.default}", one.meaning)
    return lines


def settings(name: str, choice: str) -> list[schema.Setting]:
    """The settings of a command; defaults, the yaml's where it chooses one, as one would type them."""
    target = COMMANDS[name].targets[choice]
    path = ROOT / "configs" / f"{f'{name}/{choice}' if choice else name}.yaml"
    chosen = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    assert isinstance(chosen, dict)
    over = schema.flat_values({str(key): value for key, value in chosen.items() if key != "defaults"})
    found = schema.settings(target.schema_module, target.settings, root=ROOT.parent)
    sources = [repr(over[one.key]) if one.key in over else one.default for one in found]
    return [replace(one, default=_as_typed(source)) for one, source in zip(found, sources, strict=True)]


def _laid_out(shown: str, meaning: str) -> list[str]:
    """A setting and, in a column beside it, what it means; on the next line where it is too long for that."""
    width = max(_MEANING_COLUMN + 30, shutil.get_terminal_size((110, 24)).columns)
    told = textwrap.wrap(meaning, width - _MEANING_COLUMN)
    if told and len(shown) < _MEANING_COLUMN - 3:
        first = f"  {shown:<{_MEANING_COLUMN - 3}} {told.pop(0)}"
    else:
        first = f"  {shown}"
    return [first, *(f"{'':{_MEANING_COLUMN}}{line}" for line in told)]


def _as_typed(source: str) -> str:
    """A default, given as Python source, as one would write it on the command line."""
    try:
        return _typed(ast.parse(source, mode="eval").body)
    except SyntaxError:
        return source


def _typed(value: ast.expr) -> str:
    if isinstance(value, ast.Constant):
        words = {"None": "null", "True": "true", "False": "false"}
        named = value.value is None or isinstance(value.value, bool)
        return words[str(value.value)] if named else str(value.value)
    if isinstance(value, ast.Tuple | ast.List):
        return f"[{', '.join(map(_typed, value.elts))}]"
    if isinstance(value, ast.Dict):
        pairs = zip(value.keys, value.values, strict=True)
        return f"{{{', '.join(f'{_typed(key)}: {_typed(one)}' for key, one in pairs if key is not None)}}}"
    if isinstance(value, ast.Call) and not value.args:  # a group of settings, as Bucket(kind="walk")
        return f"{{{', '.join(f'{word.arg}: {_typed(word.value)}' for word in value.keywords)}}}"
    return ast.unparse(value).removeprefix("math.")
