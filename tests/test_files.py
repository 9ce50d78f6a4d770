"""Files appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from emuworld.files import files_below, write_bytes, write_text, written


def test_a_file_comes_whole_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "words.txt"
    write_text(path, "grün\n")
    assert path.read_text(encoding="utf-8") == "grün\n"
    write_bytes(path, b"\0\1")
    assert path.read_bytes() == b"\0\1" and list(path.parent.iterdir()) == [path]


def test_nothing_is_there_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "codes.npz"
    path.write_text("old")
    with written(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old" and list(tmp_path.glob("*.npz")) == [path]
    assert path.read_text() == "new"


def test_what_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_text("old")
    with pytest.raises(RuntimeError), written(path) as beside:
        beside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_its_writer_kept_to_itself(tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    with written(tmp_path / "weights") as beside:
        beside.touch(mode=0o600)
    assert (tmp_path / "weights").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs" / "one" / "a").touch()
    (tmp_path / "elsewhere" / "b").touch()
    (tmp_path / "runs" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "runs")
    assert sorted(path.name for path in files_below(tmp_path / "runs")) == ["a", "b"]
