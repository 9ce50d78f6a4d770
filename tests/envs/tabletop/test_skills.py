"""Skills by contact: what they reach, what they leave alone, what they refuse, and that they repeat."""

from __future__ import annotations

import numpy as np
import pytest

from emuworld.envs.tabletop.layout import FurniturePlan, ObjectPlan, TablePlan
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.robot import MAX_CONTROL_STEPS
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.skills import SkillResult
from emuworld.envs.tabletop.subtasks import Subtask


def cube(colour: str, x: float, y: float, yaw: float = 0.0) -> ObjectPlan:
    return ObjectPlan(kind="cube", colour=colour, size_m=(0.028,), position=(x, y, 0.028), yaw_rad=yaw)


def ball(colour: str, x: float, y: float) -> ObjectPlan:
    return ObjectPlan(kind="ball", colour=colour, size_m=(0.028,), position=(x, y, 0.028))


def cylinder(colour: str, x: float, y: float) -> ObjectPlan:
    return ObjectPlan(kind="cylinder", colour=colour, size_m=(0.026, 0.036), position=(x, y, 0.036))


PLATE = FurniturePlan(kind="plate", colour="blue", position=(0.45, 0.12))
BIN = FurniturePlan(kind="bin", colour="wooden", position=(0.58, -0.12))
DRAWER = FurniturePlan(kind="drawer", colour="white", position=(0.36, 0.30))
BUTTON = FurniturePlan(kind="button", colour="red", position=(0.42, -0.28))


def do(scene: TableScene, skill: str, target: str, relation: str = "", destination: str = "") -> SkillResult:
    return scene.execute(
        Subtask(skill=skill, target=target, relation=relation or None, destination=destination or None)
    )


def holds(scene: TableScene, name: str, *args: str) -> bool:
    return scene.holds(Predicate(name, args))


def test_cube_onto_plate_end_to_end() -> None:
    scene = TableScene(
        TablePlan(objects=(cube("red", 0.5, -0.1, 0.6), ball("green", 0.6, 0.1)), furniture=(PLATE,))
    )
    films: list[float] = []
    result = scene.execute(
        Subtask(skill="place", target="red cube", destination="blue plate", relation="on"),
        on_step=lambda: films.append(scene.data.time),
    )
    assert result.done and result.reason == "done"
    assert result.control_steps == len(films) < MAX_CONTROL_STEPS
    assert holds(scene, "On", "red cube", "blue plate") and not holds(scene, "Held", "red cube")
    assert holds(scene, "NotMoved", "green ball")
    assert np.linalg.norm(scene.state("red cube").position[:2] - PLATE.position) < 0.01


def test_equal_requests_end_in_the_same_state_to_the_bit() -> None:
    scene = TableScene(TablePlan(objects=(cylinder("red", 0.5, -0.1),), furniture=(PLATE,)))
    hashes = set()
    for run in (scene, scene, TableScene.from_dict(scene.to_dict())):
        run.reset()
        assert do(run, "place", "red cylinder", "on", "blue plate").done
        hashes.add(run.state_hash())
    assert len(hashes) == 1


def test_pick_holds_by_friction_and_a_later_place_goes_on_from_there() -> None:
    scene = TableScene(TablePlan(objects=(ball("red", 0.5, -0.1), cube("blue", 0.45, 0.1)), furniture=(BIN,)))
    assert do(scene, "pick", "red ball").done
    assert holds(scene, "Held", "red ball") and scene.state("red ball").position[2] > 0.1
    assert int(scene.model.neq) == 1, "one constraint is the gripper's gear; a grasp must not be another"
    state = scene.save()
    twin = TableScene.from_dict(scene.to_dict())
    twin.restore(state)
    for run in (scene, twin):
        assert do(run, "pick", "red ball").reason == "it is held already"
        assert do(run, "pick", "blue cube").reason == "the gripper holds the red ball"
        assert do(run, "place", "red ball", "in", "wooden bin").done
        assert holds(run, "In", "red ball", "wooden bin")
    assert scene.state_hash() == twin.state_hash()


def test_tower_of_three() -> None:
    things = (cube("red", 0.5, -0.1), cube("green", 0.42, 0.1, 0.4), cylinder("blue", 0.6, 0.05))
    scene = TableScene(TablePlan(objects=things))
    assert do(scene, "stack", "green cube", "on", "red cube").done
    assert do(scene, "stack", "blue cylinder", "on", "green cube").done
    assert holds(scene, "Stack", "blue cylinder", "green cube", "red cube")
    before = scene.state_hash()
    assert do(scene, "pick", "red cube").reason == "the green cube stands on the red cube"
    assert scene.state_hash() == before


def test_three_things_share_a_bin() -> None:
    things = (cube("red", 0.4, 0.0), ball("green", 0.42, 0.1), cylinder("blue", 0.6, 0.05))
    scene = TableScene(TablePlan(objects=things, furniture=(BIN,)))
    for item in things:
        assert do(scene, "place", item.name, "in", "wooden bin").done
    assert all(holds(scene, "In", item.name, "wooden bin") for item in things)


@pytest.mark.parametrize(
    ("relation", "fact"),
    [("left of", "LeftOf"), ("right of", "RightOf"), ("behind", "Behind"), ("in front of", "InFrontOf")],
)
def test_beside(relation: str, fact: str) -> None:
    scene = TableScene(TablePlan(objects=(cube("red", 0.5, 0.02), cylinder("green", 0.4, -0.2))))
    assert do(scene, "place", "green cylinder", relation, "red cube").done
    assert holds(scene, fact, "green cylinder", "red cube") and holds(scene, "NotMoved", "red cube")


@pytest.mark.parametrize("direction", ["left", "right", "away", "closer"])
@pytest.mark.parametrize("make", [cube, ball, cylinder])
def test_push_ten_centimetres(make: type[ObjectPlan], direction: str) -> None:
    item = make("red", 0.5, 0.02)  # type: ignore[call-arg]
    scene = TableScene(TablePlan(objects=(item,)))
    assert do(scene, "push", item.name, direction).done
    assert holds(scene, "Moved", item.name, direction)
    moved = np.linalg.norm(scene.state(item.name).position - scene.start(item.name))
    assert 0.07 < moved < 0.13


def test_open_put_in_close_open_again() -> None:
    scene = TableScene(TablePlan(objects=(ball("red", 0.5, -0.1),), furniture=(DRAWER,)))
    assert do(scene, "place", "red ball", "in", "drawer").reason == "the drawer is closed"
    assert do(scene, "open", "drawer").done and holds(scene, "Open", "drawer")
    assert do(scene, "place", "red ball", "in", "drawer").done
    assert do(scene, "close", "drawer").done and holds(scene, "Closed", "drawer")
    assert holds(scene, "In", "red ball", "drawer")
    assert do(scene, "pick", "red ball").reason == "the gripper cannot get around the red ball"
    assert do(scene, "open", "drawer").done
    assert do(scene, "pick", "red ball").done and holds(scene, "Held", "red ball")


def test_button_springs_back_and_its_lamp_stays_lit() -> None:
    scene = TableScene(TablePlan(furniture=(BUTTON,)))
    before, dark = scene.save(), scene.model.geom("lamp/button").rgba.copy()
    assert do(scene, "press", "button").done
    assert holds(scene, "Pressed", "button") and scene.joint_share("button") < 0.1
    assert not np.array_equal(scene.model.geom("lamp/button").rgba, dark)
    after = scene.save()
    scene.restore(before)
    assert not holds(scene, "Pressed", "button")
    assert np.array_equal(scene.model.geom("lamp/button").rgba, dark)
    scene.restore(after)
    assert holds(scene, "Pressed", "button")


def test_goal_position_says_where() -> None:
    scene = TableScene(TablePlan(objects=(cube("red", 0.5, -0.1), cube("blue", 0.4, 0.1))))
    place = Subtask(skill="place", target="red cube")
    assert scene.execute(place).reason == "it is not said where to put it"
    assert scene.execute(place, goal_position=(0.6, 0.15, 0.0)).done
    assert np.linalg.norm(scene.state("red cube").position - (0.6, 0.15, 0.028)) < 0.01
    before = scene.state_hash()
    result = scene.execute(place, goal_position=(0.95, 0.0, 0.0))
    assert not result.done and result.control_steps == 0 and scene.state_hash() == before
    with pytest.raises(ValueError, match="expected x, y and z"):
        scene.execute(place, goal_position=(0.5, float("nan"), 0.0))


def test_a_goal_position_is_held_to_the_words() -> None:
    """Where words name the place too: kept where both agree, brought in on a cube, passed over elsewhere."""
    scene = TableScene(
        TablePlan(
            objects=(cube("red", 0.5, -0.1), cube("blue", 0.4, 0.1)),
            furniture=(FurniturePlan(kind="plate", colour="white", position=(0.6, 0.2)),),
        )
    )
    before = scene.save()
    on_plate = Subtask(skill="place", target="red cube", destination="white plate", relation="on")
    assert scene.execute(on_plate, goal_position=(0.57, 0.22, 0.0)).done
    assert np.linalg.norm(scene.state("red cube").position[:2] - (0.57, 0.22)) < 0.01
    scene.restore(before)
    stack = Subtask(skill="stack", target="red cube", destination="blue cube")
    assert scene.execute(stack, goal_position=(0.425, 0.1, 0.0)).done  # it would tip over there
    off = scene.state("red cube").position[:2] - (0.4, 0.1)
    assert 0.003 < off[0] < 0.017 and holds(scene, "On", "red cube", "blue cube")
    scene.restore(before)
    left = Subtask(skill="place", target="red cube", destination="blue cube", relation="left of")
    assert scene.execute(left, goal_position=(0.55, 0.0, 0.0)).done  # that is in front of it
    assert holds(scene, "LeftOf", "red cube", "blue cube")
    scene.restore(before)
    push = Subtask(skill="push", target="red cube", relation="right")
    assert scene.execute(push, goal_position=(0.51, -0.04, 0.0)).done
    assert np.linalg.norm(scene.state("red cube").position[:2] - (0.51, -0.04)) < 0.02
    scene.restore(before)
    assert scene.execute(push, goal_position=(0.6, -0.1, 0.0)).done  # that is closer
    assert holds(scene, "Moved", "red cube", "right")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("pick", "pink cube"), "there is no pink cube on this table"),
        (("pick", "blue plate"), "the blue plate is fixed to the table"),
        (("place", "red cube", "on", "white plate"), "there is no white plate on this table"),
        (("place", "red cube", "in", "blue plate"), "nothing can be put in the blue plate"),
        (("stack", "red cube", "on", "green ball"), "nothing stays on the green ball"),
        (("open", "blue plate"), "the blue plate is no drawer"),
        (("press", "button"), "there is no button on this table"),
        (("push", "green ball", "right"), "the way of the green ball is blocked"),
    ],
)
def test_refusals_change_nothing(words: tuple[str, ...], reason: str) -> None:
    things = (cube("red", 0.5, -0.1), ball("green", 0.5, 0.02), cube("white", 0.5, 0.12))
    scene = TableScene(TablePlan(objects=things, furniture=(PLATE,)))
    before = scene.state_hash()
    result = do(scene, words[0], words[1], *words[2:])
    assert result == SkillResult(done=False, reason=reason, control_steps=0)
    assert scene.state_hash() == before
    subtask = Subtask(
        skill=words[0],
        target=words[1],
        relation=words[2] if len(words) > 2 else None,
        destination=words[3] if len(words) > 3 else None,
    )
    assert scene.refusal(subtask) == reason  # the same, asked beforehand


def test_what_would_be_begun_is_told_without_a_motion() -> None:
    scene = TableScene(
        TablePlan(objects=(cube("red", 0.5, -0.1), cube("blue", 0.4, 0.1)), furniture=(PLATE,))
    )
    before = scene.state_hash()
    for subtask in (
        Subtask(skill="pick", target="red cube"),
        Subtask(skill="place", target="red cube", relation="on", destination="blue plate"),
        Subtask(skill="push", target="red cube", relation="right"),
    ):
        assert scene.refusal(subtask) is None
    from_picture = Subtask(skill="place", target="red cube")
    assert scene.refusal(from_picture) == "it is not said where to put it"
    assert scene.refusal(from_picture, goal_position=(0.45, 0.0, 0.0)) is None
    assert scene.state_hash() == before
    assert do(scene, "pick", "red cube").done
    assert scene.refusal(Subtask(skill="pick", target="blue cube")) == "the gripper holds the red cube"
    assert scene.refusal(Subtask(skill="pick", target="red cube")) is None  # done already, and no error
