"""The judge: its bookkeeping by hand-made tables, its learning on drawn squares and discs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from emuworld.envs.palette import SHAPES
from emuworld.tasks import detector as judge
from emuworld.tasks import detector_training as training
from emuworld.tasks.table_views import make_table_views
from emuworld.tasks.truth import COLOUR_NAMES, DETECTED_SHAPES, Labels, Request

CONFIG = judge.DetectorConfig(colours=("red", "blue"), shapes=("ball", "box"), width=16, dilations=(1, 2))
RGB = {0: (220, 30, 30), 1: (30, 30, 220)}


def _drawn(count: int, *, seed: int, size: int = 64) -> tuple[np.ndarray, Labels]:
    """Grey frames with one plain disc or striped square of one colour each, and their labels."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(110, 140, (count, size, size, 3), dtype=np.uint8)
    shapes, colours = (np.zeros((count, size, size), np.uint8) for _ in range(2))
    row, column = np.indices((size, size))
    for index in range(count):
        shape, colour, radius = rng.integers(2), rng.integers(2), rng.integers(9, 14)
        y, x = rng.integers(14, size - 14, 2)
        ball = (row - y) ** 2 + (column - x) ** 2 <= radius**2
        box = (abs(row - y) <= radius * 0.88) & (abs(column - x) <= radius * 0.88)
        mask = ball if shape == 0 else box
        frames[index][mask] = RGB[int(colour)]
        if shape == 1:
            frames[index][mask & (row % 4 < 2)] //= 3  # stripes: a shape that is told in few steps
        shapes[index][mask], colours[index][mask] = 1 + shape, colour
    return frames, Labels(shapes=shapes[:, 2::4, 2::4], colours=colours[:, 2::4, 2::4])


def test_the_full_detector_is_small_and_its_file_smaller_still(tmp_path: Path) -> None:
    torch.manual_seed(0)  # of the weights, whose rounding moves a cell across a threshold now and then
    detector = judge.Detector(judge.DetectorConfig())
    assert sum(p.numel() for p in detector.parameters()) <= 500_000
    detector.save(tmp_path / "d.safetensors", notes={"errors": {}})
    assert (tmp_path / "d.safetensors").stat().st_size < 1_000_000
    loaded = judge.Detector.load(tmp_path / "d.safetensors")
    assert loaded.config == detector.config
    frame = np.random.default_rng(0).integers(0, 256, (1, 256, 256, 3), dtype=np.uint8)
    np.testing.assert_allclose(loaded.shares(frame), detector.eval().shares(frame), atol=2e-3)


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stage=detector"):
        judge.Detector.load(tmp_path / "none.safetensors")


def test_true_shares_count_cells() -> None:
    shapes = np.zeros((1, 4, 4), np.uint8)
    colours = np.zeros((1, 4, 4), np.uint8)
    shapes[0, :2, 0], colours[0, :2, 0] = 2, 1  # two cells of blue box
    shapes[0, 3, :] = 1  # four of red ball
    table = judge.true_shares(Labels(shapes=shapes, colours=colours), config=CONFIG)
    np.testing.assert_allclose(table[0], [[4 / 16, 0], [0, 2 / 16]])
    assert judge.pairs_of(table[0], config=CONFIG, at_least=0.2) == {("red", "ball")}


def test_patches_are_what_hangs_together_in_one_colour() -> None:
    kind = torch.full((2, 5, 6), -1)
    kind[0, 0, :4], kind[0, 1:4, 0] = 0, 0  # an angle of colour 0
    kind[0, 1, 1] = 1  # colour 1 touches it
    kind[0, 4, 5] = 0  # colour 0 elsewhere
    kind[1, 2:4, 2:4] = 1
    numbers = judge._patches(kind)
    assert (numbers[0][kind[0] < 0] == 0).all() and len(numbers[0][kind[0] >= 0].unique()) == 3
    angle = numbers[0, 0, 0]
    assert (numbers[0] == angle).sum() == 7 and numbers[0, 1, 1] != angle
    assert (numbers[1] > 0).sum() == 4 and len(numbers[1][kind[1] >= 0].unique()) == 1


def test_a_long_winding_patch_is_one_patch() -> None:
    spiral = torch.full((1, 15, 15), -1)
    for row in range(0, 15, 2):
        spiral[0, row] = 0
        if row + 1 < 15:
            spiral[0, row + 1, -1 if row % 4 == 0 else 0] = 0
    assert len(judge._patches(spiral).unique()) == 2


def test_the_cells_of_an_object_vote_on_its_shape() -> None:
    shape_logits, colour_logits = torch.zeros(1, 3, 4, 4), torch.zeros(1, 2, 4, 4)
    shape_logits[:, 0] = 5.0  # background
    shape_logits[0, :, 0, :3] = torch.tensor(
        [[-5.0] * 3, [2.0, 2.0, 0.0], [0.0, 0.0, 2.1]]
    )  # two balls to one box
    colour_logits[0, 1] = 3.0
    table = judge._object_table(shape_logits, colour_logits)[0]
    np.testing.assert_allclose(table, [[0, 0], [3 / 16, 0]])  # all three cells are one blue ball


def test_errors_ignore_sightings_too_small_to_count() -> None:
    large, small = judge.VISIBLE_SHARE * 2, judge.VISIBLE_SHARE / 4
    true = np.array([[[large, small], [0.0, large]]])
    found = np.array([[[large, large], [large, 0.0]]])
    result = judge.errors(found, true, min_share=judge.VISIBLE_SHARE)
    assert result.precision.value == pytest.approx(2 / 3)  # the small one is there, blue ball is not
    assert result.recall.value == pytest.approx(1 / 2)  # of the two large ones


def test_calibration_finds_the_threshold_between_noise_and_objects() -> None:
    rng = np.random.default_rng(0)
    there = rng.random((200, 2, 2)) < 0.4
    true = np.where(there, judge.VISIBLE_SHARE * 2, 0.0)
    found = np.where(there, judge.VISIBLE_SHARE * 0.8, judge.VISIBLE_SHARE * 0.3)
    assert judge.VISIBLE_SHARE * 0.3 < judge.calibrate(found, true) <= judge.VISIBLE_SHARE * 0.8


def test_it_learns_shapes_and_colours_in_seconds_and_finds_them_in_new_frames() -> None:
    torch.set_num_threads(1)
    frames, labels = _drawn(240, seed=0)
    settings = training.DetectorTraining(
        max_steps=80, max_seconds=60, batch=12, crop_px=48, learning_rate=5e-3
    )
    examples = training.Examples(frames=frames, labels=labels)
    detector = training.fit(training.new(CONFIG), examples, training=settings)
    fresh, fresh_labels = _drawn(60, seed=1)
    true = judge.true_shares(fresh_labels, config=CONFIG)
    found = detector.shares(fresh)
    result = judge.errors(found, true, min_share=judge.calibrate(found, true))
    assert result.precision.value > 0.85 and result.recall.value > 0.85
    first = detector.detect(fresh[:1])[0][0]
    colour, shape = np.unravel_index(true[0].argmax(), true[0].shape)
    assert first.pair == (CONFIG.colours[colour], CONFIG.shapes[shape])
    assert first.share == pytest.approx(true[0].max(), rel=0.35)


def test_the_stage_writes_a_detector_with_its_own_errors(tmp_path: Path) -> None:
    stage = training.DetectorStage(
        out=str(tmp_path),
        device="cpu",
        num_rooms=2,
        num_tables=2,
        views_per_room=2,
        num_test_rooms=1,
        size_px=32,
        workers=1,
        renderer="rays",
        training=training.DetectorTraining(max_steps=2, batch=2),
    )
    seen: list[str] = []
    errors = training.train(stage, on_progress=lambda label, done, total: seen.append(label))
    assert set(errors) == {"validation", "test", "validation tables", "test tables"}
    assert "recall" in errors["test"]["plain"]
    assert judge.Detector.load(tmp_path / "detector.safetensors").config.shapes
    assert "training" in seen


def test_a_detector_of_rooms_goes_on_with_what_it_knows(tmp_path: Path) -> None:
    old = judge.Detector(judge.DetectorConfig(shapes=SHAPES, width=16, dilations=(1,)))
    old.save(tmp_path / "old.safetensors")
    grown = training._begun(training.DetectorStage(start_from=str(tmp_path / "old.safetensors")))
    assert grown.config.shapes == DETECTED_SHAPES
    frame = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8))
    for mine, theirs in zip(grown(frame), old(frame), strict=True):
        np.testing.assert_allclose(
            mine[:, : theirs.shape[1]].detach(), theirs.detach(), atol=2e-2
        )  # half precision
    other = judge.Detector(judge.DetectorConfig(shapes=("cone",), width=16, dilations=(1,)))
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="leave start_from out"):
        training._begun(training.DetectorStage(start_from=str(tmp_path / "other.safetensors")))


def test_what_cannot_be_trained_is_refused_before_frames_are_rendered(tmp_path: Path) -> None:
    for wrong in ({"num_rooms": 0}, {"num_test_rooms": 0}, {"renderer": "opengl"}):
        with pytest.raises(ValueError, match="expected"):
            training.DetectorStage(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"training\.max_steps=0"):
        training.DetectorTraining(max_steps=0)
    for late, said in (
        ({"start_from": str(tmp_path / "none")}, "no detector at"),
        ({"device": "gpu"}, "device 'gpu'"),
    ):
        stage = training.DetectorStage(out=str(tmp_path), num_rooms=1 << 40, **late)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=said):
            training.train(stage)


def test_sightings_say_where_an_object_is() -> None:
    detector = judge.Detector(replace(CONFIG, min_share=2 / 64))
    shape_logits, colour_logits = torch.zeros(1, 3, 8, 8), torch.zeros(1, 2, 8, 8)
    shape_logits[:, 0] = 5.0  # background
    shape_logits[0, 2, 1:3, 5:8] = 9.0  # a blue box of six cells
    shape_logits[0, 1, 7, 0] = 9.0  # one cell is too small
    colour_logits[0, 1] = 3.0
    detector.forward = lambda frames: (shape_logits, colour_logits)  # type: ignore[method-assign]
    ((found,),) = detector.sightings(np.zeros((1, 32, 32, 3), np.uint8))
    assert found.pair == ("blue", "box") and found.share == 6 / 64
    assert (found.column, found.row) == (6.5 / 8, 2 / 8) and found.cells.sum() == 6


def test_tables_are_labelled_as_the_simulator_knows_them() -> None:
    request = Request(index=0, seed=3, split="test", size_px=128, renderer="rays", num_steps=6)
    frames, labels = make_table_views(request)
    assert frames.shape == (6, 128, 128, 3) and labels.shapes.shape == (6, 32, 32)
    names = {DETECTED_SHAPES[label - 1] for label in np.unique(labels.shapes) if label}
    assert names & {"box", "ball", "cylinder"} and not names & {"cone", "pyramid", "egg", "capsule"}
    # Where a red thing is, the frame is red.
    red = (labels.shapes > 0) & (labels.colours == COLOUR_NAMES.index("red"))
    pixels = frames[:, 1::4, 1::4][red].astype(int)
    assert len(pixels) == 0 or (pixels[:, 0] > pixels[:, 1:].max(1)).mean() > 0.9
    assert (frames[0] != frames[1]).any()
