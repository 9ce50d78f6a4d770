"""What `emuworld --help` and `emuworld COMMAND --help` say: read from the table, the schemas' source and
the yaml.
"""

import contextlib
from pathlib import Path

from omegaconf import OmegaConf

from emuworld import schema
from emuworld.command_table import COMMANDS, Target

ROOT = Path(__file__).resolve().parent  # the package; its configs/ is yaml only


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
    lines += ["", "examples:", *(f"  {example}" for example in command.examples)]
    return "\n".join(lines)


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
    """What the settings are: key, default (the yaml's where it chooses one) and meaning."""
    target = COMMANDS[name].targets[choice]
    path = ROOT / "configs" / f"{f'{name}/{choice}' if choice else name}.yaml"
    chosen = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    assert isinstance(chosen, dict)
    overridden = schema.flat_values({str(key): value for key, value in chosen.items() if key != "defaults"})
    lines = [_about(target), "", "settings (key=default):"]
    for one in schema.settings(target.schema_module, target.settings, root=ROOT.parent):
        default = overridden.get(one.key, one.default)
        shown = f"{one.key}={_as_typed(str(default))}"
        lines.append(f"  {shown:<34} {one.meaning}".rstrip())
    return lines


def _as_typed(value: str) -> str:
    """A default as one would write it on the command line."""
    typed = {"None": "null", "True": "true", "False": "false", "math.inf": "inf"}
    return typed.get(value, value.strip("'\""))
