"""Drawn prompts: of the worlds' language, different, the same everywhere."""

import re

import numpy as np
import pytest

from emuworld.envs.episodes import generate_episode
from emuworld.envs.palette import OBJECT_COLOURS, SHAPES, object_pairs
from emuworld.envs.prompts import NUM_EXAMPLES, draw_prompt, example_commands
from emuworld.envs.render import make_renderer
from emuworld.envs.rooms.captions import parse_caption
from emuworld.envs.rooms.edit_words import PHRASINGS
from emuworld.envs.tabletop.edit_words import TABLE_PHRASINGS
from emuworld.envs.tabletop.subtasks import MOVABLE_KINDS, SKILLS, parse


@pytest.mark.parametrize("mode", ["explore", "t2i", "x2i"])
def test_prompts_are_of_the_worlds_language(mode: str) -> None:
    rng = np.random.default_rng(0)
    pairs = set(object_pairs("train"))
    for _ in range(300):
        named = parse_caption(draw_prompt(rng, mode=mode))
        assert named is not None
        assert set(named) <= pairs


def test_equal_generators_draw_equal_prompts() -> None:
    first, second = (draw_prompt(np.random.default_rng(7), mode="t2i") for _ in range(2))
    assert first == second


OBJECT = re.compile(rf"({'|'.join(OBJECT_COLOURS)}) ({'|'.join(SHAPES)})")
THING = re.compile(rf"({'|'.join(OBJECT_COLOURS)}) ({'|'.join(MOVABLE_KINDS)})")


@pytest.mark.parametrize("mode, thing", [("story", OBJECT), ("howto", THING), ("vla", THING)])
def test_tasks_name_objects_of_training(mode: str, thing: re.Pattern[str]) -> None:
    rng = np.random.default_rng(0)
    pairs = set(object_pairs("train")) | {
        (colour, "cube") for colour, shape in object_pairs("train") if shape == "box"
    }
    prompts = [draw_prompt(rng, mode=mode) for _ in range(300)]
    assert len(set(prompts)) > 100
    for prompt in prompts:
        named = thing.findall(prompt)
        assert named and set(named) <= pairs
        assert prompt[0].isupper() and prompt.endswith(".") and "{" not in prompt


def test_the_arm_understands_every_example() -> None:
    subtasks = [parse(command) for command in example_commands("vla")]
    assert all(subtask is not None for subtask in subtasks)
    assert {subtask.skill for subtask in subtasks if subtask} == set(SKILLS)


@pytest.mark.parametrize("mode", ["t2i", "x2i", "story", "howto", "vla"])
def test_examples_are_different_and_fixed(mode: str) -> None:
    assert len(set(example_commands(mode))) == NUM_EXAMPLES
    assert example_commands(mode) == example_commands(mode)
    assert all(command.strip() for command in example_commands(mode))


def test_instructions_to_edit_are_worded_as_in_training() -> None:
    """In rooms and, but for the walls, on table-tops."""
    templates = {
        template
        for one in (*PHRASINGS.values(), *TABLE_PHRASINGS.values())
        for template in one.of_split("train")
    }
    known = [re.compile(re.sub(r"\\{\w+\\}", "[a-z ]+", re.escape(template))) for template in templates]
    held_out = {
        template for one in (*PHRASINGS.values(), *TABLE_PHRASINGS.values()) for template in one.held_out
    }
    assert not templates & held_out
    for command in example_commands("x2i"):
        assert any(pattern.fullmatch(command) for pattern in known), command


def test_published_questions_are_part_of_training() -> None:
    """In the words that `emuworld.questions` gives them, about as often as PUBLISHED_SHARE says."""
    renderer = make_renderer("rays")
    asked = [
        generate_episode("train", seed, num_frames=1, renderer=renderer, size=16).question
        for seed in range(24)
    ]
    published = [one for one in asked if one.startswith("Under my instructions to explore a")]
    assert 1 <= len(published) <= 8 and all(one.endswith("in first-person view.") for one in published)
    assert not any("xplore explore" in one for one in published)
