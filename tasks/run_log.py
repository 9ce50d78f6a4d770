"""A measurement's log: parts that fail alone, one JSON line each, written as soon as it is known."""

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


class RunLog:
    """Runs the parts of a measurement and keeps what they give.

    Args:
        path: a file of JSON lines; lines are added, never taken away.
        budget_s: seconds from now on after which no part is begun that would not end in time.
    """

    def __init__(self, path: Path, *, budget_s: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._start_s = time.perf_counter()
        self._budget_s = budget_s
        self.figures: dict[str, Figures] = {}
        """What each part gave, those left out that failed or were skipped."""

    def run(
        self, part: str, work: Callable[[], Figures], *, expected_s: float = 0.0, keep_s: float = 0.0
    ) -> Figures | None:
        """The part's figures; None where it failed or would take longer than what is left when `keep_s` are
        kept for what comes after it.
        """
        left_s = self._left_s() - keep_s
        if expected_s > left_s:
            self._write(part, {"skipped": f"would take {expected_s:.0f} s of the {left_s:.0f} s left"})
            return None
        begin_s = time.perf_counter()
        figures, error = self._attempt(work)
        if figures is None:
            self._write(part, {"error": error})
            return None
        self.figures[part] = figures
        self._write(part, {**figures, "took_s": round(time.perf_counter() - begin_s, 2)})
        return figures

    def _left_s(self) -> float:
        return self._budget_s - (time.perf_counter() - self._start_s)

    def _attempt(self, work: Callable[[], Figures]) -> tuple[Figures | None, str]:
        """The figures, or None and what went wrong."""
        try:
            return work(), ""
        except Exception as error:  # the other parts are worth having: device time is dear
            traceback.print_exc(file=sys.stderr)
            return None, f"{type(error).__name__}: {error}"

    def _write(self, part: str, figures: Figures) -> None:
        line = json.dumps({"part": part, **figures})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)
