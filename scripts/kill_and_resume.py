"""Kill a training run at random moments (SIGKILL) and go on; its log must be that of an unbroken run.

    ./run python scripts/kill_and_resume.py --kills 20 --steps 80

Trains the tiny transformer on made-up walls with everything that has a state: Muon and AdamW, dropout, packed
rows, shards on disk. A moment may lie anywhere: while states are read or written, in a step, in the log.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from emuworld.story import Story, StoryImage, StorySegment, write_shard
from emuworld.tokens.bpe import train_bpe
from emuworld.tokens.sequence import template_texts
from emuworld.tokens.vision import VisionConfig, VisionTokenizer
from emuworld.training import supervised
from emuworld.training.examples import Bucket
from emuworld.training.loop import LoopConfig
from emuworld.training.packing import Packing
from emuworld.training.supervised import PretrainTraining

SIZE_PX = 32
VISION = VisionConfig(
    patch_px=4, width=16, width_multipliers=(1, 1, 1), z_channels=8, embed_dim=8, num_codes=32, norm_groups=4
)
SAVE_EVERY_STEPS = 3
MOST_STEPS_ALIVE = 9


def prepare(folder: Path, *, steps: int) -> PretrainTraining:
    """Shards, tokenizers and the settings of the run."""
    rng = np.random.default_rng(0)
    for number in range(2):
        stories = []
        for _ in range(4):
            walls = rng.integers(0, 256, (6, 1, 1, 3)).astype(np.uint8) * np.ones(
                (SIZE_PX, SIZE_PX, 1), np.uint8
            )
            segments = tuple(
                StorySegment(text="go on", images=(StoryImage.from_array(wall, caption="a wall"),))
                for wall in walls
            )
            stories.append(Story(question="look at walls", segments=segments))
        write_shard(folder / f"walk-{number}.stories", stories)
    train_bpe(
        ["go on a wall look at walls", *template_texts()] * 4, num_tokens=270, path=folder / "text.tiktoken"
    )
    torch.manual_seed(0)
    VisionTokenizer(VISION).save(folder)
    return PretrainTraining(
        shards=str(folder),
        vision=str(folder),
        text=str(folder / "text.tiktoken"),
        size_px=SIZE_PX,
        device="cpu",
        model="tiny",
        dropout=0.1,
        buckets=(Bucket(kind="walk", frames=3, batch_size=2), Bucket(kind="picture", batch_size=2)),
        packing=Packing(tokens=300, rows=2),
        loop=LoopConfig(
            max_steps=steps,
            warmup_steps=5,
            log_every_steps=1,
            save_every_s=1e9,
            save_every_steps=SAVE_EVERY_STEPS,
        ),
    )


def start(config: PretrainTraining) -> int:
    """Train in a child; its process id. Forked, so that PyTorch is imported once."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            supervised.train(config)
            status = 0
        finally:
            os._exit(status)
    return child


def log_of(config: PretrainTraining) -> list[dict[str, float]]:
    """What the run has logged, but for the times."""
    path = Path(config.out) / "pretrain.log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    values = [json.loads(line) for line in lines if line.endswith("}")]
    return [{key: value for key, value in one.items() if key != "seconds"} for one in values]


def broken(config: PretrainTraining, *, kills: int, seed: int) -> int:
    """Train to the end with so many kills on the way; how many there were."""
    rng = np.random.default_rng(seed)
    done = 0
    while True:
        child = start(config)
        alive_steps, begun = int(rng.integers(MOST_STEPS_ALIVE)), len(log_of(config))
        while done < kills:
            if len(log_of(config)) >= begun + alive_steps:
                time.sleep(rng.uniform(0.0, 0.1))
                os.kill(child, signal.SIGKILL)
                done += 1
                break
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
            time.sleep(0.002)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return done
        if not os.WIFSIGNALED(status):
            raise RuntimeError(f"the resumed run failed with status {status}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = prepare(Path(folder), steps=given.steps)
        whole, parts = (dataclasses.replace(config, out=f"{folder}/{name}") for name in ("whole", "parts"))
        os.waitpid(start(whole), 0)
        kills = broken(parts, kills=given.kills, seed=given.seed)
        expected, found = log_of(whole), log_of(parts)
        assert len(expected) == given.steps, f"the unbroken run logged {len(expected)} steps"
        assert found == expected, "the loss curves differ"
        weights = [Path(one.out, "model.safetensors").read_bytes() for one in (whole, parts)]
        assert weights[0] == weights[1], "the weights differ"
    print(f"{kills} kills in {given.steps} steps: the same loss curve and the same weights, to the bit")


if __name__ == "__main__":
    main()
