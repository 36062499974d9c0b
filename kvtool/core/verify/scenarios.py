"""What is done to a cache before its answers are compared: one small script for each thing that
goes wrong in practice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvtool.core.verify.subject import Session, Source, Start, Subject
from kvtool.errors import pass_on_shortage

PREFILL = 11  # tokens of a prompt that no power of two divides
STEPS = 6  # one-token steps that follow
CHUNK = 4  # tokens of a step that has several
BLOCK = 64  # tokens: about where many caches grow, or read one more block of columns


@dataclass
class Answer:
    """What one step answered: logits (B,n,V) of the tokens from column `first` of a history on."""

    step: int
    first: int
    found: Tensor


@dataclass
class Segment:
    """A stretch of steps on one history (B,T) that only grew, so that one pass judges them all."""

    start: Start
    history: Tensor
    answers: list[Answer] = field(default_factory=list)

    def real(self, logits: Tensor, first: int) -> Tensor:
        """Logits (B,n,V) of the tokens from column `first` on, where those of left padding, which
        mean nothing, are 0."""
        if self.start.padding is None:
            return logits
        columns = torch.arange(first, first + logits.shape[1], device=logits.device)
        return logits.masked_fill((columns < self.start.padding[:, None])[..., None], 0.0)


class Stopped(Exception):
    """A run has answered the last step that was wanted."""

    def __init__(self, segment: Segment, answer: Answer) -> None:
        super().__init__(answer.step)
        self.segment = segment
        self.answer = answer


class TooShort(Exception):
    """The subject's context does not hold what a scenario needs."""


class Run:
    """Plays a scenario on a subject, and keeps what was fed and what was answered.

    Ids come from `given` (1,N) where that is not used up, then from a generator: so every run of a
    scenario feeds the same ones.
    """

    def __init__(
        self,
        subject: Subject,
        given: Tensor | None = None,
        n_prompt: int = 0,
        last: int | None = None,
        source: Source | None = None,
    ) -> None:
        self.subject = subject
        self.source = source  # of the first session, for an encoder-decoder; None: a random one
        self.given = given
        self.n_prompt = n_prompt  # how many of the given ids are the prompt
        self.last = last  # the step behind which to stop
        self.watch: Callable[[Segment, Answer], None] | None = None  # told of each answer
        self.segments: list[Segment] = []
        self.n_steps = 0
        self.unrefused: int | None = None  # the step beyond capacity that raised no error
        self.sessions: list[Session] = []
        self._drawn = 0
        self._generator = torch.Generator().manual_seed(0)

    def lane(
        self, batch: int = 1, padding: list[int] | None = None, room: int = 0, source: int = 0
    ) -> Lane:
        """A new session with `room` for that many tokens (0: as many as the context has)."""
        start = self.begin(batch, padding, room, source)
        return Lane(self, start, self.subject.start(start))

    def begin(
        self, batch: int = 1, padding: list[int] | None = None, room: int = 0, source: int = 0
    ) -> Start:
        """How a session starts; `source` numbers the source that an encoder-decoder reads."""
        pads = None if padding is None else torch.tensor(padding, device=self.subject.device)
        room = room or min(self.subject.context, 4 * (PREFILL + STEPS) + self.extra)
        return Start(batch, room, pads, self._source(batch, source))

    @property
    def extra(self) -> int:
        """Tokens to add to a prompt so that a window is passed, and what was given fits."""
        window = self.subject.window + 5 if self.subject.window else 0
        return max(window, 0 if self.given is None else self.given.shape[1])

    def _source(self, batch: int, number: int) -> Source | None:
        if not self.subject.source_vocab_size:
            return None
        if self.source is not None and batch == 1 and number == 0:
            return self.source
        least = 5 + 3 * number + self.subject.window
        lengths = torch.tensor([least + 2 * row for row in range(batch)])
        width = int(lengths.max())
        generator = torch.Generator().manual_seed(100 + number)
        ids = torch.randint(self.subject.source_vocab_size, (batch, width), generator=generator)
        mask = torch.arange(width) < lengths[:, None]
        return Source(ids.to(self.subject.device), mask.to(self.subject.device))

    def answered(self, segment: Segment, answer: Answer) -> None:
        """Keep a step's answer. Raises Stopped behind the last step that is wanted."""
        segment.answers.append(answer)
        self.n_steps += 1
        if self.watch is not None:
            self.watch(segment, answer)
        if answer.step == self.last:
            raise Stopped(segment, answer)

    def draw(self, batch: int, n: int) -> Tensor:
        """The next ids (B,n)."""
        if self.given is not None and batch == 1 and self._drawn + n <= self.given.shape[1]:
            ids = self.given[:, self._drawn : self._drawn + n]
            self._drawn += n
            return ids.to(self.subject.device)
        ids = torch.randint(self.subject.vocab_size, (batch, n), generator=self._generator)
        return ids.to(self.subject.device)


class Lane:
    """One session of a run, with the history (B,T) that it should hold."""

    def __init__(
        self, run: Run, start: Start, session: Session, history: Tensor | None = None
    ) -> None:
        self.run = run
        self.start = start
        self.session = session
        run.sessions.append(session)
        empty = torch.empty(start.batch, 0, dtype=torch.long, device=run.subject.device)
        self._go_on(empty if history is None else history)

    def _go_on(self, history: Tensor) -> None:
        self.segment = Segment(self.start, history)
        self.run.segments.append(self.segment)

    @property
    def length(self) -> int:
        return self.segment.history.shape[1]

    def feed(self, n: int) -> None:
        """One step of n tokens."""
        step, context = self.run.n_steps, self.run.subject.context
        if self.length + n > context:
            raise TooShort(f"needs {self.length + n} tokens of context (the model holds {context})")
        ids = self.run.draw(self.start.batch, n)
        found, first = self.session.feed(ids), self.length
        self.segment.history = torch.cat([self.segment.history, ids], dim=1)
        self.run.answered(self.segment, Answer(step, first, found))

    def each(self, n: int) -> None:
        """n steps of one token."""
        for _ in range(n):
            self.feed(1)

    def overflow(self) -> None:
        """A step beyond the capacity, which must be refused."""
        step = self.run.n_steps
        self.run.n_steps += 1
        try:
            self.session.feed(self.run.draw(self.start.batch, 1))
        except (
            Exception,
            SystemExit,
        ) as error:  # whatever it raises: that is what counts
            pass_on_shortage(error)
            return
        self.run.unrefused = step

    def crop(self, length: int) -> None:
        self.session.crop(length)
        self._go_on(self.segment.history[:, :length])

    def select(self, rows: list[int]) -> None:
        picked = torch.tensor(rows, device=self.run.subject.device)
        self.session.select(picked)
        self.start = self.start.select(picked)
        self._go_on(self.segment.history[picked])

    def reset(self, start: Start) -> None:
        self.session.reset(start)
        self.start = start
        self._go_on(self.segment.history.new_empty(start.batch, 0))

    def fork(self) -> Lane:
        other = Lane(self.run, self.start, self.session.fork(), self.segment.history)
        self._go_on(self.segment.history)
        return other


@dataclass(frozen=True)
class Scenario:
    """A script that is played on a subject, and the abilities that it needs."""

    name: str
    about: str
    play: Callable[[Run], None]
    needs: tuple[str, ...] = ()

    def lacking(self, subject: Subject) -> str | None:
        """The first ability that the subject does not have."""
        return next((need for need in self.needs if need not in subject.abilities), None)


def _decode(run: Run) -> None:
    lane = run.lane()
    n = 0 if run.given is None else run.given.shape[1]
    lane.feed(run.n_prompt or PREFILL + run.subject.window)
    lane.each(n - run.n_prompt if n else STEPS * 2)


def _token_by_token(run: Run) -> None:
    run.lane().each(PREFILL + run.subject.window)


def _one_then_chunks(run: Run) -> None:
    lane = run.lane()
    lane.feed(1)
    for _ in range(3 + run.subject.window // CHUNK):
        lane.feed(CHUNK)


def _chunks(run: Run) -> None:
    lane = run.lane()
    lane.feed(PREFILL)
    for n in (CHUNK, CHUNK, 1, CHUNK, 2, 1):
        lane.feed(n)
    if run.subject.window:
        lane.feed(run.subject.window + 3)
        lane.feed(CHUNK)
        lane.each(2)


def _window(run: Run) -> None:
    lane = run.lane()
    lane.feed(run.subject.window + 3)  # a prompt that does not fit into the window
    lane.each(3)
    lane.feed(CHUNK)
    lane.each(run.subject.window + 3)  # every slot of a ring is written again


def _capacity(run: Run) -> None:
    room = PREFILL + STEPS + run.subject.window
    lane = run.lane(room=room)
    lane.feed(PREFILL)
    lane.each(room - PREFILL)


def _overflow(run: Run) -> None:
    prompt = PREFILL + run.subject.window
    lane = run.lane(room=prompt + 2)
    lane.feed(prompt)
    lane.each(2)
    lane.overflow()


def _growth(run: Run) -> None:
    lane = run.lane(room=BLOCK + 3 * CHUNK)
    lane.feed(PREFILL)
    lane.feed(BLOCK - 2 - PREFILL)
    lane.each(4)
    lane.feed(CHUNK)
    lane.each(2)


def _padded(run: Run) -> None:
    lane = run.lane(batch=3, padding=[0, 4, 1])
    lane.feed(PREFILL)
    lane.each(3)
    lane.feed(CHUNK)
    lane.each(2 + run.subject.window)


def _permuted(run: Run) -> None:
    lane = run.lane(batch=3)
    lane.feed(PREFILL + run.subject.window)
    lane.each(2)
    for rows in ([2, 0, 1], [1, 1, 0]):
        lane.select(rows)
        lane.each(3)


def _reset(run: Run) -> None:
    lane = run.lane()
    lane.feed(PREFILL + 3 + run.subject.window)
    lane.each(2)
    lane.reset(run.begin())
    lane.feed(PREFILL - 4)
    lane.each(3 + run.subject.window)


def _fork(run: Run) -> None:
    one = run.lane()
    one.feed(PREFILL + run.subject.window)
    two = one.fork()
    two.feed(CHUNK)
    two.each(2)
    one.each(STEPS + 1)
    two.each(2)


def _crop(run: Run) -> None:
    lane = run.lane()
    lane.feed(PREFILL + run.subject.window)
    lane.each(4)
    lane.crop(lane.length - 3)
    lane.each(3)
    lane.feed(CHUNK)
    lane.crop(lane.length - 2)
    lane.feed(CHUNK)
    lane.each(2)


def _two_sources(run: Run) -> None:
    lane = run.lane(batch=2, source=1)
    n = STEPS + 2 * run.subject.window
    lane.feed(1)
    lane.each(n)
    lane.reset(run.begin(batch=2))  # a shorter one: what stays of the first would lie behind it
    lane.feed(1)
    lane.each(n)


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
        Scenario("permuted", "rows reordered and repeated", _permuted, ("batch", "select")),
        Scenario("reset", "a second sequence on the same cache", _reset, ("reset",)),
        Scenario("fork", "one prefix, two continuations", _fork, ("fork",)),
        Scenario("crop", "tokens taken back, then others", _crop, ("crop",)),
        Scenario(
            "two-sources", "another source after the first", _two_sources, ("source", "reset")
        ),
    )
}
