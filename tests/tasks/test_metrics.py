"""Figures against hand-computed values and constructed geometry."""

from dataclasses import dataclass

import numpy as np
import pytest

from emuworld.tasks import metrics


@dataclass(frozen=True, kw_only=True)
class _Camera:
    position: np.ndarray
    rotation: np.ndarray
    fovy_rad: float


def _grey(value: int, *, size: int = 32) -> np.ndarray:
    return np.full((size, size, 3), value, dtype=np.uint8)


def _facing(direction_xy: tuple[float, float], *, position: tuple[float, float, float]) -> _Camera:
    """A level camera that looks along a horizontal direction: columns x right, y up, z backward."""
    forward = np.array([*direction_xy, 0.0]) / np.hypot(*direction_xy)
    up = np.array([0.0, 0.0, 1.0])
    rotation = np.stack([np.cross(forward, up), up, -forward], axis=1)
    return _Camera(position=np.array(position), rotation=rotation, fovy_rad=np.pi / 2)


def test_psnr_of_a_constant_difference_is_the_textbook_value() -> None:
    assert metrics.psnr(_grey(100), _grey(110)) == pytest.approx(20 * np.log10(255 / 10))


def test_equal_frames_count_as_the_rounding_error_of_eight_bits() -> None:
    assert metrics.psnr(_grey(7), _grey(7)) == pytest.approx(10 * np.log10(12 * 255**2))


def test_masked_psnr_reads_only_the_masked_pixels() -> None:
    frame, mask = _grey(100), np.zeros((32, 32), dtype=bool)
    mask[:16] = True
    frame[16:] = 0
    assert metrics.psnr(frame, _grey(110), mask=mask) == pytest.approx(20 * np.log10(255 / 10))


def test_an_almost_empty_mask_gives_nan_not_a_number() -> None:
    mask = np.zeros((32, 32), dtype=bool)
    mask[0, :5] = True
    assert np.isnan(metrics.psnr(_grey(1), _grey(2), mask=mask))
    assert np.isnan(metrics.ssim(_grey(1), _grey(2), mask=mask))


def test_ssim_of_two_flat_frames_is_the_luminance_term() -> None:
    c1 = (0.01 * 255) ** 2
    expected = (2 * 50 * 100 + c1) / (50**2 + 100**2 + c1)
    assert metrics.ssim(_grey(50), _grey(100)) == pytest.approx(expected, abs=1e-4)


def test_ssim_of_a_frame_with_itself_is_one_and_with_its_negative_is_below_zero() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    assert metrics.ssim(noise, noise) == pytest.approx(1.0, abs=1e-5)
    assert metrics.ssim(noise, 255 - noise) < -0.5


def test_ssim_at_one_pixel_equals_the_direct_sum_over_its_window() -> None:
    rng = np.random.default_rng(1)
    x, y = (rng.integers(0, 256, (11, 11, 3), dtype=np.uint8) for _ in range(2))
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(taps, taps) / np.outer(taps, taps).sum()
    expected = []
    for channel in range(3):
        a, b = x[..., channel].astype(float), y[..., channel].astype(float)
        mean_a, mean_b = (window * a).sum(), (window * b).sum()
        var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
        cov = (window * (a - mean_a) * (b - mean_b)).sum()
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
        expected.append(top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    assert metrics.ssim_map(x, y)[5, 5] == pytest.approx(np.mean(expected), abs=1e-4)


def test_frames_of_different_size_are_refused() -> None:
    with pytest.raises(ValueError, match="same height and width"):
        metrics.psnr(_grey(0, size=32), _grey(0, size=16))


def test_unproject_and_project_are_each_others_inverse() -> None:
    camera = _facing((1.0, 0.5), position=(0.3, -2.0, 1.1))
    depth = np.random.default_rng(2).uniform(0.5, 5.0, (9, 12))
    row, column, distance = metrics.project(metrics.unproject(depth, camera), camera, height=9, width=12)
    np.testing.assert_allclose(row, np.broadcast_to(np.arange(9)[:, None], (9, 12)), atol=1e-9)
    np.testing.assert_allclose(column, np.broadcast_to(np.arange(12), (9, 12)), atol=1e-9)
    np.testing.assert_allclose(distance, depth)


def test_the_pixel_in_the_middle_lies_straight_ahead() -> None:
    camera = _facing((0.0, 1.0), position=(1.0, 2.0, 0.5))
    points = metrics.unproject(np.full((5, 5), 3.0), camera)
    np.testing.assert_allclose(points[2, 2], [1.0, 5.0, 0.5], atol=1e-12)
    np.testing.assert_allclose(
        points[0, 2] - points[2, 2], [0.0, 0.0, 3.0 * 0.8], atol=1e-12
    )  # up in the frame is up


def _wall_depth(camera: _Camera, *, wall_y_m: float, size: int = 32) -> np.ndarray:
    """Depth of an endless wall at y = wall_y_m: the ray's length along the optical axis, inf where it never
    meets.
    """
    rays = metrics.unproject(np.ones((size, size)), camera) - camera.position
    with np.errstate(divide="ignore"):
        depth = (wall_y_m - camera.position[1]) / rays[..., 1]
    return np.where(depth > 0, depth, np.inf)


def test_a_turn_of_half_the_field_of_view_leaves_half_a_wall_seen() -> None:
    ahead = _facing((0.0, 1.0), position=(0.0, 0.0, 1.0))  # 90 degrees of view
    turned = _facing((1.0, 1.0), position=(0.0, 0.0, 1.0))  # 45 degrees to the right
    mask = metrics.seen_before_mask(
        _wall_depth(turned, wall_y_m=2.0), turned, [(_wall_depth(ahead, wall_y_m=2.0), ahead)]
    )
    assert mask[16, :15].all(), "what was to the right of the old centre is in the left half now"
    assert not mask[:, 17:].any(), "the right half was outside the old view"


def test_points_hidden_behind_something_before_do_not_count_as_seen() -> None:
    camera = _facing((0.0, 1.0), position=(0.0, 0.0, 1.0))
    wall, blocked = _wall_depth(camera, wall_y_m=4.0), _wall_depth(camera, wall_y_m=4.0)
    blocked[:, :16] = 1.0  # a screen stood before the left half
    mask = metrics.seen_before_mask(wall, camera, [(blocked, camera)])
    assert not mask[:, :15].any()
    assert mask[:, 17:].all()


def test_seen_in_any_earlier_frame_is_enough_and_the_void_is_never_seen() -> None:
    camera = _facing((0.0, 1.0), position=(0.0, 0.0, 1.0))
    wall = _wall_depth(camera, wall_y_m=4.0)
    left, right = wall.copy(), wall.copy()
    left[:, :16], right[:, 16:] = np.inf, np.inf
    assert metrics.seen_before_mask(wall, camera, [(left, camera), (right, camera)]).all()
    void = np.full((32, 32), np.inf)
    assert not metrics.seen_before_mask(void, camera, [(void, camera)]).any()


def test_counterfactual_retrieval_counts_the_branches_that_land_nearest_home() -> None:
    true = [_grey(value) for value in (0, 80, 160, 240)]
    assert metrics.counterfactual_retrieval([_grey(v) for v in (5, 85, 150, 230)], true) == 1.0
    assert metrics.counterfactual_retrieval([_grey(v) for v in (85, 5, 150, 230)], true) == 0.5
    assert metrics.counterfactual_retrieval([_grey(80)] * 4, true) == 0.25


def test_two_equal_true_frames_make_a_miss_not_a_lucky_hit() -> None:
    assert metrics.counterfactual_retrieval([_grey(0)] * 2, [_grey(0)] * 2) == 0.0


def test_shuffle_gap_is_the_difference_in_db() -> None:
    gap = metrics.shuffle_gap_db([_grey(101)], [_grey(110)], [_grey(100)])
    assert gap[0] == pytest.approx(20.0)


def test_wilson_interval_matches_the_published_example() -> None:
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662 with the score method; 0 of 20 gives 0 to
    # 0.1611.
    known = metrics.wilson(81, 263)
    assert (known.low, known.high) == (pytest.approx(0.2553, abs=1e-4), pytest.approx(0.3662, abs=1e-4))
    none = metrics.wilson(0, 20)
    assert (none.low, none.high) == (0.0, pytest.approx(0.1611, abs=1e-4))


def test_bootstrap_covers_the_normal_interval_and_repeats_itself() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    estimate = metrics.bootstrap(values, seed=1)
    assert estimate.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.05)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.05)
    assert metrics.bootstrap(values, seed=1) == estimate


def test_bootstrap_skips_unknown_values_and_weighs_clusters() -> None:
    assert metrics.bootstrap([1.0, np.nan, 3.0]).value == 2.0
    assert metrics.bootstrap([2.0, 0.0], weights=[4.0, 0.0]).value == 0.5
    assert metrics.bootstrap([]).count == 0


def test_by_step_estimates_each_column_and_survives_json() -> None:
    estimates = metrics.by_step([[1.0, None], [3.0, 5.0]])
    assert [e.value for e in estimates] == [2.0, 5.0]
    assert metrics.Estimate.from_dict(estimates[0].as_dict()) == estimates[0]
    assert metrics.bootstrap([]).as_dict()["value"] is None
