"""Ctrl-C and SIGTERM end the work, not the account of it: what is done is shown and written.

Both raise the same exception. Work that can be shown unfinished runs in `until_ended`, leaves its
results where they outlive it, and is then reported with the exit code of what ended it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum
from types import FrameType

Handler = Callable[[int, FrameType | None], None] | signal.Handlers
ECHO = 0.5  # seconds; `timeout` and torchrun send a signal twice, to the process and to its group


class End(Enum):
    """What ended the work, in the word that is said of it."""

    INTERRUPTED = "interrupted"  # by Ctrl-C
    TERMINATED = "terminated"  # by SIGTERM

    @property
    def exit_code(self) -> int:
        """As a shell reports it: 128 and the signal."""
        number = signal.SIGINT if self is End.INTERRUPTED else signal.SIGTERM
        return 128 + number

    @classmethod
    def of(cls, error: BaseException) -> End:
        """What an exception came from; Python itself has one for Ctrl-C alone."""
        return error.how if isinstance(error, Ended) else End.INTERRUPTED


class Ended(KeyboardInterrupt):
    """A signal ended the work; as Ctrl-C does, so that no `except Exception` keeps it alive."""

    def __init__(self, how: End) -> None:
        super().__init__(how.value)
        self.how = how


@dataclass
class _Signals:
    first_at: float | None = None  # seconds, of the signal that is being obeyed
    pending: End | None = None  # raised, and not yet known to have arrived


_signals = _Signals()


def listen() -> None:
    """Have both signals raise Ended, and the second one kill. What is ignored stays so: a shell has
    its background jobs ignore Ctrl-C."""
    forget()
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _receive)


def forget() -> None:
    """Start over, as if no signal had come."""
    _signals.first_at = _signals.pending = None


def _receive(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _signals.first_at is None:
        _signals.first_at = now
        _signals.pending = End.INTERRUPTED if number == signal.SIGINT else End.TERMINATED
        raise Ended(_signals.pending)
    if now - _signals.first_at > ECHO:
        _kill(number)


def _kill(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def lost() -> End | None:
    """What a signal asked for that was raised and did not arrive: it got lost in a callback from C,
    say, or in an import that takes any exception for a module that is not there."""
    return _signals.pending


def check() -> None:
    """Raise Ended if what a signal raised got lost: to be called between the steps of long work."""
    if _signals.pending is not None:
        raise Ended(_signals.pending)


@contextmanager
def _handled(handler: Handler) -> Iterator[None]:
    """Let `handler` have both signals in a block, but for those that are ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are obeyed in the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    obeyed = {n: usual for n, usual in before.items() if usual not in (None, signal.SIG_IGN)}
    for number in obeyed:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, usual in obeyed.items():
            signal.signal(number, usual)


@contextmanager
def held() -> Iterator[None]:
    """Let signals wait for the end of a block that is short: for work that C calls back from, where
    what a signal raises would be printed and lost. A second signal kills."""
    came: list[tuple[int, float]] = []

    def remember(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if came and now - came[0][1] > ECHO:
            _kill(number)
        came.append((number, now))

    try:
        with _handled(remember):
            yield
    finally:
        if came:
            signal.raise_signal(came[0][0])


@contextmanager
def noted(insist: bool = False) -> Iterator[Callable[[], int]]:
    """Let a signal only leave its number, which a block asks for between its steps (0: none came),
    so that a step is finished and saved. A second one takes effect at once, unless `insist`."""
    came: list[int] = []
    with ExitStack() as handled:

        def note(number: int, frame: FrameType | None) -> None:
            came.append(number)
            if not insist:
                handled.close()

        handled.enter_context(_handled(note))
        yield lambda: came[0] if came else 0


def signals_at_default() -> AbstractContextManager[None]:
    """Let both signals end the process where it is: for a library that reads a stranger's file and
    may not come back to Python. Nothing is written meanwhile, so that nothing is lost."""
    return _handled(signal.SIG_DFL)


@dataclass
class Ending:
    """Whether a block ran to its end: `how` says what ended it before, None that nothing did."""

    how: End | None = None


@contextmanager
def until_ended() -> Iterator[Ending]:
    """Let Ctrl-C and SIGTERM end the block alone, and go on after it with what is done.

    >>> with until_ended() as outcome:
    ...     for step in steps:
    ...         results.append(step())
    >>> report = Report(results, ended=outcome.how)
    """
    outcome = Ending()
    try:
        yield outcome
        check()
    except KeyboardInterrupt as error:
        outcome.how = End.of(error)
        _signals.pending = None
