"""How a token's time grows with what is read for it: depth, batch, and two number formats.

    .venv/bin/python tests/benchmarks/peers/scaling.py

Prints a table: the median time of a decoding step behind `depth` tokens of random keys and values,
the bytes of weights, keys and values that it reads, and so the bandwidth.
"""

from __future__ import annotations

import argparse
import itertools
import time
from statistics import median

import torch
from measure import make_model

from kvtool.core.bench.traffic import weights_read
from kvtool.core.cache import Cache, CacheSpec, make_cache
from kvtool.core.decoding.dispatch import decoding_form
from kvtool.core.decoding.engine import feed
from kvtool.core.models import Model

STEPS = 24  # of which the median counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--depths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", default="dynamic")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    print("| type | batch | " + " | ".join(f"{n:,}" for n in asked.depths) + " |")
    print("|---" * (len(asked.depths) + 2) + "|")
    for dtype, batch in itertools.product((torch.float32, torch.bfloat16), asked.batches):
        model = make_model(max(asked.depths) + STEPS + 1, dtype)
        times: dict[int, list[float]] = {depth: [] for depth in asked.depths}
        for _, depth in itertools.product(range(asked.rounds), asked.depths):
            times[depth].append(step_seconds(model, asked.cache, batch, depth))
        cells = []
        for depth in asked.depths:
            read = bytes_read(model, asked.cache, batch, depth)
            seconds = median(times[depth])
            cells.append(f"{seconds * 1e6:,.0f} µs, {read / seconds / 1e9:.1f} GB/s")
        name = str(dtype).removeprefix("torch.")
        print(f"| {name} | {batch} | " + " | ".join(cells) + " |", flush=True)


def filled(model: Model, kind: str, batch: int, depth: int) -> Cache:
    """A cache that holds `depth` random tokens a row, without computing them."""
    dtype = next(model.parameters()).dtype
    spec = CacheSpec.of(model.config, batch, depth + STEPS, dtype)
    cache = make_cache(kind, spec)
    step = cache.begin(depth)
    for layer in range(spec.n_layers):
        shape = batch, spec.n_kv_heads, depth, spec.head_dim
        cache.write(layer, torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), step)
    cache.commit(depth)
    return cache


@torch.inference_mode()
def step_seconds(model: Model, kind: str, batch: int, depth: int) -> float:
    """The median time of a step of one token a row behind `depth` others."""
    cache = filled(model, kind, batch, depth)
    ids = torch.randint(model.config.vocab_size, (batch, depth + STEPS))
    decode = decoding_form(model)
    times = []
    for end in range(depth + 1, depth + STEPS + 1):
        started = time.perf_counter()
        feed(decode, cache, ids[:, :end], last=True)
        times.append(time.perf_counter() - started)
    return median(times)


def bytes_read(model: Model, kind: str, batch: int, depth: int) -> int:
    """Weights, and keys and values, that a step reads once."""
    return weights_read(model) + filled(model, kind, batch, depth).nbytes().read_per_step


if __name__ == "__main__":
    main()
