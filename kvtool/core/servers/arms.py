"""What a server is asked, so that its cache shows: each arm with and without what was kept.

All compares the logprobs of the token after one and the same history. The benign variants are cold
requests of that history which move the boundary between prefill and decode, across the sizes at
which kernels change; how far these are from each other is the engine's own noise. Controls are cold
requests with one prompt token replaced or missing: the size of a fault.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtool.core.servers.engines import Completion, Engine, NotFinite

TOP = 30  # of the likeliest tokens of the reference, by which two answers are compared
TAIL = 32  # tokens of the server's own that follow a prompt: the boundaries lie among them
N_BOUNDARIES = 6
JUDGED_FROM = 0.6  # of the tail: before it there are too few boundaries
BLOCK = 16  # tokens; engines keep a prompt in blocks of this many, or of a multiple
N_SPLITS = 2  # shared prefixes that are tried for each prompt
FORKED = 6  # other tokens behind a shared prefix
CUT_TAIL = 8
MOST_SET_RIGHT = 4  # times that a decoded text is led back to the right one
LONG_TAIL = 32
AROUND = 64  # tokens; kernels change there, so the boundaries of a long prompt lie about a multiple
MOST_CHUNK = 2**16  # tokens, and MOST_SLOTS, of a server that is asked for more than they hold
MOST_SLOTS = 64
FILLERS = 8  # tokens of requests that push a prompt out of its slot
N_BESIDE = 2  # cold requests with another one at the same time

Answer = Mapping[int, float]
Vector = NDArray[np.float64]


class Probe(NamedTuple):
    """One answer of the cached server: what was asked, and the next token's logprobs."""

    history: int  # tokens before the one that is compared
    answer: Answer  # none: what it computed was not a number
    reused: int | None
    run: int = 0  # which of the requests it is from


@dataclass
class Cold:
    """What a server says of one text without a cache, by the length of the history."""

    ids: list[int]
    answers: dict[int, list[Answer]] = field(default_factory=dict)
    controls: list[Answer] = field(default_factory=list)  # of the whole history


@dataclass
class Measured:
    """One arm on one prompt: the answers with a cache, and all that they are compared with."""

    arm: str
    prompt: int
    cold: Cold
    probes: list[Probe] = field(default_factory=list)
    approximate: bool = False  # by design: its distance is a loss, never a bug
    unsupported: str = ""  # why the server cannot be asked so

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
    """The logprobs of `ids`; one that is not among the likeliest has the least that was told."""
    least = min(answer.values(), default=np.nan)
    return np.array([answer.get(i, least) for i in ids], dtype=np.float64)


def likeliest(answer: Answer) -> list[int]:
    """The ids by which an answer is compared."""
    return sorted(answer, key=lambda i: (-answer[i], i))[:TOP]


class Prompt:
    """One prompt with the server's own continuation, and cold answers to its histories."""

    def __init__(self, engine: Engine, number: int, ids: Sequence[int], tail: int = TAIL) -> None:
        self.engine, self.number, self.n_prompt = engine, number, len(ids)
        self.random = random.Random(number)
        first = engine.complete(ids, tail + 1)
        self.ids = [*ids, *first.tokens[:tail]]
        self.cold = Cold(self.ids)
        self._add(first, self.n_prompt)
        for boundary in self.boundaries()[1:]:
            self._add(engine.complete(self.ids[:boundary], self.end - boundary + 1), boundary)

    @property
    def end(self) -> int:
        """The length of the whole history."""
        return len(self.ids)

    @property
    def start(self) -> int:
        """The shortest history that is judged."""
        return self.n_prompt + int(JUDGED_FROM * (self.end - self.n_prompt))

    def boundaries(self) -> list[int]:
        """How many tokens the cold requests prefill; the rest is decoded."""
        return sorted({round(b) for b in np.linspace(self.n_prompt, self.end, N_BOUNDARIES)})

    def _add(self, found: Completion, boundary: int) -> None:
        for length, answer in self.shared(found, boundary):
            self.cold.answers.setdefault(length, []).append(answer)

    def shared(self, found: Completion, boundary: int) -> Iterator[tuple[int, Answer]]:
        """The answers to histories of this text, until the server went on otherwise."""
        for n, answer in enumerate(found.likeliest):
            yield boundary + n, answer
            if self.ids[boundary + n : boundary + n + 1] != list(found.tokens[n : n + 1]):
                return

    def add_controls(self) -> None:
        """Ask for faults of known size: a prompt token replaced, and one missing."""
        at = self.n_prompt // 2
        other = next((i for i in self.ids[at:] if i != self.ids[at]), self.ids[0])
        for ids in (
            [*self.ids[:at], other, *self.ids[at + 1 :]],
            [*self.ids[:at], *self.ids[at + 1 :]],
        ):
            self.cold.controls += self.engine.complete(ids).likeliest[:1]

    def splits(self, n: int = N_SPLITS) -> list[int]:
        """Lengths of a prefix that another request shares: more than a third, not all. Every other
        one is where blocks of a cache end, or one token beside it."""
        possible = range(max(self.end // 3, 1), self.end)
        beside = (0, 1, -1)[self.number % 3]
        ends = [i for i in possible if (i - beside) % BLOCK == 0] or possible
        return [self.random.choice(possible if k % 2 else ends) for k in range(n)]

    def add_company(self) -> None:
        """Ask some of it again while the server answers another request as well: in a batch, and
        with others in its memory, an engine may round otherwise, cache or not."""
        if self.engine.slots == 1 or len(self.engine.requests(self.ids)) > 1:
            return  # one at a time, or a cache that is dropped before, which others would hinder
        for boundary in self.boundaries()[:: N_BOUNDARIES // N_BESIDE]:
            rest = self.end - boundary + 1
            with self.beside(cached=False):
                found = self.engine.complete(self.ids[:boundary], rest)
            self._add(found, boundary)

    @contextmanager
    def beside(self, cached: bool) -> Iterator[None]:
        """Within, the server answers another request too."""
        ask = self.ask if cached else self.engine.complete
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(ask, self.ids[:0:-1][: self.n_prompt // 2], TAIL)
            yield
            other.result()

    def others(self, n: int) -> list[int]:
        """Other ids, of this prompt's own."""
        return [self.random.choice(self.ids) for _ in range(n)]

    def ask(self, ids: Sequence[int], n: int = 1) -> Completion:
        """A request with the cache."""
        return self.engine.complete(ids, n, cached=True, salt=str(self.number))

    def probe(self, into: Measured, after: int = 0) -> None:
        """Ask for the rest of the text, of which a cache may hold the first `after` tokens, and
        keep the answers to all histories that are judged."""
        begin = min(max(self.start, after + 1), self.end)
        found = self.ask(self.ids[:begin], self.end - begin + 1)
        into.add(self.shared(found, begin), found.reused)


def warm_prefix(prompt: Prompt, into: Measured) -> None:
    """A prefix that another request has left, then the rest."""
    for split in prompt.splits():
        prompt.ask([*prompt.ids[:split], *prompt.others(FORKED)])
        prompt.probe(into, split)


def long_prefix(prompt: Prompt, into: Measured) -> None:
    """Prefixes that end before, at and behind the end of what is computed at a time."""
    chunk = prompt.engine.chunk
    for split in (prompt.random.randrange(chunk // 2, chunk), chunk, chunk + chunk // 16):
        prompt.ask([*prompt.ids[:split], *prompt.others(FORKED)])
        prompt.probe(into, split)


def decode(prompt: Prompt, into: Measured) -> None:
    """Tokens decoded one by one, against a prefill of the same tokens. Where the server goes on
    otherwise, it is set right and asked again."""
    prompt.ask(prompt.ids[: prompt.n_prompt - 1])
    begin = prompt.n_prompt
    for _ in range(MOST_SET_RIGHT):
        found = prompt.ask(prompt.ids[:begin], prompt.end - begin + 1)
        answers = list(prompt.shared(found, begin))
        if judged := [f for f in answers if f[0] >= prompt.start]:
            into.add(judged, found.reused)
        begin = max(begin + len(answers), begin + 1, prompt.start)
        if begin > prompt.end:
            return


def fork(prompt: Prompt, into: Measured) -> None:
    """One prefix, another continuation that is decoded, then the first again."""
    (split,) = prompt.splits(1)
    prompt.ask(prompt.ids)
    prompt.ask([*prompt.ids[:split], *prompt.others(FORKED)], FORKED)
    prompt.probe(into, split)


def between(prompt: Prompt, into: Measured) -> None:
    """Another request in between, which shares nothing."""
    split = prompt.splits()[-1]
    prompt.ask(prompt.ids[:split])
    prompt.ask(prompt.ids[:0:-1][: prompt.n_prompt // 2], FORKED)
    prompt.probe(into, split)


def second_slot(prompt: Prompt, into: Measured) -> None:
    """Another request at the same time."""
    split = prompt.splits()[-1]
    prompt.ask(prompt.ids[:split])
    with prompt.beside(cached=True):
        prompt.probe(into, split)


def evicted(prompt: Prompt, into: Measured) -> None:
    """As many other requests as there are slots, and one more: the prompt must be restored."""
    if not prompt.engine.slots:
        into.unsupported = "it has no slots to fill"
        return
    if prompt.engine.slots > MOST_SLOTS:
        into.unsupported = f"it has more than {MOST_SLOTS} slots to fill"
        return
    prompt.ask(prompt.ids[: prompt.end - 1])
    for _ in range(prompt.engine.slots + 1):
        prompt.ask(prompt.others(FILLERS))
    prompt.probe(into, prompt.start - 1)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the prefix that two texts share."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def cut(prompt: Prompt, into: Measured) -> None:
    """A prompt cut in the middle, the rest of which lay further behind before. A server that
    shifts what it has kept answers by design with another history's keys."""
    into.approximate = True
    first, last = prompt.n_prompt // 3, 2 * prompt.n_prompt // 3
    rest = [*prompt.ids[:first], *prompt.ids[last : prompt.n_prompt]]
    prompt.ask(prompt.ids)
    found = prompt.ask(rest, CUT_TAIL + 1)
    if found.reused is None or found.reused <= common(rest, prompt.ids):
        into.unsupported = "it reuses nothing after a cut"
        return
    shorter = Prompt(prompt.engine, prompt.number, rest, CUT_TAIL)
    into.cold = shorter.cold
    into.add(shorter.shared(found, shorter.n_prompt), found.reused)


class Arm(NamedTuple):
    """What is done to a cache, and whether it needs a long prompt."""

    about: str
    play: Callable[[Prompt, Measured], None]
    long: bool = False
    crowded: bool = False  # whether others' tokens lie between: no cold request varies that


ARMS: dict[str, Arm] = {
    "prefix": Arm("a prefix that another request left, then the rest", warm_prefix),
    "decode": Arm("tokens decoded one by one, against a prefill of them", decode),
    "fork": Arm("one prefix, two continuations, the first again", fork),
    "between": Arm("another request in between", between, crowded=True),
    "slot": Arm("another request at the same time", second_slot, crowded=True),
    "evicted": Arm(
        "more other requests than there are slots, then the first again", evicted, crowded=True
    ),
    "cut": Arm("a prompt cut in the middle (reuse with shifted positions)", cut),
    "long": Arm("a prompt longer than what is computed at a time", long_prefix, long=True),
}
SHORT = [name for name, arm in ARMS.items() if not arm.long]


def play(prompt: Prompt, name: str) -> Measured:
    """One arm on one prompt; what is not a number with the cache is an answer too. Raises
    ServerError."""
    measured = Measured(name, prompt.number, prompt.cold)
    try:
        ARMS[name].play(prompt, measured)
    except NotFinite:
        measured.add([(prompt.end, {})], None)
    return measured


def open_prompt(engine: Engine, number: int, ids: Sequence[int], tail: int = TAIL) -> Prompt:
    """Ask for all that a prompt's cached answers are compared with. Raises ServerError."""
    prompt = Prompt(engine, number, ids, tail)
    prompt.add_company()
    prompt.add_controls()
    return prompt


def lengthened(prompts: Sequence[Sequence[int]], engine: Engine) -> list[int]:
    """A prompt longer than what the engine computes at a time, of shorter ones; [] if its context
    holds none, or its sizes are not told."""
    length = engine.chunk + engine.chunk // 8
    length = length // AROUND * AROUND - LONG_TAIL // 2
    fits = not 0 < engine.context <= length + LONG_TAIL + FORKED
    if not 0 < engine.chunk <= MOST_CHUNK or not fits:
        return []
    joined = [i for ids in prompts for i in ids]
    return (joined * (length // len(joined) + 1))[:length]
