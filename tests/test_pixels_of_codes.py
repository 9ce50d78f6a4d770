"""Pictures in groups: what goes through the network together, and how it comes back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from emuworld import pictures
from emuworld.pictures import Codes
from emuworld.tokens.vision import VisionConfig, VisionTokenizer

SIZES = ((2, 2), (2, 3), (2, 2), (2, 2), (1, 1), (2, 3), (2, 2))
SMALL = VisionConfig(width=8, width_multipliers=(1, 1, 1), z_channels=8, embed_dim=8, num_codes=50)


def grids() -> list[Codes]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, SMALL.num_codes, size) for size in SIZES]


@pytest.mark.parametrize(("device", "expected"), [("cpu", [1] * 7), ("cuda", [3, 2, 1, 1])])
def test_a_gpu_makes_pictures_of_one_size_together_while_others_come(
    device: str, expected: list[int]
) -> None:
    """And each comes back in its place."""
    asked: list[int] = []
    batches: list[tuple[int, int]] = []

    def codes() -> Iterator[Codes]:
        for at, grid in enumerate(grids()):
            asked.append(at)
            yield grid

    def compute(codes_Bhw: torch.Tensor) -> torch.Tensor:
        batches.append((len(codes_Bhw), len(asked)))
        return 2 * codes_Bhw

    coming = pictures._in_groups(codes(), compute, most=lambda shape: 3, device=torch.device(device))
    assert [size for size, _ in batches] == expected
    assert batches[0][1] == (1 if device == "cpu" else 4), "the first is there before all are asked for"
    assert all(np.array_equal(one, 2 * grid) for one, grid in zip(coming.received(), grids(), strict=True))


@pytest.mark.gpu
def test_pictures_of_a_gpu_are_those_of_the_cpu() -> None:
    """Proves that copies beside the computing are complete and in order: more batches than are on their way,
    made twice, equal each time and within rounding of the CPU's."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    torch.manual_seed(0)
    vision = VisionTokenizer(SMALL).eval().requires_grad_(False)
    codes = [np.random.default_rng(i).integers(0, SMALL.num_codes, (4, 4 + i % 2)) for i in range(40)]
    expected = pictures.decode(vision, codes, device=torch.device("cpu"))
    cuda = torch.device("cuda")
    vision = vision.to(cuda)
    vision.pictures_at_once = lambda size: 3  # type: ignore[method-assign]
    first, second = (pictures.decode(vision, iter(codes), device=cuda) for _ in range(2))
    for one, again, exact in zip(first, second, expected, strict=True):
        assert np.array_equal(one, again)
        assert np.abs(one.astype(int) - exact).max() <= 2
    with pytest.raises(ValueError, match="codes must lie"):
        pictures.decode(vision, [np.full((4, 4), SMALL.num_codes)], device=cuda)
