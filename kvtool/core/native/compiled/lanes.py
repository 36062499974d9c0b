"""Sixteen numbers in registers, for loops whose order of adding must not be LLVM's choice, and that
it would not vectorise well by itself: it asks before each short one whether its arrays overlap.

Addresses are whole numbers; `like` is an array of the type of the numbers there, or of those to
compute with, for its type alone.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from kvtool.core.native.compiled.tools import CONVERTS_FLOAT16

WIDTH = 16
NBYTES = 4 * WIDTH  # of float32


class Lanes(types.Type):
    """Sixteen numbers of a floating type."""

    def __init__(self, real: types.Float) -> None:
        super().__init__(name=f"{WIDTH} x {real}")
        self.real = real
        self.vector = ir.VectorType(
            ir.FloatType() if real == types.float32 else ir.DoubleType(), WIDTH
        )


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, kind.vector)


LANES = {real: Lanes(real) for real in (types.float32, types.float64)}
# Codes, told apart by the types of arrays: bytes, halves of bytes, and numbers in e4m3.
BYTES, LOW_HALVES, HIGH_HALVES, FLOATS = types.uint8, types.uint16, types.uint32, types.uint64
FLOAT8_UNIT = 256.0
I8, I16, I32 = (ir.VectorType(ir.IntType(n), WIDTH) for n in (8, 16, 32))


def computed(like: Any) -> types.Float:
    """What numbers of arrays of that type are computed in: half formats are bits here."""
    return like.dtype if isinstance(like.dtype, types.Float) else types.float32


def everywhere(builder: Any, x: Any, n: int = WIDTH) -> Any:
    """A vector of n times x."""
    none = ir.Constant(ir.VectorType(x.type, n), ir.Undefined)
    first = builder.insert_element(none, x, ir.Constant(ir.IntType(32), 0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), n), [0] * n)
    return builder.shuffle_vector(first, none, order)


def constant(kind: Any, x: int) -> Any:
    """A vector of that type, x in every lane."""
    return ir.Constant(kind, [x] * WIDTH)


def _at(builder: Any, address: Any, kind: Any) -> Any:
    size = kind.element if isinstance(kind, ir.VectorType) else kind
    width = {ir.FloatType(): 4, ir.DoubleType(): 8}.get(size) or size.width // 8
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=width)


def _widened(builder: Any, bits: Any, dtype: Any) -> Any:
    """Lanes of half formats' bits (16 x i16)."""
    floats = ir.VectorType(ir.FloatType(), WIDTH)
    if dtype == types.int16:
        return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), WIDTH)), floats)
    return builder.bitcast(builder.shl(builder.zext(bits, I32), constant(I32, 16)), floats)


def load(builder: Any, address: Any, like: Any) -> Any:
    """The instructions that read sixteen numbers of the type of `like`, to compute with."""
    if isinstance(like.dtype, types.Float):
        return _at(builder, address, LANES[like.dtype].vector)
    return _widened(builder, _at(builder, address, I16), like.dtype)


def _load(typing: Any, address: Any, like: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return load(builder, args[0], like)

    return LANES[computed(like)](types.intp, like), generate


def _store(typing: Any, x: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        at = builder.inttoptr(args[1], x.vector.as_pointer())
        builder.store(args[0], at, align=4)
        return context.get_dummy_value()

    return types.void(x, types.intp), generate


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """The instructions for a * b + c, rounded once."""
    product = builder.fmul(a, b, flags=["contract"])
    return builder.fadd(product, c, flags=["contract"])


def _multiply_add(typing: Any, a: Any, b: Any, c: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return fused(builder, *args)

    return a(a, a, a), generate


def _times(typing: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fmul(*args)

    return a(a, a), generate


def _plus(typing: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(*args)

    return a(a, a), generate


def _spread(typing: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return everywhere(builder, args[0])

    return LANES[x](x), generate


def number_of_code(builder: Any, address: Any, form: Any, vector: Any) -> Any:
    """The instructions that read sixteen codes as numbers."""
    bits = _at(builder, address, I8)
    if form == FLOATS:
        return _float8(builder, bits, vector)
    codes = builder.zext(bits, I32)
    if form == LOW_HALVES:
        codes = builder.and_(codes, constant(I32, 15))
    elif form == HIGH_HALVES:
        codes = builder.lshr(codes, constant(I32, 4))
    return builder.sitofp(codes, vector)


def scaled(builder: Any, code: Any, scale: Any, zero_point: Any, like: Any) -> Any:
    """The instructions for code * scale + zero_point, rounded after each, as PyTorch does. A code
    times a scale of a half format is exact in float32, and need not be rounded."""
    flags = () if isinstance(like.dtype, types.Float) else ["contract"]
    product = builder.fmul(code, scale, flags=flags)
    return builder.fadd(product, zero_point, flags=flags)


def spread_from(builder: Any, address: Any, vector: Any) -> Any:
    """The instructions that read a number into every lane."""
    return everywhere(builder, _at(builder, address, vector.element))


def _float8(builder: Any, bits: Any, vector: Any) -> Any:
    """Numbers in e4m3, divided by FLOAT8_UNIT: the same bits are one in a format of more exponents,
    whose bias is larger, also those too small for it. NaN is not among them."""
    floats = ir.VectorType(ir.FloatType(), WIDTH)
    if CONVERTS_FLOAT16:
        wide = builder.shl(builder.sext(bits, I16), constant(I16, 7))
        wide = builder.and_(wide, constant(I16, 0xBF80))
        found = builder.fpext(builder.bitcast(wide, ir.VectorType(ir.HalfType(), WIDTH)), floats)
    else:
        wide = builder.shl(builder.sext(bits, I32), constant(I32, 20))
        wide = builder.bitcast(builder.and_(wide, constant(I32, 0x87F00000)), floats)
        found = builder.fmul(wide, ir.Constant(floats, [2.0**112] * WIDTH))
    return found if vector == floats else builder.fpext(found, vector)


def _total(typing: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), x.vector])
        name = f"llvm.vector.reduce.fadd.v{WIDTH}f32"
        add = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(add, [ir.Constant(ir.FloatType(), 0.0), args[0]], fastmath=["reassoc"])

    return types.float32(x), generate


def _larger(typing: Any, a: Any, b: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return a(a, a), generate


def _highest(typing: Any, x: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found, order = args[0], ir.VectorType(ir.IntType(32), WIDTH)
        for n in (8, 4, 2, 1):
            turned = ir.Constant(order, [(i + n) % WIDTH for i in range(WIDTH)])
            other = builder.shuffle_vector(found, found, turned)
            found = builder.select(builder.fcmp_ordered(">", found, other), found, other)
        return builder.extract_element(found, ir.Constant(ir.IntType(32), 0))

    return x.real(x), generate


def _shuffled(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    kind = ir.VectorType(ir.IntType(32), len(order))
    return builder.shuffle_vector(a, b, ir.Constant(kind, order))


def _halved(builder: Any, a: Any, b: Any, first: list[int], behind: int) -> Any:
    """Lanes `first` of a and b, side by side, and those `behind` them, added."""
    others = [i + behind for i in first]
    return builder.fadd(*(_shuffled(builder, a, b, order) for order in (first, others)))


def totals_of(builder: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The instructions that add up the lanes of each of four vectors -> a vector of four.

    Each pair of lanes that is added becomes one: vectors of half the length, which take half as
    long."""
    a, b, c, d = (_halved(builder, x, x, list(range(8)), 8) for x in (a, b, c, d))
    fours = [0, 1, 2, 3, 8, 9, 10, 11]
    a_c, b_d = _halved(builder, a, c, fours, 4), _halved(builder, b, d, fours, 4)
    twos = _halved(builder, a_c, b_d, [0, 1, 8, 9, 4, 5, 12, 13], 2)
    a_b, c_d = (_shuffled(builder, twos, twos, list(range(at, at + 4))) for at in (0, 4))
    return _halved(builder, a_b, c_d, [0, 2, 4, 6], 1)


def _both(builder: Any, a: Any, b: Any, n: int) -> Any:
    """Of a and b (blocks of 2*n lanes that belong together) each block's halves added: those of a
    are then the first, and those of b the second half of a block."""
    first = [i + (WIDTH if i & n else 0) for i in range(WIDTH)]  # of b every second
    behind = [i - n + WIDTH if i & n else i + n for i in range(WIDTH)]
    return builder.fadd(*(_shuffled(builder, a, b, order) for order in (first, behind)))


def sixteen_totals(builder: Any, vectors: list[Any]) -> Any:
    """The instructions that add up the lanes of each of sixteen vectors, as `totals_of` -> a vector
    of sixteen."""
    # Where a step puts a vector is another bit of its lane, from the highest on.
    order = [int(f"{i:04b}"[::-1], 2) for i in range(WIDTH)]
    found = [vectors[i] for i in order]
    for n in (8, 4, 2, 1):
        found = [_both(builder, a, b, n) for a, b in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def _put_totals(typing: Any, a: Any, b: Any, c: Any, d: Any, scale: Any, address: Any) -> Any:
    """Lanes i and i+8 of each are added, then i and i+4, and so on: an order of their own."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores = builder.fmul(totals_of(builder, *args[:4]), everywhere(builder, args[4], 4))
        builder.store(scores, builder.inttoptr(args[5], scores.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(a, a, a, a, scale, types.intp), generate


lanes_at: Any = intrinsic(_load)  # (address, like) -> 16 numbers
spread: Any = intrinsic(_spread)  # (number) -> it in every lane
put_lanes: Any = intrinsic(_store)  # (lanes, address)
multiply_add: Any = intrinsic(_multiply_add)  # (a, b, c) -> a * b + c, rounded once
times: Any = intrinsic(_times)  # (a, b) -> a * b
plus: Any = intrinsic(_plus)  # (a, b) -> a + b
larger: Any = intrinsic(_larger)  # (a, b) -> the larger number of each lane
highest: Any = intrinsic(_highest)  # (lanes) -> the largest of them
total: Any = intrinsic(_total)  # (lanes of float32) -> their sum
# (a, b, c, d, scale, address): the sum of each, times the scale, side by side
put_totals: Any = intrinsic(_put_totals)
