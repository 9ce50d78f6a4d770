"""A run that is killed at random moments goes on with the loss curve of an unbroken one, to the bit.

`scripts/kill_and_resume.py --kills 20` is the long form of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kill_and_resume.py"


def test_killed_runs_go_on_as_if_nothing_had_been() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "3", "--steps", "14", "--seed", "1"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kills in 14 steps: the same loss curve" in done.stdout
