"""Tasks of the table-top: what training never shows stays out of it, and every plan reaches its goal."""

import json
import math

import numpy as np
import pytest

from emuworld.envs.tabletop.drafts import HELD_OUT_TABLE_PAIRS, uses_new_composition
from emuworld.envs.tabletop.families import FAMILIES, draft
from emuworld.envs.tabletop.layout import TablePlan
from emuworld.envs.tabletop.places import HELD_OUT_LAYOUTS, LAYOUTS, NoPlaceError, Places, find_places
from emuworld.envs.tabletop.plans import Task, possible_subtasks, random_plan, sample_task, variations_of
from emuworld.envs.tabletop.predicates import Predicate
from emuworld.envs.tabletop.scene import TableScene
from emuworld.envs.tabletop.subtasks import Subtask, parse

EVERY = tuple(FAMILIES)


def pairs(task: Task) -> set[tuple[str, str]]:
    return {(one["colour"], one["kind"]) for one in task.scene["objects"]}


@pytest.mark.parametrize("family", EVERY)
def test_training_tasks_show_nothing_that_is_held_out(family: str) -> None:
    for seed in range(40):
        task = sample_task(family, "train", seed)
        assert task.variation == "seen"
        assert not pairs(task) & HELD_OUT_TABLE_PAIRS
        assert not uses_new_composition(task.oracle)
        test = sample_task(family, "test", seed, variation="seen")
        assert test.scene != task.scene, "splits must not share scenes"
        assert len(task.instructions) >= 2 and task.instruction == task.instructions[0]


@pytest.mark.parametrize("family", EVERY)
def test_a_variation_has_what_training_has_not(family: str) -> None:
    for seed in range(8):
        made = {v: sample_task(family, "test", seed, variation=v) for v in variations_of(family)}
        for variation, task in made.items():
            assert bool(pairs(task) & HELD_OUT_TABLE_PAIRS) == (variation == "pairs")
            assert uses_new_composition(task.oracle) == (variation == "composition")
            assert task.variation == variation
        if "distractors" in made:
            bystanders = [one for one in made["distractors"].goal if one.name == "NotMoved"]
            assert len(bystanders) >= 3


@pytest.mark.parametrize("family", EVERY)
def test_a_task_is_its_arguments_and_its_json(family: str) -> None:
    for seed in (0, 7, 2**40):
        task = sample_task(family, "test", seed)
        assert sample_task(family, "test", seed) == task
        assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task
        assert TablePlan.from_dict(task.scene).to_dict() == task.scene
        assert sample_task(family, "test", seed + 1) != task


@pytest.mark.parametrize("family", EVERY)
def test_goal_oracle_and_words_speak_of_things_on_the_table(family: str) -> None:
    for seed in range(20):
        task = sample_task(family, "validation", seed)
        for one in task.goal:
            assert one.args[0] in task.names
        assert set(task.aims) | {one for one in task.goal if one.name == "NotMoved"} == set(task.goal)
        assert task.aims
        for step in task.oracle:
            assert parse(str(step)) == step
            assert step.target in task.names and step.destination in (None, *task.names)
        if len(task.oracle) == 1:
            assert all(parse(text) == task.oracle[0] for text in task.instructions)


def test_only_pictures_show_the_mark() -> None:
    tasks = [sample_task("pick-place", "train", seed) for seed in range(60)]
    shown = [task for task in tasks if task.goal_in_picture]
    assert 10 < len(shown) < 35
    for task in tasks:
        marks = [one for one in task.scene["furniture"] if one["kind"] == "mark"]
        assert len(marks) == task.goal_in_picture and "mark" not in task.names
        assert not any("mark" in text for text in task.instructions)
        if task.goal_position is not None:
            assert marks[0]["position"] == pytest.approx(task.goal_position[:2])
            assert "goal in picture" in task.tags and task.oracle[0].from_picture


def footprints(places: Places) -> list[tuple[float, float, float]]:
    radius = {"plate": 0.085, "bin": 0.1, "drawer": 0.09, "button": 0.045, "mark": 0.05}
    return [(*item.position[:2], item.radius_m) for item in places.objects] + [
        (*piece.position, radius[piece.kind]) for piece in places.furniture
    ]


def placed(family: str, rng: np.random.Generator, layout: str) -> Places:
    for _ in range(50):
        try:
            return find_places(draft(family, rng), rng, layout=layout)
        except NoPlaceError:
            continue
    raise AssertionError(f"no draft of {family} fits layout {layout}")


@pytest.mark.parametrize("layout", LAYOUTS + HELD_OUT_LAYOUTS)
def test_things_stand_apart_and_within_reach(layout: str) -> None:
    rng = np.random.default_rng(3)
    for family in EVERY:
        for _ in range(5):
            circles = footprints(placed(family, rng, layout))
            for index, (x, y, radius) in enumerate(circles):
                assert 0.3 < math.hypot(x, y) < 0.75
                for other_x, other_y, other in circles[:index]:
                    assert math.hypot(x - other_x, y - other_y) > radius + other


def test_held_out_layouts_are_what_their_names_say() -> None:
    rng = np.random.default_rng(5)
    for _ in range(10):
        made = draft("buttons", rng, num_distractors=(2, 3))
        row = find_places(made, rng, layout="row").objects
        assert np.ptp([item.position[0] for item in row]) < 0.03
        arc = find_places(made, rng, layout="arc").objects
        assert np.ptp([math.hypot(*item.position[:2]) for item in arc]) < 0.01


@pytest.mark.parametrize("family", EVERY)
def test_the_oracle_reaches_the_goal_and_nothing_does_not(family: str) -> None:
    task = sample_task(family, "train", 11)
    scene = TableScene.from_dict(task.scene)
    assert not all(scene.holds(one) for one in task.aims)
    for step in task.oracle:
        result = scene.execute(step, goal_position=task.goal_position if step.from_picture else None)
        assert result.done, result.reason
    assert all(scene.holds(one) for one in task.goal)


def test_without_the_picture_a_place_in_it_is_not_found() -> None:
    task = next(t for t in (sample_task("pick-place", "test", s) for s in range(50)) if t.goal_in_picture)
    scene = TableScene.from_dict(task.scene)
    before = scene.save()
    assert not scene.execute(task.oracle[0]).done and scene.save() == before
    name_it = Subtask(skill="place", target=task.oracle[0].target, destination="mark", relation="on")
    assert not scene.execute(name_it).done and scene.save() == before


def test_random_plans_are_legal_and_fixed() -> None:
    names = ("red cube", "blue ball", "green plate", "wooden bin", "drawer", "button")
    possible = {step for steps in possible_subtasks(names).values() for step in steps}
    drawn = [step for seed in range(30) for step in random_plan(names, 3, seed=seed)]
    assert set(drawn) <= possible and len({step.skill for step in drawn}) == 7
    assert random_plan(names, 3, seed=4) == random_plan(names, 3, seed=4) != random_plan(names, 3, seed=5)
    assert all(parse(str(step)) == step for step in possible)


@pytest.mark.parametrize(
    ("family", "split", "variation", "message"),
    [
        ("juggling", "train", None, "expected one of pick-place"),
        ("buttons", "test", "composition", "expected one of seen"),
        ("stacking", "train", "pairs", "test split"),
        ("stacking", "exam", None, "split"),
    ],
)
def test_what_cannot_be_sampled_is_refused(
    family: str, split: str, variation: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample_task(family, split, 0, variation=variation)


def test_goal_predicates_are_values() -> None:
    task = sample_task("relations", "train", 0)
    assert task.aims == (
        Predicate(task.aims[0].name, (task.oracle[0].target, str(task.oracle[0].destination))),
    )
