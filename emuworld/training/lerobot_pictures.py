"""Single pictures of a LeRobot data set: frames of an mp4 file, or encoded images in a parquet column.

Iterating decodes; nothing is kept.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
from PIL import Image

from emuworld.training import parquet


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoPictures:
    """The frames of a video that begin at `times_s`, fps frames a second. Each is sought for by itself: some
    30 ms and the frames since the last intra frame, however long the video.
    """

    path: Path
    fps: float
    times_s: tuple[float, ...]

    def __iter__(self) -> Iterator[Image.Image]:
        if not self.path.is_file():
            raise ValueError(f"{self.path} is missing; the data set is not whole: download or copy it again")
        for time_s in self.times_s:
            yield self._frame(time_s)

    def _frame(self, time_s: float) -> Image.Image:
        # Half a frame early: the first frame from there on is the wanted one, however the times are rounded.
        seek = ["-ss", f"{max(0.0, time_s - 0.5 / self.fps):.6f}"]
        # Only an mp4 file is read as one: a playlist with that ending would make ffmpeg open other files.
        format = ["-f", "mp4"]
        try:
            video: Any = imageio.get_reader(
                str(self.path),
                format="FFMPEG",
                input_params=[*seek, *format],
                output_params=["-frames:v", "1"],
            )
            with video:
                return Image.fromarray(video.get_data(0))
        except IndexError as error:
            raise ValueError(
                f"{self.path}: no frame at {time_s:.3f} s; the video ends before the episode does, or was "
                "cut off: download or copy it again"
            ) from error
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"{self.path}: not a video that can be read ({str(error).strip().splitlines()[-1][:300]}); "
                "download or copy it again"
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredPictures:
    """Rows of a parquet column of images, {bytes, path} each; only the bytes are read."""

    path: Path
    column: str
    rows: tuple[int, ...]

    def __iter__(self) -> Iterator[Image.Image]:
        for row, value in zip(self.rows, parquet.values(self.path, self.column, self.rows), strict=True):
            yield self._decoded(value, row)

    def _decoded(self, value: object, row: int) -> Image.Image:
        data = value.get("bytes") if isinstance(value, dict) else value
        where = f"{self.path}, row {row}, {self.column}"
        if not isinstance(data, bytes):
            raise ValueError(f"{where}: no image is stored there; embed the images and save the set again")
        try:
            with Image.open(io.BytesIO(data)) as opened:
                return opened.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{where}: not an image that can be read ({error})") from error
