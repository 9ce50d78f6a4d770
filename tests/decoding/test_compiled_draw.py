"""The compiled draw against the definition: the same ids, but where rounding decides."""

import numpy as np
import pytest
import torch

from emuworld.decoding import sampling
from emuworld.decoding.sampling import Truncation, pick, pick_and_rate, pick_guided


def scores(num_rows: int, num_ids: int, *, scale: float, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(num_rows, num_ids, generator=torch.Generator().manual_seed(seed))


def uniforms(num_rows: int) -> torch.Tensor:
    return torch.rand(num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("scale", [0.02, 1.0, 5.0])
@pytest.mark.parametrize("num_kinds", [1, 2, 3])
@pytest.mark.parametrize(
    "truncation", [Truncation(top_p=0.9), Truncation(temperature=0.6), Truncation(top_p=0.2)]
)
def test_draws_what_torch_draws(
    truncation: Truncation, num_kinds: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [scores(300, 777, scale=scale, seed=seed) for seed in range(num_kinds)]
    rows[0][:, 70:80] = -torch.inf
    scales = {"guidance": 2.5, "image_guidance": 1.5}
    ids_R, rates_R = pick_and_rate(rows, uniforms(300), truncation=truncation, **scales)
    monkeypatch.setattr(sampling, "_HAS_NUMBA", False)
    wanted_R, wanted_rates_R = pick_and_rate(rows, uniforms(300), truncation=truncation, **scales)
    same_R = ids_R == wanted_R
    assert same_R.double().mean() > 0.98
    torch.testing.assert_close(rates_R[same_R], wanted_rates_R[same_R], atol=1e-4, rtol=0)
    assert not ((ids_R >= 70) & (ids_R < 80)).any()


def test_line_by_hand() -> None:
    """Probabilities 0.1, 0.4, 0.4, 0.1: the line is 1, 2, 0, 3, of which top-p leaves its head."""
    four = torch.tensor([0.1, 0.4, 0.4, 0.1]).log()[None]
    for top_p, uniform, wanted in [
        (0.99, 0.0, 1), (0.99, 0.39, 1), (0.99, 0.41, 2), (0.99, 0.79, 2), (0.99, 0.81, 0), (0.99, 0.95, 3),
        (0.7, 0.0, 1), (0.7, 0.49, 1), (0.7, 0.51, 2), (0.7, 1 - 2**-53, 2), (0.3, 1 - 2**-53, 1),
    ]:  # fmt: skip
        drawn = pick(four, torch.tensor([uniform], dtype=torch.float64), truncation=Truncation(top_p=top_p))
        assert drawn.tolist() == [wanted], (top_p, uniform)


def test_equal_scores_are_drawn_in_the_order_of_ids() -> None:
    """One value that a thousand ids share, where the whole line is found in the last round."""
    flat = torch.zeros(5, 1000)
    five = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-53], dtype=torch.float64)
    drawn = pick(flat, five, truncation=Truncation(top_p=0.8))
    assert drawn.tolist() == [0, 200, 400, 600, 799]
    assert pick(flat, five, truncation=Truncation()).tolist() == [0, 250, 500, 750, 999]


@pytest.mark.parametrize("num_threads", [1, 2])
def test_a_row_is_drawn_alike_in_any_company(num_threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        rows = [scores(70, 4096, scale=3.0, seed=seed) for seed in range(2)]  # enough for threads to share
        together = pick_guided(rows, uniforms(70), truncation=Truncation(top_p=0.9), guidance=3.0)
        for row in range(70):
            one = [row_RV[row : row + 1] for row_RV in rows]
            alone = pick_guided(
                one, uniforms(70)[row : row + 1], truncation=Truncation(top_p=0.9), guidance=3.0
            )
            assert alone == together[row]
    finally:
        torch.set_num_threads(before)


def test_frequencies_are_probabilities() -> None:
    p_V = np.array([0.5, 0.05, 0.25, 0.2])
    rows = torch.from_numpy(p_V).log().float().expand(20_000, -1)
    drawn = pick(rows, uniforms(20_000), truncation=Truncation(top_p=0.9))
    wanted_V = np.array([0.5, 0.0, 0.25, 0.2]) / 0.95
    assert np.abs(np.bincount(drawn, minlength=4) / 20_000 - wanted_V).max() < 0.012
