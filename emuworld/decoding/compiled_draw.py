"""Drawing a token on a CPU, compiled by numba: what `sampling.pick_and_rate` says, without a top-k.

With top-p the ids of a row stand in a line, the likeliest first and of equally likely ones the lower id, and
the uniform number falls on one of those at its head that hold `top_p`. Nothing is sorted for it: the line is
that of the weights' bits, so three rounds over ten bits each find the bits of the id that is meant, and a
last one the id.

`choose` is a C function, so that the layers' machine code can call it between two tokens (`Draws` is what
`ExactTransformer.draw_ahead` calls a chooser); `draw` calls it for rows whose scores are there.

Shapes: W worlds, N draws of each, V ids of the span, B values of ten bits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types

from emuworld.model.exact_kernel import call, compiled, pointer
from emuworld.model.exact_numbers import FUSED, PLAIN, SUMS, exp

_LEAST = np.float32(-87.0)  # below it `exp` is as there; such ids have weight 0
_BITS = 10
_BINS = 1 << _BITS


@njit(**FUSED)
def _guide(kinds: Any, num_kinds: int, guidance: Any, image_guidance: Any, scores_V: Any) -> None:
    """As `sampling.guide`; from plain scores, because their sums do not matter."""
    c_V, u_V, b_V = kinds
    for v in range(scores_V.size):
        if num_kinds == 1:
            scores_V[v] = c_V[v]
        elif num_kinds == 2:
            scores_V[v] = u_V[v] + guidance * (c_V[v] - u_V[v])
        else:
            scores_V[v] = b_V[v] + image_guidance * (u_V[v] - b_V[v]) + guidance * (c_V[v] - u_V[v])


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


_SETTINGS = 6
"""Of a world: temperature, guidance, image guidance, top-p, what `sampling.favour` adds, rows that count."""
_TABLE = 12
"""W, V, N; id of the first score; addresses of the scores' addresses [W, 3], settings [W, _SETTINGS],
uniforms [W, N], favoured ids [W, N], ids [W, X], rates [W, N]; X; which of the X the first draw gives."""


@compiled(types.void(types.int64, types.int64, types.int64), compiler=cfunc)
def choose(table: int, w: int, n: int) -> None:
    """The n-th draw of a world: see `Draws`, whose table this is the address of."""
    table_T = carray(pointer(table), _TABLE, np.int64)
    num_worlds, num_ids, num_draws, first_id = table_T[0], table_T[1], table_T[2], table_T[3]
    addresses_3 = carray(pointer(table_T[4]), (num_worlds, 3), np.int64)[w]
    settings = carray(pointer(table_T[5]), (num_worlds, _SETTINGS), np.float64)[w]
    uniform = carray(pointer(table_T[6]), (num_worlds, num_draws), np.float64)[w, n]
    stay = carray(pointer(table_T[7]), (num_worlds, num_draws), np.int64)[w, n]
    kinds = (
        carray(pointer(addresses_3[0]), num_ids, np.float32),
        carray(pointer(addresses_3[1]), num_ids, np.float32),
        carray(pointer(addresses_3[2]), num_ids, np.float32),
    )
    num_kinds, top_p = np.int64(settings[5]), settings[3]
    if stay >= 0:
        for kind in range(num_kinds):
            kinds[kind][stay] += np.float32(settings[4])
    scores_V, weights_V = np.empty(num_ids, np.float32), np.empty(num_ids, np.float32)
    _guide(kinds, num_kinds, np.float32(settings[1]), np.float32(settings[2]), scores_V)
    most, total = _weigh(scores_V, np.float32(settings[0]), weights_V)
    if top_p < 1.0:
        drawn = _draw_of_likeliest(weights_V, uniform, top_p, np.empty(_BINS, np.float64))
    else:
        drawn = _draw_of_all(weights_V, uniform)
    carray(pointer(table_T[8]), (num_worlds, table_T[10]), np.int64)[w, table_T[11] + n] = first_id + drawn
    rate = scores_V[drawn] - most - np.log(total)
    carray(pointer(table_T[9]), (num_worlds, num_draws), np.float32)[w, n] = rate


@compiled(types.void(types.int64, types.int64, types.int64, types.int64))
def draw(function: int, table: int, first: int, last: int) -> None:
    """The first draw of each of these worlds."""
    for w in range(first, last):
        call(function, table, w, 0)


class Draws:
    """Draws of several worlds, and what they give.

    Args:
        uniforms_WN: float64, in [0, 1).
        settings_WS: of each world temperature, above 0; guidance; image guidance; top-p; and what
            `sampling.favour` adds to the score of an id.
        num_kinds_W: how many kinds of scores each has: conditional, unguided and blind.
        stays_WN: ids that are favoured, counted from the first of the span, -1: none. None: nowhere.
        first_id: the span's.
    """

    function: int = choose.address

    def __init__(
        self,
        uniforms_WN: np.ndarray,
        *,
        settings_WS: Sequence[Sequence[float]],
        num_kinds_W: Sequence[int],
        stays_WN: np.ndarray | None = None,
        first_id: int = 0,
    ) -> None:
        self._uniforms_WN = np.ascontiguousarray(uniforms_WN, dtype=np.float64)
        shape = self._uniforms_WN.shape
        self._settings_WS = np.column_stack((settings_WS, num_kinds_W)).astype(np.float64)
        self._stays_WN = np.full(shape, -1) if stays_WN is None else np.ascontiguousarray(stays_WN, np.int64)
        self._first_id = first_id
        self.rates_WN = np.empty(shape, np.float32)
        """The logarithm of each id's probability at temperature 1, before anything is cut."""

    def table(self, addresses_W3: np.ndarray, num_ids: int, ids_WX: np.ndarray, first: int) -> int:
        """Address of what `choose` reads; `addresses_W3` of scores fp32 [V], ids go into ids_WX from column
        `first` on. It holds what it points to, but for scores and ids."""
        self._addresses_W3 = np.ascontiguousarray(addresses_W3, dtype=np.int64)
        arrays = (self._addresses_W3, self._settings_WS, self._uniforms_WN, self._stays_WN, ids_WX)
        places = [array.ctypes.data for array in (*arrays, self.rates_WN)]
        sizes = (len(ids_WX), num_ids, self._uniforms_WN.shape[1], self._first_id)
        self._table = np.array((*sizes, *places, ids_WX.shape[1], first), np.int64)
        assert len(self._table) == _TABLE and ids_WX.flags.c_contiguous and ids_WX.dtype == np.int64
        address: int = self._table.ctypes.data
        return address
