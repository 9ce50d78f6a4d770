"""How a checkpoint should draw unless told otherwise: a suite on the validation split with several settings.

    python scripts/choose_sampling.py model=FOLDER suite=t2i temperature=1.0,0.7 guidance=5,3 num=128
    python scripts/choose_sampling.py model=FOLDER suite=x2i temperature=0.5,0.3 image_guidance=1,2 stay=0,2
    python scripts/choose_sampling.py model=FOLDER suite=story temperature=1.0,0.5 num=24
    python scripts/choose_sampling.py model=FOLDER suite=explore guidance=1,2,3    # greedy, as its suite is
    python scripts/choose_sampling.py model=FOLDER suite=explore temperature=1.0,0.5    # as a user walks
    python scripts/choose_sampling.py model=FOLDER suite=t2i passes=8 guided_until=0.9,0.75    # drawn at once

All combinations are run on the same cases; OUT/SUITE.jsonl has a line for each, and no combination begins
after `seconds`. What is chosen goes into `SAMPLING` of emuworld/training/supervised.py or into the folder's
emuworld.json. The test split is never asked here.
"""

import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from emuworld.manifest import FILE_NAME, Manifest
from emuworld.tasks import evaluate
from emuworld.tasks.suites import EditPictures, ExploreTwin, RoomSuite, TellTales, TextToImage

SUITES: dict[str, RoomSuite] = {
    "t2i": TextToImage(split="validation", num_pictures=0),
    "x2i": EditPictures(split="validation", num_pictures=0),
    "story": TellTales(split="validation", num_pictures=0),
    "explore": ExploreTwin(
        split="validation", num_pictures=0, num_steps=3, num_shuffled=0, num_walks=0, num_turns=0
    ),
}
COUNTS = {"t2i": "num_prompts", "x2i": "num_edits", "story": "num_tales", "explore": "num_starts"}
AXES = ("temperature", "top_p", "guidance", "image_guidance", "stay", "guided_until")


def main(words: list[str]) -> int:
    given = dict(word.split("=", 1) for word in words)
    known = {"model", "suite", "num", "passes", "out", "device", "renderer", "workers", "seconds", *AXES}
    if given.keys() - known or given.get("suite") not in SUITES or "model" not in given:
        print(__doc__)
        return 2
    name, out = given["suite"], Path(given.get("out", "outputs/sampling"))
    out.mkdir(parents=True, exist_ok=True)
    changes: dict[str, Any] = {key: given[key] for key in ("device", "renderer") if key in given}
    changes |= {COUNTS[name]: int(given.get("num", "96")), "workers": int(given.get("workers", "0"))}
    if "passes" in given:
        changes["passes"] = (int(given["passes"]),)
    if name == "explore" and "temperature" in given:
        changes["temperature"] = None
    suite = replace(SUITES[name], **changes)
    axes = {axis: [float(value) for value in given[axis].split(",")] for axis in AXES if axis in given}
    end = time.monotonic() + float(given.get("seconds", "inf"))
    for values in itertools.product(*axes.values()):
        if time.monotonic() > end:
            break
        setting = dict(zip(axes, values, strict=True))
        label = "-".join(f"{axis}-{value:g}" for axis, value in setting.items())
        model = with_sampling(Path(given["model"]), out / name / label / "model", mode=name, setting=setting)
        begun = time.monotonic()
        figures = evaluate.run(replace(suite, model=str(model), out=str(out / name / label)))
        line = {**setting, **told(name, figures), "took_s": round(time.monotonic() - begun, 1)}
        with (out / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    return 0


def with_sampling(source: Path, folder: Path, *, mode: str, setting: dict[str, float]) -> Path:
    """A folder with the checkpoint's files, as links, and other settings for a mode."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and file.name != FILE_NAME and not (folder / file.name).exists():
            (folder / file.name).symlink_to(file.resolve())
    manifest = Manifest.load(source)
    own = manifest.sampling_for(mode)
    image: dict[str, Any] = {a: value for a, value in setting.items() if a in ("temperature", "top_p")}
    guided: dict[str, Any] = {axis: value for axis, value in setting.items() if axis not in image}
    changed = replace(own, image=replace(own.image, **image), **guided)
    replace(manifest, sampling={**manifest.sampling, mode: changed}, gpu_sampling={}).save(folder)
    return folder


def told(name: str, figures: dict[str, Any]) -> dict[str, float]:
    """The rates that a choice goes by; of walks decibels too."""
    if name == "explore":
        seen = figures["psnr"]["seen"]["dream"]
        told = {f"seen_{step}_db": one["value"] for step, one in enumerate(seen, start=1)}
        told["over_copy_db"] = figures["one_step_moves"]["over_copy_db"]["value"]
        told["retrieval"] = figures["retrieval"]["value"]
        return {key: round(value, 4) for key, value in told.items() if value is not None}
    if name == "story":
        rates = figures["overall"]["dream"]
    else:
        rates = figures["dream"]["all"] if name == "t2i" else figures["groups"]["all"]["dream"]
    return {key: round(one["value"], 4) for key, one in rates.items()}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
