"""Milliseconds a token of the small model's CPU form (random weights), by rows and context.

./run python scripts/measure_decoding.py --threads 2 [--rows 1 2 4 8 16] [--contexts 300 3000 12000]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from emuworld.model.exact import ExactTransformer, exact
from emuworld.model.transformer import StaticCache, Transformer, sized

VOCABULARY = 12_000
HEAD_ROWS = 4_096  # the grammar allows about so many ids inside a picture
NUM_STEPS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[300, 3000, 12_000])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = built()
    print(f"{options.threads} threads; ms a token: fastest / median of {NUM_STEPS}")
    print("context " + "".join(f"{rows:>8} rows" for rows in options.rows))
    for context in options.contexts:
        cells = [milliseconds(model, num_rows=rows, context=context) for rows in options.rows]
        print(
            f"{context:>7} " + "".join(f"{min(cell):>6.2f}/{statistics.median(cell):<6.2f}" for cell in cells)
        )
    ids_BT = torch.zeros(1, 300, dtype=torch.int64)
    seconds = min(timed(lambda: model(ids_BT)) for _ in range(3))
    print(f"prefill of 300 tokens: {1e3 * seconds:.0f} ms")


def built() -> ExactTransformer:
    model = Transformer(sized("small", vocab_size=VOCABULARY))
    model.init_weights(torch.Generator().manual_seed(0))
    return exact(model)


def milliseconds(model: ExactTransformer, *, num_rows: int, context: int) -> list[float]:
    cache = StaticCache(model.config, num_rows=num_rows, capacity=context + NUM_STEPS, dtype=model.dtype)
    cache.finish(cache.begin(context))  # as if so many tokens had been written
    ids_R1 = torch.zeros(num_rows, 1, dtype=torch.int64)

    def step() -> None:
        model.logits(model(ids_R1, cache=cache)[:, -1], start=0, stop=HEAD_ROWS)

    return [1e3 * timed(step) for _ in range(NUM_STEPS)]


def timed(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
