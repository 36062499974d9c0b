"""The scenarios: small scripts that use a cache before its answers are compared, one for each thing
that goes wrong in practice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvtool.core.verify import schedules
from kvtool.core.verify.scenario_run import PREFILL, STEPS, ScenarioRun
from kvtool.core.verify.schedules import Bounds, Schedule
from kvtool.core.verify.subject import ABILITIES, Subject

CHUNK = 4  # tokens of a step that has several
BLOCK = 64  # tokens: about where many caches grow, or read one more block of columns


@dataclass(frozen=True)
class Scenario:
    """A script that is played on a subject, and those of ABILITIES that it needs.

    Raises ValueError for others, which no subject could have.
    """

    name: str
    about: str
    play: Callable[[ScenarioRun], None]
    needs: tuple[str, ...] = ()
    schedules: Callable[[Bounds], list[Schedule]] | None = None  # of one that is generated

    def __post_init__(self) -> None:
        if unknown := [need for need in self.needs if need not in ABILITIES]:
            expected = f"expected some of {', '.join(ABILITIES)}"
            raise ValueError(f"{self.name}: needs {unknown} ({expected})")

    @classmethod
    def generated(cls, name: str, about: str, make: Callable[[Bounds], list[Schedule]]) -> Scenario:
        """A scenario that feeds the schedules that fit a subject, each to a session of its own."""
        return cls(name, about, lambda run: run.follow(make(run.limits)), schedules=make)

    def of(self, chosen: Sequence[Schedule]) -> Scenario:
        """The same with these schedules alone."""
        return replace(self, play=lambda run: run.follow(chosen))

    def lacking(self, subject: Subject) -> str | None:
        """The first ability that the subject does not have."""
        return next((need for need in self.needs if need not in subject.abilities), None)


def _decode(run: ScenarioRun) -> None:
    session = run.open()
    n = 0 if run.given is None else run.given.shape[1]
    session.feed(run.n_prompt or PREFILL + run.subject.window)
    session.feed_singly(n - run.n_prompt if n else STEPS * 2)


def _token_by_token(run: ScenarioRun) -> None:
    run.open().feed_singly(PREFILL + run.subject.window)


def _one_then_chunks(run: ScenarioRun) -> None:
    session = run.open()
    session.feed(1)
    for _ in range(3 + run.subject.window // CHUNK):
        session.feed(CHUNK)


def _chunks(run: ScenarioRun) -> None:
    session = run.open()
    session.feed(PREFILL)
    for n in (CHUNK, CHUNK, 1, CHUNK, 2, 1):
        session.feed(n)
    if run.subject.window:
        session.feed(run.subject.window + 3)
        session.feed(CHUNK)
        session.feed_singly(2)


def _window(run: ScenarioRun) -> None:
    session = run.open()
    session.feed(run.subject.window + 3)  # a prompt that does not fit into the window
    session.feed_singly(3)
    session.feed(CHUNK)
    session.feed_singly(run.subject.window + 3)  # every slot of a ring is written again


def _capacity(run: ScenarioRun) -> None:
    room = PREFILL + STEPS + run.subject.window
    session = run.open(room=room)
    session.feed(PREFILL)
    session.feed_singly(room - PREFILL)


def _overflow(run: ScenarioRun) -> None:
    prompt = PREFILL + run.subject.window
    session = run.open(room=prompt + 2)
    session.feed(prompt)
    session.feed_singly(2)
    session.overflow()


def _growth(run: ScenarioRun) -> None:
    session = run.open(room=BLOCK + 3 * CHUNK)
    session.feed(PREFILL)
    session.feed(BLOCK - 2 - PREFILL)
    session.feed_singly(4)
    session.feed(CHUNK)
    session.feed_singly(2)


def _padded(run: ScenarioRun) -> None:
    session = run.open(batch=3, padding=[0, 4, 1])
    session.feed(PREFILL)
    session.feed_singly(3)
    session.feed(CHUNK)
    session.feed_singly(2 + run.subject.window)


def _permuted(run: ScenarioRun) -> None:
    session = run.open(batch=3)
    session.feed(PREFILL + run.subject.window)
    session.feed_singly(2)
    for rows in ([2, 0, 1], [1, 1, 0]):
        session.select(rows)
        session.feed_singly(3)


def _leaving(run: ScenarioRun) -> None:
    session = run.open(batch=3)
    session.feed(PREFILL + run.subject.window)
    session.feed_singly(2)
    for rows in ([0, 2], [1]):
        session.select(rows)
        session.feed_singly(2)
        session.feed(CHUNK)


def _rows(run: ScenarioRun) -> None:
    session = run.open(batch=3, alone=True)
    session.feed(PREFILL)
    session.feed_singly(3)
    session.feed(CHUNK)
    session.feed_singly(2 + run.subject.window)


def _padded_rows(run: ScenarioRun) -> None:
    session = run.open(batch=3, padding=[3, 0, 5])
    session.feed(PREFILL + run.subject.window)
    session.feed_singly(2)
    for rows in ([1, 2, 0], [2, 1]):
        session.select(rows)
        session.feed_singly(2)
        session.feed(CHUNK)


def _right_padded(run: ScenarioRun) -> None:
    session = run.open(batch=3, padding=[[PREFILL, PREFILL], [PREFILL - 4, PREFILL], [5, PREFILL]])
    session.feed(PREFILL)
    session.feed_singly(3)
    session.feed(CHUNK)
    session.feed_singly(2)


def _reset(run: ScenarioRun) -> None:
    session = run.open()
    session.feed(PREFILL + 3 + run.subject.window)
    session.feed_singly(2)
    session.reset(run.start())
    session.feed(PREFILL - 4)
    session.feed_singly(3 + run.subject.window)


def _fork(run: ScenarioRun) -> None:
    one = run.open()
    one.feed(PREFILL + run.subject.window)
    two = one.fork()
    two.feed(CHUNK)
    two.feed_singly(2)
    one.feed_singly(STEPS + 1)
    two.feed_singly(2)


def _crop(run: ScenarioRun) -> None:
    session = run.open()
    session.feed(PREFILL + run.subject.window)
    session.feed_singly(4)
    session.crop(session.length - 3)
    session.feed_singly(3)
    session.feed(CHUNK)
    session.crop(session.length - 2)
    session.feed(CHUNK)
    session.feed_singly(2)


def _ids(run: ScenarioRun) -> None:
    session = run.open()
    session.feed(PREFILL)
    for ids in run.telling_ids():  # runs and repeats, and the ids that may have a meaning
        session.feed(ids.shape[1], ids)
    session.feed_singly(2)


def _second_request(run: ScenarioRun) -> None:
    n = PREFILL + run.subject.window
    for steps in ((n, 1, 1, CHUNK), (n - 3, 1, 2)):  # the second begins as the first did
        session = run.open()
        for size in steps:
            session.feed(size, run.line(session.length, size))
    session.feed(CHUNK)
    session.feed_singly(3)


def _saved(run: ScenarioRun) -> None:
    session = run.open()
    session.feed(PREFILL + run.subject.window)
    session.feed_singly(2)
    session.reload()
    session.feed_singly(2)
    session.feed(CHUNK)
    session.reload()
    session.feed(CHUNK)
    session.feed_singly(2)


def _two_sources(run: ScenarioRun) -> None:
    session = run.open(batch=2, source=1)
    n = STEPS + 2 * run.subject.window
    session.feed(1)
    session.feed_singly(n)
    session.reset(run.start(batch=2))  # a shorter one: what stays of the first would lie behind it
    session.feed(1)
    session.feed_singly(n)


SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("decode", "a prompt, then one token at a time", _decode),
        Scenario("token-by-token", "no prompt: one token at a time", _token_by_token),
        Scenario("one-then-chunks", f"one token, then {CHUNK} at a time", _one_then_chunks),
        Scenario("chunks", "a prompt, then steps of several tokens and of one", _chunks),
        Scenario("window", "a prompt longer than the window, and beyond", _window, ("window",)),
        Scenario("capacity", "exactly as many tokens as there is room for", _capacity),
        Scenario("overflow", "a token too many must be refused", _overflow, ("capacity",)),
        Scenario("growth", f"past {BLOCK} tokens, where buffers grow", _growth),
        Scenario("padded", "a batch with left padding", _padded, ("batch", "padding")),
        Scenario("rows", "a batch, and each of its rows alone", _rows, ("batch",)),
        Scenario("permuted", "rows reordered and repeated", _permuted, ("batch", "select")),
        Scenario("leaving", "rows that leave the batch", _leaving, ("batch", "select")),
        Scenario(
            "padded-rows",
            "padded rows reordered, and one that leaves",
            _padded_rows,
            ("batch", "padding", "select"),
        ),
        Scenario(
            "right-padded",
            "a batch with padding after shorter prompts",
            _right_padded,
            ("batch", "padding", "right-padding"),
        ),
        Scenario("reset", "a second sequence on the same cache", _reset, ("reset",)),
        Scenario("fork", "one prefix, two continuations", _fork, ("fork",)),
        Scenario("crop", "tokens taken back, then others", _crop, ("crop",)),
        Scenario("saved", "saved, and loaded into a new cache", _saved, ("save",)),
        Scenario("second-request", "another request that begins as the first", _second_request),
        Scenario("ids", "repeats, runs, and ids with a meaning", _ids),
        Scenario.generated("prompts", "first steps of many sizes", schedules.prompts),
        Scenario.generated(
            "steps", "steps of many sizes after short and long pasts", schedules.steps
        ),
        Scenario.generated(
            "boundaries", "steps that end around blocks, windows and chunks", schedules.boundaries
        ),
        Scenario.generated(
            "long", "large steps, then small ones up to the end of the context", schedules.long
        ),
        Scenario(
            "two-sources", "another source after the first", _two_sources, ("source", "reset")
        ),
    )
}
GENERATED = frozenset(name for name, scenario in SCENARIOS.items() if scenario.schedules)
