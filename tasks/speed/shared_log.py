"""A log of what several processes measure together: every part is run by all of them, and told once."""

import faulthandler
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from emuworld.tasks.run_log import Figures, RunLog

_PATIENCE_S = 200  # a part takes a minute at most, its kernels' compilation included


class SharedLog(RunLog):
    """The first process decides what there is time for, and it alone writes. A part that failed in one
    process has failed in all.

    Who waits for a message that never comes waits for ever, so a process whose part takes longer than
    `_PATIENCE_S` says where it stands and ends; torchrun then ends the others. What was written stays.

    Args:
        group: the processes; None: this one alone.
    """

    def __init__(self, path: Path, *, budget_s: float, group: dist.ProcessGroup | None) -> None:
        super().__init__(path, budget_s=budget_s)
        self._group = group
        self.leads = group is None or dist.get_rank(group) == 0

    def _left_s(self) -> float:
        left_s = torch.tensor(super()._left_s(), dtype=torch.float64)
        if self._group is not None:
            dist.broadcast(left_s, src=0, group=self._group)
        return float(left_s)

    def _attempt(self, work: Callable[[], Figures]) -> tuple[Figures | None, str]:
        if self._group is None:
            return super()._attempt(work)
        faulthandler.dump_traceback_later(_PATIENCE_S, exit=True)
        try:
            figures, error = super()._attempt(work)
            failures = torch.tensor(float(figures is None))
            dist.all_reduce(failures, group=self._group)
        finally:
            faulthandler.cancel_dump_traceback_later()
        if failures == 0:
            return figures, ""
        return None, error or f"failed in {failures:.0f} of {self._group.size()} processes; see above"

    def _write(self, part: str, figures: Figures) -> None:
        if self.leads:
            super()._write(part, figures)
