"""Run a suite: what is stored already is kept, what is missing is run, and the report is written.

Cases are appended to `records.jsonl` as they are done, so a killed run goes on where it stopped. A record
holds every figure of its case, so that summaries can be made again without a model.
"""

import json
import os
import platform
import shlex
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from emuworld.checkpoint_folder import DETECTOR_FILE
from emuworld.envs.render import checked_backend
from emuworld.files import write_text
from emuworld.tasks import explore_twin, image_edits, report, tales, text_to_image
from emuworld.tasks.bench import Bench
from emuworld.tasks.comparison import check_comparable, write_comparison
from emuworld.tasks.detector import Detector
from emuworld.tasks.progress import OnProgress, quiet
from emuworld.tasks.robot import evaluation
from emuworld.tasks.robot.suite import load_suite
from emuworld.tasks.run_folder import FORMAT, read_records, read_run
from emuworld.tasks.suites import EditPictures, ExploreTwin, RobotSuite, RoomSuite, Suite, TellTales
from emuworld.tasks.truth import render_pool
from emuworld.world_model import WorldModel, load

GPU_BATCH, CPU_BATCH = 512, 8
# What must agree for stored cases to be used again; the rest (device, batch, pictures) changes speed, not
# cases.
_NOT_PART_OF_A_CASE = (
    "device", "batch", "workers", "out", "num_pictures", "resume", "score_only", "report", "num_starts",
    "num_walks", "num_turns", "num_prompts", "num_edits", "num_tales", "first", "families", "num_judged",
    "against",
)  # fmt: skip


def run(suite: Suite, *, on_progress: OnProgress = quiet) -> dict[str, Any]:
    """Run what is not stored yet, then write `summary.json` and `index.html` into `suite.out`; returns the
    figures (none where no report is asked for).

    With several `passes` each is run in a folder of its own, and what is written and returned compares them.
    """
    folder = Path(suite.out)
    checked_backend(suite.renderer)
    if isinstance(suite, RobotSuite):  # told before hours of work
        evaluation.all_cases(suite, load_suite())
        report.other_runs({"suite": suite.name, "case_settings": _case_settings(suite)}, suite.against)
    if len(suite.passes) > 1:
        return _compare(suite, folder, on_progress)
    if not suite.score_only:
        _run_cases(suite, folder, on_progress)
    else:
        read_run(folder)
    if not read_records(folder / "records.jsonl"):
        missing = "run the suite without score_only" if suite.score_only else "these settings ask for none"
        raise ValueError(f"{folder} holds no case: {missing}")
    if not suite.report:
        return {}
    figures = report.write_report(folder, against=suite.against if isinstance(suite, RobotSuite) else "")
    if isinstance(suite, RobotSuite):
        print(report.robot_table(figures))
    if isinstance(suite, TellTales):
        print(report.tale_table(figures))
    for name, bar in figures["bars"].items():
        value = bar["estimate"]["value"]
        shown = "unknown" if value is None else f"{value:.3f}"
        print(f"{'met   ' if bar['met'] else 'MISSED'} {name}: {shown} (bar {bar['bar']})")
    if "detector" in figures:
        judge = ", ".join(
            f"{name} {one['value']:.3f}" for name, one in figures["detector"].items() if one["count"]
        )
        print(f"the judge's own error on the simulator's frames: {judge}")
    print(f"see {folder / 'index.html'} and {folder / 'summary.json'}")
    return figures


def _compare(suite: Suite, folder: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Run the suite with each number of passes; figures with paired differences to the first."""
    check_comparable(suite.name)
    runs = {passes: folder / f"passes-{passes}" for passes in suite.passes}
    for passes, own in runs.items():
        print(f"passes={passes}{'' if passes else ' (token by token)'}:")
        run(replace(suite, passes=(passes,), out=str(own)), on_progress=on_progress)
    return write_comparison(folder, runs) if suite.report else {}


def _run_cases(suite: Suite, folder: Path, on_progress: OnProgress) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    needs_model = not isinstance(suite, RobotSuite) or suite.agent in evaluation.NEEDS_MODEL
    model = load(suite.model, device=suite.device, weights=suite.weights) if needs_model else None
    workers = suite.workers or min(16, os.cpu_count() or 1)
    batch = suite.batch or (GPU_BATCH if model is not None and model.device.type == "cuda" else CPU_BATCH)
    start, before_s = time.monotonic(), _open_run(suite, folder, model)
    try:
        if isinstance(suite, RobotSuite):
            evaluation.measure(
                suite, folder, model=model, num_workers=workers, batch=batch, on_progress=on_progress
            )
        elif model is not None:
            _measure_rooms(suite, folder, model, workers=workers, batch=batch, on_progress=on_progress)
    finally:
        _write_run(suite, folder, model, wall_s=before_s + time.monotonic() - start)


def _measure_rooms(
    suite: RoomSuite, folder: Path, model: WorldModel, *, workers: int, batch: int, on_progress: OnProgress
) -> None:
    judge = Path(suite.detector) if suite.detector else Path(model.folder) / DETECTOR_FILE
    detector = Detector.load(judge, device=model.device)
    with render_pool(workers) as pool, ThreadPoolExecutor(workers) as threads:
        bench = Bench(
            suite=suite,
            model=model,
            detector=detector,
            folder=folder,
            pool=pool,
            threads=threads,
            batch=batch,
            on_progress=on_progress,
        )
        if isinstance(suite, ExploreTwin):
            explore_twin.measure(bench, suite)
        elif isinstance(suite, EditPictures):
            image_edits.measure(bench, suite)
        elif isinstance(suite, TellTales):
            tales.measure(bench, suite)
        else:
            text_to_image.measure(bench, suite)


# Folders --------------------------------------------------------------------------------------------------


def _case_settings(suite: Suite) -> dict[str, Any]:
    settings = {key: value for key, value in asdict(suite).items() if key not in _NOT_PART_OF_A_CASE}
    return settings | (evaluation.case_settings(suite) if isinstance(suite, RobotSuite) else {})


def _fingerprint(model: WorldModel | None) -> str:
    return "" if model is None else model.fingerprint.hex()


def _open_run(suite: Suite, folder: Path, model: WorldModel | None) -> float:
    """Check that stored cases belong to these settings and this model; returns the seconds they took."""
    path, records = folder / "run.json", folder / "records.jsonl"
    if not suite.resume or not path.exists() or not read_records(records):
        records.unlink(missing_ok=True)
        for picture in folder.glob("pictures/*.npz"):
            picture.unlink()
        _write_run(suite, folder, model, wall_s=0.0)
        return 0.0
    stored = read_run(folder)
    mine, before = json.loads(json.dumps(_case_settings(suite))), stored["case_settings"]
    differ = [
        f"{key} was {before.get(key)!r} and is {mine.get(key)!r}"
        for key in sorted(mine | before)
        if mine.get(key) != before.get(key)
    ]
    if stored["model_fingerprint"] != _fingerprint(model):
        differ.append("the model has other weights")
    if differ:
        raise ValueError(
            f"{folder} holds cases of another run: {', '.join(differ)}; choose another folder with out=..., "
            "or drop them with resume=false"
        )
    return float(stored["wall_s"])


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "not installed"


def _write_run(suite: Suite, folder: Path, model: WorldModel | None, *, wall_s: float) -> None:
    packages = ("emuworld", "torch", "mujoco", "numpy", "gymnasium")
    on_gpu = model is not None and model.device.type == "cuda"
    gpu = torch.cuda.get_device_name(model.device) if model is not None and on_gpu else "no GPU used"
    run = {
        "suite": suite.name,
        "format": FORMAT,
        "settings": asdict(suite),
        "case_settings": _case_settings(suite),
        "model_fingerprint": _fingerprint(model),
        "versions": {name: _version(name) for name in packages} | {"python": platform.python_version()},
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores, {gpu}",
        "wall_s": round(wall_s, 1),
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["emuworld", *sys.argv[1:]]),
    }
    write_text(folder / "run.json", json.dumps(run, indent=1))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
