"""Queries over keys and values that are codes: each code becomes a number once, in a register, for
all queries that share its head (Ainslie 2023).

Every sum has the order that attention.py says, whatever stands beside it in a tile. Addresses are
whole numbers, as in lanes.py. Here are the instructions; codes.py calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kvtool.core.native.compiled.lanes import (
    FLOATS,
    LANES,
    LOW_HALVES,
    WIDTH,
    everywhere,
    fused,
    number_of_code,
    scaled,
    sixteen_totals,
    spread_from,
    totals_of,
)
from kvtool.core.native.compiled.tools import FEATURES, Array, compiled

# As many sums as there are registers for, as in tiles.py: in float32 with thirty-two of 64 bytes,
# by the number of queries, so many tokens; else one query and four tokens.
WIDE = "+avx512f" in FEATURES
TOKENS = {1: 16, 2: 8, 3: 4, 4: 4} if WIDE else {}
MAX_QUERIES = max(TOKENS, default=1)
FEW = 4  # tokens, of one query: for what is left
EIGHT = 8  # values that are added up before they are added to others


@compiled()
def queries_at_once(real: Array) -> int:
    """How many queries of that type share a number."""
    return MAX_QUERIES if real.itemsize == 4 else 1


class Operands(NamedTuple):
    """What a tile reads and writes: the arguments of `score_tokens` or `add_tokens`, and types."""

    builder: Any
    args: Sequence[Any]
    forms: tuple[Any, Any]  # of the first token and the next, and so on
    like: Any  # of the type of scales
    real: Any

    @property
    def vector(self) -> Any:
        return LANES[self.real].vector

    @property
    def size(self) -> int:
        """Bytes of a number to compute with."""
        return int(self.real.bitwidth) // 8

    @property
    def halves(self) -> bool:
        """Whether two tokens are in each byte."""
        return self.forms[0] != self.forms[1]

    @property
    def floats(self) -> bool:
        return bool(self.forms[0] == FLOATS)

    def constant(self, x: int) -> Any:
        return ir.Constant(self.args[0].type, x)

    def behind(self, at: Any, index: Any, size: Any) -> Any:
        size = self.constant(size) if isinstance(size, int) else size
        return self.builder.add(at, self.builder.mul(index, size))

    def apart(self, at: Any, step: Any, n: int) -> list[Any]:
        """n addresses, each `step` bytes from the one before."""
        return [self.behind(at, step, i) for i in range(n)]

    def load(self, address: Any) -> Any:
        pointer = self.builder.inttoptr(address, self.vector.as_pointer())
        return self.builder.load(pointer, align=self.size)

    def store(self, x: Any, address: Any) -> None:
        pointer = self.builder.inttoptr(address, x.type.as_pointer())
        self.builder.store(x, pointer, align=self.size)

    def number(self, codes: Any, form: Any, scale: Any, zero: Any) -> Any:
        """The instructions that make sixteen codes numbers."""
        code = number_of_code(self.builder, codes, form, self.vector)
        if form == FLOATS:
            return self.builder.fmul(code, scale)
        return scaled(self.builder, code, scale, zero, self.like)

    def loop(self, first: Any, end: Any, step: Any) -> Any:
        return cgutils.for_range_slice(self.builder, first, end, step, inc=True)


def _score_tokens(typing: Any, m: Any, q: Any, q_step: Any, width: Any, codes: Any, step: Any,
    n: Any, scales: Any, zeros: Any, factor: Any, to: Any, to_step: Any, even: Any, odd: Any,
    like: Any, real: Any,
) -> Any:  # fmt: skip
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        o = Operands(builder, args, (even.dtype, odd.dtype), like, real.dtype)
        m, n, done = args[0], args[6], cgutils.alloca_once_value(builder, o.constant(0))
        tokens = TOKENS if o.size == 4 else {}
        for n_queries, n_tokens in tokens.items():
            # A scale for each token takes a register.
            n_tokens = min(n_tokens, 8) if o.floats else n_tokens
            with builder.if_then(builder.icmp_signed("==", m, o.constant(n_queries))):
                left = builder.srem(n, o.constant(n_tokens))
                whole = builder.sub(n, left)
                builder.store(whole, done)
                with o.loop(o.constant(0), whole, o.constant(n_tokens)) as (i, _):
                    _score_tile(o, o.constant(0), n_queries, i, n_tokens)
        first, by = builder.load(done), o.constant(FEW)
        with o.loop(o.constant(0), m, o.constant(1)) as (row, _), o.loop(first, n, by) as (i, _):
            _score_tile(o, row, 1, i, FEW)
        return context.get_dummy_value()

    n_ = types.intp
    numbers = (n_, n_, n_, n_, n_, n_, n_, n_, n_, real.dtype, n_, n_)
    return types.void(*numbers, even, odd, like, real), generate


def _score_tile(o: Operands, row: Any, n_queries: int, first: Any, n_tokens: int) -> None:
    """The scores of queries from number `row` on and tokens from `first` on; of tokens that are not
    there, the last is read."""
    _, q, q_step, width, codes, step, n, scales, zeros, factor, to, to_step = o.args[:12]
    b, vector, last = o.builder, o.vector, o.builder.sub(n, o.constant(1))
    tokens = [b.add(first, o.constant(i)) for i in range(n_tokens)]
    tokens = [b.select(b.icmp_signed("<", token, last), token, last) for token in tokens]
    rows = [o.behind(codes, b.ashr(x, o.constant(1)) if o.halves else x, step) for x in tokens]
    if o.halves:  # a byte has both
        rows = [rows[i // 2 * 2] for i in range(n_tokens)]
    queries = o.apart(o.behind(q, row, q_step), q_step, n_queries)
    none = ir.Constant(vector, [0.0] * WIDTH)
    sums = [[cgutils.alloca_once_value(b, none) for _ in rows] for _ in queries]
    of_tokens = [spread_from(b, o.behind(scales, x, o.size), vector) for x in tokens if o.floats]
    with o.loop(o.constant(0), width, o.constant(WIDTH)) as (j, _):
        columns = [o.load(o.behind(x, j, o.size)) for x in queries]
        s, z = (None if o.floats else o.load(o.behind(x, j, o.size)) for x in (scales, zeros))
        for i, codes_at in enumerate(rows):
            scale = of_tokens[i] if o.floats else s
            key = o.number(b.add(codes_at, j), o.forms[i % 2], scale, z)
            for column, kept in zip(columns, sums, strict=True):
                b.store(fused(b, column, key, b.load(kept[i])), kept[i])
    goals = o.apart(o.behind(to, row, to_step), to_step, n_queries)
    goals = [o.behind(x, first, o.size) for x in goals]
    _put_totals(o, [[b.load(x) for x in kept] for kept in sums], factor, goals)


def _put_totals(o: Operands, sums: list[list[Any]], factor: Any, goals: list[Any]) -> None:
    """The totals of each goal's sums, times the factor, side by side at its address."""
    b, flat = o.builder, [x for kept in sums for x in kept]
    if len(flat) > 2 * FEW:
        none = ir.Constant(o.vector, [0.0] * WIDTH)
        flat += [none] * (WIDTH - len(flat))
        found = b.fmul(sixteen_totals(b, flat), everywhere(b, factor))
        for i, goal in enumerate(goals):
            o.store(_lanes(b, found, len(sums[0]) * i, len(sums[0])), goal)
        return
    for kept, goal in zip(sums, goals, strict=True):
        for i in range(0, len(kept), FEW):
            found = b.fmul(totals_of(b, *kept[i : i + FEW]), everywhere(b, factor, FEW))
            o.store(found, b.add(goal, o.constant(i * o.size)))


def _lanes(builder: Any, x: Any, first: int, n: int) -> Any:
    kind = ir.VectorType(ir.IntType(32), n)
    return builder.shuffle_vector(x, x, ir.Constant(kind, list(range(first, first + n))))


def _add_tokens(typing: Any, m: Any, w: Any, w_step: Any, width: Any, codes: Any, step: Any,
    n: Any, scales: Any, zeros: Any, of_token: Any, channels: Any, y: Any, y_step: Any, even: Any,
    odd: Any, like: Any, real: Any,
) -> Any:  # fmt: skip
    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        o = Operands(builder, args, (even.dtype, odd.dtype), like, real.dtype)
        m, n, zero, by = args[0], args[6], o.constant(0), o.constant(EIGHT)
        tokens = TOKENS if o.size == 4 else {}
        for n_queries in tokens:
            alike = builder.icmp_signed("==", m, o.constant(n_queries))
            with builder.if_then(alike), o.loop(zero, n, by) as (i, _):
                _add_tile(o, zero, n_queries, i)
        if not tokens:
            with o.loop(zero, m, o.constant(1)) as (row, _), o.loop(zero, n, by) as (i, _):
                _add_tile(o, row, 1, i)
        return context.get_dummy_value()

    n_ = types.intp
    return types.void(*[n_] * 13, even, odd, like, real), generate


def _add_tile(o: Operands, row: Any, n_queries: int, first: Any) -> None:
    """Add eight values, from token `first` on, to the sums of queries from number `row` on."""
    _, w, w_step, width, codes, step, _, scales, zeros, of_token, channels, y, y_step = o.args[:13]
    b, late = o.builder, o.halves and o.forms[0] != LOW_HALVES  # the first token ends a byte
    byte = b.ashr(first, o.constant(1)) if o.halves else first
    rows = o.apart(o.behind(codes, byte, step), step, EIGHT // 2 + 1 if o.halves else EIGHT)
    rows = [rows[(i + late) // 2 if o.halves else i] for i in range(EIGHT)]
    weights = o.apart(o.behind(w, row, w_step), w_step, n_queries)
    weights = [o.behind(x, first, o.size) for x in weights]
    goals = o.apart(o.behind(y, row, y_step), y_step, n_queries)
    scales, zeros = (o.behind(x, first, of_token) for x in (scales, zeros))
    with o.loop(o.constant(0), width, channels) as (c, _):
        behind = b.mul(b.sdiv(c, channels), o.constant(o.size))
        s_at, z_at = (o.apart(b.add(x, behind), of_token, EIGHT) for x in (scales, zeros))
        s = [spread_from(b, x, o.vector) for x in s_at]
        with o.loop(c, b.add(c, channels), o.constant(WIDTH)) as (j, _):
            # Zero points and weights are read where they are used: an instruction that reads one
            # into every lane of an operand takes no longer for it.
            values = [
                o.number(b.add(x, j), o.forms[i % 2], s[i], spread_from(b, z_at[i], o.vector))
                for i, x in enumerate(rows)
            ]
            for weight, goal in zip(weights, goals, strict=True):
                there = o.behind(goal, j, o.size)
                o.store(b.fadd(o.load(there), _weighed(o, weight, values)), there)


def _weighed(o: Operands, weights: Any, values: list[Any]) -> Any:
    """The sum of eight values, times the weights from that address on: two by two halves."""
    halves = []
    for first in (0, EIGHT // 2):
        total = None
        for i in range(first, first + EIGHT // 2):
            weight = spread_from(o.builder, o.behind(weights, o.constant(i), o.size), o.vector)
            if total is None:
                total = o.builder.fmul(weight, values[i])
            else:
                total = fused(o.builder, weight, values[i], total)
        halves.append(total)
    return o.builder.fadd(*halves)


# (m, q, q_step, width, codes, step, n, scales, zeros, factor, to, to_step, even, odd, like, real):
# m queries, q_step bytes apart, by n keys, step bytes apart, or of two half as many -> at address
# `to`, in rows to_step bytes apart, their products times the factor. Scales and zero points are
# reals, (width,) or in e4m3 (n,). even and odd: the forms of the first token and the next; like: an
# array of the type that scales had.
score_tokens: Any = intrinsic(_score_tokens)
# (m, w, w_step, width, codes, step, n, scales, zeros, of_token, channels, y, y_step, even, odd,
# like, real): n values, whole eights, whose scales and zero points are of_token bytes apart, one
# for so many channels: their sums with the weights at w, in m rows, are added to those at y.
add_tokens: Any = intrinsic(_add_tokens)
