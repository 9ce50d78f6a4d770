"""Drawn prompts: of the worlds' language, different, the same everywhere."""

import numpy as np
import pytest

from emuworld.envs.captions import parse_caption
from emuworld.envs.palette import object_pairs
from emuworld.envs.prompts import NUM_EXAMPLES, draw_prompt, example_prompts


@pytest.mark.parametrize("mode", ["explore", "t2i"])
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


def test_examples_are_different_and_fixed() -> None:
    assert len(set(example_prompts("t2i"))) == NUM_EXAMPLES
    assert example_prompts("t2i") == example_prompts("t2i")
