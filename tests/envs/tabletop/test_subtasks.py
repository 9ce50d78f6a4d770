"""Subtasks in words and back: every phrasing means one subtask, and nothing else is taken for one."""

import itertools

import numpy as np
import pytest

from emuworld.envs.tabletop.subtasks import (
    DIRECTIONS,
    FURNITURE_KINDS,
    PLACE_RELATIONS,
    WORDINGS,
    Subtask,
    Wording,
    canonical,
    only_names_things,
    parse,
    phrase,
    phrases,
)

RED, BLUE = "red cube", "blue plate"


def example(wording: Wording) -> Subtask:
    target = {"open": "drawer", "close": "drawer", "press": "button"}.get(wording.skill, RED)
    destination = "wooden bin" if "{d}" in wording.plain else None
    return Subtask(skill=wording.skill, target=target, destination=destination, relation=wording.relation)


def test_every_phrasing_is_read_as_what_it_says() -> None:
    said: dict[str, Subtask] = {}
    for wording in WORDINGS:
        subtask = example(wording)
        for text in phrases(subtask, "test"):
            assert said.setdefault(text, subtask) == subtask, f"{text!r} means two things"
            for written in (text, text.upper() + ".", f"Current step: {text.capitalize()}.", f"  {text} "):
                assert parse(written) == subtask
    assert {(one.skill, one.relation) for one in WORDINGS} >= {
        *(("place", relation) for relation in (*PLACE_RELATIONS, None)),
        *(("push", direction) for direction in DIRECTIONS),
    }


def test_phrases_of_the_test_split_stay_there() -> None:
    for subtask in map(example, WORDINGS):
        train, test = set(phrases(subtask, "train")), set(phrases(subtask, "test"))
        assert train == set(phrases(subtask, "validation")) and train < test
        drawn = {phrase(subtask, np.random.default_rng(seed), "train") for seed in range(60)}
        assert drawn == train
        assert canonical(subtask) in train


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dance",
        "put the red cube",
        "put the red dog on the blue plate",
        "put the red cube on the red cube",
        "press the red cube",
        "open the blue plate",
        "pick up the drawer",
        "push the red cube",
        "push the button to the left",
        "put the red cube on the blue plate and smile",
        "put the red cube on the blue plate; pick up the red cube",
        "pick up the red cube" * 2000,
    ],
)
def test_what_is_no_subtask_is_refused(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"skill": "throw", "target": RED}, "expected one of pick"),
        ({"skill": "stack", "target": RED}, "destination"),
        ({"skill": "stack", "target": RED, "destination": "blue cube", "relation": "in"}, "relation"),
        ({"skill": "place", "target": RED, "destination": BLUE}, "relation"),
        ({"skill": "place", "target": RED, "relation": "on"}, "relation"),
        ({"skill": "place", "target": RED, "destination": RED, "relation": "on"}, "own destination"),
        ({"skill": "pick", "target": RED, "destination": BLUE}, "no destination"),
        ({"skill": "push", "target": RED}, "relation"),
        ({"skill": "open", "target": "drawer", "relation": "left"}, "relation"),
    ],
)
def test_parts_that_do_not_fit_are_refused(values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Subtask(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text, is_list",
    [
        ("You need a red cube and a blue plate.", True),
        ("you need an orange ball, a wooden bin and a drawer", True),
        ("You need a red cube, a blue plate, and a button!", True),
        ("You need a drawer.", True),
        ("You need to put the red cube on the blue plate.", False),
        ("You need a red cube on a blue plate.", False),
        ("You need a sandwich.", False),
        ("Put the red cube on the blue plate.", False),
        ("", False),
    ],
)
def test_what_is_needed_is_told_from_what_is_done(text: str, is_list: bool) -> None:
    assert only_names_things(text) == is_list
    assert not is_list or parse(text) is None


def test_json_round_trip_and_refusal() -> None:
    for subtask in map(example, WORDINGS):
        assert Subtask.from_dict(subtask.to_dict()) == subtask
    with pytest.raises(ValueError, match="skill and target"):
        Subtask.from_dict({"skill": "pick"})
    with pytest.raises(ValueError, match="skill and target"):
        Subtask.from_dict({"skill": "pick", "target": RED, "speed": "9"})


def test_only_the_picture_says_where() -> None:
    shown = parse("Put the red cube where the picture shows.")
    assert shown == Subtask(skill="place", target=RED) and shown.from_picture
    for subtask in map(example, WORDINGS):
        assert subtask.from_picture == (subtask.skill == "place" and subtask.destination is None)


def test_furniture_is_not_carried_about() -> None:
    for kind, skill in itertools.product(FURNITURE_KINDS, ("pick up", "lift", "push")):
        found = parse(f"{skill} the {kind}")
        assert found is None or found.skill == "press"
