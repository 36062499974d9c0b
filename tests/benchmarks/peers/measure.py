"""The subjects, the floor below them all, and the samples, taken in turns."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
from floor import Floor
from llama import SLACK, LlamaCpp, write_gguf
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

from kvtool.config import ModelConfig
from kvtool.core.bench.peers import TransformersGenerate, load_peer
from kvtool.core.bench.timing import TimedRun, Workload, iqr
from kvtool.core.cache import CacheSpec, make_cache
from kvtool.core.decoding.engine import generate
from kvtool.core.decoding.sampling import Sampler
from kvtool.core.kernels.default import make_kernels
from kvtool.core.models import Model, build_model
from llama_server import llama_server

DISTURBED = 0.25  # of the median between the quartiles: what took so unlike times was disturbed
COMPARED = 32  # tokens that all subjects must agree in before anything is timed


class Subject(Protocol):
    def run(self, kind: str, length: int) -> TimedRun: ...


@dataclass
class Series:
    """One subject's samples: microseconds per token of whole runs, by length."""

    name: str
    subject: Subject
    kind: str
    samples: dict[int, list[float]] = field(default_factory=dict)

    def sample(self, length: int) -> None:
        seconds = self.subject.run(self.kind, length).seconds
        self.samples.setdefault(length, []).append(seconds / length * 1e6)

    def median(self, length: int) -> float:
        return median(self.samples[length])

    def iqr(self, length: int) -> float:
        return iqr(self.samples[length])

    def quiet(self, length: int) -> bool:
        """Whether the samples are alike enough for a figure."""
        return self.iqr(length) <= DISTURBED * self.median(length)


def make_model(context: int, dtype: torch.dtype = torch.float32) -> Model:
    """Random weights in a form that all peers have: GPT-2's, of 2 layers and a width of 256."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=4096, d_model=256, n_layers=2, n_heads=8, context=context,
        positions="learned", activation="gelu_tanh",
    )  # fmt: skip
    return build_model(config).to(dtype).eval().requires_grad_(False)


def make_large(context: int) -> Model:
    """Random weights in the shape of SmolLM2-135M, of Llama's form."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=49_152, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_ff=1536,
        context=context, positions="rotary", norm="rmsnorm", norm_eps=1e-5, activation="swiglu",
        bias=False, rope_theta=100_000.0, tied=True,
    )  # fmt: skip
    return build_model(config).eval().requires_grad_(False)


@contextmanager
def make_series(
    model: Model, prompt: Tensor, threads: int, folder: Path, arch: str = "gpt2"
) -> Iterator[list[Series]]:
    """Every subject that is installed, within, of a model of the form of `arch`; llama.cpp takes a
    single row. Raises SystemExit if one generates other tokens."""
    ours = Workload(model, prompt)
    exact = Workload(model, prompt, make_kernels("exact"))
    series = [
        Series("kvtool dynamic", ours, "dynamic"),
        Series("kvtool static", ours, "static"),
        Series("kvtool dynamic, exact kernels", exact, "dynamic"),
    ]
    hub = TransformersGenerate(load_peer(None, model), prompt)
    series += [Series(f"transformers {kind}", hub, kind) for kind in ("dynamic", "static")]
    spec = CacheSpec.of(model.config, len(prompt), prompt.shape[1] + COMPARED)
    steps = generate(model, prompt, make_cache("dynamic", spec), COMPARED, Sampler())
    expected = [int(tokens[0]) for tokens in steps]
    agree("transformers", expected, hub.tokens("dynamic", COMPARED)[0].tolist())
    floor = Series("floor", Floor(model, prompt.shape[1]), "")
    if len(prompt) > 1 or not importlib.util.find_spec("xllamacpp"):
        yield [*series, floor]
        return
    path = folder / "model.gguf"
    write_gguf(path, model, arch)
    f32 = {"cache_type_k": 0, "cache_type_v": 0}  # the number of that format
    context = model.config.context + SLACK
    with llama_server(path, context, threads, n_parallel=1, **f32) as url:
        llama = LlamaCpp(url, prompt)
        agree("llama.cpp", expected, llama.tokens(COMPARED))
        yield [*series, Series("llama.cpp", llama, "f32"), floor]


def agree(name: str, ours: Sequence[int], theirs: Sequence[int]) -> None:
    """Raise SystemExit unless a peer generates what we do: else the work is not the same."""
    same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if same is not None:
        raise SystemExit(f"{name}: generates another token than kvtool at step {same}")


def measure(
    series: Sequence[Series], lengths: Sequence[int], rounds: int, say: Callable[[str], None]
) -> None:
    """Each subject in turn at each length, after a short run to warm up; each round begins with
    another, since who comes first finds the processor's caches full of another's work."""
    for each in series:
        each.subject.run(each.kind, lengths[0])
    for i in range(rounds):
        for length in lengths:
            first = i % len(series)
            for each in (*series[first:], *series[:first]):
                each.sample(length)
        say(f"round {i + 1} of {rounds}")


def in_turns(
    series: Sequence[Series], length: int, rounds: int, say: Callable[[str], None]
) -> dict[str, list[TimedRun]]:
    """Runs of each subject at one length, as `measure` takes them."""
    runs: dict[str, list[TimedRun]] = {each.name: [] for each in series}
    for each in series:
        each.subject.run(each.kind, 2)
    for i in range(rounds):
        first = i % len(series)
        for each in (*series[first:], *series[:first]):
            runs[each.name].append(each.subject.run(each.kind, length))
        say(f"round {i + 1} of {rounds}")
    return runs
