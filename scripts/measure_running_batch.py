"""Pictures of unequal sizes in batches and in a running batch: the built-in model, this machine's CPU.

./run python scripts/measure_running_batch.py
"""

from __future__ import annotations

import time

from emuworld.world_model import WorldModel, WorldState, load

NUM_PICTURES, AT_ONCE, REPEATS = 32, 8, 2


def states(model: WorldModel) -> list[WorldState]:
    """Every eighth picture has 256 px, the others have 128."""
    return [
        model.begin(
            mode="t2i", prompt="a room with a red ball", seed=k, size=(256, 256) if k % 8 == 0 else (128, 128)
        )
        for k in range(NUM_PICTURES)
    ]


def in_batches(model: WorldModel) -> None:
    worlds = states(model)
    for start in range(0, NUM_PICTURES, AT_ONCE):
        model.imagine_batch(worlds[start : start + AT_ONCE], [""] * AT_ONCE)


def running(model: WorldModel) -> None:
    with model.running_batch(AT_ONCE) as batch:
        for name, state in enumerate(states(model)):
            batch.add(state, "", name=name)
        for _ in batch:
            pass


def main() -> None:
    model = load("small", device="cpu")
    for _ in range(REPEATS):
        for way in (in_batches, running):
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            way(model)
            wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
            print(
                f"{NUM_PICTURES} pictures, {way.__name__}: {wall_s:.1f} s, {cpu_s:.1f} s of CPU time",
                flush=True,
            )


if __name__ == "__main__":
    main()
