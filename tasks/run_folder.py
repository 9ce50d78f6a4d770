"""The folder of one evaluation run: what is kept there, and how it is read again.

`run.json` (settings, versions, hardware, time), `records.jsonl` (one scored case a line), `pictures/*.npz`
(frames for the page), and what `report.py` makes of them. Plain JSON and plain arrays: nothing is
unpickled.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emuworld.files import written
from emuworld.tasks.metrics import Frame

Record = dict[str, Any]
FORMAT = 4  # of the records; 4: of a moved camera, what the given picture shows is judged


@dataclass(frozen=True, kw_only=True, eq=False)
class PictureRow:
    """A row of frames with a name, and a note under each or none."""

    name: str
    frames: Sequence[Frame] | NDArray[np.uint8]  # one size
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Pictures:
    """Rows of frames under common column heads."""

    title: str
    columns: Sequence[str]
    rows: Sequence[PictureRow]


def read_run(folder: Path) -> dict[str, Any]:
    """What `run.json` says of the run in a folder. ValueError unless there is one, with records that this
    release reads.
    """
    path = folder / "run.json"
    if not path.exists():
        raise ValueError(
            f"there is no run in {folder} (no run.json); run the suite first, without score_only"
        )
    try:
        run: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}); run the suite again with resume=false") from error
    if run.get("format") != FORMAT:
        raise ValueError(
            f"the cases in {folder} are of format {run.get('format')}, this release reads {FORMAT}; run the "
            "suite again with resume=false, or with another out"
        )
    return run


def read_records(path: Path) -> list[Record]:
    """The whole lines of a records file, one case each and each case once; a line that a kill cut short is
    left out.
    """
    cases: dict[tuple[str, int], Record] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        cases[record["kind"], record["index"]] = record
    return [cases[key] for key in sorted(cases)]


def append_records(path: Path, records: Sequence[Record]) -> None:
    """Add one line a case. A line that an earlier kill cut short is closed first."""
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        file.write(b"\n" if size and file.read(1) != b"\n" else b"")
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())


def save_pictures(path: Path, pictures: Pictures) -> None:
    """Keep rows of frames for the page."""
    keys = [f"row_{index}" for index in range(len(pictures.rows))]
    words = {
        "title": pictures.title,
        "columns": list(pictures.columns),
        "rows": [{"name": row.name, "notes": list(row.notes)} for row in pictures.rows],
    }
    arrays: dict[str, Any] = {
        key: np.stack(list(row.frames)) for key, row in zip(keys, pictures.rows, strict=True)
    }
    with written(path) as beside, beside.open("wb") as file:
        np.savez_compressed(file, words=np.array(json.dumps(words)), **arrays)


def load_pictures(path: Path) -> Pictures:
    """Read what `save_pictures` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        words = json.loads(str(stored["words"]))
        rows = [
            PictureRow(name=row["name"], frames=list(stored[f"row_{index}"]), notes=row["notes"])
            for index, row in enumerate(words["rows"])
        ]
    return Pictures(title=words["title"], columns=words["columns"], rows=rows)
