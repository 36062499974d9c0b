"""Honest latencies: interleaved samples within a budget, raw values kept, medians and quartiles."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from time import process_time, sleep
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kvtool.config.setups import AS_IT_IS, Setup
from kvtool.core.cache import Cache, CacheSpec, make_cache, predicted_nbytes
from kvtool.core.cache.cross import CrossCache
from kvtool.core.decoding import cuda_graphs as graphs
from kvtool.core.decoding.dispatch import DecodingForm, decoding_form
from kvtool.core.decoding.engine import first_input, generate
from kvtool.core.decoding.sampling import Sampler
from kvtool.core.kernels.default import DEFAULT, Kernels
from kvtool.core.models import Model
from kvtool.ending import check

SHORT = 10  # tokens of the runs before those that count
TINY = 2  # of those to warm up
SETTLE = 0.02  # seconds, in which threads of the sample before stop waiting for work


class TimedRun(NamedTuple):
    """One generation: seconds, and bytes at its end."""

    seconds: float  # what a sample is: all of it, or after a depth the decoding alone
    prefill_s: float  # until the first token is chosen, allocation included
    decode_s: float  # from the first token to the last
    token_s: float | None  # a token's time at the end: the median of the last tenth of them
    nbytes: int  # bytes that the cache owns
    read: int | None  # bytes of keys and values that the next token would read; None: not known
    between: tuple[float, ...] = ()  # seconds between each token and the one before it

    @classmethod
    def of(
        cls,
        started: float,
        stamps: Sequence[float],
        nbytes: int = 0,
        read: int | None = None,
        decode_only: bool = False,
    ) -> TimedRun:
        """A run that began at `started` and had its tokens at `stamps`, in seconds."""
        prefill, decode = stamps[0] - started, stamps[-1] - stamps[0]
        between = tuple(b - a for a, b in pairwise(stamps))
        last = between[-max(1, len(stamps) // 10 - 1) :]
        token = statistics.median(last) if last else None
        seconds = decode if decode_only else prefill + decode
        return cls(seconds, prefill, decode, token, nbytes, read, between)


class Work(Protocol):
    """One implementation of one model, to be timed."""

    def run(self, kind: str, length: int) -> TimedRun:
        """Generate `length` tokens a row with a kind of cache."""

    def predicted(self, kind: str, length: int) -> int | None:
        """Predicted bytes of the cache; None: nothing is predicted."""


class Contender(NamedTuple):
    """One contender: a kind of cache of an implementation, and how it computes."""

    kind: str
    work: Work
    impl: str = "kvtool"
    setup: Setup = AS_IT_IS


Key = tuple[str, str, Setup]  # kind, implementation, setup


@dataclass
class Cell:
    """The measurements of one kind of cache at one length, in seconds and bytes."""

    cache: str
    length: int  # tokens generated
    runs: list[TimedRun] = field(default_factory=list)
    bytes_predicted: int | None = 0
    impl: str = "kvtool"
    before: int = 0  # tokens of the prompt before those
    took: list[float] = field(default_factory=list)  # by each run, its untimed part included
    setup: Setup = AS_IT_IS
    busy: list[float] = field(default_factory=list)  # seconds of all processors, in `took`

    @property
    def key(self) -> Key:
        """The contender that it is of."""
        return self.cache, self.impl, self.setup

    @property
    def cores_used(self) -> float | None:
        """How many processors were busy at a time, in the median of the runs."""
        shares = [busy / took for busy, took in zip(self.busy, self.took, strict=True) if took > 0]
        return statistics.median(shares) if shares else None

    @property
    def computed(self) -> float:
        """How many tokens pass through the model without a cache."""
        return self.length * (self.before + self.length / 2)

    @property
    def samples(self) -> list[float]:
        """The seconds of each run."""
        return [run.seconds for run in self.runs]

    @property
    def bytes_measured(self) -> int:
        """Bytes that the cache occupied at the end of the last run; 0 before the first."""
        return self.runs[-1].nbytes if self.runs else 0

    @property
    def median(self) -> float | None:
        """Of the samples, in seconds; None before the first run."""
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

    def run(self, kind: str, length: int) -> TimedRun:
        """Generate `length` tokens a row; with decode_only, after a first one that is not timed.

        Where steps are captured, a run that is not timed does that, and makes the cache.
        """
        device, n_new = self.prompt.device, length + self.decode_only
        rehearsed = self._rehearse(kind, n_new)
        started = now(device)
        prompt, source = self._begin()
        if rehearsed is None:
            cache = make_cache(kind, self._spec(prompt.shape[1] + n_new))
            tokens = generate(self.decode, prompt, cache, n_new, Sampler(), source)
        else:
            decode, cache, source = rehearsed
            tokens = generate(decode, prompt, cache, n_new, Sampler(), source)
        stamps = [now(device) for _ in tokens]
        held = cache.nbytes()
        return TimedRun.of(started, stamps, held.allocated, held.read_per_step, self.decode_only)

    @cached_property
    def decode(self) -> DecodingForm:
        """The model's decoding form, for all runs without captured steps."""
        return decoding_form(self.model)

    def _begin(self) -> tuple[Tensor, CrossCache | None]:
        with torch.inference_mode():
            return first_input(self.model, self.prompt, self.kernels)

    def _rehearse(
        self, kind: str, n_new: int
    ) -> tuple[DecodingForm, Cache, CrossCache | None] | None:
        """A decoder with captured steps, its emptied cache, and its source, which equals that of
        later runs; None if steps are not captured."""
        if graphs.capture_for(self.prompt.device) is None:
            return None
        decode = decoding_form(self.model)
        decode.taken = self.decode.taken
        cache = make_cache(kind, self._spec(self.n_start + n_new))
        if not decode.captures(cache):
            return None
        prompt, source = self._begin()
        for _ in generate(decode, prompt, cache, n_new, Sampler(), source):
            pass
        cache.reset()
        return decode, cache, source

    def predicted(self, kind: str, length: int) -> int:
        """Predicted bytes of keys and values. The last token is never stored."""
        n_start, n_new = self.n_start, length + self.decode_only
        spec = self._spec(n_start + n_new)
        return predicted_nbytes(kind, spec, n_start + n_new - 1, n_start)

    @property
    def n_start(self) -> int:
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
    """Seconds on a clock, after all work of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Measurement:
    """Every contender at every length, after `before` tokens: cells that fill while `run` runs, so
    that what is there outlives whatever ends it."""

    def __init__(
        self, contenders: Sequence[Contender], lengths: Sequence[int], before: int = 0
    ) -> None:
        of_contender = {
            (kind, impl, setup): [
                Cell(kind, n, [], work.predicted(kind, n), impl, before, setup=setup)
                for n in lengths
            ]
            for kind, work, impl, setup in contenders
        }
        # By length, and by contender in the order in which they were given.
        self.cells = [cells[i] for i in range(len(lengths)) for cells in of_contender.values()]
        self._works = {(kind, impl, setup): work for kind, work, impl, setup in contenders}
        # One number of threads is what the process has, and stays untouched.
        self._switches = len({contender.setup.threads for contender in contenders}) > 1
        self._tiny, self._short = (
            {
                (kind, impl, setup): Cell(
                    kind, min(lengths[-1], n), impl=impl, before=before, setup=setup
                )
                for kind, impl, setup in of_contender
            }
            for n in (TINY, SHORT)
        )

    def run(
        self, repeats: int, budget: float, progress: Callable[[Cell], None] = lambda cell: None
    ) -> None:
        """Time every cell `repeats` times, or until `budget` seconds are spent.

        Before they count, each contender runs twice for two tokens, for allocator, thread pool
        and code paths, and once for ten, to learn what longer runs will take. Where two of every
        contender take more than the budget, two have to tell. Then a round visits every cell once,
        contenders side by side, so that a slow minute of the machine hits all of them; the shortest
        lengths come first, and what keeps nothing last. A cell whose run would not fit any more, or
        would take the time of cheaper ones that have no sample yet, is passed over: it keeps fewer
        samples, or none.
        """
        for key, tiny in self._tiny.items():
            for _ in range(2):
                check()
                self._time(tiny)
            del tiny.runs[0], tiny.took[0], tiny.busy[0]
            if tiny.took[0] * len(self._tiny) > budget:
                self._short[key] = tiny
            else:
                check()
                self._time(self._short[key])
        deadline = time.perf_counter() + budget
        visits = sorted(self.cells, key=lambda cell: (cell.length, cell.cache == "none"))
        for _ in range(repeats):
            for cell in visits:
                check()
                if time.perf_counter() + self._wanted(cell) <= deadline:
                    self._time(cell)
                progress(cell)

    def expected(self, cell: Cell) -> float | None:
        """Seconds that the next run of a cell may take: its own slowest, or what the longest run of
        its contender up to there says. None before the first.

        Without a cache the time grows with the tokens that are computed; with one, each further
        token takes as long as the last ones did.
        """
        if cell.runs:
            return max(cell.took)
        contender = [c for c in self.cells if c.key == cell.key and c.runs]
        shorter = [c for c in contender if c.length <= cell.length]
        near = shorter[-1] if shorter else self._short[cell.key]
        if not near.runs:
            return None
        run, took = min(zip(near.runs, near.took, strict=True), key=lambda pair: pair[1])
        if cell.cache == "none":
            return took * cell.computed / near.computed
        token = run.decode_s / (near.length - 1) if near.length > 1 else run.prefill_s
        token = max(token, run.token_s or 0.0)
        # Where steps are captured, a run takes longer than what is timed of it.
        share = took / (run.prefill_s + run.decode_s)
        return max(took + (cell.length - near.length) * token * share, 0.0)

    def _wanted(self, cell: Cell) -> float:
        """Seconds that there must be for a run of a cell: its own, and those of cheaper cells that
        have no sample yet."""
        costs = [(self.expected(other) or 0.0, i) for i, other in enumerate(self.cells)]
        own = costs[self.cells.index(cell)]
        waiting = (cost for cost, other in zip(costs, self.cells, strict=True) if not other.runs)
        return own[0] + sum(cost[0] for cost in waiting if cost < own)

    def _time(self, cell: Cell) -> None:
        if self._switches:
            # Each time: native code hands its own number to OpenMP, which PyTorch then uses.
            torch.set_num_threads(cell.setup.threads)
            sleep(SETTLE)
        started, busy = time.perf_counter(), process_time()
        cell.runs.append(self._works[cell.key].run(cell.cache, cell.length))
        cell.took.append(time.perf_counter() - started)
        cell.busy.append(process_time() - busy)


def quantile(values: Sequence[float], share: float) -> float:
    """The value that a share of the values, from 0 to 1, is not above, between two of them in
    proportion.

    >>> quantile([1.0, 2.0, 4.0], 0.75)
    3.0
    """
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def speedups(cells: Sequence[Cell]) -> Iterator[tuple[Cell, float | None]]:
    """Each cell with the time of no cache, at that length, of its implementation and setup, over
    its own."""
    base = {
        (cell.impl, cell.setup, cell.length): cell.median for cell in cells if cell.cache == "none"
    }
    for cell in cells:
        reference = base.get((cell.impl, cell.setup, cell.length))
        yield cell, reference / cell.median if reference and cell.median else None


def crossover(
    cells: Sequence[Cell], kind: str, impl: str = "kvtool", setup: Setup = AS_IT_IS
) -> float | None:
    """The length from which on a kind is faster than no cache, at all longer measured lengths.

    Interpolated between the last length at which it is not and the next, as if times were powers of
    the length; the shortest measured length if it is faster everywhere; None if not at the longest.
    """
    of_contender = [(c, s) for c, s in speedups(cells) if c.key == (kind, impl, setup)]
    found = [(c.length, s) for c, s in of_contender if s is not None]
    if not found or found[-1][1] <= 1:
        return None
    slower = [i for i, (_, speedup) in enumerate(found) if speedup <= 1]
    if not slower:
        return float(found[0][0])
    (n0, s0), (n1, s1) = found[slower[-1]], found[slower[-1] + 1]
    part = math.log(1 / s0) / math.log(s1 / s0)
    return float(n0 * (n1 / n0) ** part)
