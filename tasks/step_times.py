"""Milliseconds of a decoding step: memory floors, the forms of our step, the draw, and the published way.

Every function returns figures for a log. Times are medians with the tenth and ninetieth percentile; on CUDA
they are taken with events on the device.

Shapes: R rows, S tokens held, D hidden_size, V ids that may be drawn.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from emuworld.cache_pool import CachedModel
from emuworld.decoding.drafting import exponentials
from emuworld.decoding.sampling import Truncation, guide, pick_guided, race
from emuworld.model import int8_cache
from emuworld.model.cache import StaticCache
from emuworld.model.fp8_numbers import Weight
from emuworld.model.fused import FusedTransformer
from emuworld.model.fused_layer import FusedLayer
from emuworld.model.operations import Place
from emuworld.model.transformer import Transformer
from emuworld.tasks.published_way import Branch, PublishedWay
from emuworld.tasks.run_log import Figures

_WARM_UPS = 3
_BOTH_WAYS = 72  # tokens of a picture of 128 px
_COPY_BYTES = 4 << 30  # many times any cache


def spread(times_ms: Sequence[float]) -> Figures:
    """Median, tenth and ninetieth percentile, and how many."""
    low, median, high = np.percentile(times_ms, (10, 50, 90)).round(3).tolist()
    return {"ms": median, "p10_ms": low, "p90_ms": high, "n": len(times_ms)}


def timed(
    work: Callable[[], object], *, times: int, device: torch.device, warm_ups: int = _WARM_UPS
) -> list[float]:
    """Milliseconds of each call, after a few that are not counted."""
    for _ in range(warm_ups):
        work()
    if device.type != "cuda":
        return [_timed_on_host(work) for _ in range(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for event in events[1:]:
        work()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def _timed_on_host(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start_s)


def bandwidth(device: torch.device) -> Figures:
    """What memory gives: terabytes a second of a copy (bytes read and written) and of a sum (bytes read)."""
    if device.type != "cuda":
        return {"note": "measured on CUDA only"}
    source = torch.empty(_COPY_BYTES // 2, device=device, dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    copy_ms = np.median(timed(lambda: target.copy_(source), times=10, device=device))
    read_ms = np.median(timed(lambda: source.view(torch.int32).amax(), times=10, device=device))
    return {
        "copy_tb_a_s": round(2e-9 * _COPY_BYTES / copy_ms, 3),
        "read_tb_a_s": round(1e-9 * _COPY_BYTES / read_ms, 3),
    }


def filled_cache(model: CachedModel, *, num_rows: int, held: Sequence[int], room: int) -> StaticCache:
    """Rows that hold so many tokens of noise, and room for more."""
    cache = StaticCache(
        model.config,
        num_rows=num_rows,
        capacity=max(held) + room,
        device=model.device,
        dtype=model.cache_dtype,
    )
    generator = torch.Generator(model.device).manual_seed(0)
    for layer_RKCd in cache.memory.kv_RKCd:
        if layer_RKCd.dtype == int8_cache.FORMAT:
            layer_RKCd.random_(-127, 128, generator=generator)
            int8_cache.scales(layer_RKCd).fill_(0.02)
        else:
            layer_RKCd.normal_(generator=generator)
    for row, length in enumerate(held):
        view = cache.rows([row])
        view.finish(view.begin(length))
    return cache


@torch.inference_mode()
def agreement(model: FusedTransformer, *, visual: slice) -> Figures:
    """Relative error of hidden states and logits of one step: each form against plain PyTorch, eager.

    Two rows of different lengths; one token, two (a token with the EOL behind it), and a small picture whose
    tokens see each other.
    """
    figures: Figures = {}
    plain = model.variant(use_kernels=False, use_graphs=False)
    cache = filled_cache(model, num_rows=2, held=(600, 411), room=_BOTH_WAYS)
    for num_tokens in (1, 2, _BOTH_WAYS):
        causal = num_tokens < _BOTH_WAYS
        generator = torch.Generator().manual_seed(num_tokens)
        ids_RT = torch.randint(0, model.config.vocab_size, (2, num_tokens), generator=generator).to(
            model.device
        )
        advance_B = (False, False)  # every form meets the same cache
        expected_RTD = plain(ids_RT, cache=cache, advance_B=advance_B, causal=causal)
        scores_RTV = plain.logits(expected_RTD, start=visual.start, stop=visual.stop)
        for name, form in forms(model).items():
            for _ in range(3):  # the second call is recorded, the third replayed
                hidden_RTD = form(ids_RT, cache=cache, advance_B=advance_B, causal=causal)
            logits_RTV = form.logits(hidden_RTD, start=visual.start, stop=visual.stop)
            figures[f"{name}, {num_tokens} tokens"] = {
                "hidden": _relative(hidden_RTD, expected_RTD),
                "logits": _relative(logits_RTV, scores_RTV),
            }
    return figures


def forms(model: FusedTransformer) -> dict[str, FusedTransformer]:
    """The ways to compute a step that this machine has."""
    on_cuda = model.device.type == "cuda"
    found = {"plain, eager": model.variant(use_kernels=False, use_graphs=False)}
    if on_cuda:
        found["plain, graph"] = model.variant(use_kernels=False)
    if model.uses_kernels:
        found["kernels, eager"] = model.variant(use_graphs=False)
        found["kernels, graph"] = model.variant(own_products=False)
        found["kernels, own products, graph"] = model.variant()
    return found


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    return round(float(error), 6)


@torch.inference_mode()
def step(form: FusedTransformer, *, num_rows: int, context: int, times: int, num_tokens: int = 1) -> Figures:
    """One token a row, or a window of them, without logits and draw."""
    cache = filled_cache(form, num_rows=num_rows, held=[context] * num_rows, room=8 + num_tokens)
    ids_RT = torch.randint(0, form.config.vocab_size, (num_rows, num_tokens), device=form.device)
    stay_B = np.zeros(num_rows, dtype=bool)
    return spread(timed(lambda: form(ids_RT, cache=cache, advance_B=stay_B), times=times, device=form.device))


@torch.inference_mode()
def window_draw(
    model: FusedTransformer, *, num_tokens: int, visual: slice, guidance: float, top_k: int, times: int
) -> Figures:
    """Logits of the visual ids, guidance and the races of one guided world's window, its numbers included."""
    hidden_ND = torch.randn(2 * num_tokens, model.config.hidden_size, device=model.device, dtype=model.dtype)

    def work() -> torch.Tensor:
        scores_NV = model.logits(hidden_ND, start=visual.start, stop=visual.stop).float()
        guided_TV = guide(*scores_NV.chunk(2), guidance=guidance)
        numbers_TV = exponentials(range(num_tokens), num_ids=guided_TV.shape[1], device=model.device)
        return race(guided_TV, numbers_TV, truncation=Truncation(top_k=top_k))

    return spread(timed(work, times=times, device=model.device))


@torch.inference_mode()
def products(model: FusedTransformer, *, num_rows: int, times: int = 5) -> Figures:
    """The matrix products alone, each kind over all layers, and how fast it reads its weights: the rest of a
    step is what lies between them.
    """
    kinds = {
        name: [getattr(layer, name) for layer in model.layers]
        for name in ("qkv_XD", "out_DX", "gate_up_XD", "down_DI")
    }
    figures: Figures = {}
    for name, weights in {**kinds, "head_VD": [model.head_VD]}.items():
        x_RK = torch.randn(num_rows, weights[0].shape[1], device=model.device).to(model.dtype)

        def work(x_RK: torch.Tensor = x_RK, weights: list[Weight] = weights) -> None:
            for weight_NK in weights:
                model.product(x_RK, weight_NK)

        ms = spread(timed(work, times=times, device=model.device))["ms"]
        num_bytes = sum(weight.nbytes for weight in weights)
        figures[name] = {"ms": ms, "read_tb_a_s": round(1e-9 * num_bytes / ms, 3)}
    return figures


@torch.inference_mode()
def between_products(model: FusedTransformer, *, num_rows: int, context: int, times: int = 10) -> Figures:
    """What stands between a step's products, each kind as often as a step has it, replayed as a graph."""
    ops, config, eps = model.operations, model.config, model.config.rms_norm_eps
    cache = filled_cache(model, num_rows=num_rows, held=[context] * num_rows, room=8)
    rows_R = torch.arange(num_rows, dtype=torch.int32, device=model.device)
    place = Place(rows_R, torch.full_like(rows_R, context), cache.capacity)

    def noise(size: int) -> torch.Tensor:
        return torch.randn(num_rows, size, device=model.device).to(model.dtype)

    x_RD, delta_RD, gate_up_RX = (
        noise(size) for size in (config.hidden_size, config.hidden_size, 2 * config.intermediate_size)
    )
    qkv_RX = noise((config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
    q_RHd = noise(config.num_heads * config.head_dim).unflatten(-1, (config.num_heads, -1))
    kinds: dict[str, Callable[[FusedLayer, torch.Tensor], object]] = {
        "two norms": lambda layer, _: [
            ops.add_rms_norm(x_RD, delta_RD, weight_D, eps=eps)
            for weight_D in (layer.attention_norm_D, layer.mlp_norm_D)
        ],
        "heads": lambda layer, kv_RKCd: ops.write_heads(
            qkv_RX, kv_RKCd, place=place, norms=layer.norms, rotary=model.rotary
        ),
        "attention": lambda _, kv_RKCd: ops.attend(q_RHd, kv_RKCd, place=place),
        "swiglu": lambda *_: ops.swiglu(gate_up_RX),
    }
    figures: Figures = {}
    for name, kind in kinds.items():

        def work(kind: Callable[[FusedLayer, torch.Tensor], object] = kind) -> None:
            for layer, kv_RKCd in zip(model.layers, cache.memory.kv_RKCd, strict=True):
                kind(layer, kv_RKCd)

        replay = _recorded(work, device=model.device)
        figures[f"{name}_ms"] = spread(timed(replay, times=times, device=model.device))["ms"]
    return figures


def _recorded(work: Callable[[], None], *, device: torch.device) -> Callable[[], None]:
    """A replay of its launches; on the CPU the work itself."""
    if device.type != "cuda":
        return work
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay


@torch.inference_mode()
def attention_of_a_pass(model: FusedTransformer, *, side: int, times: int = 3) -> Figures:
    """One layer's attention in a refinement pass over both rows of a picture, by what computes it."""
    config, num_tokens = model.config, side * (side + 1)
    q_RGnd, k_RGSd, v_RGSd = (
        torch.randn(2, config.num_kv_heads, size, config.head_dim, device=model.device).to(model.dtype)
        for size in (config.num_heads // config.num_kv_heads * num_tokens, num_tokens, num_tokens)
    )
    figures: Figures = {}
    backends = [None, *(SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION)]
    for backend in backends if model.device.type == "cuda" else [None]:
        chosen = contextlib.nullcontext() if backend is None else sdpa_kernel(backend)
        name = "default" if backend is None else backend.name.lower()
        try:
            with chosen:
                work = partial(F.scaled_dot_product_attention, q_RGnd, k_RGSd, v_RGSd)
                figures[f"{name}_ms"] = spread(timed(work, times=times, device=model.device))["ms"]
        except RuntimeError as error:  # this machine's PyTorch has it not
            figures[name] = str(error).splitlines()[0]
    return figures


@torch.inference_mode()
def draw(
    model: CachedModel, *, visual: slice, guidance: float, top_k: int, times: int, num_worlds: int = 1
) -> Figures:
    """Logits of the visual ids, guidance and the draw for so many guided worlds."""
    hidden_RD = torch.randn(2 * num_worlds, model.config.hidden_size, device=model.device).to(model.dtype)
    uniforms_W = torch.full((num_worlds,), 0.5, dtype=torch.float64, device=model.device)

    def work() -> torch.Tensor:
        rows_WV = model.logits(hidden_RD, start=visual.start, stop=visual.stop).split(num_worlds)
        return pick_guided(rows_WV, uniforms_W, truncation=Truncation(top_k=top_k), guidance=guidance)

    return spread(timed(work, times=times, device=model.device))


def published_way(
    model: Transformer,
    *,
    attention: str,
    context: int,
    times: int,
    visual: slice,
    guidance: float,
    top_k: int,
) -> Figures:
    """A visual token as the release draws it; both branches hold `context` tokens before the first."""
    way = PublishedWay(model, attention=attention)
    generator = torch.Generator().manual_seed(context)
    branches = (Branch(), Branch())
    for branch in branches:
        prompt_1T = torch.randint(0, model.config.vocab_size, (1, context), generator=generator)
        way.logits(prompt_1T.to(model.device), branch)
    token = visual.start
    times_ms: list[float] = []
    for _ in range(_WARM_UPS + times):  # the host waits for every token, so its clock is the right one
        start_s = time.perf_counter()
        token = way.draw(*branches, token, visual=visual, guidance=guidance, top_k=top_k)
        times_ms.append(1e3 * (time.perf_counter() - start_s))
    return spread(times_ms[_WARM_UPS:])


def memory(device: torch.device) -> dict[str, Any]:
    """Peaks in GB (1e9 bytes) since the last reset."""
    if device.type != "cuda":
        return {}
    return {
        "peak_allocated_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2),
        "peak_reserved_gb": round(torch.cuda.max_memory_reserved(device) / 1e9, 2),
    }
