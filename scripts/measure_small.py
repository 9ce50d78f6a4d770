"""The suites that a release of the built-in model is measured with, in order of importance, each under a time
limit: on a GPU that is lent for minutes. All run in one process, so that the model is opened once.

    python scripts/measure_small.py model=FOLDER out=outputs/measured stages=explore,t2i,x2i workers=14
    python scripts/measure_small.py model=FOLDER out=outputs/measured stages=robot workers=28     # beside it
    python scripts/measure_small.py model=FOLDER out=outputs/measured stages=dida-explore,dida-t2i
    python scripts/measure_small.py out=outputs/measured stages=pack      # a tar of records a stage
    python scripts/measure_small.py out=outputs/measured stages=score     # anywhere: summaries and pages

A stage that its limit cuts short keeps what it has, and the same command goes on with it. Nothing is scored
while the clock runs. share=0.1 takes a tenth of all cases; limit=60 gives every stage 60 seconds. passes=8
draws the pictures of the stages with one number of passes in so many (0: token by token, which they do unless
told otherwise). weights=fp8 computes in 8 bits.
"""

import gc
import json
import os
import signal
import sys
import tarfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from emuworld.tasks.suites import EditPictures, ExploreTwin, RobotSuite, Suite, TellTales, TextToImage

PASSES = (0, 4, 8, 2, 16, 1)  # 0: token by token; the others are compared with it, the likeliest first
DIDA = {"num_steps": 3, "num_shuffled": 0, "num_walks": 0, "num_turns": 0}
# Stage -> folder, limit in seconds, the suite.
STAGES: dict[str, tuple[str, float, Suite]] = {
    "explore": ("explore-twin", 110.0, ExploreTwin(passes=(0,), num_walks=0, num_turns=0)),
    "t2i": ("t2i", 30.0, TextToImage(passes=(0,), num_prompts=256)),
    "x2i": ("x2i", 40.0, EditPictures(passes=(0,), num_edits=192, num_pictures=2)),
    "story": ("story", 40.0, TellTales(passes=(0,), num_tales=96, num_pictures=4)),
    "walks": ("explore-twin", 45.0, ExploreTwin(passes=(0,), num_walks=32, num_turns=32)),
    "robot": ("robot-331/planner", 150.0, RobotSuite(agent="planner", num_judged=0, num_pictures=1)),
    "guide": ("robot-331/guide", 100.0, RobotSuite(agent="guide", num_judged=0, num_pictures=1)),
    "text-only": ("robot-331/text-only", 100.0, RobotSuite(agent="text-only", num_pictures=1)),
    "dida-explore": ("dida-explore-twin", 60.0, ExploreTwin(passes=PASSES, num_starts=96, **DIDA)),
    "dida-t2i": ("dida-t2i", 45.0, TextToImage(passes=PASSES, num_prompts=200)),
    "dida-x2i": ("dida-x2i", 45.0, EditPictures(passes=PASSES, num_edits=96)),
    "dida-story": ("dida-story", 60.0, TellTales(passes=PASSES, num_tales=48, num_pictures=4)),
    "dida-robot": ("dida-robot-331", 90.0, RobotSuite(passes=(0, 8), num_judged=0, num_pictures=0)),
}
_COUNTS = ("num_starts", "num_shuffled", "num_walks", "num_turns", "num_prompts", "num_edits", "num_tales")
_SCENES = 331


class OutOfTime(Exception):
    """A stage has used up its seconds."""


def main(words: list[str]) -> int:
    given = dict(word.split("=", 1) for word in words)
    unknown = given.keys() - {
        "model",
        "device",
        "out",
        "stages",
        "workers",
        "share",
        "limit",
        "passes",
        "renderer",
        "size_px",
        "weights",
    }
    if unknown or "stages" not in given:
        print(__doc__)
        return 2
    out = Path(given.get("out", "outputs/measured"))
    failed = 0
    for stage in given["stages"].split(","):
        if stage == "pack":
            pack(out)
        elif stage == "score":
            score(out)
        else:
            failed += not run(stage, out, given)
    return int(failed > 0)


def run(stage: str, out: Path, given: dict[str, str]) -> bool:
    """Run a stage up to its limit; whether it came to its end or was cut short, and did not fail."""
    # Here and not above: the simulator's processes import this file and have no use for torch.
    from emuworld.tasks import evaluate
    from emuworld.world_model import load

    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")  # of processes from now on
    folder, limit_s, suite = STAGES[stage]
    limit_s = float(given.get("limit", limit_s))
    start_s, end = time.monotonic(), "done"
    try:
        with time_limit(limit_s):
            evaluate.run(settled(suite, out / folder, given), on_progress=tell)
    except OutOfTime:
        end = "cut short"
    except Exception:  # the stages behind it are worth having
        traceback.print_exc()
        end = "failed"
    # The next stage's batches are of another form, and what a limit has cut short is half written.
    model, device = given.get("model", "small"), given.get("device", "auto")
    load(model, device=device, weights=given.get("weights", "bf16")).caches.clear()
    gc.collect()
    line = {"stage": stage, "end": end, "took_s": round(time.monotonic() - start_s, 1)}
    out.mkdir(parents=True, exist_ok=True)
    with (out / "stages.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)
    return end != "failed"


def settled(suite: Suite, folder: Path, given: dict[str, str]) -> Suite:
    """The suite with what the command says."""
    share = float(given.get("share", 1.0))
    changes: dict[str, Any] = {"out": str(folder), "report": False}
    changes |= {key: given[key] for key in ("model", "device", "renderer", "weights") if key in given}
    changes |= {key: int(given[key]) for key in ("workers", "size_px") if key in given}
    if "passes" in given and len(suite.passes) < 2:
        changes["passes"] = (int(given["passes"]),)
    if share < 1.0:
        counts = {name: getattr(suite, name) for name in _COUNTS if getattr(suite, name, 0)}
        changes |= {name: max(1, round(share * count)) for name, count in counts.items()}
        if isinstance(suite, RobotSuite):
            changes["first"] = max(1, round(share * _SCENES))
    return replace(suite, **changes)


def score(out: Path) -> None:
    """Summary and page of everything that is in the folder."""
    from emuworld.tasks import evaluate

    for folder, suite in {folder: suite for folder, _, suite in STAGES.values()}.items():
        place = out / folder
        kept = tuple(one for one in suite.passes if (place / f"passes-{one}" / "run.json").exists())
        if len(kept) < 2 and not (place / "run.json").exists():
            continue
        others = "" if not isinstance(suite, RobotSuite) else _others(place)
        more = {"against": others} if isinstance(suite, RobotSuite) else {}
        print(f"== {place}")
        try:
            evaluate.run(replace(suite, out=str(place), score_only=True, passes=kept or suite.passes, **more))
        except ValueError as error:
            print(f"not scored: {error}")


def _others(place: Path) -> str:
    """Folders of the other agents that are measured beside this one."""
    return ",".join(
        str(one) for one in sorted(place.parent.iterdir()) if one != place and (one / "run.json").exists()
    )


def pack(out: Path) -> None:
    """A tar of records and kept pictures for every folder, beside the folders."""
    for folder in sorted({folder for folder, _, _ in STAGES.values()}):
        if (out / folder).exists():
            name = out / f"{folder.replace('/', '-')}.tar.gz"
            with tarfile.open(name, "w:gz", compresslevel=3) as tar:
                tar.add(out / folder, arcname=folder)
            print(f"{name}: {name.stat().st_size / 2**20:.1f} MiB")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the body after so many seconds."""

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


_told: dict[str, float] = {}


def tell(label: str, done: int, total: int) -> None:
    """A line every few seconds."""
    now = time.monotonic()
    if done == total or now - _told.get(label, 0.0) > 5.0:
        _told[label] = now
        print(f"{now:9.1f} {label} {done}/{total}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
