"""Rewards that the worlds know, on lines that `emuworld data prompts` writes: the truth scores best."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from emuworld.checkpoint_folder import BUILTIN, DETECTOR_FILE
from emuworld.envs.palette import SHAPES
from emuworld.tasks.detector import Detector
from emuworld.tasks.reward_prompts import FILE_NAME, RewardPrompts, run
from emuworld.tasks.rewards import Objects, edit, likeness, share_found, terms
from emuworld.training.rewards import Scale


@dataclasses.dataclass(frozen=True)
class _Answer:
    pictures: tuple[np.ndarray, ...]
    truth: Mapping[str, Any]
    references: tuple[np.ndarray, ...] = ()


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("prompts")
    config = RewardPrompts(
        out=str(out), num_t2i=1, num_x2i=1, num_explore=1, num_steps=2, renderer="rays", workers=1
    )
    run(config)
    read = [json.loads(line) for line in (out / FILE_NAME).read_text().splitlines()]
    for line in read:
        line["truth"]["folder"] = str(out)
    return read


def _shown(line: dict[str, Any], name: str) -> np.ndarray:
    return np.asarray(Image.open(Path(line["truth"]["folder"], name)))


def test_lines_hold_what_is_asked_and_the_truth(lines: list[dict[str, Any]]) -> None:
    t2i, x2i, explore = lines
    assert [line["mode"] for line in lines] == ["t2i", "x2i", "explore"]
    assert t2i["truth"]["objects"] and all(shape in t2i["prompt"] for _, shape in t2i["truth"]["objects"])
    assert x2i["prompt"] and len(x2i["images"]) == len(x2i["truth"]["pictures"]) == 1
    assert len(explore["commands"]) == len(explore["truth"]["pictures"]) == 2


def test_the_simulators_own_pictures_score_best(lines: list[dict[str, Any]]) -> None:
    for line in lines[1:]:
        before = _shown(line, line["images"][0])
        true = tuple(_shown(line, name) for name in line["truth"]["pictures"])
        grey = tuple(np.full_like(picture, 128) for picture in true)
        values = likeness(
            [_Answer(pictures, line["truth"]) for pictures in (true, (before,) * len(true), grey, true[:0])]
        )
        assert values[0] > 50 and values[0] > max(values[1:3]) and values[3] == 0
    assert np.isnan(likeness([_Answer((grey[0],), lines[0]["truth"])])[0])


def test_an_edit_is_worth_what_is_done_and_kept(lines: list[dict[str, Any]]) -> None:
    """The true picture 1; neither a copy nor an empty picture anything; what else is changed takes off."""
    line = lines[1]
    before, after = (_shown(line, name) for name in (line["truth"]["before"], *line["truth"]["pictures"]))
    wall = np.full_like(after, 180)
    same = (np.abs(before.astype(int) - after).max(axis=2) <= 6).reshape(16, 16, 16, 16).all(axis=(1, 3))
    spoilt, row, column = after.copy(), *np.argwhere(same)[0]
    spoilt[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] += 90  # one block, another colour
    values = edit(
        [
            _Answer((picture,), line["truth"], (before,))
            for picture in (after, spoilt, before, wall, wall[:128, :128])
        ]
    )
    assert values[0] == 1.0 and 0.8 < values[1] < 1.0 and values[2] == 0.0 and max(values[3:]) <= 0.1
    assert edit([_Answer((), line["truth"])]) == [0.0]


def test_where_an_edit_changes_everything_all_of_it_counts(lines: list[dict[str, Any]]) -> None:
    """A block that is wrong where the true picture differs from the one before takes off as one elsewhere."""
    line = lines[1]
    before, after = (_shown(line, name) for name in (line["truth"]["before"], *line["truth"]["pictures"]))
    differs = (np.abs(before.astype(int) - after).max(axis=2) > 6).reshape(16, 16, 16, 16).any(axis=(1, 3))
    spoilt, (row, column) = after.copy(), np.argwhere(differs)[0]
    spoilt[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] += 90
    of_all, of_rest = ({**line["truth"], "everywhere": whole} for whole in (True, False))
    values = edit([_Answer((spoilt,), truth, (before,)) for truth in (of_all, of_rest)])
    assert 0.0 < values[0] < values[1] <= 1.0
    assert edit([_Answer((after,), of_all, (before,))]) == [1.0]


def test_terms_apply_to_the_lines_that_have_their_truth(lines: list[dict[str, Any]]) -> None:
    after = _shown(lines[1], *lines[1]["truth"]["pictures"])
    assert np.isnan(edit([_Answer((after,), lines[2]["truth"])])[0])


def test_to_try_is_never_worth_less_than_an_empty_room() -> None:
    red, blue = ("red", "ball"), ("blue", "box")
    asked = {red, blue}
    assert share_found(asked, []) == 0.0
    assert share_found(asked, [red, blue]) == 1.0
    assert share_found(asked, [red, ("blue", "cone")]) == pytest.approx(0.75)  # colour alone
    assert share_found(asked, [("red", "cone")]) == pytest.approx(0.25)
    assert share_found(asked, [red, blue, ("green", "cone")]) == pytest.approx(0.95)
    assert share_found(asked, [("green", "cone"), ("pink", "egg")]) == 0.0


def test_more_of_the_same_is_worth_less() -> None:
    """One asked for and seen twice: three quarters less; three times: nothing."""
    egg = ("orange", "egg")
    assert [share_found({egg}, [egg] * times) for times in (1, 2, 3, 7)] == [1.0, 0.25, 0.0, 0.0]


def test_objects_are_what_the_judge_finds(lines: list[dict[str, Any]]) -> None:
    """A plain wall shows nothing; of a view that the judge reads, what it finds scores 1, one more half."""
    objects = terms()["objects"](Scale(name="objects"), torch.device("cpu"))
    assert isinstance(objects, Objects)
    wall = np.full((256, 256, 3), 180, np.uint8)
    assert objects([_Answer((wall,), {"objects": [("red", "ball")]})]) == [0.0]
    view = _shown(lines[2], lines[2]["images"][0])
    found = [one.pair for one in Detector.load(BUILTIN["small"] / DETECTOR_FILE).detect([view])[0]]
    missing = next(("red", shape) for shape in SHAPES if ("red", shape) not in found)
    asked = [*found, missing] if found else [missing]
    right = len(found) / len(asked)
    assert objects([_Answer((view,), {"objects": asked})]) == [right]
    small = wall[:128, :128]
    several = objects(
        [
            _Answer((wall,), {}),
            _Answer((small,), {"objects": asked}),
            _Answer((wall, view), {"objects": asked}),
            _Answer((), {"objects": asked}),
        ]
    )
    np.testing.assert_allclose(several, [np.nan, 0.0, right, np.nan])
    with pytest.raises(ValueError, match="no detector at"):
        terms()["objects"](Scale(name="objects", model="none"), torch.device("cpu"))
    assert set(terms()) == {"objects", "likeness", "edit"}


def test_several_processes_write_the_same_lines(tmp_path: Path) -> None:
    for workers in (1, 2):
        run(
            RewardPrompts(
                out=str(tmp_path / str(workers)),
                num_t2i=2,
                num_x2i=3,
                num_explore=1,
                size_px=64,
                renderer="rays",
                workers=workers,
            )
        )
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("1", "2"))
    assert [path.name for path in one] == [path.name for path in two]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    assert len((tmp_path / "2" / FILE_NAME).read_text().splitlines()) == 6
