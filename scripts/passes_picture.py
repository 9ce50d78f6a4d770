"""docs/images/passes.jpg: a walk in MuJoCo, and dreamt token by token and in passes.

./run python scripts/passes_picture.py [passes=8] [seed=11]
"""

from __future__ import annotations

import dataclasses
import io
import sys

import gymnasium as gym
from PIL import Image
from readme_pictures import IMAGES, sheet

import emuworld
from emuworld.files import write_bytes

COMMANDS = ("turn left", "move forward", "turn right", "look up", "move forward")


def main(words: list[str]) -> None:
    given = {"passes": "8", "seed": "11", **dict(word.split("=", 1) for word in words)}
    passes, seed = int(given["passes"]), int(given["seed"])
    simulator = gym.make("EmuWorld/ExploreSim-v0", split="validation")
    first, _ = simulator.reset(seed=seed)
    rows = {"MuJoCo": [simulator.step(command)[0] for command in COMMANDS]}
    model = emuworld.load("small", device="cpu")
    for name, number in (("token by token", 0), (f"{passes} passes", passes)):
        sampling = dataclasses.replace(model.default_sampling("explore"), passes=number)
        state, frames = model.begin(mode="explore", images=[first], seed=seed), []
        for command in COMMANDS:
            state, segment = model.imagine(state, command, sampling=sampling)
            frames.append(segment.image)
        rows[name] = frames
    told = [
        [
            (f"{name}, {command}", Image.fromarray(frame))
            for command, frame in zip(("first view", *COMMANDS), (first, *frames), strict=True)
        ]
        for name, frames in rows.items()
    ]
    buffer = io.BytesIO()
    sheet(told).save(buffer, format="JPEG", quality=88)
    write_bytes(IMAGES / "passes.jpg", buffer.getvalue())
    print(IMAGES / "passes.jpg", f"{len(buffer.getvalue()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
