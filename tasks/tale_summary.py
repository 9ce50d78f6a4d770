"""Records of tales -> figures with 95 % intervals, the judge's own errors and what chance gives among them.

Panels of one tale depend on each other, so that rates over many panels are bootstrapped over tales. Rates
by number of the panel and of whole tales have one value a tale, and Wilson's interval; so have those by what
happens, which a tale seldom shows twice.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emuworld.tasks.metrics import Estimate, bootstrap, wilson
from emuworld.tasks.run_folder import Record
from emuworld.tasks.summary import JUDGED
from emuworld.tasks.tale_judge import CLEAR, Look, Panel, Verdict, judge, judge_all

# What is asked of a panel: attribute of a `Verdict`, name on the page.
ASKED = {
    "cast": "everybody there, colour and shape",
    "colours": "everybody there, by colour alone",
    "nobody_else": "nobody else there",
    "away": "who is away is not there",
    "once": "nobody there twice",
    "no_third": "nothing of a third colour",
    "plot": "shows what happens",
    "right": "everybody, nobody else, what happens",
}
# Whose pictures: what is measured, the judge's own error, what pictures get that know nothing of the line.
CONTENDERS = JUDGED | {
    "copy": "dream's panel before, kept",
    "true_copy": "simulator's panel before, kept",
    "shuffled": "dream of another tale",
}
_Verdicts = list[list[tuple[int, str, Verdict]]]  # of each tale: number of the panel from 1, event, verdict


def verdicts(record: Record, who: str) -> list[Verdict]:
    """What the judge says of each panel of a tale: of the dream's, or another of `JUDGED`."""
    return judge_all(_panels(record), _looks(record, who))


def share_of_panels(record: Record, name: str) -> float:
    """Share of a tale's dreamt panels of which this of `ASKED` is true; NaN where it is asked of none."""
    told = [value for one in verdicts(record, "dream") if (value := getattr(one, name)) is not None]
    return sum(told) / len(told) if told else float("nan")


def summarise_story(records: Sequence[Record]) -> dict[str, Any]:
    """Every rate overall, by number of the panel, by what happens, by kind of tale, and of whole tales."""
    tales = [record for record in records if record["kind"] == "tale"]
    judged = {who: _judged(tales, who) for who in CONTENDERS}
    numbers = range(1, max((len(tale["panels"]) for tale in tales), default=0) + 1)
    events = sorted({event for tale in judged["dream"] for _, event, one in tale if one.plot is not None})
    groups: dict[str, Callable[[Record], bool]] = {
        "the question tells the plot": lambda tale: tale["is_plot"],
        "the question tells the theme": lambda tale: not tale["is_plot"],
        "characters with names": lambda tale: tale["is_named"],
        "characters without": lambda tale: not tale["is_named"],
        "held-out pairs": lambda tale: tale["held_out"],
    }
    return {
        "num_tales": len(tales),
        "num_panels": sum(len(tale["panels"]) for tale in tales),
        "overall": {who: _rates(judged[who]) for who in CONTENDERS},
        "by_panel": {
            str(number): {
                who: {
                    name: _rate_of([one for tale in judged[who] for one in tale if one[0] == number], name)
                    for name in ASKED
                }
                for who in CONTENDERS
            }
            for number in numbers
        },
        "by_event": {
            event: {
                who: _rate_of([one for tale in judged[who] for one in tale if one[1] == event], "plot")
                for who in CONTENDERS
            }
            for event in events
        },
        "whole_tales": {who: {name: _whole(judged[who], name) for name in ASKED} for who in JUDGED},
        "groups": {
            group: {
                who: _rates([one for one, tale in zip(judged[who], tales, strict=True) if belongs(tale)])
                for who in JUDGED
            }
            for group, belongs in groups.items()
        },
        "detector": _detector_errors(tales),
        "bars": {},
    }


# Judging --------------------------------------------------------------------------------------------------


def _panels(record: Record) -> list[Panel]:
    return [Panel.from_dict(one) for one in record["panels"]]


def _looks(record: Record, who: str) -> list[Look]:
    return [Look.from_dict(one) for one in record["seen"][who]]


def _judged(tales: Sequence[Record], who: str) -> _Verdicts:
    """What the judge says of every panel of every tale, drawn by one of `CONTENDERS`."""
    if who in ("copy", "true_copy"):
        source = "dream" if who == "copy" else "truth"
        return [_copied(tale, source) for tale in tales]
    if who == "shuffled":  # each dream beside the next tale's truth
        others = [*tales[1:], *tales[:1]] if len(tales) > 1 else []
        pairs = [(_panels(other), _looks(tale, "dream")) for tale, other in zip(tales, others, strict=False)]
        shorter = [min(len(panels), len(looks)) for panels, looks in pairs]
        return [
            _numbered(panels[:count], judge_all(panels[:count], looks[:count]))
            for (panels, looks), count in zip(pairs, shorter, strict=True)
        ]
    return [_numbered(_panels(tale), verdicts(tale, who)) for tale in tales]


def _copied(tale: Record, source: str) -> list[tuple[int, str, Verdict]]:
    """The panel before in place of each panel but the first."""
    panels, looks = _panels(tale)[1:], _looks(tale, source)[:-1]
    kept = [judge(panel, look, look) for panel, look in zip(panels, looks, strict=True)]
    return _numbered(panels, kept, first=2)


def _numbered(
    panels: Sequence[Panel], said: Sequence[Verdict], *, first: int = 1
) -> list[tuple[int, str, Verdict]]:
    return [
        (number, panel.event, one)
        for number, (panel, one) in enumerate(zip(panels, said, strict=True), start=first)
    ]


# Rates ----------------------------------------------------------------------------------------------------


def _rates(judged: _Verdicts) -> dict[str, Any]:
    rates = {}
    for name in ASKED:
        told = [[getattr(one, name) for *_, one in tale] for tale in judged]
        hits = [sum(value is True for value in tale) for tale in told]
        counts = [sum(value is not None for value in tale) for tale in told]
        rates[name] = _over_tales(hits, counts).as_dict() | {"hits": sum(hits), "panels": sum(counts)}
    return rates


def _over_tales(hits: Sequence[int], counts: Sequence[int]) -> Estimate:
    """Share of panels, bootstrapped over tales; where all or none are hits, which a bootstrap takes for sure,
    Wilson's interval as if each tale had one panel.
    """
    asked = sum(count > 0 for count in counts)
    if sum(hits) in (0, sum(counts)):
        return wilson(asked if sum(hits) else 0, asked)
    return bootstrap(hits, weights=counts)


def _rate_of(told: Sequence[tuple[int, str, Verdict]], name: str) -> dict[str, Any]:
    values = [value for *_, one in told if (value := getattr(one, name)) is not None]
    return wilson(sum(values), len(values)).as_dict()


def _whole(judged: _Verdicts, name: str) -> dict[str, Any]:
    """Of the tales in which it is asked at all, those of which it is true in every panel."""
    told = [[value for *_, one in tale if (value := getattr(one, name)) is not None] for tale in judged]
    whole = [all(values) for values in told if values]
    return wilson(sum(whole), len(whole)).as_dict()


def _detector_errors(tales: Sequence[Record]) -> dict[str, Any]:
    """Precision and recall on the simulator's own panels."""
    counts: dict[str, list[int]] = {name: [] for name in ("found", "right", "visible", "recalled")}
    for tale in tales:
        rows = [
            (panel.shares, {one.name for one in look.things})
            for panel, look in zip(_panels(tale), _looks(tale, "truth"), strict=True)
        ]
        visible = [_visible(shares) for shares, _ in rows]
        counts["found"].append(sum(len(found) for _, found in rows))
        counts["right"].append(sum(len(found & shares.keys()) for shares, found in rows))
        counts["visible"].append(sum(len(one) for one in visible))
        counts["recalled"].append(
            sum(len(found & one) for (_, found), one in zip(rows, visible, strict=True))
        )
    return {
        name: bootstrap(counts[top], weights=counts[bottom]).as_dict()
        for name, top, bottom in (("precision", "right", "found"), ("recall", "recalled", "visible"))
    }


def _visible(shares: Mapping[str, float]) -> set[str]:
    return {name for name, share in shares.items() if share >= CLEAR}
