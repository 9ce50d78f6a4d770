"""The layers of the CPU form as machine code, compiled by numba.

What a token gets is a function of the token, of its place and of the keys before it in its row, and of
nothing else: every sum is over the numbers of one token (`exact_numbers`), and which thread does what is
claimed piece by piece (`claims`). So the result is the same in any company, on any number of threads, and
however tokens are cut up.

numba keeps what it compiled beside this file, or in the user's cache folder where that is read-only; where
neither may be written, every process compiles again.

Shapes: M tokens, D hidden size, K inputs, N outputs, H query heads, G key-value heads, n = H / G queries that
share one, d head_dim, I intermediate size, S keys, L layers, C capacity and R rows of the cache, P positions,
F fields of a layer, J numbers of a job, X whatever is needed most. Weights [b, p, l, 2] are blocks of
l = LANES outputs, p pairs of inputs (`exact.ExactLinear`).
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from emuworld.model.claims import LONGEST_JOB, claim, finish, publish, receive, wait
from emuworld.model.exact_numbers import (
    FUSED,
    attend,
    exp,
    multiply_blocks,
    norm,
    quantise,
    room_for_sums,
    turn,
)
from emuworld.model.exact_vectors import LANES

_PARTS = ("claims", "exact_numbers", "exact_vectors")  # modules whose functions are compiled into others'


def compiled(signature: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Compile now, or load what an earlier process compiled; without any folder to keep it in, only now.

    numba knows again what it has compiled by the function's name and its file alone, so the name tells of the
    other files too.
    """
    sources = hashlib.sha256()
    for part in _PARTS:
        sources.update(Path(__file__).with_name(f"{part}.py").read_bytes())

    def compile_function(function: Callable[..., Any]) -> Any:
        function.__qualname__ += f"_{sources.hexdigest()[:12]}"
        try:
            return njit(signature, cache=True, **FUSED)(function)
        except RuntimeError:  # numba found no folder that may be written
            return njit(signature, **FUSED)(function)

    return compile_function


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer, for `carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


NUM_PARTS = 10
"""Parts of a layer, see `run`."""
PRODUCT = 4, 6
"""Those that are no more than a product: of wide [M, H d] with the weights in fields 4 and 5, in y [M, D]."""
FIELDS = 12
"""Addresses of a layer: norm, qkv and its scale, norm of heads, out and its scale, norm, gate-up and its
scale, down and its scale, the layer's part of the cache. Behind the layers comes the last norm in field 0."""
_PIECE = 1 << 15  # bytes of weights that a thread claims at once: a microsecond or two


@njit(**FUSED)
def _add_and_norm(x_D: Any, y_X: Any, weight: int, eps: Any, integers_X: Any) -> Any:
    """Add the last product to the residual stream, and norm the sum: in y, and in integers."""
    for i in range(x_D.size):
        x_D[i] += y_X[i]
    y_D = y_X[: x_D.size]
    norm(x_D, carray(_pointer(weight), x_D.size, np.float32), eps, y_D)
    return quantise(y_D, integers_X)


@njit(**FUSED)
def _turn_and_keep(
    qkv_X: Any, place_3: Any, rotary_2Pd: Any, layer_F: Any, sizes: Any, eps: Any, normed_d: Any
) -> None:
    """Norm and position of queries and keys; keys and values go into the cache."""
    _, num_heads, num_groups, head_dim, _, num_rows, capacity = sizes
    num_turned = num_heads + num_groups
    norm_hd = carray(_pointer(layer_F[3]), (num_turned, head_dim), np.float32)
    kv_RKCd = carray(_pointer(layer_F[11]), (num_rows, 2 * num_groups, capacity, head_dim), np.float32)
    row, place = place_3[0], place_3[1]
    for h in range(num_turned + num_groups):
        head_d = qkv_X[h * head_dim : (h + 1) * head_dim]
        if h < num_turned:
            norm(head_d, norm_hd[h], eps, normed_d)
            turn(normed_d, rotary_2Pd[0, place], rotary_2Pd[1, place], head_d)
        if h >= num_heads:
            for i in range(head_dim):
                kv_RKCd[row, h - num_heads, place, i] = head_d[i]


@njit(**FUSED)
def _attention(
    qkv_X: Any, place_3: Any, g: int, layer_F: Any, sizes: Any, scores_nX: Any, sum_n: Any
) -> None:
    """The queries of one key-value head; what they find takes their place."""
    _, num_heads, num_groups, head_dim, _, num_rows, capacity = sizes
    kv_RKCd = carray(_pointer(layer_F[11]), (num_rows, 2 * num_groups, capacity, head_dim), np.float32)
    k_Cd, v_Cd = kv_RKCd[place_3[0], g], kv_RKCd[place_3[0], num_groups + g]
    q_Hd = qkv_X[: num_heads * head_dim].reshape(num_heads, head_dim)
    q_nd = q_Hd[g * sum_n.size : (g + 1) * sum_n.size]
    attend(q_nd, k_Cd, v_Cd, place_3[2], scores_nX, sum_n, q_nd)


@njit(**FUSED)
def _gate(gate_up_X: Any, inner_I: Any, integers_X: Any) -> Any:
    """silu(gate) * up, in integers."""
    for i in range(inner_I.size):
        gate = gate_up_X[i]
        inner_I[i] = gate / (np.float32(1.0) + exp(-gate)) * gate_up_X[inner_I.size + i]
    return quantise(inner_I, integers_X)


@njit(**FUSED)
def _shape(kind: int, sizes: Any) -> Any:
    """Of a product's weights: number of blocks of outputs, and pairs of inputs of one."""
    hidden_size, num_heads, num_groups, head_dim, inner_size, _, _ = sizes
    num_outputs, num_inputs = hidden_size, hidden_size
    if kind == 1:
        num_outputs = (num_heads + 2 * num_groups) * head_dim
    elif kind == 5:
        num_inputs = num_heads * head_dim
    elif kind == 7:
        num_outputs = 2 * inner_size
    else:
        num_inputs = inner_size
    return -(-num_outputs // LANES), -(-num_inputs // (2 * LANES)) * LANES


@njit(**FUSED)
def _product(
    x_MX: Any, unit_M: Any, weight: int, scale: int, shape: Any, out_MX: Any, span: Any, sums: Any
) -> None:
    weight_bpl2 = carray(_pointer(weight), (shape[0], shape[1], LANES, 2), np.int8)
    scale_N = carray(_pointer(scale), shape[0] * LANES, np.float32)
    multiply_blocks(x_MX, unit_M, weight_bpl2, scale_N, out_MX, span, sums)


JOB = 26
"""Numbers of a job: two of `claims`; M; addresses of x, y, wide, integers, unit, places, rotary and layers;
X of y, wide and integers, P; the first part, and the one behind the last; sizes; the bits of two eps."""
assert JOB <= LONGEST_JOB


@njit(**FUSED)
def _piece(
    kind: int, piece: int, per_piece: int, arrays: Any, layer_F: Any, sizes: Any, eps: Any, own: Any
) -> None:
    """One piece of a part: of a token, of a token's heads, or of the outputs of a product."""
    x_MD, y_MX, wide_MX, integers_MX, unit_M, places_M3, rotary_2Pd = arrays
    _, num_heads, num_groups, head_dim = sizes[:4]
    scores_nX, sum_n, normed_d, inner_I, sums = own
    if kind == 0 or kind == 6:
        unit_M[piece] = _add_and_norm(x_MD[piece], y_MX[piece], layer_F[kind], eps[0], integers_MX[piece])
    elif kind == 2:
        _turn_and_keep(wide_MX[piece], places_M3[piece], rotary_2Pd, layer_F, sizes, eps[1], normed_d)
    elif kind == 3:
        m, g = piece // num_groups, piece % num_groups
        _attention(wide_MX[m], places_M3[m], g, layer_F, sizes, scores_nX, sum_n)
    elif kind == 4:
        unit_M[piece] = quantise(wide_MX[piece, : num_heads * head_dim], integers_MX[piece])
    elif kind == 8:
        unit_M[piece] = _gate(wide_MX[piece], inner_I, integers_MX[piece])
    else:
        out_MX = wide_MX if kind == 1 or kind == 7 else y_MX
        field = kind if kind == 1 or kind == 7 else kind - 1 if kind == 5 else 9
        shape = _shape(kind, sizes)
        span = piece * per_piece, min(shape[0], (piece + 1) * per_piece)
        _product(integers_MX, unit_M, layer_F[field], layer_F[field + 1], shape, out_MX, span, sums)


@njit(**FUSED)
def _work(job_J: Any, mail: Any, mine: int) -> None:
    """A thread's share of a job.

    It asks for memory before it claims anything, so that what is claimed gets done; and it reads what the job
    points to only where it has claimed a piece, because behind a job that is done it may be gone.
    """
    num_threads, M, first_part, last_part = job_J[1], job_J[2], job_J[15], job_J[16]
    sizes = job_J[17], job_J[18], job_J[19], job_J[20], job_J[21], job_J[22], job_J[23]
    eps = np.int32(job_J[24]).view(np.float32), np.int32(job_J[25]).view(np.float32)
    hidden_size, num_heads, num_groups, head_dim, inner_size, _, capacity = sizes
    arrays = (
        carray(_pointer(job_J[3]), (M, hidden_size), np.float32),
        carray(_pointer(job_J[4]), (M, job_J[11]), np.float32),
        carray(_pointer(job_J[5]), (M, job_J[12]), np.float32),
        carray(_pointer(job_J[6]), (M, job_J[13]), np.int16),
        carray(_pointer(job_J[7]), M, np.float32),
        carray(_pointer(job_J[8]), (M, 3), np.int64),
        carray(_pointer(job_J[9]), (2, job_J[14], head_dim), np.float32),
    )
    layers_LF = carray(_pointer(job_J[10]), (last_part // NUM_PARTS + 1, FIELDS), np.int64)
    shared = num_heads // num_groups
    own = (
        np.empty((shared, capacity), np.float32),
        np.empty(shared, np.float32),
        np.empty(head_dim, np.float32),
        np.empty(inner_size, np.float32),
        room_for_sums(),
    )
    if mine == 0:
        publish(mail, job_J)
    first = job_J[0]
    for part in range(first_part, last_part):
        kind, num_pieces, per_piece = part % NUM_PARTS, M, 1
        if kind == 3:
            num_pieces = M * num_groups
        elif kind == 1 or kind == 5 or kind == 7 or kind == 9:
            num_blocks, num_pairs = _shape(kind, sizes)
            per_piece = max(1, _PIECE // (2 * LANES * num_pairs)) if num_threads > 1 else num_blocks
            num_pieces = -(-num_blocks // per_piece)
        num_done = 0
        for other in range(num_threads):
            whose = (mine + other) % num_threads
            while True:
                piece = claim(mail, first, num_pieces, whose, num_threads)
                if piece < 0:
                    break
                _piece(kind, piece, per_piece, arrays, layers_LF[part // NUM_PARTS], sizes, eps, own)
                num_done += 1
        finish(mail, num_done)
        first += num_pieces
        wait(mail, first)


@compiled(types.void(types.int64[::1], types.int64[::1], types.int64, types.int64))
def run(job_J: Any, mail: Any, mine: int, patience: int) -> None:
    """Parts of the layers on some tokens, together with whoever else calls this with the same mail.

    The parts of a layer are done one after another: add and norm, qkv, positions, attention, integers of what
    it found, its product, add and norm, gate-up, their product in integers, down; at the end of all layers
    comes one more add and norm. Threads claim pieces of a part and wait until all of them are done.

    Args:
        job_J: see JOB. x [M, D], the residual stream. y, zeros; in the end the first D of each row are the
            hidden states. wide, integers and unit, what one part leaves for the next. places [M, 3], of each
            token its row of the cache, its position, and how many keys it sees. rotary [2, P, d], cos, and
            sin with its sign. layers [L + 1, F], see FIELDS. Sizes D, H, G, d, I, R, C. The eps of norms
            over D and over d.
        mail: see `claims`.
        mine: 0, whose job it is; it returns when the job is done. Others, 1 and more, have no job yet and
            take part in every one that lets so many take part.
        patience: how often the others look for a job before they return.
    """
    edition = 0
    while True:
        if mine > 0:
            edition = receive(mail, edition, patience, job_J)
            if edition == 0:
                return
            if mine >= job_J[1]:
                continue
        _work(job_J, mail, mine)
        if mine == 0:
            return
