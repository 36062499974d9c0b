"""Vectors of sixteen numbers, for loops that LLVM would not vectorise well by itself."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

WIDTH = 16
NBYTES = 4 * WIDTH
VECTOR = ir.VectorType(ir.FloatType(), WIDTH)


class Lanes(types.Type):
    """numba's type of sixteen float32 in a register.

    Without it LLVM would keep the sums of a short loop in memory, and check before each loop
    whether its arrays overlap: that doubles the time of attention.
    """

    def __init__(self) -> None:
        super().__init__(name=f"{WIDTH} x float32")


LANES = Lanes()


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    """How numba stores Lanes: as an LLVM vector."""

    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, VECTOR)


def _pointer(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, VECTOR.as_pointer())


def _everywhere(builder: Any, x: Any) -> Any:
    """A vector with x in each of its sixteen lanes."""
    first, none = (
        ir.Constant(ir.IntType(32), 0),
        ir.Constant(ir.VectorType(x.type, WIDTH), ir.Undefined),
    )
    order = ir.Constant(ir.VectorType(first.type, WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(builder.insert_element(none, x, first), none, order)


def _load(typing: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_pointer(builder, args[0]), align=4)

    return LANES(types.intp), generate


def _store(typing: Any, x: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[0], _pointer(builder, args[1]), align=4)
        return context.get_dummy_value()

    return types.void(LANES, types.intp), generate


def _multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        product = builder.fmul(*args[:2], flags=["contract"])
        return builder.fadd(product, args[2], flags=["contract"])

    return LANES(LANES, LANES, LANES), generate


def _spread(typing: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _everywhere(builder, args[0])

    return LANES(types.float32), generate


def _total(typing: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), VECTOR])
        name = f"llvm.vector.reduce.fadd.v{WIDTH}f32"
        add = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(add, [ir.Constant(ir.FloatType(), 0.0), args[0]], fastmath=["reassoc"])

    return types.float32(LANES), generate


def _codes(typing: Any, address: Any, shift: Any, mask: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bytes_, wide = (ir.VectorType(ir.IntType(n), WIDTH) for n in (8, 32))
        at = builder.inttoptr(args[0], bytes_.as_pointer())
        codes = builder.zext(builder.load(at, align=1), wide)
        shift, mask = (_everywhere(builder, builder.trunc(x, wide.element)) for x in args[1:])
        return builder.sitofp(builder.and_(builder.lshr(codes, shift), mask), VECTOR)

    return LANES(types.intp, types.intp, types.intp), generate


def _times_plus(typing: Any, a: Any, b: Any, c: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(builder.fmul(*args[:2]), args[2])

    return LANES(LANES, LANES, LANES), generate


lanes_at: Any = intrinsic(_load)  # (address of 16 float32) -> lanes
put_lanes: Any = intrinsic(_store)  # (lanes, address)
multiply_add: Any = intrinsic(_multiply_add)  # (a, b, c) -> a * b + c, rounded once
times_plus: Any = intrinsic(_times_plus)  # (a, b, c) -> a * b + c, rounded twice, as PyTorch does
# (address of 16 bytes, shift, mask) -> lanes of (byte >> shift) & mask
codes_at: Any = intrinsic(_codes)
spread: Any = intrinsic(_spread)  # (float32) -> lanes, all equal to it
total: Any = intrinsic(_total)  # (lanes) -> their sum
