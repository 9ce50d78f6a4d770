"""The layers of the CPU form as machine code, compiled by numba.

What a token gets is a function of the token, of its place and of the keys before it in its row, and of
nothing else: every loop here runs over the numbers of one token, in an order that depends on their count
alone. So the result is the same in any company, on any number of threads, and however tokens are cut up.

Products are of integers: int8 weights, 16-bit activations with one scale a token, 32-bit sums that cannot
overflow, joined in 64 bits. Sums of floats are reordered for vectors, always in the same way.

numba keeps what it compiled beside this file, or in the user's cache folder where that is read-only; where
neither may be written, every process compiles again.

Shapes: M tokens, D hidden size, K inputs, N outputs, H query heads, G key-value heads, n = H / G queries that
share one, d head_dim, I intermediate size, S keys, L layers, C capacity and R rows of the cache, P positions,
F fields of a layer, X whatever is needed most. Weights [b, s, l, w] are blocks of l = LANES outputs in steps
of w = 2 LANES inputs (`exact.ExactLinear`).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_ACTIVATION_MAX = np.float32(127 * 128)  # 15 bits and a sign; 1,024 products with int8 fit into 32 bits
_TINY = np.float32(1e-30)  # keeps the scale of a token of zeros finite
_ROUNDS = np.float32(3 << 22)  # added and taken off again, it leaves the nearest integer, ties to even

LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
"""32-bit numbers of a vector, and rows that are multiplied at once. numba's cache heeds the features."""
_STEPS_AT_ONCE = 1024 // (2 * LANES)

PLAIN: dict[str, Any] = {"nogil": True, "error_model": "numpy"}  # no lock, and 1 / 0 as in IEEE
FUSED = {**PLAIN, "fastmath": {"contract"}}  # a product and a sum in one rounding
SUMS = {**PLAIN, "fastmath": {"contract", "reassoc"}}  # and sums in the order that vectors want


def compiled(signature: types.Type) -> Callable[[Callable[..., Any]], Any]:
    """Compile now, or load what an earlier process compiled; without any folder to keep it in, only now.

    numba knows again what it has compiled by the file of the function alone: touch that file where only what
    it calls in another one has changed.
    """

    def compile_function(function: Callable[..., Any]) -> Any:
        try:
            return njit(signature, cache=True, **FUSED)(function)
        except RuntimeError:  # numba found no folder that may be written
            return njit(signature, **FUSED)(function)

    return compile_function


# ---- vectors -------------------------------------------------------------------------------------


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer, for `carray`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


def _dots(*, integers: bool) -> Any:
    """LANES rows times one vector x: (address of the rows, bytes from row to row, from step to step, address
    of x, number of steps, address of the sums).

    int8 rows with int16 x and int32 sums, or fp32 throughout. A step is LANES numbers of each row, or 2 LANES
    integers: their products are added in pairs, for which the compiler knows the machine's instructions.
    """
    number, word = ir.IntType(32) if integers else ir.FloatType(), ir.IntType(64)
    width, row_bytes, x_bytes = (2 * LANES, 1, 2) if integers else (LANES, 4, 4)
    even, odd = (
        ir.Constant(ir.VectorType(ir.IntType(32), LANES), list(range(first, 2 * LANES, 2)))
        for first in (0, 1)
    )

    def neighbours(builder: Any, a: Any, b: Any) -> Any:
        """Sums of neighbours among the numbers of a and then of b, LANES of them."""
        parts = builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd)
        return builder.add(*parts) if integers else builder.fadd(*parts)

    def load(builder: Any, address: Any, num_bytes: int) -> Any:
        kind = ir.VectorType(ir.IntType(8 * num_bytes) if integers else number, width)
        values = builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)
        return builder.sext(values, ir.VectorType(number, width)) if integers else values

    def add_products(builder: Any, total: Any, a: Any, b: Any) -> Any:
        if not integers:
            return builder.fadd(total, builder.fmul(a, b, flags=("contract",)), flags=("contract",))
        products = builder.mul(a, b)
        return builder.add(total, neighbours(builder, products, products))

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows, row_stride, step_stride, x, count, sums = arguments
        lanes = ir.VectorType(number, LANES)
        totals = [cgutils.alloca_once_value(builder, ir.Constant(lanes, [0] * LANES)) for _ in range(LANES)]
        with cgutils.for_range(builder, count, intp=word) as loop:
            x_values = load(builder, builder.add(x, builder.mul(loop.index, word(width * x_bytes))), x_bytes)
            row = builder.add(rows, builder.mul(loop.index, step_stride))
            for total in totals:
                values = load(builder, row, row_bytes)
                builder.store(add_products(builder, builder.load(total), values, x_values), total)
                row = builder.add(row, row_stride)
        vectors = [builder.load(total) for total in totals]
        while len(vectors) > 1:  # in the end lane r is the sum of row r
            vectors = [neighbours(builder, a, b) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        builder.store(vectors[0], builder.inttoptr(sums, lanes.as_pointer()), align=4)
        return context.get_dummy_value()

    def typed(
        typing_context: Any, rows: Any, row_stride: Any, step_stride: Any, x: Any, count: Any, sums: Any
    ) -> Any:
        return types.void(*[types.int64] * 6), generate

    return intrinsic(typed)


_integer_dots, _float_dots = _dots(integers=True), _dots(integers=False)


# ---- numbers of one token ------------------------------------------------------------------------


@njit(**FUSED)
def exp(x: Any) -> Any:
    """e ** x, for -87 <= x <= 88; beyond, as at these.

    As in Cephes: e ** x = 2 ** n e ** r with |r| <= ln 2 / 2, ln 2 in two parts and a polynomial.
    """
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = _nearest(x * np.float32(1.44269504088896341))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return ((p * r) * r + r + np.float32(1.0)) * power


@njit(**PLAIN)  # no liberties: sum and difference must not cancel
def _nearest(x: Any) -> Any:
    """The nearest integer, for |x| < 2 ** 22."""
    return (x + _ROUNDS) - _ROUNDS


@njit(**SUMS)
def _norm(x_D: Any, weight_D: Any, eps: Any, out_D: Any) -> None:
    """RMS norm; weight and eps have taken the mean into them, see `exact._norm_weight`."""
    total = np.float32(0.0)
    for i in range(x_D.size):
        total += x_D[i] * x_D[i]
    factor = np.float32(1.0) / np.sqrt(total + eps)
    for i in range(x_D.size):
        out_D[i] = x_D[i] * factor * weight_D[i]


@njit(**PLAIN)
def _quantise(x_K: Any, out_K: Any) -> Any:
    """16-bit integers; returns what one of them is worth."""
    most = np.int32(0)
    bits_K = x_K.view(np.int32)
    for i in range(x_K.size):  # without their signs floats are ordered as their bits are
        most = max(most, np.int32(bits_K[i] & np.int32(0x7FFFFFFF)))
    largest = np.int32(most).view(np.float32) + _TINY
    inverse = _ACTIVATION_MAX / largest
    for i in range(x_K.size):
        out_K[i] = np.int16(_nearest(x_K[i] * inverse))
    return largest / _ACTIVATION_MAX


@njit(**PLAIN)
def _multiply(x_MX: Any, unit_M: Any, weight_bslw: Any, scale_N: Any, out_MX: Any, span: Any) -> None:
    """A span of the blocks of outputs of x @ W.T; each block of weights is read once for all tokens."""
    num_steps = weight_bslw.shape[1]
    parts_L, sums_L = np.empty(LANES, np.int32), np.empty(LANES, np.int64)
    for block in range(span[0], span[1]):
        for m in range(x_MX.shape[0]):
            sums_L[:] = 0
            for step in range(0, num_steps, _STEPS_AT_ONCE):
                rows = weight_bslw[block, step].ctypes.data
                x = x_MX[m].ctypes.data + 4 * LANES * step
                count = min(_STEPS_AT_ONCE, num_steps - step)
                _integer_dots(rows, 2 * LANES, 2 * LANES * LANES, x, count, parts_L.ctypes.data)
                for r in range(LANES):
                    sums_L[r] += parts_L[r]
            for r in range(LANES):
                n = block * LANES + r
                out_MX[m, n] = np.float32(sums_L[r]) * (scale_N[n] * unit_M[m])


@njit(**FUSED)
def _turn(x_d: Any, cos_d: Any, sin_d: Any, out_d: Any) -> None:
    """Rotary position: x cos + swap_halves(x) sin, the sign in the table of sin."""
    half = x_d.size // 2
    for i in range(half):
        out_d[i] = x_d[i] * cos_d[i] + x_d[half + i] * sin_d[i]
        out_d[half + i] = x_d[half + i] * cos_d[half + i] + x_d[i] * sin_d[half + i]


@njit(**SUMS)
def _softmax(scores_S: Any, scale: Any) -> Any:
    """e ** (scale (score - the highest)), in place; returns their sum."""
    most = scores_S[0]
    for s in range(scores_S.size):
        most = max(most, scores_S[s])
    total = np.float32(0.0)
    for s in range(scores_S.size):
        scores_S[s] = exp((scores_S[s] - most) * scale)
        total += scores_S[s]
    return total


@njit(**FUSED)
def _attend(q_nd: Any, k_Cd: Any, v_Cd: Any, num_keys: int, scores_nX: Any, sum_n: Any, out_nd: Any) -> None:
    """The queries that share a key-value head attend to its first keys.

    Scores come LANES at once: some are of places behind the last key (the capacity is a multiple of LANES),
    and not looked at.
    """
    num_queries, head_dim = q_nd.shape
    near_Ld = np.empty((LANES, head_dim), np.float32)  # read as they lie: a quarter faster on long rows
    for first in range(0, num_keys, LANES):
        for r in range(LANES):
            for i in range(head_dim):
                near_Ld[r, i] = k_Cd[first + r, i]
        for h in range(num_queries):
            q, scores = q_nd[h].ctypes.data, scores_nX[h].ctypes.data + 4 * first
            _float_dots(near_Ld.ctypes.data, 4 * head_dim, 4 * LANES, q, head_dim // LANES, scores)
            for i in range(head_dim - head_dim % LANES, head_dim):
                for r in range(LANES):
                    scores_nX[h, first + r] += q_nd[h, i] * near_Ld[r, i]
    for h in range(num_queries):
        sum_n[h] = _softmax(scores_nX[h, :num_keys], np.float32(1.0) / np.sqrt(np.float32(head_dim)))
        for i in range(head_dim):
            out_nd[h, i] = np.float32(0.0)
    whole = num_keys - num_keys % 4
    for s in range(0, whole, 4):  # sums are kept once for four keys; their order is the keys'
        for h in range(num_queries):
            p, p1, p2, p3 = scores_nX[h, s], scores_nX[h, s + 1], scores_nX[h, s + 2], scores_nX[h, s + 3]
            for i in range(head_dim):
                out = out_nd[h, i] + p * v_Cd[s, i] + p1 * v_Cd[s + 1, i]
                out_nd[h, i] = out + p2 * v_Cd[s + 2, i] + p3 * v_Cd[s + 3, i]
    for h in range(num_queries):
        for s in range(whole, num_keys):
            for i in range(head_dim):
                out_nd[h, i] += scores_nX[h, s] * v_Cd[s, i]
        for i in range(head_dim):
            out_nd[h, i] /= sum_n[h]


# ---- layers --------------------------------------------------------------------------------------

NUM_PARTS = 9
"""Parts of a layer, see `run_parts`. Each needs only its own tokens, but for attention."""
PRODUCTS = (1, 4, 6, 8)
"""Those that may be shared out by blocks of outputs, too."""
FIELDS = 12
"""Addresses of a layer: norm, qkv and its scale, norm of heads, out and its scale, norm, gate-up and its
scale, down and its scale, the layer's part of the cache. Behind the layers comes the last norm in field 0."""


@njit(**FUSED)
def _add_and_norm(x_MD: Any, y_MX: Any, norm: int, eps: Any, integers_MX: Any, unit_M: Any) -> None:
    """Add the last product to the residual stream, and norm the sum: in y, and in integers."""
    norm_D = carray(_pointer(norm), x_MD.shape[1], np.float32)
    for m in range(x_MD.shape[0]):
        for i in range(x_MD.shape[1]):
            x_MD[m, i] += y_MX[m, i]
        y_D = y_MX[m, : x_MD.shape[1]]
        _norm(x_MD[m], norm_D, eps, y_D)
        unit_M[m] = _quantise(y_D, integers_MX[m])


@njit(**FUSED)
def _product(x_MX: Any, unit_M: Any, weights: Any, num_inputs: int, out_MX: Any, share: Any) -> None:
    """x @ W.T, or a share of its outputs; `weights` are two addresses and the number of outputs."""
    num_outputs = weights[2]
    num_blocks, num_steps = -(-num_outputs // LANES), -(-num_inputs // (2 * LANES))
    weight_bslw = carray(_pointer(weights[0]), (num_blocks, num_steps, LANES, 2 * LANES), np.int8)
    scale_N = carray(_pointer(weights[1]), num_blocks * LANES, np.float32)
    span = (num_blocks * share[0] // share[1], num_blocks * (share[0] + 1) // share[1])
    _multiply(x_MX, unit_M, weight_bslw, scale_N, out_MX, span)


@njit(**FUSED)
def _turn_and_keep(qkv_MX: Any, places_M3: Any, rotary_2Pd: Any, layer_F: Any, sizes: Any, eps: Any) -> None:
    """Norm and position of queries and keys; keys and values go into the cache."""
    _, num_heads, num_groups, head_dim, _, num_rows, capacity = sizes
    num_turned = num_heads + num_groups
    norm_hd = carray(_pointer(layer_F[3]), (num_turned, head_dim), np.float32)
    kv_RKCd = carray(_pointer(layer_F[11]), (num_rows, 2 * num_groups, capacity, head_dim), np.float32)
    normed_d = np.empty(head_dim, np.float32)
    for m in range(qkv_MX.shape[0]):
        row, place = places_M3[m, 0], places_M3[m, 1]
        for h in range(num_turned + num_groups):
            head_d = qkv_MX[m, h * head_dim : (h + 1) * head_dim]
            if h < num_turned:
                _norm(head_d, norm_hd[h], eps, normed_d)
                _turn(normed_d, rotary_2Pd[0, place], rotary_2Pd[1, place], head_d)
            if h >= num_heads:
                for i in range(head_dim):
                    kv_RKCd[row, h - num_heads, place, i] = head_d[i]


@njit(**FUSED)
def _attention(qkv_MX: Any, places_M3: Any, layer_F: Any, sizes: Any, integers_MX: Any, unit_M: Any) -> None:
    _, num_heads, num_groups, head_dim, _, num_rows, capacity = sizes
    shared, width = num_heads // num_groups, num_heads * head_dim
    kv_RKCd = carray(_pointer(layer_F[11]), (num_rows, 2 * num_groups, capacity, head_dim), np.float32)
    scores_nX, sum_n = np.empty((shared, capacity), np.float32), np.empty(shared, np.float32)
    out_Hd = np.empty((num_heads, head_dim), np.float32)
    for m in range(qkv_MX.shape[0]):
        row, num_keys = places_M3[m, 0], places_M3[m, 2]
        q_Hd = qkv_MX[m, :width].reshape(num_heads, head_dim)
        for g in range(num_groups):
            first, stop = g * shared, (g + 1) * shared
            k_Cd, v_Cd = kv_RKCd[row, g], kv_RKCd[row, num_groups + g]
            _attend(q_Hd[first:stop], k_Cd, v_Cd, num_keys, scores_nX, sum_n, out_Hd[first:stop])
        unit_M[m] = _quantise(out_Hd.reshape(width), integers_MX[m])


@njit(**FUSED)
def _gate(gate_up_MX: Any, inner_size: int, integers_MX: Any, unit_M: Any) -> None:
    """silu(gate) * up, in integers."""
    inner_I = np.empty(inner_size, np.float32)
    for m in range(gate_up_MX.shape[0]):
        for i in range(inner_size):
            gate = gate_up_MX[m, i]
            inner_I[i] = gate / (np.float32(1.0) + exp(-gate)) * gate_up_MX[m, inner_size + i]
        unit_M[m] = _quantise(inner_I, integers_MX[m])


_MATRIX, _INTEGERS, _PAIR = types.float32[:, ::1], types.int64[:, ::1], types.UniTuple(types.int64, 2)
_ARRAYS = types.Tuple((_MATRIX, _MATRIX, _MATRIX, types.int16[:, ::1], types.float32[::1], _INTEGERS))
_SIZES, _EPS = types.UniTuple(types.int64, 7), types.UniTuple(types.float32, 2)


@compiled(types.void(_ARRAYS, types.float32[:, :, ::1], _INTEGERS, _SIZES, _EPS, _PAIR, _PAIR))
def run_parts(
    arrays: Any, rotary_2Pd: Any, layers_LF: Any, sizes: Any, eps: Any, parts: Any, share: Any
) -> None:
    """Parts of the layers one after another, NUM_PARTS a layer and one at the end, on some tokens.

    Args:
        arrays: a row for each token. x_MD, the residual stream. y_MX, zeros; in the end the first D of each
            row are the hidden states. wide_MX, integers_MX and unit_M, what one part leaves for the next.
            places_M3, its row of the cache, its position, and how many keys it sees.
        rotary_2Pd: cos, and sin with its sign.
        layers_LF: see FIELDS.
        sizes: D, H, G, d, I, R, C.
        eps: of norms over D and over d.
        parts: the first, and the one behind the last.
        share: which of how many shares of the outputs in products.
    """
    x_MD, y_MX, wide_MX, integers_MX, unit_M, places_M3 = arrays
    hidden_size, num_heads, num_groups, head_dim, inner_size = sizes[:5]
    for part in range(parts[0], parts[1]):
        layer_F, kind = layers_LF[part // NUM_PARTS], part % NUM_PARTS
        if kind == 0:
            _add_and_norm(x_MD, y_MX, layer_F[0], eps[0], integers_MX, unit_M)
        elif kind == 1:
            qkv = (layer_F[1], layer_F[2], (num_heads + 2 * num_groups) * head_dim)
            _product(integers_MX, unit_M, qkv, hidden_size, wide_MX, share)
        elif kind == 2:
            _turn_and_keep(wide_MX, places_M3, rotary_2Pd, layer_F, sizes, eps[1])
        elif kind == 3:
            _attention(wide_MX, places_M3, layer_F, sizes, integers_MX, unit_M)
        elif kind == 4:
            out = (layer_F[4], layer_F[5], hidden_size)
            _product(integers_MX, unit_M, out, num_heads * head_dim, y_MX, share)
        elif kind == 5:
            _add_and_norm(x_MD, y_MX, layer_F[6], eps[0], integers_MX, unit_M)
        elif kind == 6:
            gate_up = (layer_F[7], layer_F[8], 2 * inner_size)
            _product(integers_MX, unit_M, gate_up, hidden_size, wide_MX, share)
        elif kind == 7:
            _gate(wide_MX, inner_size, integers_MX, unit_M)
        else:
            down = (layer_F[9], layer_F[10], hidden_size)
            _product(integers_MX, unit_M, down, inner_size, y_MX, share)


@compiled(types.void(_MATRIX, types.int8[:, :, :, ::1], types.float32[::1], _MATRIX, _PAIR))
def multiply(x_MK: Any, weight_bslw: Any, scale_N: Any, out_MX: Any, span: Any) -> None:
    """x @ W.T for a span of the blocks of outputs; see `exact.ExactLinear` for the weights' order."""
    num_tokens = x_MK.shape[0]
    unit_M = np.empty(num_tokens, np.float32)
    integers_MX = np.zeros((num_tokens, weight_bslw.shape[1] * 2 * LANES), np.int16)
    for m in range(num_tokens):
        unit_M[m] = _quantise(x_MK[m], integers_MX[m])
    _multiply(integers_MX, unit_M, weight_bslw, scale_N, out_MX, span)
