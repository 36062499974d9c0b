"""Products of a few rows with a few others, whose sums stay in registers: so a number that was read
is used several times.

Each sum has one order, whatever stands beside it in a tile: sixteen lanes, and these by halves.
Addresses are whole numbers, as in lanes.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvtool.core.native.compiled.lanes import (
    LANES,
    WIDTH,
    everywhere,
    fused,
    load,
    totals_of,
)
from kvtool.core.native.compiled.tools import FEATURES, Array, compiled

# As many sums as there are registers for: thirty-two of 64 bytes, or no more than sixteen of 32.
WIDE = "+avx512f" in FEATURES
MAX_ROWS = 3 if WIDE else 1
N_WEIGHTS, N_WEIGHTS_64 = (8 if WIDE else 4), 4  # rows of weights, in float32 and in float64
# A matrix of no more weights than this is in a cache of the processor when its turn comes again,
# in most models. Measured at one row of 256: 15.3 us side by side, 18.5 in turn; of 576 and 2,048,
# from memory: 195 and 770 us, and 150 and 552.
CACHED = 2**18


@compiled()
def at_once(real: Array) -> int:
    """How many rows of weights a tile has for sums of the type of `real`."""
    return N_WEIGHTS if real.itemsize == 4 else N_WEIGHTS_64


def _dots(n_rows: int, side_by_side: bool = True) -> Callable[..., Any]:
    def typed(
        typing: Any, w: Any, w_step: Any, x: Any, x_step: Any, n: Any, like: Any, to: Any,
        real: Any, y_step: Any,
    ) -> Any:  # fmt: skip
        vector, size = LANES[real.dtype].vector, real.dtype.bitwidth // 8
        n_weights = N_WEIGHTS if size == 4 else N_WEIGHTS_64
        stored = like.dtype.bitwidth // 8
        alike = n_weights if side_by_side else 1

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            at, step, x_at, x_by, width, _, to, _, y_by = args
            weights, rows = (
                _apart(builder, at, step, n_weights),
                _apart(builder, x_at, x_by, n_rows),
            )
            none = ir.Constant(vector, [0.0] * WIDTH)
            sums = [[cgutils.alloca_once_value(builder, none) for _ in weights] for _ in rows]
            zero, by = ir.Constant(width.type, 0), ir.Constant(width.type, WIDTH)
            for first in range(0, n_weights, alike):
                with cgutils.for_range_slice(builder, zero, width, by, inc=True) as (j, _):
                    if side_by_side:
                        _prefetch(builder, weights[-1], step, j, n_weights * stored)
                    columns = [load(builder, _behind(builder, row, j, size), real) for row in rows]
                    for i in range(first, first + alike):
                        place = _behind(builder, weights[i], j, stored)
                        weight = load(builder, place, like)
                        for column, kept in zip(columns, sums, strict=True):
                            total = fused(builder, weight, column, builder.load(kept[i]))
                            builder.store(total, kept[i])
            for y, kept in zip(_apart(builder, to, y_by, n_rows), sums, strict=True):
                for i in range(0, n_weights, 4):
                    found = totals_of(builder, *map(builder.load, kept[i : i + 4]))
                    there = builder.add(y, ir.Constant(y.type, i * size))
                    pointer = builder.inttoptr(there, found.type.as_pointer())
                    builder.store(found, pointer, align=4)
            return context.get_dummy_value()

        n = types.intp
        return types.void(n, n, n, n, n, like, n, real, n), generate

    return typed


def _prefetch(builder: Any, last: Any, step: Any, j: Any, size: int) -> None:
    """Ask for what is read next, the memory behind the last row of a tile, in its own order and not
    in the tile's: then the processor foresees the rest. Nothing need be there."""
    kind, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    form = ir.FunctionType(ir.VoidType(), [kind, number, number, number])
    ask = cgutils.get_or_insert_function(builder.module, form, "llvm.prefetch.p0i8")
    options = [ir.Constant(number, x) for x in (0, 3, 1)]  # for reading, soon, data
    first = _behind(builder, builder.add(last, step), j, size)
    for line in range(0, size * WIDTH, 64):
        at = builder.add(first, ir.Constant(first.type, line))
        builder.call(ask, [builder.inttoptr(at, kind), *options])


def _apart(builder: Any, at: Any, step: Any, n: int) -> list[Any]:
    """n addresses, each `step` bytes from the one before."""
    return [builder.add(at, builder.mul(step, ir.Constant(at.type, i))) for i in range(n)]


def _behind(builder: Any, at: Any, index: Any, size: int) -> Any:
    return builder.add(at, builder.mul(index, ir.Constant(at.type, size)))


# (w, w_step, x, x_step, n, like, y, real, y_step): `at_once` rows of weights of the type of `like`
# at address w, and one, two or three rows of `real` at x, n numbers each, whole lanes -> at y as
# many rows of products
dots_of_one: Any = intrinsic(_dots(1))
# the same, one row of weights after the other: a single row waits for memory, whose next lines the
# processor foresees in few streams
dots_in_turn: Any = intrinsic(_dots(1, side_by_side=False))
dots_of_two: Any = intrinsic(_dots(2))
dots_of_three: Any = intrinsic(_dots(3))


N_ROWS = 6  # of a product of matrices, each by four vectors
N_COLUMNS = 4 * WIDTH


def _products(adds: bool) -> Callable[..., Any]:
    def typed(
        typing: Any, a: Any, a_step: Any, b: Any, b_step: Any, n: Any, c: Any, c_step: Any
    ) -> Any:
        vector, one = LANES[types.float32].vector, types.float32[::1]

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            a, a_step, b, b_step, n, c, c_step = args
            rows, results = (
                _apart(builder, at, step, N_ROWS) for at, step in ((a, a_step), (c, c_step))
            )
            places = [
                [builder.add(y, ir.Constant(y.type, 4 * i)) for i in range(0, N_COLUMNS, WIDTH)]
                for y in results
            ]
            none = ir.Constant(vector, [0.0] * WIDTH)
            sums = [
                [
                    cgutils.alloca_once_value(builder, load(builder, x, one) if adds else none)
                    for x in row
                ]
                for row in places
            ]
            with cgutils.for_range_slice(
                builder, ir.Constant(n.type, 0), n, ir.Constant(n.type, 1), inc=True
            ) as (j, _):
                begin = builder.add(b, builder.mul(j, b_step))
                columns = [
                    load(builder, builder.add(begin, ir.Constant(begin.type, 4 * i)), one)
                    for i in range(0, N_COLUMNS, WIDTH)
                ]
                for row, kept in zip(rows, sums, strict=True):
                    at = builder.inttoptr(_behind(builder, row, j, 4), ir.FloatType().as_pointer())
                    factor = everywhere(builder, builder.load(at, align=4))
                    for column, each in zip(columns, kept, strict=True):
                        builder.store(fused(builder, factor, column, builder.load(each)), each)
            for row, kept in zip(places, sums, strict=True):
                for place, each in zip(row, kept, strict=True):
                    pointer = builder.inttoptr(place, vector.as_pointer())
                    builder.store(builder.load(each), pointer, align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), generate

    return typed


# (a, a_step, b, b_step, n, c, c_step), all float32: at address c, N_ROWS rows of N_COLUMNS, the
# product of a (N_ROWS,n) and b (n,N_COLUMNS), or that added to what is there
put_products: Any = intrinsic(_products(False))
add_products: Any = intrinsic(_products(True))
