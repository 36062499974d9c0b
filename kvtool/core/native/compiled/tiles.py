"""Products of a few rows with a few others, whose sums stay in registers: so a number that was read
is used several times.

Each sum has one order, whatever stands beside it in a tile: sixteen lanes, and these by halves.
Addresses are whole numbers, as in lanes.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvtool.core.native.compiled.lanes import LANES, WIDTH, fused, load, totals_of
from kvtool.core.native.compiled.tools import FEATURES, Array, compiled

# As many sums as there are registers for: thirty-two of 64 bytes, or no more than sixteen of 32.
WIDE = "+avx512f" in FEATURES
MOST_ROWS = 3 if WIDE else 1


@compiled()
def at_once(real: Array) -> int:
    """How many rows of weights a tile has for sums of the type of `real`."""
    return 8 if WIDE and real.itemsize == 4 else 4


def _dots(n_rows: int) -> Callable[..., Any]:
    def typed(
        typing: Any, w: Any, w_step: Any, x: Any, x_step: Any, n: Any, like: Any, to: Any,
        real: Any, y_step: Any,
    ) -> Any:  # fmt: skip
        vector, size = LANES[real.dtype].vector, real.dtype.bitwidth // 8
        n_weights = at_once.py_func(np.empty(0, f"f{size}"))

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            at, step, x_at, x_by, width, _, to, _, y_by = args
            weights, rows = (
                _apart(builder, at, step, n_weights),
                _apart(builder, x_at, x_by, n_rows),
            )
            none = ir.Constant(vector, [0.0] * WIDTH)
            sums = [[cgutils.alloca_once_value(builder, none) for _ in weights] for _ in rows]
            zero, by = ir.Constant(width.type, 0), ir.Constant(width.type, WIDTH)
            with cgutils.for_range_slice(builder, zero, width, by, inc=True) as (j, _):
                columns = [load(builder, _behind(builder, row, j, size), real) for row in rows]
                stored = like.dtype.bitwidth // 8
                for i, row in enumerate(weights):
                    weight = load(builder, _behind(builder, row, j, stored), like)
                    for column, kept in zip(columns, sums, strict=True):
                        total = fused(builder, weight, column, builder.load(kept[i]))
                        builder.store(total, kept[i])
            for y, kept in zip(_apart(builder, to, y_by, n_rows), sums, strict=True):
                for i in range(0, n_weights, 4):
                    found = totals_of(builder, [builder.load(x) for x in kept[i : i + 4]])
                    there = builder.add(y, ir.Constant(y.type, i * size))
                    pointer = builder.inttoptr(there, found.type.as_pointer())
                    builder.store(found, pointer, align=4)
            return context.get_dummy_value()

        n = types.intp
        return types.void(n, n, n, n, n, like, n, real, n), generate

    return typed


def _apart(builder: Any, at: Any, step: Any, n: int) -> list[Any]:
    """n addresses, each `step` bytes from the one before."""
    return [builder.add(at, builder.mul(step, ir.Constant(at.type, i))) for i in range(n)]


def _behind(builder: Any, at: Any, index: Any, size: int) -> Any:
    return builder.add(at, builder.mul(index, ir.Constant(at.type, size)))


# (w, w_step, x, x_step, n, like, y, real, y_step): `at_once` rows of weights of the type of `like` at
# address w, and one, two or three rows of `real` at x, n numbers each, whole lanes -> at y as many
# rows of products
dots_of_one: Any = intrinsic(_dots(1))
dots_of_two: Any = intrinsic(_dots(2))
dots_of_three: Any = intrinsic(_dots(3))
