"""One text, and the server's answers to its histories without a cache.

Answers are compared by the logprobs of the next token after the same history. The benign variants
are cold requests of that history which move the boundary between prefill and decode, across the
sizes at which kernels change; how far these are from each other is the engine's own noise. Controls
are cold requests with one prompt token replaced or missing: the size of a fault.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtool.core.servers.engine import MIN_LOGPROB, Completion, Engine, require_cold
from kvtool.core.servers.splits import MIN_BLOCK, Kind, drawn, pair, single

TOP = 30  # of the likeliest tokens of the reference, by which two answers are compared
TAIL = 32  # tokens of the server's own that follow a prompt: the boundaries lie among them
N_BOUNDARIES = 6
MIN_VARIANTS = 3  # cold answers to one history, without which it has no floor
JUDGED_FROM = 0.6  # of the tail: before it there are too few boundaries
FORKED = 6  # other tokens behind a shared prefix
N_BESIDE = 2  # cold requests with another one at the same time

Answer = Mapping[int, float]
Vector = NDArray[np.float64]


class Probe(NamedTuple):
    """One answer with the cache: the next token's logprobs after a history."""

    history: int  # tokens before the one that is compared
    answer: Answer  # none: it was NaN
    reused: int | None
    run: int = 0  # which of the requests it is from


@dataclass
class Tally:
    """What is odd about a server's answers, whatever they are compared with."""

    requests: int = 0
    tokens: int = 0
    lacking: int = 0  # tokens that were asked for, and did not come
    cut: int = 0  # requests whose answer lacks some
    chosen: set[int] = field(default_factory=set)
    passed_over: list[dict[int, float]] = field(default_factory=list)  # as Completion.passed_over

    def count(self, found: Completion) -> None:
        """Add one answer."""
        self.requests += 1
        self.tokens += len(found.tokens)
        self.lacking += found.lacking
        self.cut += found.lacking > 0
        self.chosen.update(found.tokens)
        self.passed_over += found.passed_over()

    def contrary(self, chosen: set[int], by: float = 0.0) -> int:
        """How many tokens contradict their own logprobs, by more than so many nats. What the server
        never chooses may be the end of a text, which it is asked to ignore."""
        return sum(any(ids[i] > by for i in ids if i in chosen) for ids in self.passed_over)


@dataclass
class Cold:
    """A server's answers to one text without a cache, by the length of the history."""

    ids: list[int]
    answers: dict[int, list[Answer]] = field(default_factory=dict)
    controls: list[Answer] = field(default_factory=list)  # of the whole history
    tally: Tally = field(default_factory=Tally)


@dataclass
class Measured:
    """One arm on one prompt: the answers with a cache, and the cold ones that they are compared
    with."""

    arm: str
    prompt: int
    cold: Cold
    probes: list[Probe] = field(default_factory=list)
    approximate: bool = False  # by design: its distance is a loss, never a bug
    unsupported: str = ""  # why the server cannot play the arm
    least: int = 1  # tokens of the cache without which a request does not reach what is judged
    tally: Tally = field(default_factory=Tally)

    def add(self, answers: Iterable[tuple[int, Answer]], reused: int | None) -> None:
        """Keep what one request answered: (history, answer)."""
        run = len({probe.run for probe in self.probes})
        self.probes += [Probe(length, answer, reused, run) for length, answer in answers]

    @property
    def reused(self) -> int | None:
        """The most tokens that an answer took from the cache; None: the server does not say."""
        known = [probe.reused for probe in self.probes if probe.reused is not None]
        return max(known, default=None)


def vector(answer: Answer, ids: Sequence[int]) -> Vector:
    """The logprobs of `ids`. An id that is not among the likeliest, or that a sampler ruled out,
    gets the lowest logprob of those that are."""
    possible = [p for p in answer.values() if p > MIN_LOGPROB]
    least = min(possible or answer.values(), default=np.nan)
    return np.array([max(answer.get(i, least), least) for i in ids], dtype=np.float64)


def likeliest(answer: Answer) -> list[int]:
    """The ids by which an answer is compared."""
    return sorted(answer, key=lambda i: (-answer[i], i))[:TOP]


class Prompt:
    """One prompt with the server's own continuation, and cold answers to its histories.

    Its requests with a cache go to one slot, if the server has slots. So the slot's content is that
    of the last request, and other slots and earlier visits do not matter. Arms about other requests
    let the server choose.
    """

    def __init__(self, engine: Engine, number: int, ids: Sequence[int], tail: int = TAIL) -> None:
        self.engine, self.number, self.n_prompt = engine, number, len(ids)
        self.random = random.Random(number)
        self.scene = 0
        self.more: list[int] = []  # of other prompts, for what needs a longer text
        self.cold, self.tally = Cold([]), Tally()
        first = self.cold_answer(ids, tail + 1)
        self.ids = self.cold.ids = [*ids, *first.tokens[:tail]]
        self._add(first, self.n_prompt)
        for boundary in self.boundaries()[1:]:
            self._add(self._continued(boundary), boundary)

    @property
    def end(self) -> int:
        """The length of the whole history."""
        return len(self.ids)

    @property
    def n_tail(self) -> int:
        """How many tokens the server continued it by."""
        return self.end - self.n_prompt

    @property
    def start(self) -> int:
        """The shortest history that is judged."""
        return self.n_prompt + int(JUDGED_FROM * (self.end - self.n_prompt))

    @property
    def slot(self) -> int | None:
        """The slot of its requests; None: the server has no slots."""
        return self.number % self.engine.slots if self.engine.slots else None

    @property
    def other_slot(self) -> int | None:
        """The slot of other requests; the same one if there is no other."""
        return None if self.slot is None else (self.slot + 1) % self.engine.slots

    def boundaries(self) -> list[int]:
        """How many tokens the cold requests prefill; the rest is decoded."""
        return sorted({round(b) for b in np.linspace(self.n_prompt, self.end, N_BOUNDARIES)})

    def cold_answer(self, ids: Sequence[int], n: int = 1) -> Completion:
        """A request without the cache, in a slot of the server's choice. In one slot alone its
        tokens would have the same place each time, and the noise of other places would be
        missing. Raises ServerError if it took tokens from a cache."""
        found = self.engine.complete(ids, n)
        require_cold(self.engine, found)
        self.cold.tally.count(found)
        return found

    def _continued(self, boundary: int) -> Completion:
        return self.cold_answer(self.ids[:boundary], self.end - boundary + 1)

    def _add(self, found: Completion, boundary: int) -> None:
        for length, answer in self.shared(found, boundary):
            self.cold.answers.setdefault(length, []).append(answer)

    def shared(self, found: Completion, boundary: int) -> Iterator[tuple[int, Answer]]:
        """The answers to histories of this text, up to the token where the server continued
        differently."""
        for n, answer in enumerate(found.likeliest):
            yield boundary + n, answer
            if self.ids[boundary + n : boundary + n + 1] != list(found.tokens[n : n + 1]):
                return

    def at(self, engine: Engine) -> Prompt:
        """The same text for another server."""
        other = copy.copy(self)
        other.engine, other.cold, other.tally = engine, Cold(self.ids), Tally()
        for boundary in self.boundaries():
            other._add(other._continued(boundary), boundary)
        return other

    def again(self) -> Iterator[tuple[int, Answer]]:
        """The answers to the very first request, asked once more."""
        return self.shared(self._continued(self.n_prompt), self.n_prompt)

    def add_controls(self) -> None:
        """Ask for faults of known size: a prompt token replaced, and one missing."""
        at = self.n_prompt // 2
        other = next((i for i in self.ids[at:] if i != self.ids[at]), self.ids[0])
        for ids in (
            [*self.ids[:at], other, *self.ids[at + 1 :]],
            [*self.ids[:at], *self.ids[at + 1 :]],
        ):
            self.cold.controls += self.cold_answer(ids).likeliest[:1]

    def add_company(self) -> None:
        """Repeat some requests while the server answers another one. In a batch, and with other
        tokens in memory, an engine may round differently, with a cache or without."""
        if self.engine.slots == 1 or len(self.engine.requests(self.ids)) > 1:
            return  # one at a time, or a cache that is dropped before, which others would hinder
        for boundary in self.boundaries()[:: N_BOUNDARIES // N_BESIDE]:
            with self.beside(cached=False):
                found = self._continued(boundary)
            self._add(found, boundary)

    @contextmanager
    def beside(self, cached: bool) -> Iterator[None]:
        """A context in which the server answers another request too."""
        ids = self.ids[:0:-1][: self.n_prompt // 2]
        with ThreadPoolExecutor(1) as pool:
            if cached:
                other = pool.submit(self.ask, ids, TAIL, anywhere=True)
            else:
                other = pool.submit(self.cold_answer, ids, TAIL)
            yield
            other.result()

    @property
    def least(self) -> int:
        """The tokens without which a cache is not reached: a block, or a third of a short text."""
        return min(MIN_BLOCK, max(self.end // 3, 1))

    def splits(self) -> Iterator[int]:
        """The lengths of two prefixes that other requests share, one for each request."""
        for kind in pair(self.number):
            self.begin()
            yield self._drawn(kind)

    def replies(self) -> Iterator[int]:
        """The lengths of two prefixes that end within the server's own continuation, behind half of
        it, so that what is decoded fills a block."""
        first, last = self.n_prompt + self.n_tail // 2, self.end - max(self.n_tail // 8, 2)
        for kind in pair(self.number):
            yield drawn(kind, range(first, max(last, first + 1)), self.random)

    def split(self, turn: int) -> int:
        """The length of one such prefix. Arms of other turns have it at other ends of blocks."""
        return self._drawn(single(self.number, turn))

    def _drawn(self, kind: Kind) -> int:
        """A drawn length of a shared prefix: at least a third of the text, and not all of it."""
        return drawn(kind, range(max(self.end // 3, 1), self.end), self.random)

    def others(self, n: int) -> list[int]:
        """Other ids, of this prompt's own."""
        return [self.random.choice(self.ids) for _ in range(n)]

    def parted(self, split: int, n: int = FORKED) -> list[int]:
        """Another text that shares exactly that many tokens."""
        first = next((i for i in self.others(self.end) if i != self.ids[split]), self.ids[0])
        return [*self.ids[:split], first, *self.others(n - 1)]

    def begin(self) -> None:
        """Share nothing with earlier requests from here on, if the engine has salts."""
        self.scene += 1

    def ask(
        self, ids: Sequence[int], n: int = 1, slot: int | None = None, anywhere: bool = False
    ) -> Completion:
        """A request with the cache; in a slot of the server's choice if `anywhere`."""
        where = None if anywhere else self.slot if slot is None else slot
        salt = f"{self.number}-{self.scene}"
        found = self.engine.complete(ids, n, cached=True, salt=salt, slot=where)
        self.tally.count(found)
        return found

    def probe(
        self, into: Measured, after: int = 0, slot: int | None = None, anywhere: bool = False
    ) -> None:
        """Ask for the rest of the text, whose first `after` tokens may be cached, and record the
        answers to all judged histories."""
        begin = min(max(self.start, after + 1), self.end)
        found = self.ask(self.ids[:begin], self.end - begin + 1, slot, anywhere)
        into.add(self.shared(found, begin), found.reused)
