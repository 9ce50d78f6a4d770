"""The layers of the CPU form as machine code, compiled by numba.

What a token gets is a function of the token, of its place and of the keys before it in its row, and of
nothing else: every sum is over the numbers of one token (`exact_numbers`), and which thread does what is
claimed piece by piece (`claims`). So the result is the same in any company, on any number of threads, and
however tokens are cut up.

numba keeps what it compiled beside this file, or in the user's cache folder where that is read-only; where
neither may be written, every process compiles again.

Shapes: M tokens, D hidden size, K inputs, N outputs, H query heads, G key-value heads, n = H / G queries that
share one, d head_dim, I intermediate size, S keys, L layers, C capacity and R rows of the cache, P positions,
F fields of a layer, J numbers of a job, X whatever is needed most, W worlds, N steps. Weights [b, p, l, 2]
are blocks of l = LANES outputs, p pairs of inputs (`exact_linear.ExactLinear`).
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
    narrowed,
    norm,
    quantise,
    room_for_sums,
    turn,
)
from emuworld.model.exact_vectors import LANES

_PARTS = ("claims", "exact_numbers", "exact_vectors")  # modules whose functions are compiled into others'


def compiled(signature: types.Type, *, compiler: Callable[..., Any] = njit) -> Callable[..., Any]:
    """Compile now, or load what an earlier process compiled; without any folder to keep it in, only now. With
    `cfunc` for a compiler it becomes a C function.

    numba knows again what it has compiled by the function's name and its file alone, so the name tells of the
    other files too.
    """
    sources = hashlib.sha256()
    for part in _PARTS:
        sources.update(Path(__file__).with_name(f"{part}.py").read_bytes())

    def compile_function(function: Callable[..., Any]) -> Any:
        function.__qualname__ += f"_{sources.hexdigest()[:12]}"
        try:
            return compiler(signature, cache=True, **FUSED)(function)
        except RuntimeError:  # numba found no folder that may be written
            return compiler(signature, **FUSED)(function)

    return compile_function


@intrinsic
def pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer, for `carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def call(typing_context: Any, function: Any, a: Any, b: Any, c: Any) -> Any:
    """Call what lies at an address: a C function of three 64-bit numbers that gives nothing back."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)] * 3)
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


NUM_PARTS = 10
"""Parts of a layer, see `run`."""
_BEGIN, _SCORES, _CHOOSE = NUM_PARTS, NUM_PARTS + 1, NUM_PARTS + 2  # before the first layer, behind the last
PRODUCT = 4, 6
"""Those that are no more than a product: of wide [M, H d] with the weights in fields 4 and 5, in y [M, D]."""
FIELDS = 12
"""Addresses of a layer: norm, qkv and its scale, norm of heads, out and its scale, norm, gate-up and its
scale, down and its scale, the layer's part of the cache. Behind the layers come the last norm in field 0, and
in fields 1 and 2 what gives the scores and its scale."""
_PIECE = 1 << 15  # bytes of weights that a thread claims at once: a microsecond or two


@njit(**FUSED)
def _embed(embedding: int, is_half: bool, token: int, x_D: Any) -> None:
    """A row of the embedding, in bfloat16 or fp32."""
    if is_half:
        half_D = carray(pointer(embedding + 2 * x_D.size * token), x_D.size, np.int16)
        for i in range(x_D.size):
            x_D[i] = np.int32(np.int32(half_D[i]) << np.int32(16)).view(np.float32)
    else:
        x_D[:] = carray(pointer(embedding + 4 * x_D.size * token), x_D.size, np.float32)


@njit(**FUSED)
def _add_and_norm(x_D: Any, y_X: Any, is_first: bool, weight: int, eps: Any, integers_X: Any) -> Any:
    """Add the last product, if there is one, to the residual stream, and norm the sum: in y, and in
    integers."""
    y_D = y_X[: x_D.size]
    if not is_first:
        for i in range(x_D.size):
            x_D[i] += y_D[i]
    norm(x_D, carray(pointer(weight), x_D.size, np.float32), eps, y_D)
    return quantise(y_D, integers_X)


@njit(**FUSED)
def _turn_and_keep(
    qkv_X: Any, row: int, place: int, rotary_2Pd: Any, layer_F: Any, sizes: Any, eps: Any, normed_d: Any
) -> None:
    """Norm and position of queries and keys; keys and values go into the cache."""
    _, num_heads, num_groups, head_dim, _, num_rows, capacity, _ = sizes
    num_turned = num_heads + num_groups
    norm_hd = carray(pointer(layer_F[3]), (num_turned, head_dim), np.float32)
    kv_RKCd = carray(pointer(layer_F[11]), (num_rows, 2 * num_groups, capacity, head_dim), np.int16)
    for h in range(num_turned + num_groups):
        head_d = qkv_X[h * head_dim : (h + 1) * head_dim]
        if h < num_turned:
            norm(head_d, norm_hd[h], eps, normed_d)
            turn(normed_d, rotary_2Pd[0, place], rotary_2Pd[1, place], head_d)
        if h >= num_heads:
            for i in range(head_dim):
                kv_RKCd[row, h - num_heads, place, i] = narrowed(head_d[i])


@njit(**FUSED)
def _attention(
    qkv_X: Any, row: int, num_keys: int, g: int, layer_F: Any, sizes: Any, scores_nX: Any, sum_n: Any
) -> None:
    """The queries of one key-value head; what they find takes their place."""
    _, num_heads, num_groups, head_dim, _, num_rows, capacity, _ = sizes
    kv_RKCd = carray(pointer(layer_F[11]), (num_rows, 2 * num_groups, capacity, head_dim), np.int16)
    k_Cd, v_Cd = kv_RKCd[row, g], kv_RKCd[row, num_groups + g]
    q_Hd = qkv_X[: num_heads * head_dim].reshape(num_heads, head_dim)
    q_nd = q_Hd[g * sum_n.size : (g + 1) * sum_n.size]
    attend(q_nd, k_Cd, v_Cd, num_keys, scores_nX, sum_n, q_nd)


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
    hidden_size, num_heads, num_groups, head_dim, inner_size, _, _, num_scores = sizes
    num_outputs, num_inputs = hidden_size, hidden_size
    if kind == 1:
        num_outputs = (num_heads + 2 * num_groups) * head_dim
    elif kind == 5:
        num_inputs = num_heads * head_dim
    elif kind == 7:
        num_outputs = 2 * inner_size
    elif kind == _SCORES:
        num_outputs = num_scores
    else:
        num_inputs = inner_size
    return -(-num_outputs // LANES), -(-num_inputs // (2 * LANES)) * LANES


@njit(**FUSED)
def _product(
    x_MX: Any, unit_M: Any, weight: int, scale: int, shape: Any, out_MX: Any, span: Any, sums: Any
) -> None:
    weight_bpl2 = carray(pointer(weight), (shape[0], shape[1], LANES, 2), np.int8)
    scale_N = carray(pointer(scale), shape[0] * LANES, np.float32)
    multiply_blocks(x_MX, unit_M, weight_bpl2, scale_N, out_MX, span, sums)


JOB = 36
"""Numbers of a job: two of `claims`; M; addresses of x, y, wide, integers, unit, places, rotary, layers, ids
and embedding; X of y, wide and integers, P, N; whether the embedding is in bfloat16; L; the first part, and
the one behind the last; sizes; the bits of two eps; how many steps; how many worlds choose, by which
function, and its first argument."""
assert JOB <= LONGEST_JOB


@njit(**FUSED)
def _piece(
    kind: int,
    piece: int,
    per_piece: int,
    step: int,
    arrays: Any,
    tokens: Any,
    layer_F: Any,
    sizes: Any,
    eps: Any,
    own: Any,
) -> None:
    """One piece of a part: of a token, of its heads, of the outputs of a product, or a world's choice."""
    x_MD, y_MX, wide_MX, integers_MX, unit_M, places_M4, rotary_2Pd = arrays
    _, num_heads, num_groups, head_dim = sizes[:4]
    scores_nX, sum_n, normed_d, inner_I, sums = own
    if kind == 0 or kind == 6 or kind == _BEGIN:
        ids_MN, embedding, is_half, _, _ = tokens
        if kind == _BEGIN:
            _embed(embedding, is_half, ids_MN[places_M4[piece, 3], step], x_MD[piece])
        unit_M[piece] = _add_and_norm(
            x_MD[piece], y_MX[piece], kind == _BEGIN, layer_F[kind % NUM_PARTS], eps[0], integers_MX[piece]
        )
    elif kind == 2:
        row, place = places_M4[piece, 0], places_M4[piece, 1] + step
        _turn_and_keep(wide_MX[piece], row, place, rotary_2Pd, layer_F, sizes, eps[1], normed_d)
    elif kind == 3:
        m, g = piece // num_groups, piece % num_groups
        row, num_keys = places_M4[m, 0], places_M4[m, 2] + step
        _attention(wide_MX[m], row, num_keys, g, layer_F, sizes, scores_nX, sum_n)
    elif kind == 4:
        unit_M[piece] = quantise(wide_MX[piece, : num_heads * head_dim], integers_MX[piece])
    elif kind == 8:
        unit_M[piece] = _gate(wide_MX[piece], inner_I, integers_MX[piece])
    elif kind == _CHOOSE:
        call(tokens[3], tokens[4], piece, step)
    else:
        is_wide = kind == 1 or kind == 7 or kind == _SCORES
        out_MX = wide_MX if is_wide else y_MX
        field = 1 if kind == _SCORES else kind if is_wide else kind - 1 if kind == 5 else 9
        shape = _shape(kind, sizes)
        span = piece * per_piece, min(shape[0], (piece + 1) * per_piece)
        _product(integers_MX, unit_M, layer_F[field], layer_F[field + 1], shape, out_MX, span, sums)


@njit(**FUSED)
def _kind(part: int, num_layers: int) -> int:
    """What a part is."""
    if part == 0:
        return _BEGIN
    behind = part - num_layers * NUM_PARTS
    return part % NUM_PARTS if behind <= 0 else _SCORES if behind == 1 else _CHOOSE


@njit(**FUSED)
def _work(job_J: Any, mail: Any, mine: int) -> None:
    """A thread's share of a job.

    It asks for memory before it claims anything, so that what is claimed gets done; and it reads what the job
    points to only where it has claimed a piece, because behind a job that is done it may be gone.
    """
    num_threads, M, num_layers, first_part, last_part = job_J[1], job_J[2], job_J[19], job_J[20], job_J[21]
    sizes = job_J[22], job_J[23], job_J[24], job_J[25], job_J[26], job_J[27], job_J[28], job_J[29]
    eps = np.int32(job_J[30]).view(np.float32), np.int32(job_J[31]).view(np.float32)
    hidden_size, num_heads, num_groups, head_dim, inner_size, _, capacity, _ = sizes
    arrays = (
        carray(pointer(job_J[3]), (M, hidden_size), np.float32),
        carray(pointer(job_J[4]), (M, job_J[13]), np.float32),
        carray(pointer(job_J[5]), (M, job_J[14]), np.float32),
        carray(pointer(job_J[6]), (M, job_J[15]), np.int16),
        carray(pointer(job_J[7]), M, np.float32),
        carray(pointer(job_J[8]), (M, 4), np.int64),
        carray(pointer(job_J[9]), (2, job_J[16], head_dim), np.float32),
    )
    ids_MN = carray(pointer(job_J[11]), (M, job_J[17]), np.int64)
    tokens = ids_MN, job_J[12], job_J[18] != 0, job_J[34], job_J[35]
    layers_LF = carray(pointer(job_J[10]), (num_layers + 1, FIELDS), np.int64)
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
    for number in range(job_J[32] * (last_part - first_part)):
        step, part = number // (last_part - first_part), first_part + number % (last_part - first_part)
        kind, num_pieces, per_piece = _kind(part, num_layers), M, 1
        if kind == 3:
            num_pieces = M * num_groups
        elif kind == _CHOOSE:
            num_pieces = job_J[33]
        elif kind == 1 or kind == 5 or kind == 7 or kind == 9 or kind == _SCORES:
            num_blocks, num_pairs = _shape(kind, sizes)
            per_piece = max(1, _PIECE // (2 * LANES * num_pairs)) if num_threads > 1 else num_blocks
            num_pieces = -(-num_blocks // per_piece)
        layer, num_done = min(part // NUM_PARTS, num_layers), 0
        for other in range(num_threads):
            whose = (mine + other) % num_threads
            while True:
                piece = claim(mail, first, num_pieces, whose, num_threads)
                if piece < 0:
                    break
                _piece(kind, piece, per_piece, step, arrays, tokens, layers_LF[layer], sizes, eps, own)
                num_done += 1
        finish(mail, num_done)
        first += num_pieces
        wait(mail, first)


@compiled(types.void(types.int64[::1], types.int64[::1], types.int64, types.int64))
def run(job_J: Any, mail: Any, mine: int, patience: int) -> None:
    """Parts of the layers on some tokens, together with whoever else calls this with the same mail.

    The parts of a layer are done one after another: add and norm, qkv, positions, attention, integers of what
    it found, its product, add and norm, gate-up, their product in integers, down; at the end of all layers
    comes one more add and norm. Before the first norm tokens are looked up. Behind the last may come the
    scores of what is next, in wide, and then each world's choice: the function of the job is called with its
    argument, the world and the step, and puts the next id where the next step finds it. Threads claim pieces
    of a part and wait until all of them are done.

    Args:
        job_J: see JOB. x [M, D], the residual stream. y: in the end the first D of each row are the hidden
            states. wide, integers and unit, what one part leaves for the next. places [M, 4], of each token
            its row of the cache, its position, how many keys it sees, and the row of ids [W, N] that has its
            id, a step a column. rotary [2, P, d], cos, and sin with its sign. layers [L + 1, F], see FIELDS.
            embedding [V, D]. Sizes D, H, G, d, I, R, C, and the number of scores. The eps of norms over D and
            over d.
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
