"""Calls of the `tokenizers` library, whose rules and files may be a stranger's.

It is native code. What it cannot do with a file it says in an exception, or by a panic, which is no
Exception, and which is printed on stderr before it is raised. It may also not come back.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

from kvtool import ending
from kvtool.errors import KvtoolError, first_line, pass_on_shortage


class Asking:
    """A block that does nothing but call the library: what goes wrong is raised as what `failed`
    makes of one line. Made for a call a token: it costs a microsecond.

    careful: nothing is printed on stderr meanwhile, not even by other threads, and Ctrl-C and
    SIGTERM end the process at once.
    """

    def __init__(self, failed: Callable[[str], KvtoolError], careful: bool) -> None:
        self.failed = failed
        self.around = contextlib.ExitStack() if careful else None

    def __enter__(self) -> None:
        if self.around is not None:
            self.around.enter_context(ending.signals_at_default())
            self.around.enter_context(silence())

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.around is not None:
            self.around.close()
        if error is None:
            return
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            pass_on_shortage(error)
            raise self.failed(first_line(error)) from error


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Let nothing reach the file descriptor of stderr, where native code prints."""
    if threading.current_thread() is not threading.main_thread():
        yield  # the descriptor is the process's
        return
    try:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no stderr
        yield
        return
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
