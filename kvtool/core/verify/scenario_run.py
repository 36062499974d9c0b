"""A scenario as it is played: the sessions that it opens, what it feeds them, and the answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvtool.core.verify.subject import Session, Source, Start, Subject
from kvtool.errors import pass_on_shortage

PREFILL = 11  # tokens of a prompt that no power of two divides
STEPS = 6  # one-token steps that follow


@dataclass
class Answer:
    """What one step answered: logits (B,n,V) of the tokens from column `first` of a history on."""

    step: int
    first: int
    logits: Tensor


@dataclass
class Segment:
    """A stretch of steps on one history (B,T) that only grew, so that one pass judges them all."""

    start: Start
    history: Tensor
    answers: list[Answer] = field(default_factory=list)

    def zero_padding(self, logits: Tensor, first: int) -> Tensor:
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


class ScenarioRun:
    """One run of a scenario on a subject: what it feeds, and what is answered.

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
        self.last = last  # the step after which to stop
        self.on_answer: Callable[[Segment, Answer], None] | None = None  # called with each
        self.segments: list[Segment] = []
        self.n_steps = 0
        self.accepted_beyond_capacity: int | None = None  # the step that raised no error
        self.sessions: list[Session] = []
        self._drawn = 0
        self._generator = torch.Generator().manual_seed(0)

    def open(
        self, batch: int = 1, padding: list[int] | None = None, room: int = 0, source: int = 0
    ) -> TrackedSession:
        """A new session with `room` for that many tokens (0: as many as the context has)."""
        start = self.start(batch, padding, room, source)
        return TrackedSession(self, start, self.subject.start(start))

    def start(
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

    def keep(self, segment: Segment, answer: Answer) -> None:
        """Keep a step's answer. Raises Stopped after the last step that is wanted."""
        segment.answers.append(answer)
        self.n_steps += 1
        if self.on_answer is not None:
            self.on_answer(segment, answer)
        if answer.step == self.last:
            raise Stopped(segment, answer)

    def next_ids(self, batch: int, n: int) -> Tensor:
        """The ids (B,n) to feed next."""
        if self.given is not None and batch == 1 and self._drawn + n <= self.given.shape[1]:
            ids = self.given[:, self._drawn : self._drawn + n]
            self._drawn += n
            return ids.to(self.subject.device)
        ids = torch.randint(self.subject.vocab_size, (batch, n), generator=self._generator)
        return ids.to(self.subject.device)


class TrackedSession:
    """One session of a run, with the history (B,T) that it should hold."""

    def __init__(
        self, run: ScenarioRun, start: Start, session: Session, history: Tensor | None = None
    ) -> None:
        self.run = run
        self.start = start
        self.session = session
        run.sessions.append(session)
        empty = torch.empty(start.batch, 0, dtype=torch.long, device=run.subject.device)
        self._begin_segment(empty if history is None else history)

    def _begin_segment(self, history: Tensor) -> None:
        self.segment = Segment(self.start, history)
        self.run.segments.append(self.segment)

    @property
    def length(self) -> int:
        """Tokens of the history, left padding included."""
        return self.segment.history.shape[1]

    def feed(self, n: int) -> None:
        """One step of n tokens. Raises TooShort, and Stopped as `ScenarioRun.keep` does."""
        step, context = self.run.n_steps, self.run.subject.context
        if self.length + n > context:
            raise TooShort(f"needs {self.length + n} tokens of context (the model holds {context})")
        ids = self.run.next_ids(self.start.batch, n)
        logits, first = self.session.feed(ids), self.length
        self.segment.history = torch.cat([self.segment.history, ids], dim=1)
        self.run.keep(self.segment, Answer(step, first, logits))

    def feed_singly(self, n: int) -> None:
        """n steps of one token."""
        for _ in range(n):
            self.feed(1)

    def overflow(self) -> None:
        """A step beyond the capacity, which must be refused."""
        step = self.run.n_steps
        self.run.n_steps += 1
        try:
            self.session.feed(self.run.next_ids(self.start.batch, 1))
        except (Exception, SystemExit) as error:  # whatever it raises: it was refused
            pass_on_shortage(error)
            return
        self.run.accepted_beyond_capacity = step

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens, left padding included."""
        self.session.crop(length)
        self._begin_segment(self.segment.history[:, :length])

    def select(self, rows: list[int]) -> None:
        """Go on from the histories of `rows`, in that order."""
        picked = torch.tensor(rows, device=self.run.subject.device)
        self.session.select(picked)
        self.start = self.start.select(picked)
        self._begin_segment(self.segment.history[picked])

    def reset(self, start: Start) -> None:
        """Forget everything and begin again on the same cache."""
        self.session.reset(start)
        self.start = start
        self._begin_segment(self.segment.history.new_empty(start.batch, 0))

    def fork(self) -> TrackedSession:
        """A second session with the same history, which goes its own way."""
        other = TrackedSession(self.run, self.start, self.session.fork(), self.segment.history)
        self._begin_segment(self.segment.history)
        return other
