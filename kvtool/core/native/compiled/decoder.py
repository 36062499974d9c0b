"""A decoding step as compiled code, from tokens to logits without a return to Python.

In a small model the Python code between layers takes as long as the layers. This file does the
operations of models/decoder.py in the same order, with the functions of layers.py. The model comes
as records of addresses, so one compiled form serves every depth and size. The caller keeps the
memory at these addresses alive.

`kind` is an array that only tells the type of the numbers at those addresses. Half formats are
computed in float32, and rounded wherever a module would return a tensor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, typeof, types
from numba import from_dtype as from_dtype

from kvtool.core.native.compiled import attention, quantize
from kvtool.core.native.compiled.attention import attend
from kvtool.core.native.compiled.codes import (
    EXACT,
    FORM,
    FORM_FLOATS,
    LENGTH,
    N_FACTS,
)
from kvtool.core.native.compiled.layers import activate, normalise, product, round_to_format
from kvtool.core.native.compiled.quantize import store_float8
from kvtool.core.native.compiled.tools import CONVERTS_FLOAT16 as CONVERTS_FLOAT16
from kvtool.core.native.compiled.tools import (
    Array,
    Forms,
    compiled,
    copy_rows,
    dense,
    kept,
    number,
    pointer,
    shared,
    vector,
)

# A model as records of addresses and sizes. A missing part has the address 0.
NORM = np.dtype(
    [(name, np.int64) for name in ("scale", "shift", "width", "centred")] + [("eps", np.float64)]
)
LINEAR = np.dtype([(name, np.int64) for name in ("weight", "bias", "n_out", "n_in")])
NORMS = ("norm1", "q_norm", "k_norm", "norm_cross", "norm2")
LINEARS = ("qkv", "out", "cross_q", "cross_out", "up", "down")
BLOCK = np.dtype(
    [(name, NORM) for name in NORMS] + [(name, LINEAR) for name in LINEARS] + [("window", np.int64)]
)
SIZES = ("n_vocab", "context", "n_heads", "n_groups", "head_dim", "activation")
TABLES = ("tokens", "positions", "sinusoids", "angles")  # the last two in float64
MODEL = np.dtype(
    [(name, np.int64) for name in (*TABLES, *SIZES)]
    + [("scale", np.float64), ("norm", NORM), ("head", LINEAR)]
)


@compiled()
def apply_norm(norm: Any, x: Array, y: Array, kind: Array) -> None:
    """y (n,d) = the norm of a record, applied to x (n,d)."""
    scale = vector(norm.scale, norm.width, kind)
    shift = vector(norm.shift, norm.width if norm.shift else 0, kind)
    normalise(x, norm.centred != 0, scale, shift, norm.eps, y)
    round_to_format(y, kind)


@compiled()
def apply_linear(layer: Any, x: Array, y: Array, kind: Array, threads: int, large: int) -> None:
    """y (n,out) = the linear layer of a record, applied to x (n,in)."""
    weight = carray(pointer(layer.weight, kind), (layer.n_out, layer.n_in))
    bias = vector(layer.bias, layer.n_out if layer.bias else 0, kind)
    product(x, weight, bias, y, threads, large)
    round_to_format(y, kind)


@compiled()
def rounded(x: float, kind: Array) -> float:
    """x rounded to the type of `kind`, as float32 or float64."""
    return number(kept(x, kind))


@shared(entry=True, fast=False)  # rounds after each operation, as PyTorch does
def embed(models: Array, tokens: Array, pos: Array, x: Array, kind: Array) -> bool:
    """x (n,d) = embeddings of tokens (n,) at positions pos (n,) -> whether all of them exist.

    Padding has negative positions, and reads position 0.
    """
    model, width, size = models[0], x.shape[1], kind.itemsize
    for n in range(x.shape[0]):
        at = max(pos[n], 0)
        placed = model.positions or model.sinusoids or model.angles
        if not 0 <= tokens[n] < model.n_vocab or (placed and at >= model.context):
            return False
        token = vector(model.tokens + tokens[n] * width * size, width, kind)
        if model.sinusoids:
            wave = carray(pointer(model.sinusoids + at * width * 8, np.float64), (width,))
            for j in range(width):
                scaled = rounded(number(token[j]) * x.dtype.type(model.scale), kind)
                x[n, j] = rounded(scaled + rounded(x.dtype.type(wave[j]), kind), kind)
        elif model.positions:
            position = vector(model.positions + at * width * size, width, kind)
            for j in range(width):
                x[n, j] = rounded(number(token[j]) + number(position[j]), kind)
        else:
            for j in range(width):
                x[n, j] = number(token[j])
    return True


@compiled(fast=False)
def rotate(heads: Array, n_turned: int, angles: Array, kind: Array) -> None:
    """Apply rotary positions to the first `n_turned` heads (H,D), in place (Su 2021).

    angles (D,): the D/2 cosines of the token's position, then the D/2 sines.
    """
    half = heads.shape[1] // 2
    for h in range(n_turned):
        for j in range(half):
            cos = rounded(heads.dtype.type(angles[j]), kind)
            sin = rounded(heads.dtype.type(angles[half + j]), kind)
            a, b = heads[h, j], heads[h, half + j]
            heads[h, j] = rounded(rounded(a * cos, kind) - rounded(b * sin, kind), kind)
            heads[h, half + j] = rounded(rounded(b * cos, kind) + rounded(a * sin, kind), kind)


@shared(entry=True)
def before_attention(
    models: Array, blocks: Array, layer: int, x: Array, pos: Array, qkv: Array, kind: Array,
    threads: int, large: int,
) -> None:  # fmt: skip
    """qkv (n,H+2*G,D) = queries, keys and values of x (n,d) at positions pos (n,)."""
    model, block = models[0], blocks[layer]
    n_heads, n_turned, width = model.n_heads, model.n_heads + model.n_groups, model.head_dim
    normal = np.empty_like(x)
    apply_norm(block.norm1, x, normal, kind)
    apply_linear(block.qkv, normal, qkv.reshape(x.shape[0], -1), kind, threads, large)
    for n in range(x.shape[0]):
        if block.q_norm.scale:
            before = qkv[n].copy()
            apply_norm(block.q_norm, before[:n_heads], qkv[n, :n_heads], kind)
            apply_norm(block.k_norm, before[n_heads:n_turned], qkv[n, n_heads:n_turned], kind)
        if model.angles:
            at = model.angles + max(pos[n], 0) * width * 8
            rotate(qkv[n], n_turned, carray(pointer(at, np.float64), (width,)), kind)


@compiled()
def add_linear(layer: Any, y: Array, x: Array, kind: Array, threads: int, large: int) -> None:
    """x (n,d) += the linear layer of a record, applied to y (n,in)."""
    out = np.empty_like(x)
    apply_linear(layer, y, out, kind, threads, large)
    x += out
    round_to_format(x, kind)


@compiled()
def read_source(
    model: Any, block: Any, x: Array, k: int, v: int, columns: int, seen: Array, kind: Array,
    threads: int, large: int,
) -> None:  # fmt: skip
    """x (n,d) += cross-attention; k and v are addresses of the source's (B,G,columns,D).

    Each row sees the columns from seen[row,0] to seen[row,1].
    """
    n, n_groups, width = x.shape[0], model.n_groups, model.head_dim
    normal, q = np.empty_like(x), np.empty((n, model.n_heads, width), x.dtype)
    apply_norm(block.norm_cross, x, normal, kind)
    apply_linear(block.cross_q, normal, q.reshape(n, -1), kind, threads, large)
    n_each, row_bytes = n // seen.shape[0], n_groups * columns * width * kind.itemsize
    spans, y = np.zeros((n, 4), np.int64), np.empty_like(q)
    for i in range(n):
        spans[i, 0], spans[i, 1] = seen[i // n_each]
    none = np.zeros(N_FACTS, np.int64)
    keys, values = (k, row_bytes, columns, kind, none), (v, row_bytes, columns, kind, none)
    attend(q, n_each, n_groups, keys, values, spans, y, threads, large)
    given = y.reshape(n, -1)
    round_to_format(given, kind)
    add_linear(block.cross_out, given, x, kind, threads, large)


@shared(entry=True)
def after_attention(
    models: Array, blocks: Array, layer: int, y: Array, x: Array, kind: Array,
    source: Array, columns: int, seen: Array, threads: int, large: int,
) -> None:  # fmt: skip
    """The rest of a block: x (n,d) += attention's result y (n,H,D) through `out`, then
    cross-attention if there is a source, then the feed-forward network.

    source (2,layers): addresses as in `read_source`, with columns and seen; (2,0) without a source.
    """
    model, block, n = models[0], blocks[layer], x.shape[0]
    add_linear(block.out, y.reshape(n, -1), x, kind, threads, large)
    if source.shape[1]:
        k, v = source[0, layer], source[1, layer]
        read_source(model, block, x, k, v, columns, seen, kind, threads, large)
    normal = np.empty_like(x)
    apply_norm(block.norm2, x, normal, kind)
    wide = np.empty((n, block.up.n_out), x.dtype)
    apply_linear(block.up, normal, wide, kind, threads, large)
    active = np.empty((n, block.down.n_in), x.dtype)
    activate(model.activation, wide, active)
    round_to_format(active, kind)
    add_linear(block.down, active, x, kind, threads, large)


@shared(entry=True)
def logits_of(
    models: Array, x: Array, logits: Array, kind: Array, threads: int, large: int
) -> None:
    """logits (n,V) = the final norm and the head, applied to x (n,d)."""
    normal = np.empty_like(x)
    apply_norm(models[0].norm, x, normal, kind)
    apply_linear(models[0].head, normal, logits, kind, threads, large)


@compiled()
def spans_of_step(pos: Array, n_each: int, slot: int, window: int, sinks: Array) -> Array:
    """The columns that each token at pos (n,) sees, as `spans` of `attend` -> (n,4).

    A row's first new token is in column `slot`. A token sees itself and the tokens before it, at
    most `window` of them (0: all), and always its row's sinks, columns sinks[row,0] to [row,1].
    """
    spans = np.zeros((pos.shape[0], 4), np.int64)
    for i in range(pos.shape[0]):
        row, last = i // n_each, slot + i % n_each + 1
        n_seen = max(pos[i] + 1, 1)  # padding sees itself
        n_seen = min(n_seen, window) if window else n_seen
        first, begin, end = last - n_seen, sinks[row, 0], min(sinks[row, 1], last)
        if pos[i] >= 0 and begin < end:
            if end < first:
                spans[i, 2], spans[i, 3] = begin, end
            else:
                first = begin
        spans[i, 0], spans[i, 1] = first, last
    return spans


@compiled()
def store(
    qkv: Array, n_heads: int, stored: Array, layer: int, columns: int, slot: int, n_each: int,
    kind: Array,
) -> None:  # fmt: skip
    """Keys and values of qkv (n,H+2*G,D), n_each tokens of each row, into the memory of a layer as
    `decode` has it, from column `slot` on."""
    n, width = qkv.shape[0], qkv.shape[2]
    n_groups = (qkv.shape[1] - n_heads) // 2
    shape = n // n_each, n_groups, columns, width
    keys = carray(pointer(stored[0, layer], kind), shape)
    values = carray(pointer(stored[1, layer], kind), shape)
    for i in range(n):
        row, column = i // n_each, slot + i % n_each
        for group in range(n_groups):
            for j in range(width):
                keys[row, group, column, j] = kept(qkv[i, n_heads + group, j], kind)
                value = qkv[i, n_heads + n_groups + group, j]
                values[row, group, column, j] = kept(value, kind)


@shared(entry=True)
def decode(
    models: Array, blocks: Array, tokens: Array, memory: Any, source: Any, logits: Array,
    kind: Array, threads: int, large: int,
) -> bool:  # fmt: skip
    """One step of the decoder -> whether all tokens and positions exist; if not, stop at once.

    tokens (n,): the same number for each of B rows, a row's together. memory: a StepAddresses
    (cache/direct_access.py). stored (2,layers): addresses of keys and values (B,G,columns,D); new
    ones go to column `slot` and on. window and sinks as in `spans_of_step`. coded (2,layers,9) of
    keys and values as in codes.py, or (2,1,9) zeros; where these are in e4m3, new ones are stored
    among them. source: addresses, columns and seen as in `after_attention`. logits (n,V), or (B,V)
    of each row's last token.
    """
    start, padding, stored, columns, slot, window, sinks, coded = memory
    source_at, source_columns, seen = source
    model, n, batch = models[0], tokens.shape[0], padding.shape[0]
    n_each, n_heads, n_groups, width = n // batch, model.n_heads, model.n_groups, model.head_dim
    pos = np.empty(n, np.int64)
    for i in range(n):
        pos[i] = start + i % n_each - padding[i // n_each]
    x = np.empty((n, model.head.n_in), logits.dtype)
    if not embed(models, tokens, pos, x, kind):
        return False
    qkv = np.empty((n, n_heads + 2 * n_groups, width), x.dtype)
    q, y = np.empty((n, n_heads, width), x.dtype), np.empty((n, n_heads, width), x.dtype)
    row_bytes = n_groups * columns * width * kind.itemsize
    for layer in range(blocks.shape[0]):
        before_attention(models, blocks, layer, x, pos, qkv, kind, threads, large)
        k_coded, v_coded = coded[0, layer % coded.shape[1]], coded[1, layer % coded.shape[1]]
        at = slot + k_coded[LENGTH] - k_coded[EXACT]
        if k_coded[FORM] == FORM_FLOATS:
            at = slot
            store_float8(qkv, n_heads, n_groups, k_coded, slot, n_each, kind)
            store_float8(qkv, n_heads + n_groups, n_groups, v_coded, slot, n_each, kind)
        else:
            store(qkv, n_heads, stored, layer, columns, slot, n_each, kind)
        for i in range(n):
            copy_rows(qkv[i, :n_heads], q[i])
        k_at = stored[0, layer], row_bytes, columns, kind, k_coded
        v_at = stored[1, layer], row_bytes, columns, kind, v_coded
        if layer + 1 == blocks.shape[0] and logits.shape[0] < n:  # no other tokens are asked for
            x, pos = x[n_each - 1 :: n_each].copy(), pos[n_each - 1 :: n_each].copy()
            q = q[n_each - 1 :: n_each].copy()
            y, n, at, n_each = np.empty_like(q), batch, at + n_each - 1, 1
        spans = spans_of_step(pos, n_each, at, blocks[layer].window or window, sinks)
        attend(q, n_each, n_groups, k_at, v_at, spans, y, threads, large)
        round_to_format(y.reshape(n, -1), kind)
        after_attention(
            models, blocks, layer, y, x, kind, source_at, source_columns, seen, threads, large
        )
    logits_of(models, x, logits, kind, threads, large)
    return True


def forms(real: types.Type, kind: types.Type) -> Forms:
    """All that decodes in `real` with weights, keys and values of `kind`, what is called first."""
    yield from attention.forms(real, kind)
    yield from quantize.forms(real, kind)
    n, (_, x2, x3), (k1, _, _), (n1, n2, n3) = types.intp, *map(dense, (real, kind, types.intp))
    records = tuple(typeof(np.empty(0, record)) for record in (MODEL, BLOCK))
    source = n2, n, n2
    yield embed, (records[0], n1, n1, x2, k1)
    yield before_attention, (*records, n, x2, n1, x3, k1, n, n)
    yield after_attention, (*records, n, x3, x2, k1, *source, n, n)
    yield logits_of, (records[0], x2, x2, k1, n, n)
    memory = types.Tuple((n, n1, n2, n, n, n, n2, n3))
    yield decode, (*records, n1, memory, types.Tuple(source), x2, k1, n, n)
