"""The judge of tales on made-up sightings and truths, and what the simulator's tales ask."""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from emuworld.envs.rooms.tale_events import EVENTS
from emuworld.tasks.detector import Sighting
from emuworld.tasks.tale_judge import NEED_BEFORE, RULES, Look, Panel, Thing, Verdict, judge
from emuworld.tasks.tale_summary import share_of_panels, summarise_story, verdicts
from emuworld.tasks.tale_truth import make_tale, panels_of
from emuworld.tasks.tales import look_at
from emuworld.tasks.truth import Request

BALL, BOX = "red ball", "blue box"


def _panel(event: str, who: str = BALL, **changes: Any) -> Panel:
    other = BOX if who == BALL else BALL
    panel = Panel(
        event=event, who=who, other=other, shown=(BALL, BOX), away=(), shares={BALL: 0.02, BOX: 0.02},
        is_readable=event != "opening",
    )  # fmt: skip
    return replace(panel, **changes)


def _thing(name: str, left: float, *, side: float = 0.15, bottom: float = 0.8) -> Thing:
    share = 0.8 * side * side
    return Thing(
        name=name, share=share, left=left, right=left + side, top=bottom - side, bottom=bottom
    )  # fmt: skip


def _look(*things: Thing, grey: float = 120.0) -> Look:
    return Look(grey=grey, things=tuple(sorted(things, key=lambda one: -one.share)))


APART = _look(_thing(BALL, 0.2), _thing(BOX, 0.65))


def _said(event: str, *things: Thing, who: str = BALL, grey: float = 120.0) -> bool | None:
    """Whether the judge sees the event happen, behind a panel in which both stood apart."""
    return judge(_panel(event, who), _look(*things, grey=grey), APART).plot


def test_every_event_that_tells_something_has_a_rule() -> None:
    assert set(RULES) == set(EVENTS) and set(NEED_BEFORE) < set(RULES)


@pytest.mark.parametrize("who, other", [(BALL, BOX), (BOX, BALL)])
def test_events_are_seen_where_they_happen_and_only_there(who: str, other: str) -> None:
    there = _thing(other, 0.65)
    both = (_thing(who, 0.2), there)
    for event in ("towards", "beside"):
        assert _said(event, _thing(who, 0.45), there, who=who)
        assert not _said(event, *both, who=who) and not _said(event, _thing(who, 0.45), who=who)
    assert _said("hide", there, _thing(who, 0.68, side=0.08), who=who)
    assert not _said("hide", there, _thing(who, 0.45, side=0.08), who=who), "smaller, but not behind"
    assert not _said("hide", there, _thing(who, 0.60), who=who), "beside, and as large as before"
    assert not _said("hide", _thing(who, 0.2), who=who), "there is nothing to hide behind"
    assert _said("alone", _thing(who, 0.2), who=who)
    assert not _said("alone", *both, who=who) and not _said("alone", there, who=who)
    assert _said("appear", *both, who=who) and not _said("appear", there, who=who)
    assert _said("left", *both, who=who) and not _said("left", _thing(who, 0.7), who=who)
    assert _said("right", _thing(who, 0.7), who=who) and not _said("right", *both, who=who)
    before = _look(_thing(who, 0.7))
    gone = judge(_panel("left", who), _look(_thing(who, 0.55), _thing(other, 0.1)), before)
    assert gone.plot, "left of where it was, for the other one is on the left"
    assert not judge(_panel("left", who), _look(_thing(who, 0.65)), before).plot
    assert not judge(_panel("left", who), _look(_thing(who, 0.42)), _look(_thing(who, 0.42))).plot
    assert _said("closer", _thing(who, 0.2, side=0.2), there, who=who)
    assert not _said("closer", *both, who=who) and not _said("closer", there, who=who)
    assert _said("further", _thing(who, 0.2, side=0.12), there, who=who)
    assert not _said("further", *both, who=who) and not _said("further", there, who=who)
    assert _said("top", _thing(who, 0.66, bottom=0.65), there, who=who)
    assert not _said("top", _thing(who, 0.66, bottom=0.8), there, who=who), "before it, on the floor"
    assert not _said("top", _thing(who, 0.2, bottom=0.65), there, who=who), "above nothing"
    assert _said("night", *both, grey=80.0, who=who) and not _said("night", *both, who=who)
    assert _said("day", *both, grey=180.0, who=who) and not _said("day", *both, who=who)


def test_nothing_is_said_of_what_cannot_be_read() -> None:
    assert judge(_panel("opening"), APART, None).plot is None
    assert judge(_panel("closer", is_readable=False), APART, APART).plot is None


def test_who_is_missing_away_twice_or_a_stranger() -> None:
    def said(*things: Thing, **changes: Any) -> Verdict:
        return judge(_panel("opening", **changes), _look(*things), None)

    both = _thing(BALL, 0.2), _thing(BOX, 0.65)
    assert said(*both) == Verdict(cast=True, colours=True, away=None, once=True, no_third=True, plot=None)
    misread = said(_thing("red egg", 0.2), both[1])
    assert not misread.cast and misread.colours and misread.nobody_else and not misread.right
    assert not said(both[1]).colours
    assert said(both[1], shown=(BOX,)).right, "who is not clearly seen is not asked for"
    gone = {"shown": (BOX,), "away": (BALL,)}
    assert said(both[1], **gone).away and said(both[1], **gone).right
    assert said(*both, **gone).away is False and not said(*both, **gone).nobody_else
    assert not said(_thing("red egg", 0.2), both[1], **gone).nobody_else, "it is there in another shape"
    twice = said(*both, _thing("red egg", 0.4))
    assert twice.cast and not twice.once and not twice.nobody_else and not twice.right
    third = said(*both, _thing("green egg", 0.4))
    assert not third.no_third and third.nobody_else


def test_a_look_measures_what_the_detector_marks() -> None:
    cells = np.zeros((16, 32), np.bool_)
    cells[4:8, 8:16] = True
    seen = Sighting(colour="red", shape="ball", share=0.0625, column=0.375, row=0.375, cells=cells)
    look = look_at(np.full((64, 128, 3), 90, np.uint8), [seen])
    assert look.grey == 90.0 and Look.from_dict(asdict(look)) == look
    assert look.things == (Thing(name=BALL, share=0.0625, left=0.25, right=0.5, top=0.25, bottom=0.5),)


# What is true ---------------------------------------------------------------------------------------------


def _truth(event: str, who: str, **pixels: int) -> dict[str, Any]:
    names = {"ball": BALL, "box": BOX}
    tale = {"event": event, "who": who, "characters": [BALL, BOX]}
    return {"tale": tale, "objects": [[names[one], count, 0.5, 2.0] for one, count in pixels.items()]}


def test_what_a_panel_must_show_follows_from_what_happens() -> None:
    truths = [
        _truth("opening", BALL, ball=900),
        _truth("closer", BALL, ball=2000),
        _truth("appear", BOX, ball=2000, box=700),
        _truth("hide", BOX, ball=2000, box=300),
        _truth("night", BOX, ball=2000, box=300),
        _truth("closer", BOX, ball=2000, box=1500),
        _truth("closer", BALL, ball=2900, box=1500),
        _truth("alone", BOX, box=1500),
        _truth("left", BOX, box=200),
    ]
    panels = list(panels_of(["A red ball is in a room."], truths))
    assert [panel.away for panel in panels] == [(BOX,), (BOX,), (), (), (), (), (), (BALL,), (BALL,)]
    assert [panel.shown for panel in panels] == [
        (BALL,), (BALL,), (BALL, BOX), (BALL,), (BALL,), (BALL, BOX), (BALL, BOX), (BOX,), ()
    ]  # fmt: skip
    # Who hid just now was as large as the dream liked: whether it comes closer then cannot be told.
    assert [panel.is_readable for panel in panels] == [False, True, True, True, True, False, True, True, True]
    both = list(panels_of(["Ruby is a red ball and Tom is a blue box."], [_truth("opening", BALL, ball=900)]))
    assert both[0].away == () and both[0].shown == (BALL,)


def test_tales_are_the_simulators_and_the_same_again() -> None:
    def made(index: int) -> Any:
        return make_tale(
            Request(index=index, seed=40 + index, split="validation", size_px=32, renderer="rays")
        )

    tales = [made(index) for index in range(3)]
    for tale in tales:
        assert len(tale.lines) == len(tale.panels) == len(tale.frames) >= 4
        assert tale.frames.shape[1:] == (32, 32, 3) and tale.panels[0].event == "opening"
        assert all(panel.shown for panel in tale.panels) and set(tale.cast) == {
            tale.panels[0].who, tale.panels[0].other
        }  # fmt: skip
        assert tale.is_plot == (tale.lines[1] in tale.question)
    np.testing.assert_array_equal(made(0).frames, tales[0].frames)


# Figures --------------------------------------------------------------------------------------------------


def _tale(index: int, dream: list[Look], *, cast: tuple[str, str] = (BALL, BOX)) -> dict[str, Any]:
    """Both apart, one beside the other, the other gone: as in `GOOD`."""
    one, other = cast
    panels = [
        Panel(event=event, who=one, other=other, shown=shown, away=away,
              shares=dict.fromkeys(shown, 0.02), is_readable=event != "opening")
        for event, shown, away in (("opening", cast, ()), ("towards", cast, ()), ("alone", (one,), (other,)))
    ]  # fmt: skip
    true = [_of(one, other, gap) for gap in (0.45, 0.2)] + [_look(_thing(one, 0.2))]
    seen = {"dream": dream, "tokenizer": true, "truth": true}
    return {
        "kind": "tale", "index": index, "prompt": "…", "is_plot": index % 2 == 0, "is_named": False,
        "held_out": False, "panels": [asdict(panel) for panel in panels],
        "seen": {who: [asdict(look) for look in looks] for who, looks in seen.items()},
    }  # fmt: skip


def _of(one: str, other: str, way: float) -> Look:
    return _look(_thing(one, 0.2), _thing(other, 0.2 + way))


GOOD = [_of(BALL, BOX, 0.45), _of(BALL, BOX, 0.2), _look(_thing(BALL, 0.2))]


def test_figures_tell_a_good_dream_from_a_poor_one() -> None:
    still = [_of(BALL, BOX, 0.45)] * 3
    green = [_of("green egg", "pink cone", 0.45)] * 3
    figures = summarise_story([_tale(0, GOOD), _tale(1, still), _tale(2, green)])
    assert (figures["num_tales"], figures["num_panels"]) == (3, 9)
    dream = figures["overall"]["dream"]
    assert (dream["cast"]["hits"], dream["cast"]["panels"]) == (6, 9)
    assert (dream["plot"]["hits"], dream["plot"]["panels"]) == (2, 6)
    assert (dream["away"]["hits"], dream["away"]["panels"]) == (2, 3)
    assert (dream["right"]["hits"], dream["no_third"]["hits"]) == (4, 6)
    for who in ("tokenizer", "truth"):
        assert all(one["value"] == 1.0 for one in figures["overall"][who].values())
        assert figures["overall"][who]["cast"]["low"] == pytest.approx(0.4385, abs=1e-4), "three tales"
    assert figures["overall"]["true_copy"]["plot"]["hits"] == 0 == figures["overall"]["copy"]["plot"]["hits"]
    assert figures["overall"]["copy"]["cast"]["panels"] == 6, "there is none before the first"
    assert figures["overall"]["shuffled"]["cast"]["hits"] == 6, "the same cast: tales 0 and 1, beside 1 and 2"
    assert figures["by_panel"]["3"]["dream"]["nobody_else"] == pytest.approx(
        {"value": 2 / 3, "low": 0.2077, "high": 0.9385, "count": 3}, abs=1e-4
    )
    assert figures["by_panel"]["1"]["dream"]["plot"]["value"] is None
    assert figures["by_event"]["alone"]["dream"]["value"] == pytest.approx(1 / 3)
    assert set(figures["by_event"]) == {"alone", "towards"}
    assert figures["whole_tales"]["dream"]["right"]["value"] == pytest.approx(1 / 3)
    opening = _tale(0, GOOD)
    short = {**opening, "panels": opening["panels"][:1]}
    short["seen"] = {who: looks[:1] for who, looks in opening["seen"].items()}
    whole = summarise_story([short])["whole_tales"]["dream"]
    assert whole["away"]["count"] == whole["plot"]["count"] == 0 and whole["cast"]["value"] == 1.0
    assert figures["groups"]["the question tells the theme"]["dream"]["cast"]["panels"] == 3
    assert figures["groups"]["held-out pairs"]["dream"]["cast"]["value"] is None
    assert figures["detector"]["precision"]["value"] == figures["detector"]["recall"]["value"] == 1.0


def test_a_dream_does_not_pass_for_another_tales() -> None:
    other = ("green egg", "pink cone")
    dream = [_of(*other, 0.45), _of(*other, 0.2), _look(_thing(other[0], 0.2))]
    shuffled = summarise_story([_tale(0, GOOD), _tale(1, dream, cast=other)])["overall"]["shuffled"]
    assert shuffled["cast"]["hits"] == shuffled["plot"]["hits"] == shuffled["right"]["hits"] == 0
    alone = summarise_story([_tale(0, GOOD)])["overall"]["shuffled"]
    assert alone["cast"]["value"] is None, "there is no other tale"


def test_a_tales_worth_is_its_share_of_panels() -> None:
    record = _tale(0, [GOOD[0], GOOD[0], GOOD[2]])
    assert [one.plot for one in verdicts(record, "dream")] == [None, False, True]
    assert share_of_panels(record, "plot") == 0.5 and share_of_panels(record, "cast") == 1.0
    assert share_of_panels(record, "right") == pytest.approx(2 / 3)
    short = {**record, "panels": record["panels"][:1], "seen": {"dream": record["seen"]["dream"][:1]}}
    assert np.isnan(share_of_panels(short, "plot")) and share_of_panels(short, "cast") == 1.0
