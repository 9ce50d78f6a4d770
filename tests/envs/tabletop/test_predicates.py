"""Predicates on states made by hand: each must be true where it is, and false beside it."""

from __future__ import annotations

import pytest

from emuworld.envs.tabletop.layout import FurniturePlan, ObjectPlan, TablePlan
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.scene import TableScene


def cube(colour: str, x: float, y: float, z: float = 0.03) -> ObjectPlan:
    return ObjectPlan(kind="cube", colour=colour, size_m=(0.03,), position=(x, y, z))


@pytest.fixture(scope="module")
def scene() -> TableScene:
    """Three cubes in a tower on a plate, a fourth alone, a fifth in the bin, the drawer open."""
    return TableScene(
        TablePlan(
            objects=(
                cube("red", 0.45, 0.0, 0.038),
                cube("green", 0.45, 0.0, 0.098),
                cube("blue", 0.45, 0.01, 0.158),
                cube("white", 0.45, -0.15),
                cube("black", 0.60, 0.12, 0.036),
            ),
            furniture=(
                FurniturePlan(kind="plate", colour="yellow", position=(0.45, 0.0)),
                FurniturePlan(kind="bin", colour="wooden", position=(0.60, 0.12)),
                FurniturePlan(kind="drawer", colour="white", position=(0.36, 0.32), open_m=0.13),
                FurniturePlan(kind="button", colour="red", position=(0.55, -0.3)),
            ),
        )
    )


TRUE = [
    ("On", "red cube", "yellow plate"),
    ("On", "blue cube", "green cube"),
    ("On", "white cube", "table"),
    ("Stack", "blue cube", "green cube", "red cube"),
    ("In", "black cube", "wooden bin"),
    ("LeftOf", "white cube", "red cube"),
    ("RightOf", "red cube", "white cube"),
    ("Open", "drawer"),
    ("NotMoved", "red cube"),
    ("At", "white cube", "0.47", "-0.15"),
    ("Not", "Held", "red cube"),
]
FALSE = [
    ("On", "blue cube", "red cube"),
    ("On", "white cube", "yellow plate"),
    ("On", "red cube", "green cube"),
    ("Stack", "green cube", "blue cube"),
    ("In", "white cube", "wooden bin"),
    ("In", "black cube", "drawer"),
    ("LeftOf", "red cube", "white cube"),
    ("Behind", "white cube", "red cube"),
    ("LeftOf", "white cube", "black cube"),  # too far, and more in front than aside
    ("LeftOf", "blue cube", "black cube"),  # high up
    ("Closed", "drawer"),
    ("Pressed", "button"),
    ("Held", "blue cube"),
    ("At", "white cube", "0.45", "-0.20"),
    ("Moved", "white cube", "left"),
]


@pytest.mark.parametrize(("words", "truth"), [*((w, True) for w in TRUE), *((w, False) for w in FALSE)])
def test_truth_of_a_state_made_by_hand(scene: TableScene, words: tuple[str, ...], truth: bool) -> None:
    assert scene.holds(Predicate(words[0], words[1:])) is truth


def test_moved_and_not_moved_read_the_start(scene: TableScene) -> None:
    state = scene.save()
    scene.place_object("white cube", (0.45, -0.23, 0.03))
    assert scene.holds(Predicate("Moved", ("white cube", "left")))
    assert not scene.holds(Predicate("Moved", ("white cube", "right")))
    assert not scene.holds(Predicate("Moved", ("white cube", "away")))
    assert not scene.holds(Predicate("NotMoved", ("white cube",)))
    scene.restore(state)
    assert scene.holds(Predicate("NotMoved", ("white cube",)))


def test_a_floating_cube_is_on_nothing_and_falls(scene: TableScene) -> None:
    state = scene.save()
    scene.place_object("white cube", (0.55, -0.15, 0.12))
    assert not scene.holds(Predicate("On", ("white cube", "table")))
    scene.settle(0.5)
    assert scene.holds(Predicate("On", ("white cube", "table")))
    scene.restore(state)


def test_json_both_ways() -> None:
    predicate = Predicate("Stack", ("blue cube", "green cube", "red cube"))
    assert Predicate.from_json(predicate.to_json()) == predicate
    assert Predicate.from_dict(predicate.to_dict()) == predicate
    assert str(predicate) == "Stack(blue cube, green cube, red cube)"


def test_errors_name_what_came(scene: TableScene) -> None:
    with pytest.raises(ValueError, match="'Above' is unknown"):
        Predicate("Above", ("a", "b"))
    with pytest.raises(ValueError, match="On got 1 arguments"):
        Predicate("On", ("a",))
    with pytest.raises(ValueError, match="'pink cube'"):
        scene.holds(Predicate("On", ("pink cube", "table")))
    with pytest.raises(ValueError, match="is no button"):
        scene.holds(Predicate("Pressed", ("drawer",)))
    with pytest.raises(ValueError, match="holds nothing inside"):
        scene.holds(Predicate("In", ("red cube", "yellow plate")))
