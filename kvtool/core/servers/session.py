"""One visit to a server: every prompt and arm in turn, and whether it stayed what it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from kvtool.core.servers.arms import LONG_TAIL, lengthened, open_prompt, play
from kvtool.core.servers.client import RequestsSpent
from kvtool.core.servers.engine import Engine
from kvtool.core.servers.gaps import distance, pooled_floor, scale_of
from kvtool.core.servers.texts import FORKED, Cold, Measured, Prompt
from kvtool.core.servers.verdict import ArmVerdict, judge_arm
from kvtool.errors import ServerError, UsageError

Progress = Callable[[str], None]  # is called before each arm, with a few words


@dataclass
class Visit:
    """The requests to a server and their answers so far."""

    measured: list[Measured] = field(default_factory=list)
    colds: list[Cold] = field(default_factory=list)
    spent: bool = False  # whether the allowed requests were used up too early
    stopped: str = ""  # the error that ended the visit early
    grown: float = 1.0  # the noise at the end over that at the beginning

    @property
    def pooled(self) -> float:
        """The typical floor of all histories, relative."""
        return pooled_floor(self.colds)

    @property
    def cut(self) -> tuple[int, int]:
        """How many requests without a cache were cut short, and of how many."""
        tallies = [cold.tally for cold in self.colds]
        return sum(t.cut for t in tallies), sum(t.requests for t in tallies)

    def lacks(self, arm: str) -> bool:
        """Whether the server does not support an arm, so that it need not be tried again."""
        return any(m.unsupported for m in self.measured if m.arm == arm)

    def verdicts(self, arms: Sequence[str]) -> list[ArmVerdict]:
        """Of all arms that were asked, in their order."""
        pooled, found = self.pooled, []
        for name in arms:
            if of_arm := [m for m in self.measured if m.arm == name]:
                found.append(judge_arm(of_arm, pooled, self.grown))
        return found


def visit(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    short: Sequence[str],
    long: Sequence[str],
    tail: int,
    progress: Progress,
    found: Visit,
) -> None:
    """Play all arms, and add the answers to `found`, until the requests are used up or the server
    fails.

    Raises ServerError if nothing was found by then, and for a model that was exchanged.
    """
    before = engine.identity()
    first: Prompt | None = None
    try:
        for number in range(len(prompts)):
            progress(f"prompt {number + 1}")
            prompt = open_prompt(engine, number, prompts, tail)
            found.colds.append(prompt.cold)
            first = first or prompt
            for name in short:
                progress(f"{name}, prompt {number + 1}")
                if not found.lacks(name):
                    found.measured.append(play(prompt, name))
        _visit_long(engine, prompts, long, progress, found)
        if first is not None:
            found.grown = growth(first, found.pooled)
    except RequestsSpent:
        if not found.measured:
            raise
        found.spent = True
    except ServerError as error:
        if not found.measured:
            raise
        found.stopped = error.message
        return
    require_same(engine, before)


def _visit_long(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    long: Sequence[str],
    progress: Progress,
    found: Visit,
) -> None:
    for name in long:
        progress(name)
        ids = lengthened(prompts, engine)
        if not ids:
            why = "its context is too short, or it does not tell its sizes"
            found.measured.append(Measured(name, len(prompts), Cold([]), unsupported=why))
            continue
        prompt = open_prompt(engine, len(prompts), [*prompts, ids], LONG_TAIL)
        found.colds.append(prompt.cold)
        found.measured.append(play(prompt, name))


def require_same(engine: Engine, before: dict[str, str]) -> None:
    """Raise ServerError if the server now serves another model than before."""
    try:
        now = engine.identity()
    except RequestsSpent:
        return
    for key, value in before.items():
        if now.get(key) != value:
            raise ServerError(
                f"{engine.client.url}: the model changed in between ({key} {value!r}, then "
                f"{now.get(key)!r})",
                "Ask again, while nobody exchanges it.",
            )


def growth(prompt: Prompt, pooled: float) -> float:
    """How far the answer to the very first request has moved, over the floor of its history; 1 or
    more.

    Where other requests are served at a time, the shapes of all change from moment to moment.
    """
    times = []
    for length, answer in prompt.again():
        cold = prompt.cold.answers[length]
        scale = scale_of(cold)
        if scale is not None:
            times.append(distance(answer, scale, cold[0]) / scale.floor_or(pooled))
    return max(1.0, float(median(times))) if times else 1.0


def require_room(engine: Engine, prompts: Sequence[Sequence[int]], tail: int) -> None:
    """Raise UsageError for a prompt that does not fit in the server's context with its tail."""
    more = tail + FORKED + 1
    for number, ids in enumerate(prompts, 1):
        if 0 < engine.context < len(ids) + more:
            raise UsageError(
                f"--prompts: prompt {number} is {len(ids):,} tokens, and with {more} after it "
                f"longer than the server's context of {engine.context:,}",
                "Shorten it, or give fewer --tokens.",
            )
