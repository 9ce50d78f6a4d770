"""What a run keeps, and what is left of it after a kill."""

from pathlib import Path

import numpy as np

from emuworld.tasks.run_folder import (
    PictureRow,
    Pictures,
    append_records,
    load_pictures,
    read_records,
    save_pictures,
)


def test_records_come_back_in_order_and_once(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    assert read_records(path) == []
    append_records(path, [{"kind": "start", "index": 1}, {"kind": "start", "index": 0, "old": True}])
    append_records(path, [{"kind": "start", "index": 0, "old": False}])
    assert read_records(path) == [{"kind": "start", "index": 0, "old": False}, {"kind": "start", "index": 1}]


def test_a_line_cut_short_by_a_kill_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    append_records(path, [{"kind": "start", "index": 0}])
    with path.open("a") as file:
        file.write('{"kind": "start", "ind')
    assert [r["index"] for r in read_records(path)] == [0]
    append_records(path, [{"kind": "start", "index": 2}])
    assert [r["index"] for r in read_records(path)] == [0, 2]


def test_pictures_round_trip(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    rows = [
        PictureRow(name="sim", frames=frames),
        PictureRow(name="dream", frames=frames[::-1], notes=["", "9"]),
    ]
    save_pictures(tmp_path / "p" / "x.npz", Pictures(title="t", columns=["a", "b"], rows=rows))
    back = load_pictures(tmp_path / "p" / "x.npz")
    assert (back.title, list(back.columns), back.rows[1].notes) == ("t", ["a", "b"], ["", "9"])
    np.testing.assert_array_equal(np.stack(list(back.rows[1].frames)), frames[::-1])
