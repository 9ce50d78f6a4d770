"""What the layers of the CPU form do with the numbers of a token: norms, integers, products, attention.

Every loop runs over the numbers of one token, in an order that depends on their count alone. Products are of
integers: int8 weights, 16-bit activations with one scale a token, 32-bit sums that cannot overflow, joined in
64 bits. Sums of floats are reordered for vectors, always in the same way.

Shapes: M tokens, D hidden size, K inputs, N outputs, n queries that share a key-value head, d head_dim,
S keys of C that there is room for, X whatever is needed most. Weights [b, p, l, 2] are blocks of l = LANES
outputs, p pairs of inputs.
"""

from typing import Any

import numpy as np
from numba import njit

from emuworld.model import exact_vectors as vectors
from emuworld.model.exact_vectors import LANES

_ACTIVATION_MAX = np.float32(127 * 128)  # 15 bits and a sign; 1,024 products with int8 fit into 32 bits
_PAIRS_AT_ONCE = 1024 // 2
_AHEAD = 4096  # bytes that keys are fetched ahead
_HALF_MAX, _HALF_LEAST = np.float32(65504), np.float32(2.0**-14)  # of fp16, and the least normal one
_HALF, _HALF_BITS = np.float32(0.5), np.int32(0x3F000000)
_TINY = np.float32(1e-30)  # keeps the scale of a token of zeros finite
_ROUNDS = np.float32(3 << 22)  # added and taken off again, it leaves the nearest integer, ties to even

PLAIN: dict[str, Any] = {"nogil": True, "error_model": "numpy"}  # no lock, and 1 / 0 as in IEEE
FUSED = {**PLAIN, "fastmath": {"contract"}}  # a product and a sum in one rounding
SUMS = {**PLAIN, "fastmath": {"contract", "reassoc"}}  # and sums in the order that vectors want


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


@njit(**PLAIN)
def narrowed(x: Any) -> Any:
    """The bits of the nearest fp16, ties to even; beyond its range the largest."""
    size = min(np.float32(abs(x)), _HALF_MAX)
    if size < _HALF_LEAST:  # added to a half, its last bit is worth what that of a small fp16 is
        bits = np.int32(np.float32(size + _HALF).view(np.int32) - _HALF_BITS)
    else:  # exponents of fp16 begin 112 lower
        bits = np.int32(np.float32(size).view(np.int32) - np.int32(112 << 23))
        bits = np.int32((bits + np.int32(0x0FFF) + ((bits >> np.int32(13)) & np.int32(1))) >> np.int32(13))
    return np.int16(bits | ((np.float32(x).view(np.int32) >> np.int32(16)) & np.int32(0x8000)))


@njit(**PLAIN)
def widened(half: Any) -> Any:
    """fp16, given by its bits, as fp32."""
    size = np.int32((np.int32(half) & np.int32(0x7FFF)) << np.int32(13)).view(np.float32)
    size *= np.float32(2.0**112)
    return -size if half < 0 else size


@njit(**SUMS)
def norm(x_D: Any, weight_D: Any, eps: Any, out_D: Any) -> None:
    """RMS norm; weight and eps have taken the mean into them, see `exact._norm_weight`."""
    total = np.float32(0.0)
    for i in range(x_D.size):
        total += x_D[i] * x_D[i]
    factor = np.float32(1.0) / np.sqrt(total + eps)
    for i in range(x_D.size):
        out_D[i] = x_D[i] * factor * weight_D[i]


@njit(**PLAIN)
def quantise(x_K: Any, out_K: Any) -> Any:
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
def room_for_sums() -> Any:
    return np.empty((4, LANES), np.int32), np.empty((4, LANES), np.int64)


@njit(**PLAIN)
def multiply_blocks(
    x_MX: Any, unit_M: Any, weight_bpl2: Any, scale_N: Any, out_MX: Any, span: Any, sums: Any
) -> None:
    """A span of the blocks of outputs of x @ W.T; each block of weights is read once for all tokens."""
    num_pairs, stride, (parts_ml, sums_ml) = weight_bpl2.shape[1], 2 * x_MX.shape[1], sums
    for block in range(span[0], span[1]):
        start = 0
        while start < x_MX.shape[0]:
            left = x_MX.shape[0] - start
            num_tokens = 4 if left >= 4 else 2 if left >= 2 else 1
            sums_ml[:num_tokens] = 0
            for pair in range(0, num_pairs, _PAIRS_AT_ONCE):
                weights, inputs = weight_bpl2[block, pair].ctypes.data, x_MX[start].ctypes.data + 4 * pair
                count = min(_PAIRS_AT_ONCE, num_pairs - pair)
                if num_tokens == 4:
                    vectors.products_4(weights, count, inputs, stride, parts_ml.ctypes.data)
                elif num_tokens == 2:
                    vectors.products_2(weights, count, inputs, stride, parts_ml.ctypes.data)
                else:
                    vectors.products_1(weights, count, inputs, stride, parts_ml.ctypes.data)
                sums_ml[:num_tokens] += parts_ml[:num_tokens]
            for m in range(num_tokens):
                for r in range(LANES):
                    n = block * LANES + r
                    out_MX[start + m, n] = np.float32(sums_ml[m, r]) * (scale_N[n] * unit_M[start + m])
            start += num_tokens


@njit(**FUSED)
def turn(x_d: Any, cos_d: Any, sin_d: Any, out_d: Any) -> None:
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
def attend(q_nd: Any, k_Cd: Any, v_Cd: Any, num_keys: int, scores_nX: Any, sum_n: Any, out_nd: Any) -> None:
    """The queries that share a key-value head attend to its first keys; keys and values are fp16, int16 here.

    Scores come several at once: some are of places behind the last key (the capacity is a multiple of LANES),
    and not looked at. Values are fetched beside them.
    """
    num_queries, head_dim = q_nd.shape
    whole, row, half_row = num_queries - num_queries % 4, 4 * head_dim, 2 * head_dim
    score_row = 4 * scores_nX.shape[1]
    for s in range(0, num_keys, LANES // 4):
        vectors.fetch(k_Cd[s].ctypes.data + _AHEAD, LANES // 4 * half_row)
        vectors.fetch(v_Cd[s].ctypes.data, LANES // 4 * half_row)
        for h in range(0, whole, 4):
            at = k_Cd[s].ctypes.data, half_row, q_nd[h].ctypes.data, row, head_dim // LANES
            vectors.scores_4(at[0], at[1], at[2], at[3], at[4], scores_nX[h].ctypes.data + 4 * s, score_row)
    for h in range(whole, num_queries):
        for s in range(0, num_keys, LANES):
            at = k_Cd[s].ctypes.data, half_row, q_nd[h].ctypes.data, row, head_dim // LANES
            vectors.scores_1(at[0], at[1], at[2], at[3], at[4], scores_nX[h].ctypes.data + 4 * s, score_row)
    for h in range(num_queries):
        for i in range(head_dim - head_dim % LANES, head_dim):
            for s in range(num_keys):
                scores_nX[h, s] += q_nd[h, i] * widened(k_Cd[s, i])
        sum_n[h] = _softmax(scores_nX[h, :num_keys], np.float32(1.0) / np.sqrt(np.float32(head_dim)))
    in_vectors = head_dim - head_dim % vectors.COLUMNS
    for i in range(0, in_vectors, vectors.COLUMNS):
        for h in range(0, whole, 4):
            at = v_Cd.ctypes.data + 2 * i, half_row, num_keys, scores_nX[h].ctypes.data, score_row
            vectors.weighted_sums_4(at[0], at[1], at[2], at[3], at[4], out_nd[h].ctypes.data + 4 * i, row)
        for h in range(whole, num_queries):
            at = v_Cd.ctypes.data + 2 * i, half_row, num_keys, scores_nX[h].ctypes.data, score_row
            vectors.weighted_sums_1(at[0], at[1], at[2], at[3], at[4], out_nd[h].ctypes.data + 4 * i, row)
    for h in range(num_queries):
        for i in range(in_vectors, head_dim):
            out_nd[h, i] = np.float32(0.0)
        for s in range(num_keys):
            for i in range(in_vectors, head_dim):
                out_nd[h, i] += scores_nX[h, s] * widened(v_Cd[s, i])
        for i in range(head_dim):
            out_nd[h, i] /= sum_n[h]
