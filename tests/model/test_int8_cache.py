"""A cache in 8 bits: what it keeps of keys and values, and rows that are fed, copied, grown and shared."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from triton_cases import run_cases

import emuworld
from emuworld import checkpoint_folder
from emuworld.cache_pool import CachePool
from emuworld.model import int8_cache, operations
from emuworld.model.cache import StaticCache
from emuworld.model.config import sized
from emuworld.model.fused import FusedTransformer
from emuworld.model.transformer import Transformer

HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNELS_SCRIPT = Path(__file__).with_name("int8_cache_cases.py")


def built() -> Transformer:
    model = Transformer(sized("tiny", vocab_size=300, max_position_embeddings=512, head_dim=32)).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def random_ids(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(seed))


def cache_of(form: FusedTransformer, *, num_rows: int = 1) -> StaticCache:
    return StaticCache(
        form.config, num_rows=num_rows, capacity=64, device=form.device, dtype=form.cache_dtype
    )


def test_numbers_by_hand() -> None:
    kv_RKTd = torch.tensor([[[254.0, -1.0, 3.0, -254.0]], [[0.0, 1.0, -2.0, 127.0]]])[None]
    numbers, scales = int8_cache.narrowed(kv_RKTd, int8_cache.FORMAT)
    assert scales.flatten().tolist() == [2.0, 1.0]
    assert numbers.flatten().tolist() == [127, 0, 2, -127, -128, -127, 126, -1]  # 1.5 to 2: the even one
    wide = int8_cache.widened(numbers, scales, dtype=torch.float32)
    assert wide.flatten().tolist() == [254.0, 0.0, 4.0, -254.0, 0.0, 1.0, -2.0, 127.0]
    zeros = int8_cache.zeros((2, 4, 64, 8), device=torch.device("cpu"))
    assert not int8_cache.widened(*int8_cache.parts(zeros), dtype=torch.float32).any()
    assert int8_cache.scales(zeros).data_ptr() == zeros.data_ptr() + 64 * 8
    assert zeros.untyped_storage().nbytes() == sum(part.nbytes for part in int8_cache.parts(zeros))


@torch.no_grad()
def test_every_way_to_feed_reads_the_same_cache() -> None:
    """Token by token, in short runs and as prefill, which reads it widened; near the 16-bit cache. The plain
    transformer takes it too.
    """
    model, ids_BT = built(), random_ids(2, 60)
    expected_BTD = model(ids_BT)
    form, results = FusedTransformer(model).variant(cache="int8"), []
    for reader, size in ((form, 1), (form, 4), (form, 30), (form, 60), (model, 30)):
        cache = cache_of(form, num_rows=2)
        assert cache.dtype == torch.int8
        parts = [reader(part, cache=cache) for part in ids_BT.split(size, dim=1)]
        results.append(torch.cat(parts, dim=1))
    for found_BTD in results:
        # A number that lies between two of 8 bits may fall to either side, by how its sum was taken.
        assert float((found_BTD - results[0]).norm() / expected_BTD.norm()) < 0.01
        assert 1e-4 < float((found_BTD - expected_BTD).norm() / expected_BTD.norm()) < 0.02


@torch.no_grad()
def test_copied_grown_and_cut_rows_go_on_alike() -> None:
    form, ids_BT = FusedTransformer(built()).variant(cache="int8"), random_ids(1, 30)
    cache, other = cache_of(form, num_rows=3), cache_of(form)
    form(ids_BT, cache=cache.rows([1]))
    cache.copy_row(1, 0)
    other.copy_row(1, 0, origin=cache)
    cache.reserve(200)
    form(random_ids(1, 9, seed=3), cache=cache.rows([0]))
    cache.truncate(0, 30)
    new_BT = random_ids(1, 5, seed=2)
    expected = form(new_BT, cache=cache.rows([1]))
    assert torch.equal(form(new_BT, cache=cache.rows([0])), expected)
    assert torch.equal(form(new_BT, cache=other), expected)


@torch.no_grad()
def test_the_pool_holds_chunks_in_8_bits() -> None:
    form = FusedTransformer(built()).variant(cache="int8")
    pool = CachePool(form)
    chunks = [tuple(random_ids(20, seed=seed).tolist()) for seed in (1, 2)]

    def held() -> list[torch.Tensor]:
        with pool.lend([chunks], room=4) as prepared:
            parts = [part for kv in prepared.cache.memory.kv_RKCd for part in int8_cache.parts(kv)]
            return [part[0, :, :40].clone() for part in parts]

    first = held()
    pool._working, pool._held = None, []  # what is stored is all that is left
    assert all(map(torch.equal, first, held())) and first[0].any() and first[1].all()
    assert pool.num_prefills == 2


def test_what_does_not_fit_is_refused(tiny_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="cache must be 'bf16' or 'int8', got 'int4'"):
        emuworld.load(tiny_folder, device="cpu", cache="int4")
    with pytest.raises(ValueError, match="cache='int8' needs a GPU of compute capability 8"):
        emuworld.load(tiny_folder, device="cpu", cache="int8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(checkpoint_folder.parallel, "tensor_group", lambda: object())
    with pytest.raises(ValueError, match="cache='int8' is not there where several processes"):
        checkpoint_folder.check_weights("bf16", torch.device("cuda"), cache="int8")


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernels_agree_with_plain_pytorch() -> None:
    printed = run_cases(KERNELS_SCRIPT, "compare", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert printed.count("agrees") == 15


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernels_compile_for_the_published_sizes(tmp_path: Path) -> None:
    printed = run_cases(KERNELS_SCRIPT, "compile", TRITON_CACHE_DIR=str(tmp_path))
    assert printed.count("compiled") == 10


@pytest.mark.gpu
@torch.no_grad()
def test_kernels_on_the_gpu_read_and_write_8_bits() -> None:
    """Proves that the kernels, whose numbers are widened by assembly there, agree with plain PyTorch over one
    cache, with rows of different lengths, and that graphs replay over it.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    assert run_cases(KERNELS_SCRIPT, "compare-gpu").count("agrees") == 15
    form = FusedTransformer(built().to("cuda", torch.bfloat16)).variant(cache="int8")
    plain = form.variant(use_kernels=False, use_graphs=False)
    assert form.uses_kernels and plain.operations is operations
    ids_BT, hidden = random_ids(3, 40).cuda(), []
    for one in (form, plain):
        cache = cache_of(form, num_rows=3)
        for row, length in enumerate((30, 7, 1)):
            one(ids_BT[row : row + 1, :length], cache=cache.rows([row]))
        hidden.append(torch.cat([one(part, cache=cache) for part in ids_BT[:, :6].split(1, dim=1)], dim=1))
    assert float((hidden[0] - hidden[1]).float().norm() / hidden[1].float().norm()) < 0.02
