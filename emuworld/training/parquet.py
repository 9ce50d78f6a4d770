"""Parquet files -> columns, with errors that name the file and what is wrong with it.

pyarrow is optional (the extra `lerobot`): nothing but LeRobot data sets needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ModuleNotFoundError:  # said by `_open`, to whoever has such a data set
    pa = pq = None


def table(path: Path, *, needed: Sequence[str], optional: Sequence[str] = ()) -> Any:
    """A `pyarrow.Table` with the needed columns and those of the optional ones that are there. ValueError
    where the file is missing or damaged, a needed column is missing, or pyarrow is not installed.
    """
    file = _open(path)
    try:
        there = file.schema_arrow.names
        missing = sorted(set(needed) - set(there))
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; there are {', '.join(there)[:500]}")
        return file.read(columns=[*needed, *(name for name in optional if name in there)])
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    finally:
        file.close()


def whole_numbers(columns: Any, name: str, *, path: Path) -> np.ndarray:
    """A column of a table as int64 [N]; no value counts as -1."""
    try:
        return columns[name].cast(pa.int64()).fill_null(-1).to_numpy()
    except pa.ArrowException as error:
        raise ValueError(
            f"{path}: the column {name} is {columns[name].type}, expected whole numbers"
        ) from error


def values(path: Path, column: str, rows: Sequence[int]) -> Iterator[Any]:
    """What some rows hold in one column, in their order; one row group of it is in memory at a time."""
    file = _open(path)
    try:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        ends = np.cumsum(sizes)
        if column not in file.schema_arrow.names or (rows and not 0 <= min(rows) <= max(rows) < sum(sizes)):
            raise ValueError(
                f"{path}: expected a column {column} with rows {list(rows)[:8]}, but has no such"
            )
        at, held = -1, None
        for row in rows:
            group = int(np.searchsorted(ends, row, side="right"))
            if group != at or held is None:
                at, held = group, file.read_row_group(group, columns=[column])[column]
            yield held[row - int(ends[group]) + sizes[group]].as_py()
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error
    finally:
        file.close()


def _open(path: Path) -> Any:
    if pq is None:
        raise ValueError(
            f"{path} is a parquet file, and pyarrow, which reads them, is not installed: "
            "pip install emuworld[lerobot]"
        )
    if not path.is_file():
        raise ValueError(f"{path} is missing; the data set is not whole: download or copy it again")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not a whole parquet file ({str(error)[:300]}); download or copy it again")
