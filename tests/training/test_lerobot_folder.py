"""LeRobot data sets of each format, with pictures whose colours say which episode and frame they are."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from lerobot_sets import SUBTASKS, TASKS, TOP, WRIST, Recorded, colour, write_set, write_table, write_video
from PIL import Image

from emuworld.training import parquet
from emuworld.training.lerobot_folder import Episode, is_lerobot, read_episodes

# 0: three subtasks; 1: another task, no subtask; 2: a time without a name between two subtasks.
EPISODES = (
    Recorded(tasks=[0] * 13, subtasks=[0] * 5 + [1] * 4 + [2] * 4),
    Recorded(tasks=[1] * 9, subtasks=[-1] * 9, look=1),
    Recorded(tasks=[0] * 12, subtasks=[0] * 3 + [-1] * 5 + [1] * 4, look=2),
)
SHOWN = {
    "": [(0, [0, 3, 6, 9, 12]), (1, [0, 2, 4, 6, 8]), (2, [0, 3, 6, 8, 11])],
    "index": [(0, [0, 4, 8, 12]), (1, [0, 2, 4, 6, 8]), (2, [0, 2, 11])],
}
TEXTS = {
    "": [(TASKS[0],) * 4, (TASKS[1],) * 4, (TASKS[0],) * 4],
    "index": [SUBTASKS, (TASKS[1],) * 4, SUBTASKS[:2]],
}


def close_to(pictures: Iterable[Image.Image], expected: list[tuple[int, int, int]]) -> bool:
    seen = np.array([np.asarray(picture).reshape(-1, 3).mean(0) for picture in pictures])
    return seen.shape == (len(expected), 3) and np.abs(seen - np.array(expected)).max() < 9


def told(episodes: list[Episode]) -> list[tuple[str, tuple[str, ...]]]:
    return [(episode.task, episode.texts) for episode in episodes]


@pytest.mark.parametrize("subtasks", ["", "index"])
@pytest.mark.parametrize(
    "form",
    [
        {"version": "v2.0"},
        {"version": "v2.1", "dtype": "image"},
        {"data_files": [[0, 1], [2]], "video_files": [[0], [1, 2]]},
        {"dtype": "image", "data_files": [[0], [1, 2]], "index_name": "__index_level_0__"},
    ],
    ids=["v2.0 videos", "v2.1 images", "v3.0 videos", "v3.0 images"],
)
def test_every_format_tells_the_same_episodes(tmp_path: Path, form: dict[str, Any], subtasks: str) -> None:
    data = write_set(tmp_path / "set", EPISODES, subtasks=subtasks, **form)
    assert is_lerobot(data) and not is_lerobot(tmp_path)
    episodes = read_episodes(data)
    assert [episode.task for episode in episodes] == [TASKS[0], TASKS[1], TASKS[0]]
    assert [episode.texts for episode in episodes] == TEXTS[subtasks]
    for episode, (number, frames) in zip(episodes, SHOWN[subtasks], strict=True):
        assert close_to(episode.pictures, [colour(number, frame) for frame in frames])


def test_subtasks_of_the_language_column(tmp_path: Path) -> None:
    """Lines in any order, other lines between them; "nothing" cannot be said there, so no episode 2."""
    kwargs: dict[str, Any] = {"dtype": "image"}
    by_index = read_episodes(write_set(tmp_path / "a", EPISODES[:1], subtasks="index", **kwargs))
    by_line = read_episodes(write_set(tmp_path / "b", EPISODES[:1], subtasks="language", **kwargs))
    assert told(by_line) == told(by_index)
    assert close_to(by_line[0].pictures, [colour(0, frame) for frame in (0, 4, 8, 12)])
    unnamed = write_set(tmp_path / "c", [Recorded(tasks=[0] * 5)], subtasks="language", **kwargs)
    assert told(read_episodes(unnamed, keyframes=1)) == [(TASKS[0], (TASKS[0],))]


def test_another_camera_and_other_keyframes(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", EPISODES[:2])
    last = read_episodes(data, camera=WRIST, keyframes=1)[1]
    assert close_to(last.pictures, [colour(1, 0, WRIST), colour(1, 8, WRIST)])
    assert close_to(last.pictures, [colour(1, 0, WRIST), colour(1, 8, WRIST)])  # can be read again
    many = read_episodes(data, keyframes=50)[1]
    assert close_to(many.pictures, [colour(1, frame) for frame in range(9)])


def test_a_recording_of_two_tasks_and_one_of_one_frame(tmp_path: Path) -> None:
    recorded = [Recorded(tasks=[0] * 4 + [1] * 3), Recorded(tasks=[1], look=1)]
    episodes = read_episodes(write_set(tmp_path / "set", recorded, dtype="image"), keyframes=1)
    assert [episode.task for episode in episodes] == [TASKS[0], TASKS[1], TASKS[1]]
    frames = [(0, 0), (0, 3)], [(0, 4), (0, 6)], [(1, 0), (1, 0)]
    for episode, shown in zip(episodes, frames, strict=True):
        assert close_to(episode.pictures, [colour(*one) for one in shown])


# ---- what cannot be read -------------------------------------------------------------------------


def spoil_info(**values: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "meta/info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def spoil_frames(**values: Any) -> Callable[[Path], None]:
    """The first row of the first data file says something else."""

    def spoil(folder: Path) -> None:
        path = sorted((folder / "data").rglob("*.parquet"))[0]
        rows = pq.read_table(path).to_pylist()
        write_table(path, [rows[0] | values, *rows[1:]])

    return spoil


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda folder: sorted(folder.glob(pattern))[0].unlink()


def cut(pattern: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = sorted(folder.glob(pattern))[0]
        path.write_bytes(path.read_bytes()[:-200])

    return spoil


def write(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


DATA = "data/chunk-000/file-000.parquet"
VIDEO = f"videos/{TOP}/chunk-000/file-000.mp4"
SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "another version": (spoil_info(codebase_version="v1.6"), "meta/info.json: codebase_version is 'v1.6'"),
    "no version": (spoil_info(codebase_version=None), "expected v2.0, v2.1 or v3.0"),
    "no cameras": (spoil_info(features={"action": {"dtype": "float32"}}), "info.json: no camera; there are"),
    "no features": (spoil_info(features=None), "info.json: expected an object with features"),
    "no time": (spoil_info(fps=0), "fps and chunks_size must be above zero, got 0"),
    "no path": (
        spoil_info(data_path=None),
        "data_path is 'None', expected a path with the names chunk_index",
    ),
    "an odd path": (spoil_info(data_path="{episode}"), "data_path is '{episode}', expected a path"),
    "a path out": (
        spoil_info(data_path="../x{file_index}.parquet"),
        "leads to ../x0.parquet, out of the data",
    ),
    "half an info": (cut("meta/info.json"), "info.json: not valid JSON"),
    "no tasks": (remove("meta/tasks.parquet"), "neither tasks.parquet nor tasks.jsonl"),
    "no such task": (spoil_frames(task_index=7), "meta/tasks says nothing for index 7"),
    "no episodes": (remove("meta/episodes/*/*.parquet"), "meta/episodes holds no parquet files"),
    "no data": (remove(DATA), "file-000.parquet is missing"),
    "half the data": (cut(DATA), "file-000.parquet: not a whole parquet file"),
    "half a table": (cut("meta/tasks.parquet"), "tasks.parquet: not a whole parquet file"),
    "no frames": (
        lambda f: write_table(f / DATA, [{"frame_index": 0}]),
        "no column episode_index, task_index",
    ),
    "another episode": (spoil_frames(episode_index=5), "episode 0: 12 frames, where meta/episodes says 13"),
    "a frame below": (spoil_frames(frame_index=-3), "frame_index runs from -3 to 12, expected 0 to 12"),
    "a frame above": (spoil_frames(frame_index=99), "frame_index runs from 1 to 99, expected 0 to 12"),
    "a frame twice": (spoil_frames(frame_index=1), "each once"),
    "frames in words": (
        lambda f: write_table(f / DATA, [{"frame_index": "one", "episode_index": 0, "task_index": 0}] * 13),
        "column frame_index is string, expected whole numbers",
    ),
    "no video": (remove(VIDEO), "file-000.mp4 is missing"),
    "half a video": (cut(VIDEO), "file-000.mp4: not a video"),
    "a playlist": (write(VIDEO, "#EXTM3U\n#EXTINF:1\nother.ts\n"), "file-000.mp4: not a video"),
    "a short video": (
        lambda f: write_video(f / VIDEO, [(0, 0, 0)] * 5),
        "no frame at 0.600 s; the video ends before the episode",
    ),
}


@pytest.fixture(scope="module")
def whole_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("whole") / "set", EPISODES[:1])


@pytest.mark.parametrize("name", SPOILT)
def test_what_is_wrong_is_named(whole_set: Path, tmp_path: Path, name: str) -> None:
    spoil, said = SPOILT[name]
    data = shutil.copytree(whole_set, tmp_path / "set")
    spoil(data)
    with pytest.raises(ValueError, match=re.escape(said)):
        [list(episode.pictures) for episode in read_episodes(data, keyframes=2)]


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("meta/tasks.jsonl", '{"task_index": 0, "task": " "}', "tasks says nothing for index 0"),
        ("meta/tasks.jsonl", '{"task": "a"}', "tasks.jsonl: task_index is None"),
        ("meta/tasks.jsonl", "[1]", "tasks.jsonl, line 1: expected an object"),
        ("meta/episodes.jsonl", '{"episode_index": 0, "length"', "episodes.jsonl, line 1: not valid JSON"),
        ("meta/episodes.jsonl", '{"episode_index": -1, "length": 3}', "episode_index is -1"),
        ("meta/episodes.jsonl", "", "lists no episodes"),
    ],
)
def test_lines_of_the_older_format(tmp_path: Path, name: str, text: str, said: str) -> None:
    data = write_set(tmp_path / "set", EPISODES[:1], version="v2.1", dtype="image")
    (data / name).write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)):
        read_episodes(data)


def test_cameras_subtasks_and_images_that_are_not_there(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", EPISODES[:1], subtasks="index", dtype="image")
    with pytest.raises(ValueError, match=rf"no camera 'top'; there are {TOP}, {WRIST}"):
        read_episodes(data, camera="top")
    whole = pq.read_table(data / DATA).to_pylist()
    write_table(data / DATA, [*whole[:4], whole[4] | {TOP: {"bytes": b"?", "path": None}}, *whole[5:]])
    with pytest.raises(ValueError, match=r"row 4, .*: not an image"):
        list(read_episodes(data)[0].pictures)
    write_table(data / DATA, [row | {TOP: {"bytes": None, "path": "a.png"}} for row in whole])
    with pytest.raises(ValueError, match=r"row 0, .*: no image is stored there"):
        list(read_episodes(data)[0].pictures)
    (data / "meta/subtasks.parquet").unlink()
    with pytest.raises(ValueError, match="meta/subtasks says nothing for index 0"):
        read_episodes(data)


def test_without_pyarrow_it_is_said_what_to_install(whole_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "pq", None)
    with pytest.raises(ValueError, match=re.escape("pip install emuworld[lerobot]")):
        read_episodes(whole_set)
