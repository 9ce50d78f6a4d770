"""Where a task was lost and whose fault it is, on failures that are known because they were made."""

from collections.abc import Sequence

import pytest

from emuworld.envs.tabletop.plans import Task
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.subtasks import Subtask
from emuworld.tasks.robot.blame import Failure, Tried, effect_of, first_failure, still_to_do
from emuworld.tasks.robot.suite import load_suite

TASKS = load_suite()


def task_of(family: str, tag: str = "") -> Task:
    return next(task for task in TASKS if task.family == family and (not tag or tag in task.tags))


def follow(
    task: Task, scene: TableScene, steps: Sequence[Subtask], *, places: Sequence[Sequence[float]] = ()
) -> list[Tried]:
    """Carry out a plan and note it; `places` where the steps' pictures have things."""
    tried = []
    for index, step in enumerate(steps):
        place = places[index] if index < len(places) else None
        scene.execute(step, goal_position=place)
        tried.append(Tried(subtask=step, place=place, state=scene.save()))
    return tried


def blamed(task: Task, steps: Sequence[Subtask], *, places: Sequence[Sequence[float]] = ()) -> Failure | None:
    scene = TableScene.from_dict(task.scene)
    start = scene.save()
    return first_failure(task, scene, start, follow(task, scene, steps, places=places))


def test_a_plan_that_stops_short() -> None:
    task = task_of("open-put-close")
    assert blamed(task, ()) == Failure(step=0, blame="plan")
    assert blamed(task, task.oracle[:1]) == Failure(step=1, blame="plan")


def test_what_is_left_to_do() -> None:
    task = task_of("open-put-close")
    scene = TableScene.from_dict(task.scene)
    for done in range(3):
        assert still_to_do(task, scene) == task.oracle[done:]
        scene.execute(task.oracle[done])
    assert still_to_do(task, scene) == ()


def test_a_plan_that_moves_a_bystander() -> None:
    task = next(t for t in TASKS if t.family == "holders" and any(g.name == "NotMoved" for g in t.goal))
    guard = next(one for one in task.goal if one.name == "NotMoved")
    wrong = Subtask(
        skill="place",
        target=guard.args[0],
        destination=task.oracle[0].destination,
        relation=task.oracle[0].relation,
    )
    assert blamed(task, (*task.oracle, wrong)) == Failure(step=1, blame="plan")


def test_an_execution_that_throws_a_bystander_over() -> None:
    task = next(t for t in TASKS if t.family == "holders" and any(g.name == "NotMoved" for g in t.goal))
    guard = next(one for one in task.goal if one.name == "NotMoved")
    scene = TableScene.from_dict(task.scene)
    start = scene.save()
    (tried,) = follow(task, scene, task.oracle)
    x, y, z = scene.state(guard.args[0]).position
    scene.place_object(guard.args[0], (x + 0.03, y, z))
    spoiled = Tried(subtask=tried.subtask, place=None, state=scene.save())
    assert first_failure(task, scene, start, [spoiled]) == Failure(step=0, blame="execution")


def test_a_plan_in_the_wrong_order() -> None:
    """The top of a tower put on its middle before that is where it belongs."""
    task = task_of("stacking", "tower of three")
    failure = blamed(task, task.oracle[1:])
    assert failure is not None and failure.blame == "plan"


@pytest.mark.parametrize("has_place", [False, True])
def test_a_picture_that_shows_no_place_or_another(has_place: bool) -> None:
    task = task_of("pick-place", "goal in picture")
    assert task.goal_position is not None
    x, y, z = task.goal_position
    step = task.oracle[0]
    effect = effect_of(task, step)
    assert effect is not None and effect.name == "At"
    places = [(x, y - 0.08 if y > 0 else y + 0.08, z)] if has_place else []
    failure = blamed(task, (step,), places=places)
    assert failure is not None and failure.blame == "plan"
