"""What no decoder can avoid: the products of one token, and reading its keys and values."""

from __future__ import annotations

import time

import numba
import numpy as np

from kvtool.core.bench.timing import TimedRun
from kvtool.core.decoding.native_decoder import linear_record
from kvtool.core.models import Model
from kvtool.core.models.layers import Linear
from kvtool.core.native import arrays as native
from kvtool.core.native.compiled.decoder import LINEAR, apply_linear
from kvtool.core.native.compiled.tools import Array, compiled, shared


class Floor:
    """The time of these two for each token of a run, and of nothing else.

    Both are compiled loops, one call a token: the products by kvtool's native code, which is faster
    than PyTorch's, and the sum of as many keys and values as a run's token reads on average.
    """

    def __init__(self, model: Model, n_prompt: int) -> None:
        c = model.config
        self.model = model  # keeps the weights
        layers = [m for m in model.modules() if isinstance(m, Linear)]
        self.layers = np.array([linear_record(layer) for layer in layers], LINEAR)
        self.x = np.ones((1, max(layer.in_features for layer in layers)), np.float32)
        self.y = np.empty((1, max(layer.out_features for layer in layers)), np.float32)
        shape = 2 * c.n_layers * c.n_kv_heads, c.context, c.head_dim
        self.stored = np.ones(shape, np.float32)
        self.n_prompt = n_prompt

    def run(self, kind: str, length: int) -> TimedRun:
        seen, sums = self.n_prompt + length // 2, np.empty(len(self.stored), np.float32)
        threads = native.threads_for(native.MIN_SHARED)
        started = time.perf_counter()
        for _ in range(length):
            products(self.layers, self.x, self.y, threads, native.MIN_SHARED)
            (read_by_threads if threads > 1 else read)(self.stored, seen, sums)
        seconds = time.perf_counter() - started
        return TimedRun(seconds, 0.0, seconds, None, 0, None)


@shared(entry=True)
def products(layers: Array, x: Array, y: Array, threads: int, large: int) -> None:
    for i in range(layers.shape[0]):
        layer = layers[i]
        x_in, y_out = x[:, : layer.n_in].copy(), y[:, : layer.n_out].copy()
        apply_linear(layer, x_in, y_out, x[0], threads, large)


@compiled()
def add_up(x: Array) -> float:
    total = x.dtype.type(0)
    for i in range(x.shape[0]):
        total += x[i]
    return total


@shared(entry=True)
def read(stored: Array, seen: int, sums: Array) -> None:
    for i in range(stored.shape[0]):
        sums[i] = add_up(stored[i, :seen].reshape(-1))


@shared(entry=True, parallel=True)
def read_by_threads(stored: Array, seen: int, sums: Array) -> None:
    for i in numba.prange(stored.shape[0]):
        sums[i] = add_up(stored[i, :seen].reshape(-1))
