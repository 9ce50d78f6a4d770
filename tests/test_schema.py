"""Dataclasses as schemas: values in and out, messages, and help read from source."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from emuworld import schema
from emuworld.command_table import COMMANDS

ROOT = Path(schema.__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Nested settings."""

    rate: float = 0.5
    names: tuple[str, ...] = ("a",)


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Settings of a test. More words.

    A second paragraph.
    """

    path: Path  # where it goes
    count: int = 3
    limit: float = math.inf
    kind: Literal["x", "y"] = "x"
    label: str | None = None
    pair: tuple[int, float] = (1, 2.0)
    parts: tuple[Inner, ...] = (Inner(), Inner(rate=1.0))
    # stands above
    inner: Inner = field(default_factory=Inner)


def test_defaults_and_build_are_each_others_inverse() -> None:
    values = schema.defaults(Outer)
    assert values["path"] == "???" and values["inner"] == {"rate": 0.5, "names": ["a"]}
    assert schema.build(Outer, values | {"path": "p"}) == Outer(path=Path("p"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "path must be given"),
        ({"path": "p", "cuont": 1}, "did you mean count"),
        ({"path": "p", "count": 1.5}, "count must be a whole number, got 1.5"),
        ({"path": "p", "count": True}, "count must be a whole number"),
        ({"path": "p", "kind": "z"}, "one of 'x', 'y'"),
        ({"path": "p", "inner": {"rtae": 1}}, "did you mean inner.rate"),
        ({"path": "p", "inner": {"rate": "fast"}}, "inner.rate must be a number, got 'fast'"),
        ({"path": "p", "pair": [1]}, "pair must have 2 values"),
        ({"path": "p", "parts": [{"rate": None}]}, r"parts\[0\].rate must be a number"),
    ],
)
def test_every_mistake_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        schema.build(Outer, values)


def test_numbers_become_what_the_field_says_when_nothing_is_lost() -> None:
    built = schema.build(Outer, {"path": "p", "count": 1e3, "limit": 2, "label": 42, "pair": [1.0, 3]})
    assert (built.count, built.limit, built.label, built.pair) == (1000, 2.0, "42", (1, 3.0))
    assert isinstance(built.limit, float) and isinstance(built.pair[1], float)


def test_text_settings_are_known_at_any_depth() -> None:
    assert schema.is_text(Outer, "path") and schema.is_text(Outer, "label")
    assert not schema.is_text(Outer, "count") and not schema.is_text(Outer, "inner.rate")
    assert not schema.is_text(Outer, "inner.names") and not schema.is_text(Outer, "kind")


def test_help_is_read_from_source_comments_included() -> None:
    here = {
        one.key: one
        for one in schema.settings("tests.test_schema", "Outer", root=Path(__file__).resolve().parents[1])
    }
    assert here["path"].meaning == "where it goes" and here["path"].default == "(must be given)"
    assert here["inner.rate"].default == "0.5" and here["count"].kind == "int"
    words = schema.first_paragraph("tests.test_schema", "Outer", root=Path(__file__).resolve().parents[1])
    assert words == "Settings of a test. More words."


@pytest.mark.parametrize(
    ("name", "choice"), [(name, choice) for name, command in COMMANDS.items() for choice in command.targets]
)
def test_help_lists_exactly_the_settings_that_exist(name: str, choice: str) -> None:
    target = COMMANDS[name].targets[choice]
    cls = getattr(__import__(target.schema_module, fromlist=["_"]), target.settings)
    flat = schema.flat_values(schema.defaults(cls))
    leaves = {key for key, value in flat.items() if not isinstance(value, dict) or not value}
    listed = [one.key for one in schema.settings(target.schema_module, target.settings, root=ROOT)]
    assert set(listed) == leaves
    assert len(listed) == len(leaves), "a setting that a class says anew is listed once"
