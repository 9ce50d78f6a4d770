"""Small LeRobot data sets on disk, written as lerobot lays them out, with pictures that say what they are."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

TOP, WRIST, DEPTH = "observation.images.top", "observation.images.wrist", "observation.images.depth"
FPS = 10
TASKS = ("put the cube into the box", "open the drawer")
SUBTASKS = ("grasp the cube", "put it into the box", "let go")
V2_DATA = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
V2_VIDEO = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
V3_DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
V3_VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded:
    """An episode: the task of each frame, and its subtask (-1: none). `look`: equal ones look alike."""

    tasks: Sequence[int]
    subtasks: Sequence[int] = ()
    look: int = 0

    def __len__(self) -> int:
        return len(self.tasks)


def colour(look: int, frame: int, camera: str = TOP) -> tuple[int, int, int]:
    """What the whole picture shows; neighbours differ by 20 in one channel, more than any codec loses."""
    return 20 + 20 * (frame % 10), 20 + 40 * look + 20 * (frame // 10), 60 if camera == TOP else 200


def write_set(
    folder: Path,
    episodes: Sequence[Recorded],
    *,
    version: str = "v3.0",
    subtasks: str = "",  # index | language
    dtype: str = "video",
    data_files: Sequence[Sequence[int]] = (),  # v3: numbers of the episodes in each; (): all in one
    video_files: Sequence[Sequence[int]] = (),
    index_name: str = "task",
) -> Path:
    """Write a data set; two cameras, and one of depth that is no picture in colour."""
    old = version.startswith("v2")
    every = [range(len(episodes))]
    alone = [[number] for number in range(len(episodes))]
    data = _Files(groups=alone if old else data_files or every, template=V2_DATA if old else V3_DATA)
    videos = _Files(groups=alone if old else video_files or every, template=V2_VIDEO if old else V3_VIDEO)
    camera = {"dtype": dtype, "shape": [48, 64, 3], "names": ["height", "width", "channels"]}
    features: dict[str, Any] = {
        DEPTH: {**camera, "info": {"video.is_depth_map": True}},
        TOP: camera,
        WRIST: camera,
        "action": {"dtype": "float32", "shape": [6], "names": None},
    }
    info = {
        "codebase_version": version,
        "robot_type": "so100",
        "total_episodes": len(episodes),
        "chunks_size": 2 if old else 1000,
        "fps": FPS,
        "data_path": data.template,
        "video_path": videos.template if dtype == "video" else None,
        "features": features,
    }
    (folder / "meta").mkdir(parents=True)
    (folder / "meta/info.json").write_text(json.dumps(info))
    _write_meta(folder, episodes, data, videos, old=old, index_name=index_name)
    if subtasks == "index":
        _write_words(folder, "subtask", SUBTASKS, name="subtask", old=False)
    for place, group in enumerate(data.groups):
        rows = [row for number in group for row in _rows(number, episodes[number], subtasks, dtype)]
        write_table(folder / data.path(place, old=old), rows)
    if dtype == "video":
        for key in (TOP, WRIST):
            for place, group in enumerate(videos.groups):
                path = folder / videos.path(place, old=old, video_key=key)
                write_video(
                    path, [colour(episodes[n].look, f, key) for n in group for f in range(len(episodes[n]))]
                )
    return folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Files:
    """Which episodes stand in which file."""

    groups: Sequence[Sequence[int]]
    template: str

    def path(self, place: int, *, old: bool, **names: str) -> str:
        new = {"chunk_index": 0, "file_index": place}
        numbers = {"episode_chunk": place // 2, "episode_index": place} if old else new
        return self.template.format(**numbers, **names)

    def place(self, number: int) -> int:
        return next(place for place, group in enumerate(self.groups) if number in group)

    def before(self, number: int, episodes: Sequence[Recorded]) -> int:
        """Frames that stand before an episode in its file."""
        return sum(len(episodes[n]) for n in self.groups[self.place(number)] if n < number)


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """A row group of at most 8 rows, so that files have several."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=8)


def write_video(path: Path, colours: Sequence[tuple[int, int, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with imageio.get_writer(path, format="FFMPEG", fps=FPS, codec="libx264", macro_block_size=16) as film:
        for one in colours:
            film.append_data(np.full((48, 64, 3), one, np.uint8))


def _write_meta(
    folder: Path, episodes: Sequence[Recorded], data: _Files, videos: _Files, *, old: bool, index_name: str
) -> None:
    _write_words(folder, "task", TASKS, name=index_name, old=old)
    lines: list[dict[str, Any]] = []
    for number, one in enumerate(episodes):
        told = list(dict.fromkeys(TASKS[task] for task in one.tasks))
        line: dict[str, Any] = {"episode_index": number, "tasks": told, "length": len(one)}
        if not old:
            line |= {"data/chunk_index": 0, "data/file_index": data.place(number), "stats/action/max": [1.0]}
            for key in (TOP, WRIST):
                start_s = videos.before(number, episodes) / FPS
                line |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": videos.place(number)}
                line |= {
                    f"videos/{key}/from_timestamp": start_s,
                    f"videos/{key}/to_timestamp": start_s + len(one) / FPS,
                }
        lines.append(line)
    if old:
        (folder / "meta/episodes.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    else:  # the later half in the first file: names of files need not follow the episodes
        half = len(lines) // 2
        write_table(folder / "meta/episodes/chunk-000/file-000.parquet", lines[half:])
        if half:
            write_table(folder / "meta/episodes/chunk-000/file-001.parquet", lines[:half])


def _write_words(folder: Path, kind: str, words: Sequence[str], *, name: str, old: bool) -> None:
    if old:
        lines = [json.dumps({f"{kind}_index": index, kind: text}) for index, text in enumerate(words)]
        (folder / f"meta/{kind}s.jsonl").write_text("\n".join(lines))
    else:
        rows = [{f"{kind}_index": index, name: text} for index, text in enumerate(words)]
        write_table(folder / f"meta/{kind}s.parquet", rows)


def _rows(number: int, episode: Recorded, subtasks: str, dtype: str) -> list[dict[str, Any]]:
    said = [
        {"role": "assistant", "content": SUBTASKS[code], "style": "subtask", "timestamp": frame / FPS}
        for frame, code in enumerate(episode.subtasks)
        if frame == 0 or code != episode.subtasks[frame - 1]
    ]
    plan = {"role": "assistant", "content": "1. …", "style": "plan", "timestamp": 0.0}
    rows = []
    for frame, task in enumerate(episode.tasks):
        row: dict[str, Any] = {"action": [0.0] * 6, "timestamp": np.float32(frame / FPS)}
        row |= {"frame_index": frame, "episode_index": number, "task_index": task}
        if subtasks == "index":
            row["subtask_index"] = episode.subtasks[frame] if episode.subtasks else -1
        if subtasks == "language":
            row["language_persistent"] = [*said[::-1], plan]
        if dtype == "image":
            row |= {key: _image(colour(episode.look, frame, key)) for key in (TOP, WRIST)}
        rows.append(row)
    return rows


def _image(one: tuple[int, int, int]) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), one).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}
