"""Decoding on a GPU: with CUDA graphs, without, transformers on the same weights, and the floor.

All in one run and in turns. Every figure is of decoding alone, microseconds a token; nothing of a
prompt, of recording graphs, or of transformers' compiler is in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu import needs_cuda
from kvtool.config import ModelConfig
from kvtool.core.bench.peers import TransformersGenerate, load_peer
from kvtool.core.bench.timing import now
from kvtool.core.bench.traffic import weights_read
from kvtool.core.cache import Cache, CacheSpec, make_cache
from kvtool.core.decoding import cuda_graphs as graphs
from kvtool.core.decoding.dispatch import decoding_form
from kvtool.core.decoding.engine import feed, generate
from kvtool.core.decoding.sampling import Sampler
from kvtool.core.kernels.default import attention_of_one
from kvtool.core.models import Model, build_model

N_PROMPT, N_NEW, ROUNDS = 128, 128, 7
COPIED = 2**30  # bytes; far more than a GPU's caches hold


class Shape(NamedTuple):
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    dtype: torch.dtype

    def model(self, device: torch.device) -> Model:
        """Random weights in GPT-2's form, which transformers has too."""
        torch.manual_seed(0)
        config = ModelConfig(
            vocab_size=self.vocabulary, d_model=self.width, n_layers=self.layers,
            n_heads=self.heads, context=N_PROMPT + N_NEW + 1,
            positions="learned", activation="gelu_tanh",
        )  # fmt: skip
        model = build_model(config).eval().requires_grad_(False)
        return model.to(device, self.dtype)


SHAPES = {
    "2 layers, float32": Shape(2, 256, 8, 4096, 1, torch.float32),
    "12 layers, float32": Shape(12, 768, 12, 50257, 1, torch.float32),
    "12 layers, bfloat16": Shape(12, 768, 12, 50257, 1, torch.bfloat16),
    "12 layers, bfloat16, 8 rows": Shape(12, 768, 12, 50257, 8, torch.bfloat16),
    "24 layers, bfloat16": Shape(24, 2048, 16, 50257, 1, torch.bfloat16),
}


@dataclass
class Ours:
    """Our loop on one cache, which holds all of the prompt but its last token before each run."""

    model: Model
    prompt: Tensor
    kind: str
    graphs: bool = False
    cache: Cache = field(init=False)

    def __post_init__(self) -> None:
        weight = self.model.head.weight
        batch, n_prompt = self.prompt.shape
        spec = CacheSpec.of(self.model.config, batch, n_prompt + N_NEW, weight.dtype, weight.device)
        self.cache = make_cache(self.kind, spec)
        off = mock.patch.object(graphs, "capture_for", lambda device: None)
        if self.graphs:
            self.decode = decoding_form(self.model)
        else:
            with off:
                self.decode = decoding_form(self.model)
        feed(self.decode, self.cache, self.prompt[:, :-1], last=True)

    def tokens(self) -> Tensor:
        """(B,N_NEW)"""
        self.cache.crop(self.prompt.shape[1] - 1)
        run = generate(self.decode, self.prompt, self.cache, N_NEW, Sampler())
        return torch.stack(list(run), dim=1)

    def seconds(self) -> float:
        started = now(self.prompt.device)
        self.tokens()
        return now(self.prompt.device) - started


@dataclass
class Theirs:
    """transformers' `generate`, uncompiled, behind the prompt and a first token."""

    work: TransformersGenerate
    kind: str

    def tokens(self) -> Tensor:
        return self.work.tokens(self.kind, N_NEW)

    def seconds(self) -> float:
        return self.work.run(self.kind, N_NEW).seconds


def make_subjects(shape: Shape, device: torch.device) -> dict[str, Ours | Theirs]:
    """All on the same weights and prompt; the first is what is measured, the others beside it."""
    model = shape.model(device)
    prompt = torch.randint(shape.vocabulary, (shape.batch, N_PROMPT), device=device)
    hub = TransformersGenerate(load_peer(None, model), prompt, decode_only=True)
    return {
        "static, graphs": Ours(model, prompt, "static", graphs=True),
        "static": Ours(model, prompt, "static"),
        "dynamic": Ours(model, prompt, "dynamic"),
        "transformers static": Theirs(hub, "static"),
        "transformers dynamic": Theirs(hub, "dynamic"),
    }


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy on the device reads and writes; the best of several."""
    source = torch.ones(COPIED // 4, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(10):
        started = now(device)
        target.copy_(source)
        best = max(best, 2 * COPIED / (now(device) - started))
    return best


def floor_us(subject: Ours, bandwidth: float) -> float:
    """Reading all weights once, and the keys and values of half of the new tokens: microseconds."""
    tokens = subject.prompt.shape[1] + N_NEW // 2
    nbytes = weights_read(subject.model) + tokens * subject.cache.spec.token_nbytes
    return nbytes / bandwidth * 1e6


def measure(
    benchmark: BenchmarkFixture, subjects: dict[str, Ours | Theirs], floor: Callable[[], float]
) -> dict[str, Any]:
    """Each subject in turn, ROUNDS times; the benchmark's own rounds are those of the first."""
    (name, first), *others = subjects.items()
    samples: dict[str, list[float]] = {each: [] for each in subjects}
    for each in subjects.values():  # graphs are recorded, kernels loaded
        each.seconds()

    def in_turns() -> None:
        for other, subject in others:
            samples[other].append(subject.seconds() / N_NEW * 1e6)

    def timed() -> None:
        samples[name].append(first.seconds() / N_NEW * 1e6)

    benchmark.pedantic(timed, setup=in_turns, rounds=1 if benchmark.disabled else ROUNDS)
    us = {each: median(found) for each, found in samples.items()}
    least = floor()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "tokens": N_NEW,
        "floor_us": least,
        "us_per_token": us,
        "times_graphs": {each: us[each] / us[name] for each in us},
        "times_floor": {each: us[each] / least for each in us},
        "samples_us": samples,
    }


@needs_cuda
@pytest.mark.parametrize("name", SHAPES)
def test_graphs_beside_eager_steps_transformers_and_the_floor(
    benchmark: BenchmarkFixture, name: str
) -> None:
    benchmark.group = name
    device = torch.device("cuda")
    subjects = make_subjects(SHAPES[name], device)
    ours = subjects["static, graphs"]
    assert isinstance(ours, Ours)
    tokens = ours.tokens()
    assert tokens.equal(subjects["static"].tokens())
    if SHAPES[name].dtype is torch.float32:  # in half formats two may be equally likely
        same = tokens == subjects["transformers static"].tokens()
        assert same.cumprod(1).sum() > 32 * len(tokens)
    found = measure(benchmark, subjects, lambda: floor_us(ours, copy_bandwidth(device)))
    benchmark.extra_info.update(found)
    print(f"\n{name}: floor {found['floor_us']:.0f} µs a token")
    for each, us in found["us_per_token"].items():
        print(f"{each:>22}: {us:6.0f} µs, {found['times_floor'][each]:.2f} times the floor")


def in_graph_us(step: Callable[[], Tensor], times: int = 20) -> float:
    """A step's time on the device: microseconds, of a graph that has it several times."""
    device, aside = torch.device("cuda"), torch.cuda.Stream()
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            step()
    samples = []
    for _ in range(ROUNDS):
        started = now(device)
        graph.replay()
        samples.append(now(device) - started)
    return median(samples) / times * 1e6


@needs_cuda
@pytest.mark.parametrize("n_keys", [64, 384, 1024, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_of_one_query_beside_fused_attention(
    benchmark: BenchmarkFixture, dtype: torch.dtype, n_keys: int
) -> None:
    benchmark.group = f"one query, 12 heads of 64, {n_keys} keys, {dtype}"
    q = torch.randn(1, 12, 1, 64, device="cuda", dtype=dtype)
    k, v = torch.randn(2, 1, 12, n_keys, 64, device="cuda", dtype=dtype)
    mask = torch.ones(1, 1, 1, n_keys, device="cuda", dtype=torch.bool)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        ours = in_graph_us(lambda: attention_of_one(q, k, v, mask))
        fused = in_graph_us(lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        benchmark(attention_of_one, q, k, v, mask)
    benchmark.extra_info.update(products_us=ours, fused_us=fused)
    print(f"\n{benchmark.group}: {ours:.1f} µs by products, {fused:.1f} fused")
