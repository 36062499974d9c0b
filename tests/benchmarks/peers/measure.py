"""The subjects, the floor below them all, and the samples, taken in turns."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
from floor import Floor
from llama import LlamaCpp, write_gguf
from torch import Tensor

from kvtool.config import ModelConfig
from kvtool.core.bench.peers import TransformersGenerate, load_peer
from kvtool.core.bench.timing import TimedRun, Workload, iqr
from kvtool.core.cache import CacheSpec, make_cache
from kvtool.core.decoding.engine import generate
from kvtool.core.decoding.sampling import Sampler
from kvtool.core.kernels.default import make_kernels
from kvtool.core.models import Model, build_model

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


def make_series(model: Model, prompt: Tensor, threads: int, folder: Path) -> list[Series]:
    """Every subject that is installed. Raises SystemExit if one generates other tokens."""
    ours = Workload(model, prompt)
    exact = Workload(model, prompt, make_kernels("exact"))
    series = [
        Series("kvtool dynamic", ours, "dynamic"),
        Series("kvtool static", ours, "static"),
        Series("kvtool dynamic, exact kernels", exact, "dynamic"),
    ]
    hub = TransformersGenerate(load_peer(None, model), prompt)
    series += [Series(f"transformers {kind}", hub, kind) for kind in ("dynamic", "static")]
    cache = make_cache("dynamic", CacheSpec.of(model.config, 1, prompt.shape[1] + COMPARED))
    expected = [int(token) for token in generate(model, prompt, cache, COMPARED, Sampler())]
    agree("transformers", expected, hub.tokens("dynamic", COMPARED)[0].tolist())
    if importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("gguf"):
        path = folder / "model.gguf"
        write_gguf(path, model)
        llama = LlamaCpp(path, model.config.vocab_size, prompt, threads)
        agree("llama.cpp", expected, llama.tokens(COMPARED))
        series.append(Series("llama.cpp", llama, "f32"))
    return [*series, Series("floor", Floor(model, prompt.shape[1]), "")]


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
