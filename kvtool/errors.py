"""Every error that kvtool raises on purpose: a message, a hint, and an exit code.

Core code raises these; `kvtool.app.main` is the one place that turns them into a red line on
stderr. Anything else that escapes is a defect of kvtool itself and keeps its traceback.
"""

from __future__ import annotations

import errno

MAX_MESSAGE = 2000  # characters of a message, and of a hint: names of files may be long
CLOSED_PIPE = 141  # as a shell reports SIGPIPE


class KvtoolError(Exception):
    """What went wrong and where, and what to do about it.

    `message` reads "<file or flag>: <what> (<found>, expected <expected>)"; `hint` is a sentence.
    """

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        message, hint = _bounded(message), _bounded(hint)
        super().__init__(f"{message}. {hint}" if hint else message)
        self.message = message
        self.hint = hint


def _bounded(text: str) -> str:
    """A text without the rest of what was quoted whole in it, megabytes of a file perhaps."""
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


class UsageError(KvtoolError):
    """A flag or a combination of flags that means nothing (exit 2)."""


class FileError(KvtoolError):
    """A file that is missing, damaged, or not what it should be (exit 2)."""


class DeviceError(KvtoolError):
    """A device or dtype that this machine does not have (exit 2)."""


class ServerError(KvtoolError):
    """A server that cannot be reached, refuses, or answers with something else (exit 2)."""


class CapacityError(KvtoolError):
    """More tokens than a cache or a model can hold (exit 2)."""


class CheckFailed(KvtoolError):
    """The work ran and its result is wrong, NaN logits for example (exit 1)."""

    exit_code = 1


class CacheOpUnsupported(KvtoolError):
    """A cache kind was asked for an operation that it cannot do correctly (exit 2)."""

    def __init__(self, kind: str, op: str, why: str, hint: str = "") -> None:
        super().__init__(f"{kind} cache cannot {op}: {why}", hint)
        self.kind = kind
        self.op = op


OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory",
)  # fmt: skip


def short_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, in the words of Python, the system or PyTorch."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(text in said for text in OUT_OF_MEMORY)


LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "socket closed")


def lost_a_process(error: BaseException) -> bool:
    """Whether another process, with which this one shares its work, ended: in the words of gloo and
    of NCCL."""
    said = str(error).lower()
    words = "gloo" in said or "nccl" in said
    return isinstance(error, RuntimeError) and words and any(text in said for text in LOST)


def pass_on_shortage(error: BaseException) -> None:
    """Raise the error again if memory ran out, or another process that is needed ended: that says
    nothing about the code that raised it."""
    if short_of_memory(error) or lost_a_process(error):
        raise error


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [""])[0][:160]
