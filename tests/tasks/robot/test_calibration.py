"""Calibration against gains, offsets and shifts that were put in by hand."""

import numpy as np
import pytest

from emuworld.tasks.robot.calibration import calibrate, shifted, undo

RNG = np.random.default_rng(5)


def scene() -> np.ndarray:
    """Smooth ground with some boxes, so that there are edges in both directions."""
    rows, columns = np.indices((96, 128))
    picture = np.stack([80 + 0.5 * rows, 100 + 0.3 * columns, 90 + 0.2 * (rows + columns)], axis=2)
    for _ in range(12):
        top, left = RNG.integers(8, 70), RNG.integers(8, 100)
        picture[top : top + 14, left : left + 18] = RNG.integers(20, 200, 3)
    return picture.astype(np.uint8)


SCENE = scene()


def test_equal_pictures_need_nothing() -> None:
    found = calibrate(SCENE, SCENE)
    assert found.shift_px == (0.0, 0.0) and found.residual < 0.01
    assert np.allclose(found.gain, 1.0, atol=1e-3) and found.photometric < 0.1
    assert np.array_equal(undo(SCENE, found), SCENE)


def test_gain_and_offset_by_channel() -> None:
    gain, offset = np.array([1.2, 0.8, 0.6]), np.array([3.0, 10.0, -4.0])
    picture = np.clip(SCENE * gain + offset, 0, 255).astype(np.uint8)
    found = calibrate(picture, SCENE)
    assert np.allclose(found.gain, gain, atol=0.02) and np.allclose(found.offset, offset, atol=2.0)
    assert np.abs(undo(picture, found).astype(int) - SCENE).mean() < 1.0
    expected = np.abs(gain * 128 + offset - 128).mean()
    assert found.photometric == pytest.approx(expected, abs=2.0)


@pytest.mark.parametrize("shift", [(3, 0), (0, -4), (-2, 5)])
def test_whole_shifts(shift: tuple[int, int]) -> None:
    picture = np.roll(SCENE, shift, axis=(0, 1))
    found = calibrate(picture, SCENE)
    assert found.shift_px == pytest.approx(shift, abs=0.15)
    inner = (slice(8, -8), slice(8, -8))
    assert np.abs(undo(picture, found).astype(int) - SCENE)[inner].mean() < 1.5


def test_part_of_a_pixel() -> None:
    picture = np.round(shifted(SCENE, (0.0, -1.5))).astype(np.uint8)  # content moves right
    down, right = calibrate(picture, SCENE).shift_px
    assert abs(down) < 0.2 and right == pytest.approx(1.5, abs=0.3)


def test_a_moved_thing_does_not_pull() -> None:
    picture = np.clip(SCENE * 1.15, 0, 255).astype(np.uint8)
    picture[20:50, 30:70] = (250, 10, 10)
    found = calibrate(picture, SCENE)
    assert np.allclose(found.gain, 1.15, atol=0.03) and found.camera_px == 0.0


def test_all_together_with_noise() -> None:
    noise = np.random.default_rng(1).normal(0, 8, SCENE.shape)
    picture = np.clip(np.roll(SCENE, (2, -3), axis=(0, 1)) * 0.8 + noise, 0, 255).astype(np.uint8)
    found = calibrate(picture, SCENE)
    assert found.shift_px == pytest.approx((2, -3), abs=0.3)
    assert np.allclose(found.gain, 0.8, atol=0.04)
    assert 3.0 < found.residual < 15.0


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="resize"):
        calibrate(SCENE[:-1], SCENE)
