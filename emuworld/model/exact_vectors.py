"""Loops over vectors, written down for the compiler: what it does not find in plain loops by itself.

Each is a numba intrinsic that takes addresses and counts. Vectors are LLVM's portable ones: from products of
widened integers and a sum of neighbours it makes the machine's own instructions.

Shapes: M tokens, K inputs, Q queries, S keys, d head_dim, l = LANES.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8
"""32-bit numbers of a vector. numba's cache heeds the features."""
COLUMNS = LANES * LANES // 4
"""Numbers of a value that `weighted_sums` takes at once: four vectors, or two where registers are few."""

LINE = 64
"""Bytes of a line of the processor's caches."""
_AHEAD = 12 << 10  # bytes that weights are fetched ahead; with 3 KiB a token takes a tenth longer
_WIDENS_HALVES = binding.get_host_cpu_features().get("f16c") or not binding.get_default_triple().startswith(
    "x86"
)

_WORD, _FLOAT, _INTEGER = ir.IntType(64), ir.FloatType(), ir.IntType(32)
_FLOATS, _INTEGERS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INTEGER, LANES)
_EVEN, _ODD = (
    ir.Constant(ir.VectorType(_INTEGER, LANES), list(range(first, 2 * LANES, 2))) for first in (0, 1)
)


def _at(builder: Any, address: Any, kind: Any, *, offset: int = 0) -> Any:
    """What lies at an address."""
    place = builder.add(address, _WORD(offset)) if offset else address
    return builder.load(builder.inttoptr(place, kind.as_pointer()), align=1)


def _halves_at(builder: Any, address: Any, *, offset: int = 0) -> Any:
    """A vector of fp16 at an address, as floats; see `exact_numbers.widened`."""
    if _WIDENS_HALVES:
        return builder.fpext(
            _at(builder, address, ir.VectorType(ir.HalfType(), LANES), offset=offset), _FLOATS
        )

    def all_lanes(kind: Any, number: Any) -> Any:
        return ir.Constant(kind, [number] * LANES)

    bits = builder.zext(_at(builder, address, ir.VectorType(ir.IntType(16), LANES), offset=offset), _INTEGERS)
    size = builder.shl(builder.and_(bits, all_lanes(_INTEGERS, 0x7FFF)), all_lanes(_INTEGERS, 13))
    size = builder.fmul(builder.bitcast(size, _FLOATS), all_lanes(_FLOATS, 2.0**112))
    sign = builder.shl(builder.and_(bits, all_lanes(_INTEGERS, 0x8000)), all_lanes(_INTEGERS, 16))
    return builder.bitcast(builder.or_(builder.bitcast(size, _INTEGERS), sign), _FLOATS)


def _fetch(builder: Any, address: Any) -> None:
    """Ask for the cache line of an address, which may be anyone's; it comes into the second level."""
    pointer, read, near, data = ir.IntType(8).as_pointer(), _INTEGER(0), _INTEGER(2), _INTEGER(1)
    kind = ir.FunctionType(ir.VoidType(), [pointer, _INTEGER, _INTEGER, _INTEGER])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)
    builder.call(prefetch, [builder.inttoptr(address, pointer), read, near, data])


@intrinsic
def fetch(typing_context: Any, address: Any, num_bytes: Any) -> Any:
    """Ask for so many bytes, a multiple of `LINE` or less."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, num_bytes = arguments
        lines = builder.udiv(builder.add(num_bytes, _WORD(LINE - 1)), _WORD(LINE))
        with cgutils.for_range(builder, lines, intp=_WORD) as loop:
            _fetch(builder, builder.add(address, builder.mul(loop.index, _WORD(LINE))))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _put(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def _everywhere(builder: Any, number: Any) -> Any:
    """A vector of one number."""
    kind = ir.VectorType(number.type, LANES)
    first = builder.insert_element(ir.Constant(kind, ir.Undefined), number, _INTEGER(0))
    return builder.shuffle_vector(first, first, ir.Constant(_INTEGERS, [0] * LANES))


def _multiply_add(builder: Any, a: Any, b: Any, total: Any) -> None:
    """total += a b in one rounding, of floats."""
    product = builder.fmul(a, b, flags=("contract",))
    builder.store(builder.fadd(builder.load(total), product, flags=("contract",)), total)


def _zeros(builder: Any, kind: Any, count: int) -> list[Any]:
    return [cgutils.alloca_once_value(builder, ir.Constant(kind, [0] * LANES)) for _ in range(count)]


def _of_seven(generate: Callable[[Any, Any, Any, Any], Any]) -> Any:
    """What is called with seven whole numbers and gives nothing back; numba wants a name for each."""

    def typed(typing_context: Any, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any) -> Any:
        return types.void(*[types.int64] * 7), generate

    return intrinsic(typed)


def _products(num_tokens: int) -> Any:
    """A block of l outputs for M tokens: (address of the weights int8 [K / 2, l, 2], how many pairs of
    inputs, a multiple of `PAIRS`; address of the inputs int16 [M, K], bytes from token to token; address of
    the sums int32 [M, l]).

    Each pair of inputs is multiplied with those of all outputs. A sum is gathered in several chains, so that
    none waits for its own last step.
    """
    num_chains = max(1, PAIRS // num_tokens)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        weights, num_pairs, inputs, stride, sums = arguments
        chains = [_zeros(builder, _INTEGERS, num_chains) for _ in range(num_tokens)]
        with cgutils.for_range(builder, builder.udiv(num_pairs, _WORD(PAIRS)), intp=_WORD) as loop:
            near = builder.add(weights, builder.mul(loop.index, _WORD(2 * LANES * PAIRS)))
            pair = builder.add(inputs, builder.mul(loop.index, _WORD(4 * PAIRS)))
            for line in range(0, 2 * LANES * PAIRS, LINE):
                _fetch(builder, builder.add(near, _WORD(_AHEAD + line)))
            for p in range(PAIRS):
                w_values = _at(builder, near, ir.VectorType(ir.IntType(8), 2 * LANES), offset=2 * LANES * p)
                token = pair
                for totals in chains:
                    x_pair = _everywhere(builder, _at(builder, token, _INTEGER, offset=4 * p))
                    x_values = builder.bitcast(x_pair, ir.VectorType(ir.IntType(16), 2 * LANES))
                    _add_pairs(builder, w_values, x_values, totals[p % num_chains])
                    token = builder.add(token, stride)
        for m, totals in enumerate(chains):
            total = builder.load(totals[0])
            for other in totals[1:]:
                total = builder.add(total, builder.load(other))
            _put(builder, total, builder.add(sums, _WORD(4 * LANES * m)))
        return context.get_dummy_value()

    def typed(typing_context: Any, weights: Any, num_pairs: Any, inputs: Any, stride: Any, sums: Any) -> Any:
        return types.void(*[types.int64] * 5), generate

    return intrinsic(typed)


def _add_pairs(builder: Any, a: Any, b: Any, total: Any) -> None:
    """total += a b, neighbours added up; a of 8 and b of 16 bits."""
    wide = ir.VectorType(_INTEGER, 2 * LANES)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    pairs = [builder.shuffle_vector(products, products, places) for places in (_EVEN, _ODD)]
    builder.store(builder.add(builder.load(total), builder.add(*pairs)), total)


def _scores(num_queries: int) -> Any:
    """Q queries times l / Q keys, fp16: (address of the keys, bytes from key to key; address of the queries,
    bytes from query to query; how many vectors one has; address of the scores, bytes from query to query).

    Every score is summed up in lanes and then neighbour by neighbour.
    """
    num_keys = LANES // num_queries

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        keys, key_stride, queries, query_stride, num_vectors, scores, score_stride = arguments
        totals = [_zeros(builder, _FLOATS, num_keys) for _ in range(num_queries)]
        with cgutils.for_range(builder, num_vectors, intp=_WORD) as loop:
            offset = builder.mul(loop.index, _WORD(4 * LANES))
            key, key_values = builder.add(keys, builder.udiv(offset, _WORD(2))), []
            for _ in range(num_keys):
                key_values.append(_halves_at(builder, key))
                key = builder.add(key, key_stride)
            query = builder.add(queries, offset)
            for q in range(num_queries):
                query_values = _at(builder, query, _FLOATS)
                for s in range(num_keys):
                    _multiply_add(builder, key_values[s], query_values, totals[q][s])
                query = builder.add(query, query_stride)
        vectors = [builder.load(total) for row in totals for total in row]
        while len(vectors) > 1:  # in the end each lane is one sum
            vectors = [
                builder.fadd(*(builder.shuffle_vector(a, b, places) for places in (_EVEN, _ODD)))
                for a, b in zip(vectors[::2], vectors[1::2], strict=True)
            ]
        for q in range(num_queries):
            lanes = ir.Constant(
                ir.VectorType(_INTEGER, num_keys), [num_keys * q + s for s in range(num_keys)]
            )
            _put(builder, builder.shuffle_vector(vectors[0], vectors[0], lanes), scores)
            scores = builder.add(scores, score_stride)
        return context.get_dummy_value()

    return _of_seven(generate)


def _weighted_sums(num_queries: int) -> Any:
    """COLUMNS numbers of the sum of weighted values, fp16, for Q queries: (address of the values, bytes from
    value to value, how many; address of the weights, bytes from query to query; address of the sums, bytes
    from query to query). Each number is summed up value by value."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values, value_stride, num_values, weights, weight_stride, sums, sum_stride = arguments
        num_vectors = COLUMNS // LANES
        totals = [_zeros(builder, _FLOATS, num_vectors) for _ in range(num_queries)]
        with cgutils.for_range(builder, num_values, intp=_WORD) as loop:
            value = builder.add(values, builder.mul(loop.index, value_stride))
            numbers = [_halves_at(builder, value, offset=2 * LANES * i) for i in range(num_vectors)]
            weight = builder.add(weights, builder.mul(loop.index, _WORD(4)))
            for row in totals:
                factor = _everywhere(builder, _at(builder, weight, _FLOAT))
                for number, total in zip(numbers, row, strict=True):
                    _multiply_add(builder, number, factor, total)
                weight = builder.add(weight, weight_stride)
        for row in totals:
            for i, total in enumerate(row):
                _put(builder, builder.load(total), builder.add(sums, _WORD(4 * LANES * i)))
            sums = builder.add(sums, sum_stride)
        return context.get_dummy_value()

    return _of_seven(generate)


PAIRS = 8
"""Pairs of inputs of one turn of `products_1` and its like."""
products_1, products_2, products_4 = _products(1), _products(2), _products(4)
scores_1, scores_4 = _scores(1), _scores(4)
weighted_sums_1, weighted_sums_4 = _weighted_sums(1), _weighted_sums(4)
