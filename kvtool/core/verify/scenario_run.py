"""One run of a scenario: its sessions, the tokens that they are fed, and the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvtool.core.verify.schedules import THOROUGH, Bounds, Schedule
from kvtool.core.verify.subject import Session, Source, Start, Subject
from kvtool.errors import pass_on_shortage

PREFILL = 11  # tokens of a prompt that no power of two divides
STEPS = 6  # one-token steps that follow
REACH = 600  # tokens of the longest history, if their cost is not known
MAX_SPECIAL = 8  # ids to which a decoder gives a meaning
Padding = list[int] | list[list[int]] | None  # of rows: see Start


@dataclass
class Answer:
    """The answer of one step: logits (B,n,V) of the tokens from column `first` of a history on."""

    step: int
    first: int
    logits: Tensor


@dataclass
class Segment:
    """A stretch of steps on one history (B,T) that only grew, so that one pass judges them all."""

    start: Start
    history: Tensor
    answers: list[Answer] = field(default_factory=list)
    alone: bool = False  # each row is judged by a pass over it alone

    def zero_padding(self, logits: Tensor, first: int) -> Tensor:
        """Logits (B,n,V) of the tokens from column `first` on, with 0 for padding, which means
        nothing, and for ids that the decoder bans with -inf."""
        logits = logits.masked_fill(logits == -math.inf, 0.0)
        if self.start.padding is None:
            return logits
        real = self.start.real(first, logits.shape[1])
        return logits.masked_fill(~real[..., None], 0.0)


class Stopped(Exception):
    """A run has answered the last step that was wanted."""

    def __init__(self, segment: Segment, answer: Answer) -> None:
        super().__init__(answer.step)
        self.segment = segment
        self.answer = answer


class TooShort(Exception):
    """The subject's context does not hold what a scenario needs."""


class ScenarioRun:
    """One run of a scenario on a subject: its ids and answers.

    Ids come from `given` (1,N) until it is used up, then from a seeded generator. So every run of a
    scenario feeds the same ids.
    """

    def __init__(
        self,
        subject: Subject,
        given: Tensor | None = None,
        n_prompt: int = 0,
        last: int | None = None,
        source: Source | None = None,
        seed: int = 0,
        thorough: bool = False,
    ) -> None:
        self.subject = subject
        self.thorough = thorough
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
        self._generator = torch.Generator().manual_seed(seed)
        self._line = torch.empty(1, 0, dtype=torch.long)
        self._line_generator = torch.Generator().manual_seed(seed + 1)

    def open(
        self,
        batch: int = 1,
        padding: Padding = None,
        room: int = 0,
        source: int = 0,
        alone: bool = False,
    ) -> TrackedSession:
        """A new session with `room` for that many tokens (0: as many as the context has)."""
        start = self.start(batch, padding, room, source)
        return TrackedSession(self, start, self.subject.start(start), alone=alone)

    def start(
        self, batch: int = 1, padding: Padding = None, room: int = 0, source: int = 0
    ) -> Start:
        """How a session starts; `source` numbers the source that an encoder-decoder reads."""
        pads = None if padding is None else torch.tensor(padding, device=self.subject.device)
        room = room or min(self.subject.context, 4 * (PREFILL + STEPS) + self.extra)
        return Start(batch, room, pads, self._source(batch, source))

    @property
    def limits(self) -> Bounds:
        """The bounds of the subject's schedules."""
        subject = self.subject
        level = THOROUGH if self.thorough and not subject.fed_little else subject.level
        return Bounds(
            subject.reach or min(subject.context, REACH),
            subject.largest_step,
            subject.single_steps_only,
            (*subject.sizes, *filter(None, (subject.window,))),
            level,
        )

    def follow(self, schedules: Iterable[Schedule]) -> None:
        """Feed each schedule to a session of its own. All read one line of ids, so that one pass
        over the longest of them judges them all. Only the longest is asked whether its cache is
        used: a window need not be passed by each."""
        before, longest = list(self.sessions), 0
        for schedule in schedules:
            session = self.open(room=sum(schedule))
            for n in schedule:
                session.feed(n, self.line(session.length, n))
            if session.length > longest:
                longest, asked = session.length, session.session
            self.sessions = [*before, asked]

    def line(self, first: int, n: int) -> Tensor:
        """The ids (1,n) from `first` on of the line that sessions of one row may share."""
        if missing := max(first + n - self._line.shape[1], 0):
            n_ids, generator = self.subject.vocab_size, self._line_generator
            more = torch.randint(n_ids, (1, missing), generator=generator)
            self._line = torch.cat([self._line, more], dim=1)
        return self._line[:, first : first + n].to(self.subject.device)

    def telling_ids(self) -> list[Tensor]:
        """Steps of ids (1,n) as real text has them: runs, repeats, the first and the last of the
        vocabulary, and those to which the decoder gives a meaning."""
        n_ids = self.subject.vocab_size
        special = dict.fromkeys((n_ids - 1, 0, *self.subject.special_ids))
        a, b, c = (int(i) for i in torch.randint(n_ids, (3,), generator=self._generator))
        lines = [[a], [a], [a] * 3, [b, c] * 2]
        for i in list(special)[:MAX_SPECIAL]:
            lines += [[i], [b], [c, i, i, a]]
        lines.append([b, *list(special)[:MAX_SPECIAL], c])
        return [torch.tensor([line], device=self.subject.device) for line in lines]

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
        self,
        run: ScenarioRun,
        start: Start,
        session: Session,
        history: Tensor | None = None,
        alone: bool = False,
    ) -> None:
        self.run = run
        self.alone = alone
        self.start = start
        self.session = session
        run.sessions.append(session)
        empty = torch.empty(start.batch, 0, dtype=torch.long, device=run.subject.device)
        self._begin_segment(empty if history is None else history)

    def _begin_segment(self, history: Tensor) -> None:
        self.segment = Segment(self.start, history, alone=self.alone)
        self.run.segments.append(self.segment)

    @property
    def length(self) -> int:
        """Tokens of the history, left padding included."""
        return self.segment.history.shape[1]

    def feed(self, n: int, ids: Tensor | None = None) -> None:
        """One step of n tokens, of `ids` (B,n) if they are given. Raises TooShort, and Stopped as
        `ScenarioRun.keep` does."""
        step, context = self.run.n_steps, self.run.subject.context
        if self.length + n > context:
            raise TooShort(f"needs {self.length + n} tokens of context (the model holds {context})")
        ids = self.run.next_ids(self.start.batch, n) if ids is None else ids
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

    def reload(self) -> None:
        """Save the cache, and go on with a new one that is loaded from it."""
        self.session.reload()
        self._begin_segment(self.segment.history)

    def fork(self) -> TrackedSession:
        """A second session with the same history, which goes its own way."""
        other = TrackedSession(self.run, self.start, self.session.fork(), self.segment.history)
        self._begin_segment(self.segment.history)
        return other
