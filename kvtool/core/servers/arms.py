"""What a server is asked, so that its cache shows: each arm with and without what was kept.

All compares the logprobs of the token after one and the same history. The benign variants are cold
requests of that history which move the boundary between prefill and decode; how far these are from
each other is the engine's own noise. Controls are cold requests with one prompt token replaced or
missing: the size of a fault.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvtool.core.servers.engines import Completion, Engine

TOP = 30  # of the likeliest tokens of the reference, by which two answers are compared
TAIL = 16  # tokens of the server's own that follow a prompt: the boundaries lie among them
BOUNDARIES = (0, 1, 2, 4, 8, 16)  # tokens that are decoded rather than prefilled
N_SPLITS = 3  # shared prefixes that are tried for each prompt
FORKED = 6  # other tokens behind a shared prefix

Answer = Mapping[int, float]
Vector = NDArray[np.float64]


class Probe(NamedTuple):
    """One answer of the cached server: what was asked, and the next token's logprobs."""

    history: int  # tokens before the one that is compared
    answer: Answer
    reused: int | None


@dataclass
class Measured:
    """One arm on one prompt: the answers with a cache, and all that they are compared with."""

    arm: str
    prompt: int
    probes: list[Probe] = field(default_factory=list)
    cold: dict[int, list[Answer]] = field(default_factory=dict)  # by the history's length
    controls: list[Answer] = field(default_factory=list)
    approximate: bool = False  # by design: its distance is a loss, never a bug

    @property
    def reused(self) -> int | None:
        """The most tokens that an answer took from the cache; None: the server does not say."""
        known = [probe.reused for probe in self.probes if probe.reused is not None]
        return max(known, default=None)


def vector(answer: Answer, ids: Sequence[int]) -> Vector:
    """The logprobs of `ids`; one that is not among the likeliest has the least that was told."""
    least = min(answer.values())
    return np.array([answer.get(i, least) for i in ids], dtype=np.float64)


def likeliest(answer: Answer) -> list[int]:
    """The ids by which an answer is compared."""
    return sorted(answer, key=lambda i: (-answer[i], i))[:TOP]


class Prompt:
    """One prompt with the server's own continuation, and cold answers to its histories."""

    def __init__(self, engine: Engine, number: int, ids: Sequence[int], tail: int = TAIL) -> None:
        self.engine, self.number, self.n_prompt = engine, number, len(ids)
        self.random = random.Random(number)
        first = engine.complete(ids, tail)
        self.ids = [*ids, *first.tokens[:tail]]
        self._cold: dict[int, list[Answer]] = {}
        self._controls: list[Answer] = []

    @property
    def end(self) -> int:
        """The length of the whole history."""
        return len(self.ids)

    def cold(self, length: int) -> list[Answer]:
        """The token after the first `length`, without a cache: the boundary moved, [0] a pass."""
        if length not in self._cold:
            found = []
            for n in BOUNDARIES:
                if n >= length - 1:
                    break
                answer = self.engine.complete(self.ids[: length - n], n + 1)
                if list(answer.tokens[:n]) == self.ids[length - n : length]:  # the same history
                    found.append(answer.likeliest[n])
            self._cold[length] = found
        return self._cold[length]

    def controls(self) -> list[Answer]:
        """Faults of known size: a prompt token replaced, and one missing, without a cache."""
        if not self._controls:
            at = self.n_prompt // 2
            other = self.ids[(at + 1) % self.n_prompt]
            wrong = other if other != self.ids[at] else self.ids[0]
            for ids in (
                [*self.ids[:at], wrong, *self.ids[at + 1 :]],
                [*self.ids[:at], *self.ids[at + 1 :]],
            ):
                self._controls.append(self.engine.complete(ids).likeliest[0])
        return self._controls

    def splits(self) -> list[int]:
        """Lengths of a prefix that another request shares: more than a third, not all."""
        first = max(self.end // 3, 1)
        return sorted(self.random.sample(range(first, self.end), min(N_SPLITS, self.end - first)))

    def others(self, n: int) -> list[int]:
        """Other ids, of this prompt's own."""
        return [self.random.choice(self.ids) for _ in range(n)]

    def ask(self, ids: Sequence[int], n: int = 1, salt: str = "") -> Completion:
        """A request with the cache."""
        return self.engine.complete(ids, n, cached=True, salt=salt or f"kvtool-{self.number}")


def _probe(prompt: Prompt, into: Measured, length: int, answer: Answer, reused: int | None) -> None:
    into.probes.append(Probe(length, answer, reused))
    into.cold[length] = prompt.cold(length)


def warm_prefix(prompt: Prompt, into: Measured) -> None:
    """A prefix that another request has left, then the rest."""
    for split in prompt.splits():
        prompt.ask([*prompt.ids[:split], *prompt.others(FORKED)])
        found = prompt.ask(prompt.ids)
        _probe(prompt, into, prompt.end, found.likeliest[0], found.reused)


def decode(prompt: Prompt, into: Measured) -> None:
    """Tokens decoded one by one, against a prefill of the same tokens."""
    prompt.ask(prompt.ids[: prompt.n_prompt - 1])
    found = prompt.ask(prompt.ids[: prompt.n_prompt], prompt.end - prompt.n_prompt + 1)
    for n in (1, 3, 7, prompt.end - prompt.n_prompt):
        length = prompt.n_prompt + n
        if length <= prompt.end and list(found.tokens[:n]) == prompt.ids[prompt.n_prompt : length]:
            _probe(prompt, into, length, found.likeliest[n], found.reused)


def fork(prompt: Prompt, into: Measured) -> None:
    """One prefix, another continuation that is decoded, then the first again."""
    for split in prompt.splits()[:2]:
        prompt.ask(prompt.ids)
        prompt.ask([*prompt.ids[:split], *prompt.others(FORKED)], FORKED)
        found = prompt.ask(prompt.ids)
        _probe(prompt, into, prompt.end, found.likeliest[0], found.reused)


def between(prompt: Prompt, into: Measured) -> None:
    """Another request in between, which shares nothing."""
    split = prompt.splits()[-1]
    prompt.ask(prompt.ids[:split])
    prompt.ask(prompt.ids[::-1], FORKED)
    found = prompt.ask(prompt.ids)
    _probe(prompt, into, prompt.end, found.likeliest[0], found.reused)


def second_slot(prompt: Prompt, into: Measured) -> None:
    """Another request at the same time."""
    prompt.ask(prompt.ids[: prompt.splits()[-1]])
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(prompt.ask, prompt.ids[::-1], TAIL)
        found = prompt.ask(prompt.ids)
        beside.result()
    _probe(prompt, into, prompt.end, found.likeliest[0], found.reused)


def cut(prompt: Prompt, into: Measured) -> None:
    """A prompt cut in the middle, the rest of which lay further behind before. A server that
    shifts what it has kept answers by design with another history's keys."""
    into.approximate = True
    first, last = prompt.n_prompt // 3, 2 * prompt.n_prompt // 3
    rest = [*prompt.ids[:first], *prompt.ids[last:]]
    prompt.ask(prompt.ids)
    found = prompt.ask(rest)
    exact = prompt.engine.complete(rest)
    into.probes.append(Probe(len(rest), found.likeliest[0], found.reused))
    into.cold[len(rest)] = [exact.likeliest[0]]


ARMS: dict[str, tuple[str, Callable[[Prompt, Measured], None]]] = {
    "prefix": ("a prefix that another request left, then the rest", warm_prefix),
    "decode": ("tokens decoded one by one, against a prefill of them", decode),
    "fork": ("one prefix, two continuations, the first again", fork),
    "between": ("another request in between", between),
    "slot": ("another request at the same time", second_slot),
    "cut": ("a prompt cut in the middle (reuse with shifted positions)", cut),
}


def measure(
    engine: Engine, prompts: Sequence[Sequence[int]], arms: Sequence[str], tail: int = TAIL
) -> Iterator[Measured]:
    """Ask the server for each prompt and arm. Raises ServerError."""
    for number, ids in enumerate(prompts):
        prompt = Prompt(engine, number, ids, tail)
        for name in arms:
            measured = Measured(name, number)
            ARMS[name][1](prompt, measured)
            if not measured.approximate:
                measured.controls = prompt.controls()
            yield measured
