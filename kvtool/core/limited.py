"""Work that a stranger's file decides, such as building what its configuration describes, within
limits: of time, of memory, and so that Ctrl-C and SIGTERM end it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from kvtool import ending
from kvtool.errors import FileError, short_of_memory

SECONDS = 120  # of all processors: the largest models are built without their weights in some ten
NBYTES = 2 * 2**30  # beside what is there: configurations and modules, and code that is imported


class _TooLong(BaseException):
    """Raised by the clock; no `except Exception` of others keeps it."""


@contextlib.contextmanager
def limited(what: str, seconds: float = SECONDS, nbytes: int = NBYTES) -> Iterator[None]:
    """Raise FileError, which begins with `what`, if a block takes more of the processors' time, or
    more memory, where the system can tell (in the main thread, on Linux)."""
    try:
        with ending.signals_at_default(), _clock(seconds), _ceiling(nbytes):
            yield
    except _TooLong:
        raise FileError(f"{what} takes more than {seconds:g} s to build") from None
    except Exception as error:
        if short_of_memory(error):
            gib = nbytes / 2**30
            raise FileError(f"{what} takes more than {gib:g} GiB beside its weights") from error
        raise


@contextlib.contextmanager
def _clock(seconds: float) -> Iterator[None]:
    # Of the processor, and not of the day: a machine that does other work is no reason to stop.
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1.0)  # and again, should someone catch all
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _ceiling(nbytes: int) -> Iterator[None]:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most, hard = resource.getrlimit(resource.RLIMIT_AS)
        ceiling = pages * resource.getpagesize() + nbytes
        others = [limit for limit in (most, hard) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min([ceiling, *others]), hard))
    except (ImportError, OSError, ValueError):
        yield  # no Linux: a shortage of memory is reported as usual
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
