"""Paths from noise to codes: their shares at a time, and that steps lead from one time to the next."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from emuworld.decoding.noise import MetricPath, MixturePath, Noise, make_path, noisy_ids
from emuworld.decoding.uniforms import TokenUniforms
from emuworld.tokens.vocabulary import builtin

NUM_CODES = 16
MANY = 40_000


def codebook() -> torch.Tensor:
    return torch.randn(NUM_CODES, 6, generator=torch.Generator().manual_seed(0))


def uniforms(draw: int, count: int = MANY) -> torch.Tensor:
    return torch.from_numpy(TokenUniforms(seed=7, step=0).grid(0, draw, count))


def shares(codes: torch.Tensor) -> torch.Tensor:
    return torch.bincount(codes, minlength=NUM_CODES).double() / len(codes)


def metric_shares(clean: int, beta: float) -> torch.Tensor:
    """The definition, one code after the other."""
    vectors = codebook().double()
    vectors /= vectors.norm(dim=1, keepdim=True)
    distances = [(vectors[x] - vectors[clean]).square().sum() for x in range(NUM_CODES)]
    return torch.softmax(-beta * torch.stack(distances), dim=0)


def test_mixture_keeps_its_share_and_steps_between_times() -> None:
    path = MixturePath(NUM_CODES)
    clean = torch.full((MANY,), 3)
    at = path.corrupt(clean, torch.full((MANY,), 0.3), kept_N=uniforms(0), drawn_N=uniforms(1))
    expected = torch.full((NUM_CODES,), 0.7 / NUM_CODES, dtype=torch.float64)
    expected[3] += 0.3
    torch.testing.assert_close(shares(at), expected, rtol=0, atol=0.01)
    later = path.step(at, clean, now=0.3, then=0.8, kept_N=uniforms(2), drawn_N=uniforms(3))
    expected = torch.full((NUM_CODES,), 0.2 / NUM_CODES, dtype=torch.float64)
    expected[3] += 0.8
    torch.testing.assert_close(shares(later), expected, rtol=0, atol=0.01)
    assert torch.equal(
        path.step(at, clean, now=0.3, then=1.0, kept_N=uniforms(2), drawn_N=uniforms(3)), clean
    )


@pytest.mark.parametrize("time", [0.0, 0.4, 0.8])
def test_metric_shares_are_the_softmax_of_distances(time: float) -> None:
    noise = Noise(path="metric")
    path = make_path(noise, codebook_KE=codebook())
    clean = torch.full((MANY,), 5)
    times = torch.full((MANY,), time)
    at = path.corrupt(clean, times, kept_N=uniforms(0), drawn_N=uniforms(1))
    beta = noise.scale * (time / (1 - time)) ** noise.exponent
    torch.testing.assert_close(shares(at), metric_shares(5, beta), rtol=0, atol=0.01)


def test_small_metric_steps_lead_to_the_shares_of_the_last_time() -> None:
    noise = Noise(path="metric", exponent=1.0, scale=2.0)
    path = MetricPath(codebook(), exponent=noise.exponent, scale=noise.scale)
    count = 8_000
    clean = torch.full((count,), 5)
    codes = path.corrupt(clean, torch.zeros(count), kept_N=uniforms(0, count), drawn_N=uniforms(1, count))
    times = torch.linspace(0.0, 0.5, 51).tolist()
    for number, (now, then) in enumerate(itertools.pairwise(times)):
        kept, drawn = (uniforms(2 + 2 * number + k, count) for k in range(2))
        codes = path.step(codes, clean, now=now, then=then, kept_N=kept, drawn_N=drawn)
    beta = noise.scale * 0.5 / 0.5
    torch.testing.assert_close(shares(codes), metric_shares(5, beta), rtol=0, atol=0.03)
    assert torch.equal(path.step(codes, clean, now=0.5, then=1.0, kept_N=kept, drawn_N=drawn), clean)


def test_what_is_masked_is_not_there_until_it_comes_and_stays() -> None:
    path = make_path(Noise(path="masked"), codebook_KE=codebook())
    clean = torch.full((MANY,), 3)
    assert (path.start(lambda: uniforms(0), like=clean) == NUM_CODES).all()
    at = path.corrupt(clean, torch.full((MANY,), 0.3), kept_N=uniforms(0), drawn_N=uniforms(1))
    assert set(at.unique().tolist()) == {3, NUM_CODES}
    assert float((at == 3).double().mean()) == pytest.approx(0.3, abs=0.01)
    later = path.step(at, torch.full_like(at, 5), now=0.3, then=0.8, kept_N=uniforms(2), drawn_N=uniforms(3))
    assert torch.equal(later == 3, at == 3)
    assert float((later == NUM_CODES).double().mean()) == pytest.approx(0.2, abs=0.01)
    vocabulary = builtin(num_text_tokens=300, num_visual_tokens=NUM_CODES)
    assert noisy_ids(torch.tensor([0, NUM_CODES]), vocabulary).tolist() == [
        vocabulary.visual_start,
        vocabulary.pad,
    ]


@pytest.mark.parametrize("name", ["mixture", "metric", "masked"])
def test_at_time_one_nothing_is_corrupted(name: str) -> None:
    path = make_path(Noise(path=name), codebook_KE=codebook())
    clean = torch.arange(NUM_CODES)
    drawn = uniforms(0, NUM_CODES)
    assert torch.equal(path.corrupt(clean, torch.ones(NUM_CODES), kept_N=drawn, drawn_N=drawn), clean)


def test_the_shift_moves_times_towards_the_noise() -> None:
    grid = Noise(shift=3.0).grid(4)
    assert grid[0] == 0.0 and grid[-1] == 1.0
    np.testing.assert_allclose(grid[1:-1], [1 / 10, 1 / 4, 1 / 2])
    np.testing.assert_allclose(Noise().grid(4), [0, 0.25, 0.5, 0.75, 1])
    assert Noise.from_json(Noise(shift=3.0).to_json()) == Noise(shift=3.0)
    with pytest.raises(ValueError, match="known are path"):
        Noise.from_json({"speed": 1})


def test_grids_of_numbers_are_streams_of_their_own() -> None:
    """Of each image and draw; beginnings of one another; none of those that are drawn token by token."""
    world = TokenUniforms(seed=3, step=2)
    first = world.grid(0, 0, 600)
    np.testing.assert_array_equal(world.grid(0, 0, 100), first[:100])
    seen = [
        first,
        world.grid(0, 1, 600),
        world.grid(1, 0, 600),
        TokenUniforms(seed=3, step=3).grid(0, 0, 600),
    ]
    seen.append(np.array([world.image(0, position) for position in range(600)]))
    for i, one in enumerate(seen):
        assert one.min() >= 0.0 and one.max() < 1.0 and abs(one.mean() - 0.5) < 0.05
        for other in seen[:i]:
            assert not np.intersect1d(one, other).size
