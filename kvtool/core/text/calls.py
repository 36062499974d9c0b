"""Calls of the `tokenizers` library, whose rules and files may be untrusted.

The library is native code. It reports an error by an exception, or by a panic, which is no
Exception and is first printed on stderr. A call may also never return.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

from kvtool import ending
from kvtool.errors import KvtoolError, first_line, pass_on_shortage


class LibraryCall:
    """A context manager around a call of the library, which turns its errors into kvtool's.

    failed: makes the error from one line of text. careful: print nothing on stderr meanwhile, not
    even from other threads, and let Ctrl-C and SIGTERM end the process at once. It costs a
    microsecond, since it may be used once for each token.
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
    """Discard what is written to the file descriptor of stderr, where native code prints."""
    if threading.current_thread() is not threading.main_thread():
        yield  # the descriptor belongs to the whole process
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
