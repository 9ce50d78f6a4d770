"""A LeRobot data set on disk -> episodes to learn vla from: the task, its subtasks, where their pictures are.

Formats v2.0, v2.1 (a file an episode) and v3 (many episodes a file), as Hugging Face's lerobot writes them;
lerobot itself is not needed. Actions and states are not read.

Subtasks are those of `subtask_index` and `meta/subtasks.parquet`, else those of the column
`language_persistent`: a step for each, with the frame at its end. An episode without any is told by its task
alone: `keyframes` steps of equal length, each with the task as its text. Where a recording goes on to another
task, that is another episode.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from emuworld.training import parquet
from emuworld.training.json_lines import json_lines
from emuworld.training.lerobot_pictures import StoredPictures, VideoPictures

_INFO = "meta/info.json"
_VERSION = re.compile(r"v?([23])\.\d+")
_FRAMES = ("episode_index", "frame_index", "task_index")
_SUBTASKS, _LANGUAGE = "subtask_index", "language_persistent"
_CAMERAS = ("image", "video")  # dtypes of a feature


@dataclasses.dataclass(frozen=True, kw_only=True)
class Episode:
    """A task, the text of each step, and the pictures: before the first step, and at the end of each."""

    task: str
    texts: tuple[str, ...]
    pictures: Iterable[Image.Image]  # decoded while one iterates


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Set:
    """What `meta/info.json` says, of one camera."""

    folder: Path
    by_episode: bool  # v2: a file an episode
    fps: float
    camera: str
    is_video: bool
    chunk_size: int
    templates: Mapping[str, str]  # "data", "video": paths with names in braces

    def file(self, kind: str, **names: object) -> Path:
        try:
            path = PurePosixPath(self.templates[kind].format(**names))
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{self.folder / _INFO}: {kind}_path is {str(self.templates.get(kind))[:200]!r}, expected a "
                f"path with the names {', '.join(names)}"
            ) from error
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{self.folder / _INFO}: {kind}_path leads to {path}, out of the data set")
        return self.folder / path


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recording:
    """Where one recorded episode lies. `start_s`: its begin in the video."""

    number: int
    length: int
    data: Path
    video: Path | None
    start_s: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Labels:
    """Which text each frame has: codes [N] int64, negative for none."""

    codes: np.ndarray
    texts: Mapping[int, object]
    origin: str  # for messages

    def spans(self, first: int, stop: int) -> list[tuple[str, int, int]]:
        """Texts with their first frame and the frame after their last, of the frames that have one."""
        spans = _runs(self.codes[first:stop])
        return [(self._text(code), first + a, first + b) for code, a, b in spans if code >= 0]

    def _text(self, code: int) -> str:
        text = self.texts.get(code)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{self.origin} says nothing for index {code}, which frames have; add its words")
        return text.strip()


def is_lerobot(folder: str | Path) -> bool:
    return (Path(folder) / _INFO).is_file()


def read_episodes(folder: str | Path, *, camera: str = "", keyframes: int = 4) -> list[Episode]:
    """All episodes of a data set, in order; no picture is decoded yet.

    Args:
        camera: feature whose pictures are taken; "": the first one.
        keyframes: steps of an episode without subtasks, if it has so many frames.

    Raises:
        ValueError: names the file, what is wrong in it and what was expected.
    """
    one = _described(Path(folder), camera)
    tasks, subtasks = _texts(one.folder, "task"), _texts(one.folder, "subtask")
    if tasks is None:
        raise ValueError(f"{one.folder / 'meta'} has neither tasks.parquet nor tasks.jsonl: what was asked?")
    recordings = _listed_by_episode(one) if one.by_episode else _listed_by_file(one)
    episodes: list[Episode] = []
    for path, group in itertools.groupby(recordings, key=lambda recording: recording.data):
        frames = parquet.table(path, needed=_FRAMES, optional=(_SUBTASKS, _LANGUAGE, "timestamp"))
        numbers = parquet.whole_numbers(frames, "episode_index", path=path)
        for recording in group:
            rows = _rows(frames, np.flatnonzero(numbers == recording.number), recording)
            codes = parquet.whole_numbers(frames, "task_index", path=path)[rows]
            told = _Labels(codes=codes, texts=tasks, origin=f"{one.folder}/meta/tasks")
            labels = _labels(frames, rows, subtasks, path=path, folder=one.folder)
            episodes += _told(one, recording, rows, told, labels, keyframes=keyframes)
    if not episodes:
        raise ValueError(f"{one.folder} lists no episodes: there is nothing to learn from")
    return episodes


def _told(
    one: _Set,
    recording: _Recording,
    rows: np.ndarray,
    tasks: _Labels,
    subtasks: _Labels | None,
    *,
    keyframes: int,
) -> Iterator[Episode]:
    tasked = tasks.spans(0, recording.length)
    if not tasked:
        raise ValueError(f"{recording.data}, episode {recording.number}: no frame has a task_index")
    for task, first, stop in tasked:
        spans = [] if subtasks is None else subtasks.spans(first, stop)
        steps = [(text, end - 1) for text, _, end in spans]
        if not steps:
            count = max(1, min(keyframes, stop - 1 - first))
            ends = np.linspace(first, stop - 1, count + 1)[1:].round().astype(int)
            steps = [(task, end) for end in ends.tolist()]
        shown = [first, *(frame for _, frame in steps)]
        pictures: Iterable[Image.Image]
        if recording.video is None:
            taken = tuple(int(rows[frame]) for frame in shown)
            pictures = StoredPictures(path=recording.data, column=one.camera, rows=taken)
        else:
            times_s = tuple(recording.start_s + frame / one.fps for frame in shown)
            pictures = VideoPictures(path=recording.video, fps=one.fps, times_s=times_s)
        yield Episode(task=task, texts=tuple(text for text, _ in steps), pictures=pictures)


# ---- meta ----------------------------------------------------------------------------------------


def _described(folder: Path, camera: str) -> _Set:
    path = folder / _INFO
    if not path.is_file():
        raise ValueError(f"{path} is missing; give the folder of a LeRobot data set, which has one")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(info, dict) or not isinstance(info.get("features"), dict):
        raise ValueError(f"{path}: expected an object with features; this describes no LeRobot data set")
    version = info.get("codebase_version")
    known = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if known is None:
        raise ValueError(
            f"{path}: codebase_version is {str(version)[:50]!r}, expected v2.0, v2.1 or v3.0; convert the "
            "data set with lerobot's own scripts"
        )
    fps, chunk_size = info.get("fps"), info.get("chunks_size", 1000)
    if not isinstance(fps, int | float) or not 0 < fps < 1e6 or type(chunk_size) is not int or chunk_size < 1:
        raise ValueError(
            f"{path}: fps and chunks_size must be above zero, got {str(fps)[:50]} and {str(chunk_size)[:50]}"
        )
    cameras = {name: one["dtype"] for name, one in info["features"].items() if _is_camera(one)}
    if not cameras or (camera and camera not in cameras):
        wanted = f"no camera {camera!r}" if camera else "no camera"
        listed = ", ".join(cameras) or "no features of pictures in colour"
        raise ValueError(f"{path}: {wanted}; there are {listed}")
    camera = camera or next(iter(cameras))
    return _Set(
        folder=folder,
        by_episode=known[1] == "2",
        fps=fps,
        camera=camera,
        is_video=cameras[camera] == "video",
        chunk_size=chunk_size,
        templates={kind: info[f"{kind}_path"] for kind in ("data", "video") if info.get(f"{kind}_path")},
    )


def _is_camera(feature: object) -> bool:
    """Whether a feature is pictures in colour: maps of depth are coded into videos too."""
    if not isinstance(feature, dict) or feature.get("dtype") not in _CAMERAS:
        return False
    infos = [one for name in ("info", "video_info") if isinstance(one := feature.get(name), dict)]
    return not any(one.get("is_depth_map") or one.get("video.is_depth_map") for one in infos)


def _texts(folder: Path, name: str) -> Mapping[int, object] | None:
    """Index -> words of `meta/tasks` or `meta/subtasks`; None where there is no such file."""
    path, lines = folder / "meta" / f"{name}s.parquet", folder / "meta" / f"{name}s.jsonl"
    if path.is_file():
        # The words are the index of a data frame, which may have a name or none.
        read = parquet.table(path, needed=(f"{name}_index",), optional=(name, "__index_level_0__"))
        numbers = parquet.whole_numbers(read, f"{name}_index", path=path).tolist()
        if len(read.column_names) < 2:
            raise ValueError(f"{path}: no column {name} with the words")
        return dict(zip(numbers, read[read.column_names[1]].to_pylist(), strict=True))
    if lines.is_file():
        return {_number(line, f"{name}_index", lines): line.get(name) for _, line in json_lines(lines)}
    return None


def _listed_by_episode(one: _Set) -> Iterator[_Recording]:
    path = one.folder / "meta" / "episodes.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} is missing; the data set is not whole: download or copy it again")
    lines = [line for _, line in json_lines(path)]
    for line in sorted(lines, key=lambda line: _number(line, "episode_index", path)):
        number, length = _number(line, "episode_index", path), _number(line, "length", path)
        names = {"episode_chunk": number // one.chunk_size, "episode_index": number}
        video = one.file("video", video_key=one.camera, **names) if one.is_video else None
        yield _Recording(number=number, length=length, data=one.file("data", **names), video=video)


def _listed_by_file(one: _Set) -> Iterator[_Recording]:
    paths = sorted((one.folder / "meta" / "episodes").glob("*/*.parquet"))
    if not paths:
        raise ValueError(f"{one.folder}/meta/episodes holds no parquet files; download or copy the set again")
    video = f"videos/{one.camera}"
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    in_video = [f"{video}/chunk_index", f"{video}/file_index", f"{video}/from_timestamp"]
    columns += in_video if one.is_video else []
    lines = [(path, line) for path in paths for line in parquet.table(path, needed=columns).to_pylist()]
    for path, line in sorted(lines, key=lambda found: _number(found[1], "episode_index", found[0])):
        start_s = line.get(in_video[2], 0.0)
        if not isinstance(start_s, int | float) or not 0 <= start_s < np.inf:
            raise ValueError(f"{path}: {in_video[2]} is {str(start_s)[:50]}, expected seconds from zero on")
        yield _Recording(
            number=_number(line, "episode_index", path),
            length=_number(line, "length", path),
            data=one.file("data", **_place(line, "data", path)),
            video=one.file("video", video_key=one.camera, **_place(line, video, path))
            if one.is_video
            else None,
            start_s=start_s,
        )


def _place(line: Mapping[str, Any], prefix: str, path: Path) -> dict[str, int]:
    return {name: _number(line, f"{prefix}/{name}", path) for name in ("chunk_index", "file_index")}


def _number(line: Mapping[str, Any], name: str, path: Path) -> int:
    value = line.get(name)
    if type(value) is not int or value < 0:
        raise ValueError(f"{path}: {name} is {str(value)[:50]}, expected a whole number from zero on")
    return value


# ---- frames --------------------------------------------------------------------------------------


def _rows(frames: Any, rows: np.ndarray, recording: _Recording) -> np.ndarray:
    """Rows of the recording's frames in its data file, first to last."""
    path, length = recording.data, recording.length
    where = f"{path}, episode {recording.number}"
    if len(rows) != length or not length:
        raise ValueError(
            f"{where}: {len(rows)} frames, where meta/episodes says {length}: download or copy the set again"
        )
    indices = parquet.whole_numbers(frames, "frame_index", path=path)[rows]
    order = np.argsort(indices, kind="stable")
    if not np.array_equal(indices[order], np.arange(length)):
        raise ValueError(
            f"{where}: frame_index runs from {indices.min()} to {indices.max()}, expected 0 to {length - 1}, "
            "each once"
        )
    return rows[order]


def _labels(
    frames: Any, rows: np.ndarray, subtasks: Mapping[int, object] | None, *, path: Path, folder: Path
) -> _Labels | None:
    """The subtask of each frame; None where the data set has none."""
    if _SUBTASKS in frames.column_names:
        codes = parquet.whole_numbers(frames, _SUBTASKS, path=path)[rows]
        return _Labels(codes=codes, texts=subtasks or {}, origin=f"{folder}/meta/subtasks")
    if _LANGUAGE not in frames.column_names:
        return None
    # Each row has the lines of the whole episode. One of the style "subtask" holds from its time on, until
    # the next.
    said = frames[_LANGUAGE][int(rows[0])].as_py()
    said = [line for line in said or () if isinstance(line, dict) and line.get("style") == "subtask"]
    now = frames["timestamp"].to_numpy()[rows] if "timestamp" in frames.column_names else np.empty(0, object)
    if now.dtype.kind != "f" or not all(isinstance(line.get("timestamp"), float) for line in said):
        raise ValueError(f"{path}: {_LANGUAGE} needs seconds as timestamp, in each line and of each frame")
    said.sort(key=lambda line: line["timestamp"])
    begins = np.array([line["timestamp"] for line in said], now.dtype)
    return _Labels(
        codes=np.searchsorted(begins, now, side="right") - 1,
        texts={number: line.get("content") for number, line in enumerate(said)},
        origin=f"{path}, {_LANGUAGE}",
    )


def _runs(codes: np.ndarray) -> list[tuple[int, int, int]]:
    """(code, first, stop) of each stretch of equal codes."""
    cuts = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    return [(int(codes[a]), a, b) for a, b in itertools.pairwise(cuts)]
