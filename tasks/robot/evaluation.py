"""Suite `robot-331`: which cases there are, who runs them, and what of them is kept.

Every scene is a case of kind "scene". An agent whose plans have pictures runs the scenes whose goal place is
only in the picture twice more, with the text and with the keyframes alone ("use text", "use keyframe"), and
some scenes are shown to the pixel judges ("judges"). Cases are kept as they are done, so a killed run goes
on.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from emuworld.envs.tabletop.plans import Task
from emuworld.tasks.progress import OnProgress
from emuworld.tasks.robot.agents import NEEDS_MODEL
from emuworld.tasks.robot.keyframe_execution import USES
from emuworld.tasks.robot.scene_cases import SceneCase, SceneResult, do_case, open_renderer
from emuworld.tasks.robot.suite import load_suite, suite_hash
from emuworld.tasks.robot.workers import Work, work_off
from emuworld.tasks.run_folder import PictureRow, Pictures, append_records, read_records, save_pictures
from emuworld.tasks.suites import RobotSuite
from emuworld.world_model import WorldModel

__all__ = ["NEEDS_MODEL", "case_settings", "measure"]

WITH_PICTURES = ("planner", "guide", "oracle")  # agents whose steps have keyframes


def case_settings(suite: RobotSuite) -> dict[str, Any]:
    """What beside the suite's own settings decides what a case gives."""
    return {"tasks": suite_hash([task.to_dict() for task in load_suite()]), "mujoco": mujoco.__version__}


def measure(
    suite: RobotSuite,
    folder: Path,
    *,
    model: WorldModel | None,
    num_workers: int,
    batch: int,
    on_progress: OnProgress,
) -> None:
    """Run the cases that are not stored in `folder` yet. Raises CasesFailed where some raised."""
    records = folder / "records.jsonl"
    cases = all_cases(suite, load_suite())
    if model is not None and suite.passes:
        sampling = replace(model.default_sampling(NEEDS_MODEL[suite.agent]), passes=suite.passes[0])
        cases = [replace(case, sampling=sampling) for case in cases]
    stored = {(one["kind"], one["index"]) for one in read_records(records)}
    missing = _mixed([case for case in cases if (case.kind, case.index) not in stored])
    done = len(cases) - len(missing)

    def keep(case: SceneCase, result: SceneResult) -> None:
        nonlocal done
        done += 1
        keep_pictures(folder, result, most=suite.num_pictures)
        append_records(records, [result.record])
        on_progress(f"{suite.name}: {suite.agent}", done, len(cases))

    work = Work(open_tool=functools.partial(open_renderer, suite.renderer), do=do_case)
    work_off(work, missing, num_workers=num_workers, model=model, batch=batch, on_result=keep)


def all_cases(suite: RobotSuite, tasks: Sequence[Task]) -> list[SceneCase]:
    """The cases of a suite, scenes first. ValueError for a family that it does not have."""
    families = {one.strip() for one in suite.families.split(",") if one.strip()}
    unknown = sorted(families - {task.family for task in tasks})
    if unknown:
        known = ", ".join(dict.fromkeys(task.family for task in tasks))
        raise ValueError(f"families={', '.join(unknown)} are unknown; expected some of {known}")
    chosen = [index for index, task in enumerate(tasks) if not families or task.family in families]
    chosen = chosen[: suite.first or None]
    cases = [("scene", index) for index in chosen]
    if suite.agent in WITH_PICTURES:
        shown = [index for index in chosen if tasks[index].goal_in_picture]
        cases += [(f"use {use}", index) for use in USES if use != suite.use for index in shown]
        stride = max(1, len(chosen) // max(suite.num_judged, 1))
        cases += [("judges", index) for index in chosen[::stride][: suite.num_judged]]
    return [
        SceneCase(kind=kind, index=index, task=tasks[index].to_dict(), suite=suite) for kind, index in cases
    ]


def _mixed(cases: Sequence[SceneCase]) -> list[SceneCase]:
    """Each kind's cases in a random order that is always the same: a run that is cut short has done some of
    every family."""
    kinds = list(dict.fromkeys(case.kind for case in cases))
    turns = np.random.default_rng(0).random(1 + max((case.index for case in cases), default=0))
    return sorted(cases, key=lambda case: (kinds.index(case.kind), turns[case.index]))


def keep_pictures(folder: Path, result: SceneResult, *, most: int) -> None:
    """Keep what was seen in an episode: of failures so many of each family, of successes one."""
    record = result.record
    if record["kind"] != "scene" or most < 1:
        return
    kind = "success" if record["success"] else "failure"
    family = str(record["family"])
    kept = Counter(path.name.split("_")[1] for path in (folder / "pictures").glob(f"{kind}_*.npz"))
    if kept[family] >= (1 if record["success"] else most):
        return
    rows = [
        PictureRow(name="imagined", frames=result.imagined),
        PictureRow(name="seen", frames=result.seen, notes=["", *(one["reason"] for one in record["steps"])]),
    ]
    pictures = Pictures(title=_title(record), columns=list(result.columns), rows=rows)
    save_pictures(folder / "pictures" / f"{kind}_{family}_{record['index']:05d}.npz", pictures)


def _title(record: dict[str, Any]) -> str:
    missed = ", ".join(fact for fact, holds in record["facts"].items() if not holds)
    told = f"{record['index']}, {record['variation']}: {record['instruction']}"
    if record["success"]:
        return told
    where = "" if record["blame"] is None else f" (step {record['failing_step'] + 1}, {record['blame']})"
    return f"{told}. Not reached: {missed}{where}"
