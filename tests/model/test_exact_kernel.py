"""The compiled layers: right to the last integer, close to fp64, and the same however the work is cut."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numba import carray, cfunc, njit, types
from numba.core import caching

from emuworld.model import exact_kernel, exact_linear, exact_vectors
from emuworld.model.cache import StaticCache
from emuworld.model.config import TransformerConfig, sized
from emuworld.model.exact import ExactTransformer, exact
from emuworld.model.exact_linear import ExactLinear
from emuworld.model.exact_numbers import narrowed, widened
from emuworld.model.transformer import Transformer

SMALL = sized("small", vocab_size=400, num_layers=2)
ODD = sized("tiny", vocab_size=101, hidden_size=72, intermediate_size=150, num_heads=6, head_dim=18)
"""Sizes that no vector width divides, of heads too."""
BOTH = pytest.mark.parametrize("config", [SMALL, ODD], ids=["small", "odd"])


def built(config: TransformerConfig) -> ExactTransformer:
    model = Transformer(config).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    return exact(model)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 101, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_inputs", [1, 31, 64, 150, 1024, 1152, 2500])
@pytest.mark.parametrize("num_outputs", [1, 16, 37])
def test_sums_are_exact(num_inputs: int, num_outputs: int, num_threads: int) -> None:
    """The largest numbers that there are, of one sign and of both, and any: fp32 of the true sum."""
    rng = np.random.default_rng(0)
    weight_NK = rng.choice([-127, 127], (num_outputs, num_inputs))
    weight_NK[::3] = 127
    weight_NK[1::3, 1:] = rng.integers(-127, 128, weight_NK[1::3, 1:].shape)
    x_MK = rng.choice([-16256, 16256], (3, num_inputs))
    x_MK[0] = 16256
    x_MK[1, 1:] = rng.integers(-16256, 16257, num_inputs - 1)
    linear = ExactLinear(torch.from_numpy(weight_NK).float())
    got_MN = linear(torch.from_numpy(x_MK).float())
    assert np.array_equal(got_MN.numpy(), (x_MK @ weight_NK.T).astype(np.float32))
    part_MN = linear.part(torch.from_numpy(x_MK).float(), start=num_outputs // 3, stop=num_outputs - 1)
    assert torch.equal(part_MN, got_MN[:, num_outputs // 3 : num_outputs - 1])


def test_exponential_function() -> None:
    x_N = np.linspace(-87, 88, 30_001, dtype=np.float32)
    wanted_N = np.exp(x_N.astype(np.float64))
    error_N = np.abs(np.array([exact_kernel.exp(x) for x in x_N]) - wanted_N)
    assert (error_N / np.spacing(wanted_N.astype(np.float32))).max() < 1.5
    assert exact_kernel.exp(np.float32(0)) == 1
    assert exact_kernel.exp(np.float32(-1e30)) < 1e-37 and exact_kernel.exp(np.float32(1e30)) > 1e38


@BOTH
def test_close_to_double_precision(config: TransformerConfig) -> None:
    """The same 8-bit weights, everything else in fp64: what is left is the rounding of activations, keys and
    values."""
    model = Transformer(config).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    ids_BT = tokens(2, 40)
    got = exact(model)(ids_BT)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear) and module is not model.lm_head:
                scale_N1 = module.weight.abs().amax(1, keepdim=True) / 127
                module.weight.copy_((module.weight / scale_N1).round() * scale_N1)
        wanted = model.double()(ids_BT)
    assert (got - wanted).norm() / wanted.norm() < 6e-4


@BOTH
@pytest.mark.parametrize("pieces", [[1] * 50, [16, 1, 2, 31], [49, 1]])
def test_how_tokens_are_cut_into_calls_changes_nothing(
    config: TransformerConfig, pieces: list[int], num_threads: int
) -> None:
    model, ids_BT = built(config), tokens(3, 50)
    whole, cut = (
        StaticCache(config, num_rows=3, capacity=capacity, dtype=torch.float16) for capacity in (50, 300)
    )
    wanted = model(ids_BT, cache=whole)
    got = torch.cat([model(piece, cache=cut) for piece in ids_BT.split(pieces, dim=1)], dim=1)
    assert torch.equal(got, wanted)
    for a, b in zip(whole.memory.kv_RKCd, cut.memory.kv_RKCd, strict=True):
        assert torch.equal(a[:, :, :50], b[:, :, :50])


@BOTH
def test_how_work_is_shared_changes_nothing(
    config: TransformerConfig, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread, or every part piece by piece by whoever comes."""
    model, results = built(config), []
    for worth in (1 << 60, 1):
        monkeypatch.setattr(exact_linear, "WORTH_A_HELPER", worth)
        cache = StaticCache(config, num_rows=4, capacity=40, dtype=torch.float16)
        states = [model(tokens(4, 30), cache=cache), model(tokens(4, 1), cache=cache)]
        results.append([*states, model(tokens(2, 3), cache=cache.rows([3, 1]), causal=False)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@BOTH
def test_drawn_ahead_is_what_is_drawn_one_by_one(config: TransformerConfig, num_threads: int) -> None:
    """Three worlds, of which the first has two rows, take the likeliest id of the first row's scores."""
    model, start, stop = built(config), 7, 90
    prompts, sources_B = [tokens(1, length, seed=length) for length in (3, 20, 9, 33)], np.array([0, 1, 0, 2])
    ahead, single = (
        StaticCache(config, num_rows=6, capacity=64, dtype=torch.float16).rows([4, 0, 2, 3]) for _ in range(2)
    )
    for row, prompt in enumerate(prompts):
        for cache in (ahead, single):
            model(prompt, cache=cache.rows([row]))
    ids_WN = np.zeros((3, 11), np.int64)
    ids_WN[:, 0] = 5, 80, 33
    wanted_WN = ids_WN.copy()
    hidden_BD = model.draw_ahead(
        ids_WN, sources_B, cache=ahead, start=start, stop=stop, chooser=Likeliest(stop - start, start)
    )
    for n in range(10):
        wanted_BD = model(torch.from_numpy(wanted_WN[sources_B, n : n + 1]), cache=single)[:, 0]
        scores_BV = model.logits(wanted_BD, start=start, stop=stop)
        wanted_WN[:, n + 1] = start + scores_BV[[0, 1, 3]].argmax(dim=1)
    assert np.array_equal(ids_WN, wanted_WN) and torch.equal(hidden_BD, wanted_BD)
    assert ahead.lengths.tolist() == single.lengths.tolist() == [13, 30, 19, 43]
    assert all(ahead.ids(row, 0) == single.ids(row, 0) for row in range(4))
    for a, b in zip(ahead.memory.kv_RKCd, single.memory.kv_RKCd, strict=True):
        assert torch.equal(a, b)


class Likeliest:
    """A chooser without any chance; its argument is the address of sizes and addresses."""

    def __init__(self, num_ids: int, first_id: int) -> None:
        self._sizes = num_ids, first_id
        self._function = cfunc(types.void(types.int64, types.int64, types.int64))(likeliest)

    @property
    def function(self) -> int:
        address: int = self._function.address
        return address

    def argument(self, scores_BV: np.ndarray, ids_WN: np.ndarray) -> int:
        rows = (0, 1, 3)
        places = [scores_BV[row].ctypes.data for row in rows]
        self._numbers = np.array([*self._sizes, ids_WN.ctypes.data, ids_WN.shape[1], *places])
        address: int = self._numbers.ctypes.data
        return address


def likeliest(argument: int, world: int, step: int) -> None:
    numbers = carray(exact_kernel.pointer(argument), 7, np.int64)
    scores_V = carray(exact_kernel.pointer(numbers[4 + world]), numbers[0], np.float32)
    ids_WN = carray(exact_kernel.pointer(numbers[2]), (3, numbers[3]), np.int64)
    ids_WN[world, step + 1] = numbers[1] + np.argmax(scores_V)


def test_sixteen_bits_are_those_of_ieee() -> None:
    """Every number that there is and what lies between; beyond the largest, the largest."""
    halves_N = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves_N = halves_N[np.isfinite(halves_N)]
    widened_N = np.array([widened(bits) for bits in halves_N.view(np.int16)], np.float32)
    assert np.array_equal(widened_N.view(np.int32), halves_N.astype(np.float32).view(np.int32))
    rng = np.random.default_rng(0)
    ties_N = (widened_N[:31743] + widened_N[1:31744]) / 2
    any_N = np.exp2(rng.uniform(-26, 16, 20_000)) * rng.choice([-1, 1], 20_000)
    x_N = np.concatenate((widened_N, ties_N, np.nextafter(ties_N, 9e9), any_N)).astype(np.float32)
    x_N = x_N[np.abs(x_N) < 65504]
    got_N = np.array([narrowed(x) for x in x_N], np.int16)
    assert np.array_equal(got_N, x_N.astype(np.float16).view(np.int16))
    assert [narrowed(np.float32(x)) for x in (1e9, -1e9)] == [0x7BFF, np.int16(0xFBFF - (1 << 16))]


def key_sums(keys_Cd: np.ndarray) -> np.ndarray:
    """Each key times ones, by the vectors of now."""
    few_scores, lanes = exact_vectors._scores(1), exact_vectors.LANES

    @njit
    def score(bits_Cd: np.ndarray, ones_d: np.ndarray, scores_C: np.ndarray) -> None:
        stride, count = 2 * ones_d.size, ones_d.size // lanes
        for s in range(0, scores_C.size, lanes):
            place = scores_C[s:].ctypes.data
            few_scores(bits_Cd[s].ctypes.data, stride, ones_d.ctypes.data, 0, count, place, 0)

    scores_C = np.zeros(len(keys_Cd), np.float32)
    score(keys_Cd.view(np.int16), np.ones(keys_Cd.shape[1], np.float32), scores_C)
    return scores_C


def test_vectors_of_sixteen_bits_need_no_instruction_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors that have none for it, integers do it."""
    rng = np.random.default_rng(0)
    numbers = (rng.normal(size=400), rng.normal(size=400) * 1e-6, np.array([0.0, -0.0, 6e4, -65504.0] * 56))
    keys_Cd = rng.permutation(np.concatenate(numbers)).astype(np.float16).reshape(16, 64)
    by_instruction_C = key_sums(keys_Cd)
    monkeypatch.setattr(exact_vectors, "_WIDENS_HALVES", False)
    assert np.array_equal(key_sums(keys_Cd), by_instruction_C)
    np.testing.assert_allclose(by_instruction_C, keys_Cd.astype(np.float64).sum(axis=1), atol=0.1)


def test_rows_anywhere_in_a_cache_that_grows() -> None:
    model, ids_BT = built(ODD), tokens(1, 70)
    wanted = model(ids_BT)[0]
    cache = StaticCache(ODD, num_rows=7, capacity=10, dtype=torch.float16)
    model(tokens(7, 10, seed=2), cache=cache)
    cache.truncate(5, 0)
    got = [model(ids_BT[:, :9], cache=cache.rows([5]))[0]]
    cache.reserve(200)
    for at in range(9, 70):
        rows = [5, 2, 6] if at % 2 else [0, 5]
        company = ids_BT[:, at : at + 1].repeat(len(rows), 1)
        hidden = model(company, cache=cache.rows(rows), advance_B=[row == 5 for row in rows])
        got.append(hidden[rows.index(5)])
    assert torch.equal(torch.cat(got), wanted)
    assert cache.lengths.tolist() == [10, 10, 10, 10, 10, 70, 10]


CHILD = """
import torch
from tests.model.test_exact_kernel import SMALL, built, tokens
print(built(SMALL)(tokens(2, 9)).numpy().tobytes().hex())
"""


def test_another_process_gives_equal_bits() -> None:
    wanted = built(SMALL)(tokens(2, 9)).numpy().tobytes().hex()
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300)
    assert child.stdout.strip() == wanted, child.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_child_has_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_linear, "WORTH_A_HELPER", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = built(ODD)
        wanted = model(tokens(2, 1)).numpy().tobytes()  # the parent's threads have started
        reader, writer = os.pipe()
        if (child := os.fork()) == 0:
            os.write(writer, model(tokens(2, 1)).numpy().tobytes())
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(reader, 1 << 16) == wanted
    finally:
        torch.set_num_threads(before)


def test_models_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_linear, "WORTH_A_HELPER", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        models = [built(ODD), built(SMALL)]
        ids = [tokens(2, 20, seed=seed) for seed in range(8)]
        wanted = [models[i % 2](one) for i, one in enumerate(ids)]
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda i: models[i % 2](ids[i]), range(8)))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    finally:
        torch.set_num_threads(before)


def test_without_a_folder_for_compiled_code_it_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(locator: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(caching._CacheLocator, "ensure_cache_path", refuse)

    @exact_kernel.compiled(types.int64(types.int64))
    def next_number(number: int) -> int:
        return number + 1

    assert next_number(1) == 2


def test_what_is_kept_goes_by_the_sources_of_all_that_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """numba looks at the function's own file alone."""
    names = []
    for source in (b"one", b"one", b"another"):

        def double(number: int) -> int:
            return number * 2

        monkeypatch.setattr(Path, "read_bytes", lambda _, source=source: source)
        monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])  # no folder to keep it in
        assert exact_kernel.compiled(types.int64(types.int64))(double)(4) == 8
        names.append(double.__qualname__)
    assert names[0] == names[1] != names[2]
