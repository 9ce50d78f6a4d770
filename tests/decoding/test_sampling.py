"""Sampling against brute force in numpy and against the distribution it stands for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from emuworld.decoding.sampling import Sampling, Truncation, guide, pick
from emuworld.decoding.uniforms import TokenUniforms

SETTINGS = [
    Truncation(),
    Truncation(temperature=0.7),
    Truncation(top_k=3),
    Truncation(top_p=0.6),
    Truncation(temperature=1.5, top_k=6, top_p=0.8),
    Truncation(top_k=1),
    Truncation(top_p=1e-6),
]


def reference(scores: np.ndarray, truncation: Truncation) -> np.ndarray:
    """Probabilities by definition: temperature, then the k likeliest, then the likeliest that reach p."""
    scaled = scores.astype(np.float64) / truncation.temperature
    order = np.argsort(-scaled, kind="stable")
    keep = order[: truncation.top_k or len(order)]
    p = np.exp(scaled[keep] - scaled[keep].max())
    p /= p.sum()
    num = int(np.searchsorted(np.cumsum(p), truncation.top_p)) + 1 if truncation.top_p < 1 else len(keep)
    out = np.zeros(len(scores))
    out[keep[:num]] = p[:num] / p[:num].sum()
    return out


def uniforms(num: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(num))


@pytest.mark.parametrize("truncation", SETTINGS)
def test_draws_have_the_reference_distribution(truncation: Truncation) -> None:
    """Chi-square over 20,000 draws, and nothing outside the support."""
    num = 20_000
    scores = np.random.default_rng(5).normal(size=10).astype(np.float32) * 1.5
    picked = pick(torch.from_numpy(scores).expand(num, -1), uniforms(num), truncation=truncation)
    counts = np.bincount(picked.numpy(), minlength=10)
    expected = reference(scores, truncation) * num
    assert counts[expected == 0].sum() == 0
    inside = expected > 0
    chi2 = ((counts[inside] - expected[inside]) ** 2 / expected[inside]).sum()
    assert chi2 < 33.7  # 99.99 % of chi-square with at most 9 degrees of freedom


def test_inverse_distribution_function_by_hand() -> None:
    scores = torch.log(torch.tensor([[0.2, 0.5, 0.3]]))
    for uniform, expected in ((0.0, 0), (0.19, 0), (0.21, 1), (0.69, 1), (0.71, 2), (1 - 2**-53, 2)):
        assert pick(scores, torch.tensor([uniform], dtype=torch.float64), truncation=Truncation()) == expected
    # Truncated scores are drawn in order of likelihood: 0.5, 0.3 | 0.2 is cut.
    top = Truncation(top_k=2)
    for uniform, expected in ((0.0, 1), (0.62, 1), (0.63, 2), (1 - 2**-53, 2)):
        assert pick(scores, torch.tensor([uniform], dtype=torch.float64), truncation=top) == expected


@pytest.mark.parametrize("truncation", SETTINGS)
def test_what_is_forbidden_is_never_drawn(truncation: Truncation) -> None:
    scores = torch.full((1000, 50), float("-inf"))
    scores[:, [7, 20, 33]] = torch.tensor([0.0, 1.0, -3.0])
    edge = uniforms(1000)
    edge[0], edge[1] = 0.0, 1 - 2**-53
    assert set(pick(scores, edge, truncation=truncation).tolist()) <= {7, 20, 33}


def test_greedy_takes_the_likeliest() -> None:
    scores = torch.from_numpy(np.random.default_rng(0).normal(size=(64, 100)))
    greedy = Truncation(temperature=0.0, top_k=5, top_p=0.5)
    assert torch.equal(pick(scores, uniforms(64), truncation=greedy), scores.argmax(dim=-1))


@pytest.mark.parametrize("truncation", [*SETTINGS, Truncation(top_k=2000), Truncation(top_p=0.95)])
def test_a_row_does_not_depend_on_the_rows_beside_it(truncation: Truncation) -> None:
    """4,096 codes, guided: each row alone, in pairs, all together and in another order picks the same."""
    rng = np.random.default_rng(2)
    scale = rng.uniform(0.1, 6, (13, 1))
    c, u = (torch.from_numpy((rng.normal(size=(13, 4096)) * scale).astype(np.float32)) for _ in range(2))
    draws = uniforms(13)

    def picked(rows: list[int]) -> list[int]:
        return pick(guide(c[rows], u[rows], guidance=3.0), draws[rows], truncation=truncation).tolist()

    everything = list(range(13))
    together = picked(everything)
    assert [picked([i])[0] for i in everything] == together
    assert picked(everything[::-1])[::-1] == together
    assert picked([4, 9]) == [together[4], together[9]]
    alone = guide(c[3:4], u[3:4], guidance=3.0)
    assert torch.equal(alone[0], guide(c, u, guidance=3.0)[3])


@pytest.mark.parametrize("num_ids", [300, 5000])
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 8.0])
def test_many_rows_draw_what_each_draws_alone(scale: float, num_ids: int) -> None:
    """Few ids hold the mass, or nearly all, or equal ones: however many are sorted, the draw is the same."""
    generator = torch.Generator().manual_seed(int(10 * scale) + num_ids)
    scores = scale * torch.randn(64, num_ids, generator=generator)
    scores[::2] = scores[::2].round()  # many are equal
    scores[:, 5] = -torch.inf
    uniforms = torch.rand(64, dtype=torch.float64, generator=generator)
    for truncation in (Truncation(top_p=0.9), Truncation(temperature=0.5, top_p=0.3)):
        together = pick(scores, uniforms, truncation=truncation)
        alone = [int(pick(scores[i : i + 1], uniforms[i : i + 1], truncation=truncation)) for i in range(64)]
        assert together.tolist() == alone


def test_guidance_by_hand() -> None:
    c, u = torch.log(torch.tensor([[0.6, 0.4]])), torch.log(torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(guide(c + 3, u - 1, guidance=1.0), c)
    torch.testing.assert_close(guide(c, u, guidance=0.0), u)
    expected = torch.log(torch.tensor([[0.5 * (0.6 / 0.5) ** 3, 0.5 * (0.4 / 0.5) ** 3]]))
    torch.testing.assert_close(guide(c, u, guidance=3.0), expected)


def test_three_way_guidance_by_hand() -> None:
    """softmax(b + a (u - b) + g (c - u)) = b (u / b) ** a (c / u) ** g, normalised."""
    c, u, b = ([0.6, 0.3, 0.1], [0.5, 0.2, 0.3], [0.25, 0.25, 0.5])
    rows = [torch.log(torch.tensor([p])) for p in (c, u, b)]
    blended = guide(rows[0] + 3, rows[1] - 1, rows[2] + 7, guidance=3.0, image_guidance=1.5)
    expected = [pb * (pu / pb) ** 1.5 * (pc / pu) ** 3 for pc, pu, pb in zip(c, u, b, strict=True)]
    torch.testing.assert_close(blended.exp(), torch.tensor([expected]))
    two = guide(rows[0], rows[1], guidance=3.0)
    torch.testing.assert_close(guide(*rows, guidance=3.0), two)  # a = 1: the blind row cancels
    torch.testing.assert_close(guide(*rows, guidance=0.0, image_guidance=0.0), rows[2])
    # Equal unguided rows, as without reference pictures: to the bit the form with two.
    assert torch.equal(guide(rows[0], rows[1], rows[1], guidance=3.0, image_guidance=1.5), two)


@pytest.mark.parametrize(
    ("guidance", "image_guidance", "rows_with", "rows_without"),
    [(1.0, 1.0, 1, 1), (3.0, 1.0, 2, 2), (3.0, 1.5, 3, 2), (1.0, 1.5, 3, 1), (0.0, 0.0, 3, 2)],
)
def test_rows_of_each_form(guidance: float, image_guidance: float, rows_with: int, rows_without: int) -> None:
    sampling = Sampling(guidance=guidance, image_guidance=image_guidance)
    assert sampling.num_rows(has_references=True) == rows_with
    assert sampling.num_rows(has_references=False) == rows_without
    assert sampling.guided == (rows_with > 1)


def test_settings_round_trip_and_refuse_nonsense() -> None:
    sampling = Sampling(
        text=Truncation(top_p=0.9),
        image=Truncation(top_k=5120),
        guidance=3.0,
        image_guidance=1.5,
        max_new_tokens=5120,
    )
    assert Sampling.from_json(json.loads(json.dumps(sampling.to_json()))) == sampling
    assert Sampling.from_json({}) == Sampling()
    assert sampling.guided
    assert not Sampling().guided
    for wrong in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match="must"):
            Truncation(**wrong)
    for wrong in ({"guidance": float("inf")}, {"image_guidance": -1.0}, {"max_new_tokens": 0}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must"):
            Sampling(**wrong)
    with pytest.raises(ValueError, match="known are text and image"):
        Sampling.from_json({"text": {"topk": 3}})


def test_uniforms_are_what_philox_says() -> None:
    """Golden values, so that worlds stay the same over versions of numpy and of this file."""
    numbers = TokenUniforms(seed=7, step=3)
    golden = [
        numbers.text(0),
        numbers.text(511),
        numbers.text(512),
        numbers.image(0, 0),
        numbers.image(1, 271),
    ]
    assert golden == [
        0.4821286018761155,
        0.10850134656572852,
        0.539968801866396,
        0.8905560502271676,
        0.1691335425361663,
    ]


def test_uniforms_differ_by_key_stream_and_position_and_are_uniform() -> None:
    drawn = [
        getattr(TokenUniforms(seed=seed, step=step), stream)(*index, position)
        for seed in (0, 1, 2**64 - 1)
        for step in (0, 1)
        for stream, index in (("text", ()), ("image", (0,)), ("image", (1,)))
        for position in range(600)
    ]
    assert len(set(drawn)) == len(drawn)
    assert 0 <= min(drawn) <= max(drawn) < 1
    ranks = np.sort(drawn)
    distance = np.abs(ranks - (np.arange(len(ranks)) + 0.5) / len(ranks)).max()
    assert distance < 1.95 / np.sqrt(len(ranks))  # Kolmogorov-Smirnov, 99.9 %


def test_uniforms_refuse_keys_out_of_range() -> None:
    with pytest.raises(ValueError, match="seed"):
        TokenUniforms(seed=-1, step=0)
    with pytest.raises(ValueError, match="step"):
        TokenUniforms(seed=0, step=2**64)
