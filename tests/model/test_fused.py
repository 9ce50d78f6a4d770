"""The CUDA form: the transformer's results from fused weights; kernels and graphs agree with plain ones."""

import gc
import importlib.util
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from triton_cases import run_cases

import emuworld
from emuworld.model import operations
from emuworld.model.cache import StaticCache
from emuworld.model.config import TransformerConfig, sized
from emuworld.model.fused import FusedTransformer, fused
from emuworld.model.transformer import Transformer

CONFIGS = {
    "tied": sized("tiny", vocab_size=300, max_position_embeddings=512),
    "one key-value head": sized(
        "tiny", vocab_size=300, max_position_embeddings=512, tie_word_embeddings=False, num_kv_heads=1
    ),
    "heads wider than hidden, no power of two": sized(
        "tiny", vocab_size=257, max_position_embeddings=512, num_heads=4, num_kv_heads=4, head_dim=48
    ),
    "other eps and theta": sized(
        "tiny", vocab_size=300, max_position_embeddings=512, rms_norm_eps=1e-3, rope_theta=10_000.0
    ),
}
HAS_TRITON = importlib.util.find_spec("triton") is not None
KERNELS_SCRIPT = Path(__file__).with_name("kernel_cases.py")
# Each module before all others; modules that are there with CUDA only are imported while others still are.
IMPORTS_WITH_CUDA = """
import importlib, sys, torch
torch.cuda.is_available = lambda: True
for name in sys.argv[1:]:
    for known in [known for known in sys.modules if known.split(".")[0] == "emuworld"]:
        del sys.modules[known]
    importlib.import_module(name)
    assert not name.endswith(".fused") or sys.modules[name].kernels is not None
    print("imported", name)
"""


def built(config: TransformerConfig, *, seed: int = 0) -> Transformer:
    """Random weights, three times the usual spread and uneven norms, so that a slip shows."""
    model = Transformer(config).eval()
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.mul_(3.0)
    return model


def random_ids(config: TransformerConfig, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_every_way_to_feed_gives_the_transformers_results(config: TransformerConfig) -> None:
    """Prefill, single tokens, pairs and short runs, over rows of a larger cache that are no neighbours."""
    model = built(config)
    ids_BT = random_ids(config, 3, 140)
    expected_BTD = model(ids_BT)
    expected_BTV = model.logits(expected_BTD)
    form = fused(model)
    cache = StaticCache(config, num_rows=5, capacity=64).rows([3, 0, 4])
    stops = [30, *range(31, 50), 52, 59, 70, 71, 139, 140]
    parts, start = [], 0
    for stop in stops:
        if stop > cache.capacity:
            cache.reserve(2 * stop)
        parts.append(form(ids_BT[:, start:stop], cache=cache))
        start = stop
    hidden_BTD = torch.cat(parts, dim=1)
    torch.testing.assert_close(hidden_BTD, expected_BTD, atol=2e-5, rtol=0)
    torch.testing.assert_close(form.logits(hidden_BTD), expected_BTV, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        form.logits(hidden_BTD, start=40, stop=90), expected_BTV[..., 40:90], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(form(ids_BT), expected_BTD, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 2, 9, 20])
def test_rows_of_different_lengths_and_rows_that_wait(num_tokens: int) -> None:
    model = built(CONFIGS["tied"])
    ids_BT = random_ids(model.config, 3, 80)
    lengths = [17, 40, 1]
    form = fused(model)
    cache = StaticCache(model.config, num_rows=3, capacity=100)
    for row, length in enumerate(lengths):
        form(ids_BT[row : row + 1, :length], cache=cache.rows([row]))
    form(random_ids(model.config, 3, num_tokens, seed=5), cache=cache, advance_B=[False] * 3)
    new_BT = torch.stack([ids_BT[row, length : length + num_tokens] for row, length in enumerate(lengths)])
    hidden_BTD = form(new_BT, cache=cache, advance_B=[True, False, True])
    assert cache.lengths.tolist() == [17 + num_tokens, 40, 1 + num_tokens]
    for row, length in enumerate(lengths):
        whole_TD = model(ids_BT[row : row + 1, : length + num_tokens])[0]
        torch.testing.assert_close(hidden_BTD[row], whole_TD[length:], atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [1, 9, 60])
def test_the_hidden_states_of_one_token_a_row(num_tokens: int) -> None:
    """What all of them are made with has it too; keys and values of all are written."""
    model = built(CONFIGS["tied"])
    form = fused(model)
    ids_BT, new_BT = random_ids(model.config, 3, 40), random_ids(model.config, 3, num_tokens, seed=5)
    last_B = torch.tensor([num_tokens - 1, 0, num_tokens // 2])
    caches = []
    for last in (None, last_B):
        cache = StaticCache(model.config, num_rows=3, capacity=110)
        for row, length in enumerate((17, 40, 1)):
            form(ids_BT[row : row + 1, :length], cache=cache.rows([row]))
        caches.append((cache, form(new_BT, cache=cache, last_B=last)))
    (cache, hidden_BTD), (other, found_B1D) = caches
    assert found_B1D.shape == (3, 1, model.config.hidden_size)
    torch.testing.assert_close(found_B1D[:, 0], hidden_BTD[torch.arange(3), last_B], atol=2e-5, rtol=0)
    for row, length in enumerate(cache.lengths.tolist()):
        assert other.lengths[row] == length
        for layer in range(model.config.num_layers):
            pairs = zip(cache.row_kv(layer, row, length), other.row_kv(layer, row, length), strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    expected_BTD = model(new_BT)
    assert torch.equal(model(new_BT, last_B=last_B)[:, 0], expected_BTD[torch.arange(3), last_B])


@torch.no_grad()
def test_weights_are_shared_and_the_transformer_stays_what_it_was() -> None:
    model = built(CONFIGS["one key-value head"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    form = FusedTransformer(model)
    assert fused(form) is form
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    attention, mlp, layer = model.model.layers[1].self_attn, model.model.layers[1].mlp, form.layers[1]
    for part, whole in (
        (attention.v_proj, layer.qkv_XD),
        (mlp.up_proj, layer.gate_up_XD),
        (attention.o_proj, layer.out_DX),
    ):
        assert part.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    assert form.variant().layers is form.layers
    ids_BT = random_ids(model.config, 1, 5)
    mlp.up_proj.weight.mul_(2.0)
    torch.testing.assert_close(form(ids_BT), model(ids_BT), atol=2e-5, rtol=0)


def test_a_full_cache_and_a_wrong_number_of_rows_are_refused() -> None:
    form = fused(built(CONFIGS["tied"]))
    cache = StaticCache(form.config, num_rows=2, capacity=64)
    with pytest.raises(ValueError, match="1 rows, the cache 2"):
        form(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    with pytest.raises(ValueError, match="room for 64 tokens"):
        form(torch.zeros(2, 65, dtype=torch.int64), cache=cache)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="kernels need CUDA"):
            form.variant(use_kernels=True)


def test_a_cache_that_grows_lets_go_of_its_old_memory() -> None:
    """Graphs hold on to a cache's `Memory` weakly: growth must give another one and let the old one go."""
    cache = StaticCache(CONFIGS["tied"], num_rows=1, capacity=64)
    view, old = cache.rows([0]), weakref.ref(cache.memory)
    cache.reserve(64)
    assert cache.memory is old()
    cache.reserve(65)
    gc.collect()
    assert old() is None and view.memory is cache.memory


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_every_module_about_kernels_imports_first_where_there_is_cuda() -> None:
    """A circle among them would show on a GPU machine only; the child process believes that it is on one."""
    root = Path(emuworld.__file__).parents[1]
    files = [
        path for name in ("model", "decoding", "tokens") for path in (root / "emuworld" / name).glob("*.py")
    ]
    names = [f"emuworld.{path.parent.name}.{path.stem}" for path in files if "triton" in path.read_text()]
    assert {"emuworld.model.fp8", "emuworld.model.fused", "emuworld.decoding.sampling"} <= set(names)
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS_WITH_CUDA, *sorted(names)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("imported") == len(names)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernels_agree_with_plain_pytorch() -> None:
    """In Triton's interpreter, in a process of its own: what `import triton` finds decides."""
    printed = run_cases(KERNELS_SCRIPT, "compare", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    assert printed.count("agrees") == 145
    assert printed.count("the same bits") == 6 and printed.count("all quotients") == 2


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_kernels_compile_for_the_published_sizes(tmp_path: Path) -> None:
    """To machine code for compute capability 9.0, which needs no GPU; nothing is spilled to local memory."""
    printed = run_cases(KERNELS_SCRIPT, "compile", TRITON_CACHE_DIR=str(tmp_path))
    assert printed.count("compiled") == 61


def cuda_model(**changes: object) -> Transformer:
    config = sized("small", vocab_size=500, num_layers=3, max_position_embeddings=2048, **changes)
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model.cuda().bfloat16().eval()


def filled(model: FusedTransformer, lengths: list[int], *, capacity: int = 700) -> StaticCache:
    cache = StaticCache(
        model.config, num_rows=len(lengths), capacity=capacity, device=model.device, dtype=model.dtype
    )
    for row, length in enumerate(lengths):
        model(random_ids(model.config, 1, length, seed=row).to(model.device), cache=cache.rows([row]))
    return cache


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within what bf16 allows: 1 % of the whole."""
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert float(error) < 0.01, f"relative error {float(error):.4f}"


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 16])
@pytest.mark.parametrize("lengths", [[5], [300, 41], [600] * 4, [1, 511, 512, 513, 77, 8, 64, 63] * 3])
def test_graphs_and_kernels_give_what_the_eager_form_gives(
    lengths: list[int], num_tokens: int, head_dim: int
) -> None:
    """Proves every form of a step on CUDA: recorded and replayed, with Triton kernels and without."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    form = fused(cuda_model(head_dim=head_dim))
    eager = form.variant(use_kernels=False, use_graphs=False)
    cache = filled(eager, lengths)
    choices = [(False, True), *([(True, False), (True, True)] if form.uses_kernels else [])]
    variants = [form.variant(use_kernels=kernels, use_graphs=graphs) for kernels, graphs in choices]
    for turn in range(4):  # computed, recorded, replayed, replayed
        ids_RT = random_ids(form.config, len(lengths), num_tokens, seed=100 + turn).cuda()
        expected_RTD = eager(ids_RT, cache=cache, advance_B=[False] * len(lengths))
        for variant in variants:
            assert_near(variant(ids_RT, cache=cache, advance_B=[False] * len(lengths)), expected_RTD)
        eager(ids_RT, cache=cache)


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_tokens", [40, 272])
@pytest.mark.parametrize("lengths", [[1], [64, 64], [300, 41], [600, 1, 77] * 5])
def test_many_tokens_behind_rows_of_any_lengths(lengths: list[int], num_tokens: int, causal: bool) -> None:
    """Proves attention over several blocks of queries, one way and both ways, the last tokens alone too, and
    as graphs. So many tokens behind each other make two forms in bf16 differ by up to a percent: fp32 is the
    judge.
    """
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    form = fused(cuda_model())
    eager = form.variant(use_kernels=False, use_graphs=False)
    exact = fused(cuda_model().float()).variant(use_kernels=False, use_graphs=False)
    capacity = max(lengths) + num_tokens
    cache, exact_cache = filled(eager, lengths, capacity=capacity), filled(exact, lengths, capacity=capacity)
    how = {"advance_B": [False] * len(lengths), "causal": causal}
    for turn in range(4):
        ids_RT = random_ids(form.config, len(lengths), num_tokens, seed=turn).cuda()
        exact_RTD = exact(ids_RT, cache=exact_cache, **how)
        plain_error = (eager(ids_RT, cache=cache, **how) - exact_RTD).norm()
        hidden_RTD = form(ids_RT, cache=cache, **how)
        assert float((hidden_RTD - exact_RTD).norm()) < 1.2 * float(plain_error)
        if causal:
            last_B = torch.arange(len(lengths), device="cuda") * 7 % num_tokens
            last_B1D = form(ids_RT, cache=cache, last_B=last_B, **how)
            assert_near(last_B1D, operations.only(hidden_RTD, last_B))


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("weights", ["bf16", "fp8"])
def test_kernels_that_come_early_give_the_same_bits(weights: str) -> None:
    """Proves that none reads what is not there yet, recorded and not."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs CUDA of compute capability 9.0")
    model = FusedTransformer(cuda_model(hidden_size=1024, intermediate_size=4096), weights=weights)
    in_turn = model.variant(programmatic_launches=False)
    cache = filled(in_turn, [300, 41])
    forms = [model.variant(use_graphs=graphs) for graphs in (False, True)]
    for turn in range(6):
        ids_RT = random_ids(model.config, 2, 1, seed=turn).cuda()
        expected_RTD = in_turn(ids_RT, cache=cache, advance_B=[False] * 2)
        expected_RTV = in_turn.logits(expected_RTD[:, 0])
        for form in forms:
            found_RTD = form(ids_RT, cache=cache, advance_B=[False] * 2)
            assert torch.equal(found_RTD, expected_RTD)
            assert torch.equal(form.logits(found_RTD[:, 0]), expected_RTV)


@pytest.mark.gpu
@torch.no_grad()
def test_graphs_follow_the_cache_and_the_rows() -> None:
    """Proves that a replayed graph writes where it should: other rows of one cache, and a cache that grew."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    form = fused(cuda_model())
    eager = form.variant(use_kernels=False, use_graphs=False)
    lengths = [60, 17, 33, 90]
    ours, theirs = filled(eager, lengths, capacity=128), filled(eager, lengths, capacity=128)
    for turn, rows in enumerate([[0, 1], [2, 3], [3, 0], [1, 2], [0, 3], [2, 1]]):
        if turn == 3:
            ours.reserve(512)
        ids_R1 = random_ids(form.config, 2, 1, seed=turn)
        assert_near(form(ids_R1, cache=ours.rows(rows)), eager(ids_R1.cuda(), cache=theirs.rows(rows)))
    assert ours.lengths.tolist() == theirs.lengths.tolist()
    for row, length in enumerate(ours.lengths.tolist()):
        for layer in range(form.config.num_layers):
            for mine, other in zip(
                ours.row_kv(layer, row, length), theirs.row_kv(layer, row, length), strict=True
            ):
                assert_near(mine, other)
