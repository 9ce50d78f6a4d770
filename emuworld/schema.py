"""Dataclasses as configuration schemas: defaults out, typed values in, and help read from the source.

A frozen dataclass beside each class says which settings exist, of what type, with which default and, in a
comment behind the field, what it means. This file turns such a class into a plain mapping, a mapping back
into the class, and its source into help lines without importing anything heavy. It knows nothing of Hydra
and nothing of the commands.
"""

import ast
import copy
import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting as help shows it: dotted key, type, default (source text) and meaning ("" where unsaid)."""

    key: str
    kind: str
    default: str
    meaning: str


def defaults(cls: type) -> dict[str, Any]:
    """Nested plain values of a dataclass's defaults; "???" marks a setting that must be given."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = "???"
        values[field.name] = _plain(value)
    return values


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def build(cls: type, values: Mapping[str, Any], *, path: str = "") -> Any:
    """An instance of the dataclass `cls` from nested plain values.

    ValueError names the setting for an unknown key (with the nearest known one), a missing value or a wrong
    type.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            raise ValueError(unknown_key(f"{path}{key}", [f"{path}{name}" for name in fields]))
    hints = typing.get_type_hints(cls)
    arguments = {
        key: _convert(value, hints[key], path=f"{path}{key}")
        for key, value in values.items()
        if value != "???"
    }
    missing = [
        f"{path}{name}"
        for name, field in fields.items()
        if name not in arguments
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be given, for example {missing[0]}=...")
    return cls(**arguments)


def flat_values(values: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat[f"{prefix}{key}"] = value
        if isinstance(value, Mapping):
            flat |= flat_values(value, prefix=f"{prefix}{key}.")
    return flat


def flat_keys(values: Mapping[str, Any]) -> list[str]:
    """Every dotted key that may be set, whole groups included."""
    return list(flat_values(values))


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set the value under a dotted key."""
    first, _, rest = key.partition(".")
    if rest:
        put(values[first], rest, value)
    else:
        values[first] = value


def is_text(cls: type, key: str) -> bool:
    """Whether the setting under a dotted key is text (or a path), so that whatever is typed is meant
    literally.
    """
    first, _, rest = key.partition(".")
    hint = typing.get_type_hints(cls).get(first)
    if rest:
        return dataclasses.is_dataclass(hint) and isinstance(hint, type) and is_text(hint, rest)
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return all(part in (str, Path, type(None)) for part in parts)


def unknown_key(key: str, known: Iterable[str]) -> str:
    """The message for a key that does not exist: the nearest ones, or all where none is near."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return f"unknown setting {key!r}; {hint}"


def _convert(value: Any, hint: Any, *, path: str) -> Any:
    """Value of the annotated type, or ValueError; only conversions that lose nothing are made."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        return _convert_union(value, [part for part in parts if part is not type(None)], path=path)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return build(hint, value, path=f"{path}.")
    if origin is typing.Literal and value in parts:
        return value
    if origin in (tuple, list) and isinstance(value, list | tuple):
        return _convert_items(value, origin, parts, path=path)
    if origin is dict and isinstance(value, Mapping):
        return {key: _convert(item, parts[1], path=f"{path}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)  # 1e6 is a float in yaml
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # prompt=42
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    choices = f" one of {', '.join(map(repr, parts))}" if origin is typing.Literal else f" {_name(hint)}"
    raise ValueError(f"{path} must be{choices}, got {value!r}")


def _convert_union(value: Any, hints: list[Any], *, path: str) -> Any:
    for hint in hints:
        if isinstance(hint, type) and isinstance(value, hint):
            return value
    problem: ValueError | None = None
    for hint in hints:
        try:
            return _convert(value, hint, path=path)
        except ValueError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _convert_items(
    value: list[Any] | tuple[Any, ...], origin: type, parts: tuple[Any, ...], *, path: str
) -> Any:
    if origin is tuple and not (len(parts) == 2 and parts[1] is Ellipsis):
        if len(parts) != len(value):
            raise ValueError(f"{path} must have {len(parts)} values, got {len(value)}: {list(value)}")
        return tuple(
            _convert(v, h, path=f"{path}[{i}]") for i, (v, h) in enumerate(zip(value, parts, strict=True))
        )
    return origin(_convert(item, parts[0], path=f"{path}[{index}]") for index, item in enumerate(value))


def _name(hint: Any) -> str:
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if typing.get_origin(hint) in (tuple, list):
        examples = {int: "[1, 2]", float: "[0.5, 1]", str: "[one, another]"}
        return f"a list in brackets, as {examples.get(typing.get_args(hint)[0], '[{...}, {...}]')}"
    return plain.get(hint, str(hint))


# Help from source -----------------------------------------------------------------------------------------


def settings(module: str, name: str, *, root: Path, prefix: str = "") -> list[Setting]:
    """Settings of the dataclass `name` in the dotted `module`, nested ones flattened, read without
    importing it.

    `root` is the folder that holds the top package. A nested dataclass is followed into the module that it is
    imported from.
    """
    source = _source_of(module, root=root).read_text()
    tree, lines = ast.parse(source), source.splitlines()
    owner = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name), None)
    if owner is None:
        raise ValueError(f"{module} has no class {name}")
    found: list[Setting] = []
    for base in owner.bases:
        inherited = _resolve(base, tree, module, root=root)
        found.extend(settings(*inherited, root=root, prefix=prefix) if inherited is not None else [])
    for node in owner.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        if ast.unparse(node.annotation).startswith("ClassVar"):
            continue
        key = f"{prefix}{node.target.id}"
        nested = _factory(node.value)
        target = _resolve(nested.func, tree, module, root=root) if nested is not None else None
        if nested is not None and target is not None:
            own = {f"{key}.{word.arg}": ast.unparse(word.value) for word in nested.keywords}
            found.extend(
                replace(one, default=own.get(one.key, one.default))
                for one in settings(*target, root=root, prefix=f"{key}.")
            )
            continue
        default = "(must be given)"
        if node.value is not None:
            default = ast.unparse(_Constants(tree, root=root).visit(copy.deepcopy(node.value)))
        found.append(
            Setting(
                key=key, kind=ast.unparse(node.annotation), default=default, meaning=_comment(node, lines)
            )
        )
    return list({one.key: one for one in found}.values())  # a class may say an inherited setting anew


def first_paragraph(module: str, name: str = "", *, root: Path) -> str:
    """First paragraph of the docstring of a class, or of the module, on one line, without importing it."""
    tree = ast.parse(_source_of(module, root=root).read_text())
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    owner = next(classes, None) if name else tree
    words = (ast.get_docstring(owner) or "") if owner is not None else ""
    return " ".join(words.split("\n\n")[0].split())


class _Constants(ast.NodeTransformer):
    """Puts the values of a module's constants, its own or imported ones of ours, in place of their names."""

    def __init__(self, tree: ast.Module, *, root: Path) -> None:
        self._tree, self._root = tree, root

    def visit_Name(self, node: ast.Name) -> ast.AST:
        for line in self._tree.body:
            if isinstance(line, ast.Assign) and node.id in map(ast.unparse, line.targets):
                return self.visit(copy.deepcopy(line.value))
            if isinstance(line, ast.ImportFrom) and line.module is not None:
                name = next((one.name for one in line.names if (one.asname or one.name) == node.id), None)
                source = _source_of(line.module, root=self._root)
                if name is not None and source.exists():
                    elsewhere = _Constants(ast.parse(source.read_text()), root=self._root)
                    return elsewhere.visit_Name(ast.Name(name))
        return node


def _source_of(module: str, *, root: Path) -> Path:
    path = root.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _comment(node: ast.AnnAssign, lines: list[str]) -> str:
    """The comment behind a field, or the comment lines right above it."""
    line = lines[(node.end_lineno or node.lineno) - 1]
    behind = line[node.end_col_offset :] if node.end_col_offset is not None else ""
    if "#" in behind:
        return behind.split("#", 1)[1].strip()
    above: list[str] = []
    at = node.lineno - 2
    while at >= 0 and lines[at].strip().startswith("#"):
        above.insert(0, lines[at].strip().lstrip("# "))
        at -= 1
    return " ".join(above)


def _factory(value: ast.expr | None) -> ast.Call | None:
    """What makes a default: the call in `Class()`, `field(default_factory=Class)` or
    `field(default_factory=lambda: Class(key=…))`."""
    if not isinstance(value, ast.Call):
        return None
    for keyword in value.keywords:
        if keyword.arg != "default_factory":
            continue
        if isinstance(keyword.value, ast.Name | ast.Attribute):
            return ast.Call(func=keyword.value, args=[], keywords=[])
        if isinstance(keyword.value, ast.Lambda) and isinstance(keyword.value.body, ast.Call):
            return keyword.value.body
    return value if not value.args and not value.keywords else None


def _resolve(expression: ast.expr, tree: ast.Module, module: str, *, root: Path) -> tuple[str, str] | None:
    """(module, class) of a name or of `module.Name` as imported in `tree`; None where it is not ours."""
    text = ast.unparse(expression)
    first, _, rest = text.partition(".")
    if not rest and any(isinstance(node, ast.ClassDef) and node.name == first for node in tree.body):
        return module, first
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        for alias in node.names:
            if (alias.asname or alias.name) == first:
                found = (f"{node.module}.{alias.name}", rest) if rest else (node.module, alias.name)
                return found if _source_of(found[0], root=root).exists() else None
    return None
