"""Honest latencies: interleaved samples within a budget, raw values kept, medians and quartiles."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvtool.core.cache import Cache, CacheSpec, make_cache, predicted_nbytes
from kvtool.core.cache.cross import CrossCache
from kvtool.core.engine import begin, generate
from kvtool.core.kernels import DEFAULT, Kernels
from kvtool.core.models import Model, graphs
from kvtool.core.models.flat import DecodingForm, decoding_form
from kvtool.core.sampling import Sampler
from kvtool.ending import End, Ended


class Run(NamedTuple):
    """One generation: seconds, and bytes at its end."""

    seconds: float  # what a sample is: all of it, or after a depth the decoding alone
    prefill_s: float  # until the first token was chosen, allocation included
    decode_s: float  # from then to the last token
    token_s: float | None  # a token's time at the end: the median of the last tenth of them
    nbytes: int  # that the cache owns
    read: int | None  # bytes of keys and values that the next token would read; None: not known

    @classmethod
    def of(
        cls,
        started: float,
        stamps: Sequence[float],
        nbytes: int = 0,
        read: int | None = None,
        decode_only: bool = False,
    ) -> Run:
        """A run that began at `started` and had its tokens at `stamps`, in seconds."""
        prefill, decode = stamps[0] - started, stamps[-1] - stamps[0]
        last = [b - a for a, b in pairwise(stamps[-max(2, len(stamps) // 10) :])]
        token = statistics.median(last) if last else None
        return cls(
            decode if decode_only else prefill + decode, prefill, decode, token, nbytes, read
        )


class Work(Protocol):
    """What can be timed: one implementation of one model."""

    def run(self, kind: str, length: int) -> Run:
        """Generate `length` tokens a row with a kind of cache."""

    def predicted(self, kind: str, length: int) -> int | None:
        """Bytes that the kind should need for that; None: nothing is predicted."""


class Lane(NamedTuple):
    """Who is timed: a kind of cache of an implementation."""

    kind: str
    work: Work
    impl: str = "kvtool"


@dataclass
class Cell:
    """One kind of cache at one length: what was measured, in seconds and bytes."""

    cache: str
    length: int  # tokens generated
    runs: list[Run] = field(default_factory=list)
    bytes_predicted: int | None = 0
    impl: str = "kvtool"
    before: int = 0  # tokens that stand before those

    @property
    def computed(self) -> float:
        """How many tokens pass through the model if nothing is kept."""
        return self.length * (self.before + self.length / 2)

    @property
    def samples(self) -> list[float]:
        return [run.seconds for run in self.runs]

    @property
    def bytes_measured(self) -> int:
        return self.runs[-1].nbytes if self.runs else 0

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.runs else None

    @property
    def iqr(self) -> float | None:
        """The distance between the quartiles; None below three samples."""
        return iqr(self.samples) if len(self.runs) >= 3 else None


@dataclass(frozen=True)
class Workload:
    """Greedy generation from prompts (B,P): sources, for an encoder-decoder.

    With `decode_only`, reading the prompt is no part of a sample: decoding at a depth. The model's
    decoding form is made once for all runs, as its weights are loaded once.
    """

    model: Model
    prompt: Tensor
    kernels: Kernels = DEFAULT
    decode_only: bool = False

    def run(self, kind: str, length: int) -> Run:
        """Generate `length` tokens a row; with decode_only, after a first one that is not timed.

        Where steps are recorded, a run that is not timed does that, and makes the cache.
        """
        device, n_new = self.prompt.device, length + self.decode_only
        rehearsed = self._rehearse(kind, n_new)
        started = now(device)
        prompt, source = self._begin()
        if rehearsed is None:
            cache = make_cache(kind, self._spec(prompt.shape[1] + n_new))
            tokens = generate(self._decode, prompt, cache, n_new, Sampler(), source)
        else:
            decode, cache, source = rehearsed
            tokens = generate(decode, prompt, cache, n_new, Sampler(), source)
        stamps = [now(device) for _ in tokens]
        held = cache.nbytes()
        return Run.of(started, stamps, held.allocated, held.read_per_step, self.decode_only)

    @cached_property
    def _decode(self) -> Model | DecodingForm:
        return decoding_form(self.model)

    def _begin(self) -> tuple[Tensor, CrossCache | None]:
        with torch.inference_mode():
            return begin(self.model, self.prompt, self.kernels)

    def _rehearse(
        self, kind: str, n_new: int
    ) -> tuple[DecodingForm, Cache, CrossCache | None] | None:
        """Who has recorded the steps of such a run, on which cache, empty again, and on which
        source, of the same contents as others will be; None where steps are not recorded."""
        if graphs.capture_for(self.prompt.device) is None:
            return None
        decode = decoding_form(self.model)
        cache = make_cache(kind, self._spec(self._n_start + n_new))
        if not isinstance(decode, DecodingForm) or not decode.records(cache):
            return None
        prompt, source = self._begin()
        for _ in generate(decode, prompt, cache, n_new, Sampler(), source):
            pass
        cache.reset()
        return decode, cache, source

    def predicted(self, kind: str, length: int) -> int:
        """Bytes of keys and values that the kind should need; the last token is never stored."""
        n_start, n_new = self._n_start, length + self.decode_only
        spec = self._spec(n_start + n_new)
        return predicted_nbytes(kind, spec, n_start + n_new - 1, n_start)

    @property
    def _n_start(self) -> int:
        """How many tokens decoding starts from: those of the prompt, or a start token."""
        return 1 if self.model.config.n_encoder_layers else self.prompt.shape[1]

    def _spec(self, capacity: int) -> CacheSpec:
        batch, device = self.prompt.shape[0], self.prompt.device
        dtype = next(self.model.parameters()).dtype
        return CacheSpec.of(self.model.config, batch, capacity, dtype, device, self.kernels)


def iqr(samples: Sequence[float]) -> float:
    """The distance between the quartiles of two samples or more."""
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return high - low


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(
    lanes: Sequence[Lane],
    lengths: Sequence[int],
    repeats: int,
    budget: float,
    progress: Callable[[Cell], None] = lambda cell: None,
    before: int = 0,
) -> list[Cell]:
    """Time every lane at every length, behind `before` tokens, `repeats` times or until `budget`
    seconds are spent.

    A round visits every cell once, lanes side by side, so that a slow minute of the machine hits
    all of them; the shortest runs come first. A cell whose run would not fit any more is passed
    over: it keeps fewer samples, or none. Raises Stopped when a signal ends it, once there is a
    sample.
    """
    deadline = time.perf_counter() + budget
    for kind, work, _ in lanes:
        work.run(kind, min(lengths[0], 10))  # warm-up: allocator, thread pool, code paths
        work.run(kind, min(lengths[0], 10))
    visits = [
        (work, Cell(kind, n, [], work.predicted(kind, n), impl, before))
        for n in lengths
        for kind, work, impl in lanes
    ]
    cells = [cell for _, cell in visits]
    try:
        for _ in range(repeats):
            for work, cell in visits:
                if time.perf_counter() + expected(cell, cells) <= deadline:
                    cell.runs.append(work.run(cell.cache, cell.length))
                progress(cell)
    except KeyboardInterrupt as interrupt:
        if any(cell.runs for cell in cells):
            raise Stopped(cells, End.of(interrupt)) from interrupt
        raise
    return cells


class Stopped(Ended):
    """A signal while cells were measured, which have the runs until then."""

    def __init__(self, cells: list[Cell], how: End) -> None:
        super().__init__(how)
        self.cells = cells


def expected(cell: Cell, cells: Sequence[Cell]) -> float:
    """Seconds that the next run of a cell may take: its own slowest, or extrapolated.

    As if nothing were kept: that is right without a cache, and too much with one.
    """
    if cell.runs:
        return max(run.prefill_s + run.decode_s for run in cell.runs)
    lane = [c for c in cells if (c.impl, c.cache) == (cell.impl, cell.cache)]
    shorter = [c for c in lane if c.runs and c.length <= cell.length]
    if not shorter:
        return 0.0
    near = shorter[-1]
    least = min(run.prefill_s + run.decode_s for run in near.runs)
    return least * cell.computed / near.computed


def speedups(cells: Sequence[Cell]) -> Iterator[tuple[Cell, float | None]]:
    """Each cell with the time of no cache, at that length and of its implementation, over its
    own."""
    base = {(cell.impl, cell.length): cell.median for cell in cells if cell.cache == "none"}
    for cell in cells:
        reference = base.get((cell.impl, cell.length))
        yield cell, reference / cell.median if reference and cell.median else None


def crossover(cells: Sequence[Cell], kind: str, impl: str = "kvtool") -> float | None:
    """The length from which on a kind is faster than no cache, at all longer measured lengths.

    Interpolated between the last length at which it is not and the next, as if times were powers of
    the length; the shortest measured length if it is faster everywhere; None if not at the longest.
    """
    of_lane = [(c, s) for c, s in speedups(cells) if (c.impl, c.cache) == (impl, kind)]
    found = [(c.length, s) for c, s in of_lane if s is not None]
    if not found or found[-1][1] <= 1:
        return None
    slower = [i for i, (_, speedup) in enumerate(found) if speedup <= 1]
    if not slower:
        return float(found[0][0])
    (n0, s0), (n1, s1) = found[slower[-1]], found[slower[-1] + 1]
    part = math.log(1 / s0) / math.log(s1 / s0)
    return float(n0 * (n1 / n0) ** part)
