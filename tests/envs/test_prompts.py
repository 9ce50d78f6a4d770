"""Drawn prompts: of the worlds' language, different, the same everywhere."""

import re

import numpy as np
import pytest

from emuworld.envs.captions import parse_caption
from emuworld.envs.palette import OBJECT_COLOURS, SHAPES, object_pairs
from emuworld.envs.prompts import NUM_EXAMPLES, draw_prompt, example_commands


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


@pytest.mark.parametrize("mode", ["story", "howto", "vla"])
def test_tasks_name_objects_of_training(mode: str) -> None:
    rng = np.random.default_rng(0)
    pairs = set(object_pairs("train"))
    prompts = [draw_prompt(rng, mode=mode) for _ in range(300)]
    assert len(set(prompts)) > 100
    for prompt in prompts:
        named = OBJECT.findall(prompt)
        assert named and set(named) <= pairs
        assert prompt[0].isupper() and prompt.endswith(".") and "{" not in prompt


@pytest.mark.parametrize("mode", ["t2i", "x2i", "story", "howto", "vla"])
def test_examples_are_different_and_fixed(mode: str) -> None:
    assert len(set(example_commands(mode))) == NUM_EXAMPLES
    assert example_commands(mode) == example_commands(mode)
    assert all(command.strip() for command in example_commands(mode))
