"""Drawing a token on a CPU, compiled by numba: what `sampling.pick_and_rate` says, without a top-k.

With top-p the ids of a row stand in a line, the likeliest first and of equally likely ones the lower id, and
the uniform number falls on one of those at its head that hold `top_p`. Nothing is sorted for it: the line is
that of the weights' bits, so three rounds over ten bits each find the bits of the id that is meant, and a
last one the id.

Shapes: R rows, V ids of the span, B values of ten bits.
"""

from typing import Any

import numpy as np
from numba import njit, types

from emuworld.model.exact_kernel import compiled
from emuworld.model.exact_numbers import FUSED, PLAIN, SUMS, exp

_LEAST = np.float32(-87.0)  # below it `exp` is as there; such ids have weight 0
_BITS = 10
_BINS = 1 << _BITS


@njit(**FUSED)
def _guide(rows: Any, r: int, num_kinds: int, guidance: Any, image_guidance: Any, scores_V: Any) -> None:
    """As `sampling.guide`; from plain scores, because their sums do not matter."""
    for v in range(scores_V.size):
        c = rows[0][r, v]
        if num_kinds == 1:
            scores_V[v] = c
        elif num_kinds == 2:
            scores_V[v] = rows[1][r, v] + guidance * (c - rows[1][r, v])
        else:
            u, b = rows[1][r, v], rows[2][r, v]
            scores_V[v] = b + image_guidance * (u - b) + guidance * (c - u)


@njit(**SUMS)
def _weigh(scores_V: Any, temperature: Any, weights_V: Any) -> tuple[Any, Any]:
    """e ** ((score - the highest) / temperature); returns the highest, and the sum at temperature 1."""
    most = scores_V[0]
    for v in range(scores_V.size):
        most = max(most, scores_V[v])
    total = np.float32(0.0)
    for v in range(scores_V.size):
        below = scores_V[v] - most
        total += exp(below) if below > _LEAST else np.float32(0.0)
        weights_V[v] = exp(below / temperature) if below / temperature > _LEAST else np.float32(0.0)
    return most, total


@njit(**PLAIN)
def _find(weights_V: Any, mass: Any, closed: bool, sums_B: Any) -> tuple[int, Any]:
    """The first id in line with which the sum of weights exceeds `mass` (or reaches it, if `closed`), and the
    sum before it; where rounding leaves none, the last that has weight."""
    bits_V = weights_V.view(np.int32)
    chosen, before = np.int32(0), 0.0
    for shift in (2 * _BITS, _BITS, 0):
        sums_B[:] = 0.0
        for v in range(bits_V.size):
            if bits_V[v] >> (shift + _BITS) == chosen:
                sums_B[(bits_V[v] >> shift) & (_BINS - 1)] += weights_V[v]
        place, last = -1, 0.0
        for b in range(_BINS - 1, -1, -1):
            if sums_B[b] > 0.0:
                before += last
                place, last = b, sums_B[b]
                if before + last > mass or (closed and before + last == mass):
                    break
        chosen = np.int32((chosen << _BITS) | place)
    found, last = -1, 0.0
    for v in range(bits_V.size):
        if bits_V[v] == chosen:
            before += last
            found, last = v, np.float64(weights_V[v])
            if before + last > mass or (closed and before + last == mass):
                break
    return found, before


@njit(**PLAIN)
def _draw_of_likeliest(weights_V: Any, uniform: float, top_p: float, sums_B: Any) -> int:
    mass = 0.0
    for v in range(weights_V.size):
        mass += weights_V[v]
    last, before = _find(weights_V, top_p * mass, True, sums_B)
    drawn, _ = _find(weights_V, uniform * (before + weights_V[last]), False, sums_B)
    if weights_V[drawn] < weights_V[last] or (weights_V[drawn] == weights_V[last] and drawn > last):
        return last  # where the product was rounded up to the mass
    return drawn


@njit(**PLAIN)
def _draw_of_all(weights_V: Any, uniform: float) -> int:
    """In the order of ids."""
    mass = 0.0
    for v in range(weights_V.size):
        mass += weights_V[v]
    drawn, total = -1, 0.0
    for v in range(weights_V.size):
        if weights_V[v] > 0.0:
            drawn, total = v, total + weights_V[v]
            if total > uniform * mass:
                break
    return drawn


_ROWS = types.float32[:, ::1]


@compiled(
    types.void(
        types.UniTuple(_ROWS, 3),
        types.int64,
        types.float64[::1],
        types.UniTuple(types.float32, 3),
        types.float64,
        types.int64[::1],
        types.float32[::1],
    )
)
def draw(
    rows: Any, num_kinds: int, uniforms_R: Any, settings: Any, top_p: float, ids_R: Any, rates_R: Any
) -> None:
    """Draw an id of each row.

    Args:
        rows: conditional, unguided and blind scores [R, V], of which `num_kinds` count.
        uniforms_R: in [0, 1).
        settings: temperature, above 0; guidance; image guidance.
        ids_R: what is drawn.
        rates_R: the logarithm of its probability at temperature 1, before anything is cut.
    """
    num_ids = rows[0].shape[1]
    scores_V, weights_V = np.empty(num_ids, np.float32), np.empty(num_ids, np.float32)
    sums_B = np.empty(_BINS, np.float64)
    for r in range(uniforms_R.size):
        _guide(rows, r, num_kinds, settings[1], settings[2], scores_V)
        most, total = _weigh(scores_V, settings[0], weights_V)
        if top_p < 1.0:
            drawn = _draw_of_likeliest(weights_V, uniforms_R[r], top_p, sums_B)
        else:
            drawn = _draw_of_all(weights_V, uniforms_R[r])
        ids_R[r], rates_R[r] = drawn, scores_V[drawn] - most - np.log(total)
