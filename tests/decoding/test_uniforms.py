"""Random numbers that hang on a world's seed and step, the stream and the place alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from emuworld.decoding.uniforms import TokenUniforms


def expected(seed: int, step: int, *, counter: list[int], count: int) -> np.ndarray:
    """By definition: the upper 53 bits of Philox's words."""
    raw = np.random.Philox(
        key=np.array([seed, step], dtype=np.uint64), counter=np.array(counter, dtype=np.uint64)
    ).random_raw(count)
    return (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53


def check(world: int) -> None:
    seed, step = 2**64 - 1 - world, world
    uniforms = TokenUniforms(seed=seed, step=step)
    for index, draw, count in ((0, 0, 256), (2, 3, 7), (0, 0, 1)):
        numbers = expected(seed, step, counter=[0, 0, 1 + index, 1 + draw], count=count)
        assert np.array_equal(uniforms.grid(index, draw, count), numbers)
    for stream, position in ((0, 3), (0, 1025), (2, 511)):
        block, offset = divmod(position, 512)
        number = expected(seed, step, counter=[0, block, stream, 0], count=512)[offset]
        assert number == (uniforms.image(stream - 1, position) if stream else uniforms.text(position))


def test_numbers_are_those_of_philox_whatever_was_asked_before() -> None:
    for world in range(20):
        check(world)


def test_threads_do_not_disturb_each_other() -> None:
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(check, range(400)))
