"""Does a panel of a tale show who is in it, nobody else, and what its line tells? Numbers only, no pixels.

A `Look` is what the detector sees in one picture. Only what the words say is asked: where the characters
stand at first, how large they are and who stands left is the dream's own choice, so that a move is judged
within one picture ("side by side": little between them) or against the dream's own panel before ("closer":
larger than there). Who is meant is found by colour alone, for the two differ in it and a misread shape is
counted once, by `cast`. Thresholds were set on true panels of the validation split (2026-11-30); `tales`
measures how often this judge errs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

CLEAR = 1.0 / 256.0  # of the picture, about one token: who covers so much must be there


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object that the detector sees: where it begins and ends, 0 to 1 from the upper left."""

    name: str  # "red ball"
    share: float  # of the picture
    left: float
    right: float
    top: float
    bottom: float

    @property
    def colour(self) -> str:
        return self.name.partition(" ")[0]

    @property
    def column(self) -> float:
        return (self.left + self.right) / 2


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is seen in one picture: its mean grey level, and the things, largest first."""

    grey: float
    things: tuple[Thing, ...]

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Look:
        """The reverse of `dataclasses.asdict`, through JSON."""
        return Look(grey=stored["grey"], things=tuple(Thing(**one) for one in stored["things"]))

    def largest(self, name: str) -> Thing | None:
        """The largest thing of this one's colour."""
        colour = name.partition(" ")[0]
        return next((one for one in self.things if one.colour == colour), None)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What a panel must show: `shown` clearly, `away` not at all."""

    event: str
    who: str
    other: str
    shown: tuple[str, ...]
    away: tuple[str, ...]
    shares: Mapping[str, float]  # of the true picture, by character
    is_readable: bool  # whether what happens can be read off the true panels

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Panel:
        """The reverse of `dataclasses.asdict`, through JSON."""
        return Panel(**{**stored, "shown": tuple(stored["shown"]), "away": tuple(stored["away"])})


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge says of one panel; None where there is nothing to say."""

    cast: bool  # everybody is there, in colour and shape
    colours: bool  # the same, whatever the shape
    away: bool | None  # who is away is not there
    once: bool  # nobody of the cast is there twice
    no_third: bool  # nothing of a colour that neither of the two has
    plot: bool | None  # it shows what happens

    @property
    def nobody_else(self) -> bool:
        return self.away is not False and self.once

    @property
    def right(self) -> bool:
        return self.cast and self.nobody_else and self.plot is not False


def judge(panel: Panel, now: Look, before: Look | None) -> Verdict:
    """Judge a panel by what is seen in it and in the one before."""
    names, colours = [one.name for one in now.things], [one.colour for one in now.things]
    own = [name.partition(" ")[0] for name in (panel.who, panel.other)]
    return Verdict(
        cast=all(name in names for name in panel.shown),
        colours=all(name.partition(" ")[0] in colours for name in panel.shown),
        away=all(now.largest(name) is None for name in panel.away) if panel.away else None,
        once=all(colours.count(colour) <= 1 for colour in own),
        no_third=set(colours) <= set(own),
        plot=_tells(panel, now, before) if panel.is_readable and before is not None else None,
    )


def judge_all(panels: Sequence[Panel], looks: Sequence[Look]) -> list[Verdict]:
    """Verdicts of panels that follow each other."""
    before = [None, *looks[:-1]]
    return [judge(*one) for one in zip(panels, looks, before, strict=True)]


# What happens ---------------------------------------------------------------------------------------------

_NEAR = 0.10  # of the picture's width: who stands beside is 0.03 to 0.06 away, on other sides 0.25
_MIDDLE = 0.05  # to either side counts as neither left nor right
_MOVED = 0.10  # of the width, which is a move to a side wherever it ends
_CLOSER, _FURTHER = 1.25, 0.85  # times as large as before; 1.9 and 0.6 in the simulator
_COVERED = 0.75  # of what was seen before, at most, is seen of who hides
_DARKER, _LIGHTER = 0.85, 1.18  # times as light as before


@dataclass(frozen=True, kw_only=True)
class _Scene:
    """Who does it and the other one, where they are seen, now and before; grey levels."""

    a: Thing | None
    b: Thing | None
    a_before: Thing | None
    lighter: float  # times as light as before


def _tells(panel: Panel, now: Look, before: Look) -> bool:
    scene = _Scene(
        a=now.largest(panel.who),
        b=now.largest(panel.other),
        a_before=before.largest(panel.who),
        lighter=now.grey / max(before.grey, 1.0),
    )
    return RULES[panel.event](scene)


def _gap(one: Thing, other: Thing) -> float:
    """Free columns between the two; below 0 where one is before the other."""
    return max(one.left, other.left) - min(one.right, other.right)


def _near(scene: _Scene) -> bool:
    return scene.a is not None and scene.b is not None and _gap(scene.a, scene.b) <= _NEAR


def _hidden(scene: _Scene) -> bool:
    if scene.b is None or scene.a_before is None:
        return False
    if scene.a is None:
        return True
    return _gap(scene.a, scene.b) <= 0.02 and scene.a.share <= _COVERED * scene.a_before.share


def _to_side(scene: _Scene, side: int) -> bool:
    """`side`: -1 to the left, 1 to the right."""
    if scene.a is None:
        return False
    moved = scene.a.column - scene.a_before.column if scene.a_before else 0.0
    return side * (scene.a.column - 0.5) > _MIDDLE or side * moved >= _MOVED


def _on_top(scene: _Scene) -> bool:
    a, b = scene.a, scene.b
    return a is not None and b is not None and b.left <= a.column <= b.right and a.bottom < b.bottom - 0.05


def _larger(scene: _Scene) -> float | None:
    """How many times as large as before."""
    return scene.a.share / scene.a_before.share if scene.a and scene.a_before else None


# By event of `tale_events.EVENTS`; an opening tells nothing but who is there.
RULES: dict[str, Callable[[_Scene], bool]] = {
    "towards": _near,
    "beside": _near,
    "hide": _hidden,
    "top": _on_top,
    "alone": lambda scene: scene.a is not None and scene.b is None,
    "appear": lambda scene: scene.a is not None,
    "left": lambda scene: _to_side(scene, -1),
    "right": lambda scene: _to_side(scene, 1),
    "closer": lambda scene: (_larger(scene) or 0.0) >= _CLOSER,
    "further": lambda scene: 0.0 < (_larger(scene) or 0.0) <= _FURTHER,
    "night": lambda scene: scene.lighter <= _DARKER,
    "day": lambda scene: scene.lighter >= _LIGHTER,
}
# Told by who does it, now and in the panel before.
NEED_BEFORE = ("hide", "closer", "further")
