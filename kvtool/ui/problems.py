"""Errors as one line on stderr, whatever raised them.

`explain_usage` and `explain_machine` turn what Typer, torch and the system raise into KvtoolErrors;
`error_line` is the only place that knows the form of the line.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import traceback
from typing import Any, TextIO

import typer

from kvtool.errors import KvtoolError, UsageError, first_line, lost_a_process, short_of_memory
from kvtool.nearest import did_you_mean, nearest_names
from kvtool.ui.inert import in_a_line, visible

# The class that Typer raises for every misuse; where it is defined has moved between releases.
UsageProblem: Any = typer.BadParameter.__mro__[1]

ALLOCATE = re.compile(r"allocate ([\d.]+) (\w+)")  # in what torch and NumPy say
WORDS_FOR_TYPES = {  # pydantic's names of what can be wrong with one value
    "int_parsing": "is not a whole number",
    "int_parsing_size": "is not a whole number",
    "int_from_float": "is not a whole number",
    "float_parsing": "is not a number",
    "string_unicode": "is not valid UTF-8",
}
WORDS_FOR_CLICK = {"valid integer": "whole number", "valid float": "number"}  # Typer before 0.26
NO_SPACE = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "no space left in the quota",
    errno.EFBIG: "no space left in the largest file that is allowed",
}
DEBUG_HINT = "--debug shows where."
RED, DIM, PLAIN = "\x1b[31m", "\x1b[2m", "\x1b[0m"


def error_line(message: str, hint: str = "", colour: bool = False) -> str:
    """One physical line: `kvtool: error: <message>. <hint>`, control characters made visible."""
    message, hint = _joined(message).rstrip("."), _joined(hint)
    head = f"kvtool: error: {message}"
    if colour:
        head, hint = f"{RED}{head}{PLAIN}", hint and f"{DIM}{hint}{PLAIN}"
    return f"{head}. {hint}" if hint else head


def _joined(text: str) -> str:
    """Blanks for line breaks, escapes for what could steer a terminal."""
    return in_a_line(" ".join(part.strip() for part in text.splitlines() if part.strip()))


def wants_colour(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that may be coloured."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def show_error(error: KvtoolError) -> None:
    """Write the line of `error` to stderr."""
    line = error_line(error.message, error.hint, wants_colour(sys.stderr))
    with contextlib.suppress(OSError):  # stderr is closed or full: the exit code still tells
        print(line, file=sys.stderr, flush=True)


def show_traceback() -> None:
    """Write the traceback of the error that is being handled to stderr, made inert."""
    with contextlib.suppress(OSError):
        print(visible(traceback.format_exc()), end="", file=sys.stderr, flush=True)


def explain_usage(error: Exception) -> UsageError:
    """Typer's usage error in kvtool's words: an option, its value, or a stray word."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "kvtool"
    hint = f"See {command} --help."
    option = getattr(error, "option_name", None)
    if hasattr(error, "possibilities"):  # Typer's own; ours also know prefixes and plurals
        near = nearest_names(str(option), _options(context))
        return UsageError(f"{option}: no such option of {command}", did_you_mean(near) or hint)
    message = str(getattr(error, "message", error))
    if option:
        what = "takes no value" if "does not take" in message else "needs a value"
        return UsageError(f"{option}: {what}", hint)
    param = getattr(error, "param", None)
    if param is not None:
        flag = max(param.opts, key=len)
        return UsageError(f"{flag}: {_bad_value(error, message)}", hint)
    stray = re.search(r"unexpected extra argument.*\((.*)\)$", message, re.DOTALL)
    if stray:
        return UsageError(f"{stray[1]}: unexpected", f"{command} takes options only. {hint}")
    return UsageError(message.rstrip("."), hint)


def _options(context: Any) -> list[str]:
    """The long names of the options of a command."""
    params = context.command.get_params(context) if context else []
    return [name for param in params for name in param.opts if name.startswith("--")]


def _bad_value(error: Exception, message: str) -> str:
    """Typer checks values with pydantic, whose sentences name neither the value nor the fix."""
    details = getattr(error.__cause__, "errors", None)
    if details is not None:
        first = details(include_url=False)[0]
        words = WORDS_FOR_TYPES.get(first["type"])
        return (
            f"{first['input']!r} {words}" if words else first["msg"].removeprefix("Value error, ")
        )
    for said, words in WORDS_FOR_CLICK.items():
        message = message.replace(said, words)
    return message.rstrip(".") or "is required"


def explain_machine(error: BaseException) -> KvtoolError | None:
    """The error for a machine that is too small, or an input that is too much for a library; None
    if `error` is a defect of kvtool."""
    if short_of_memory(error):
        return KvtoolError(
            f"memory: there is not enough for this{_asked_for(str(error).strip())}",
            "Use shorter lengths, a smaller batch, or a smaller model or number format.",
        )
    if lost_a_process(error):
        text = "torchrun: another process that shares the work has ended"
        return KvtoolError(text, "What it said, if anything, stands above.")
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        what = f"{error.filename or 'output'}: {NO_SPACE[error.errno]}"
        return KvtoolError(what, "Free some and run it again.")
    if isinstance(error, RecursionError):
        return KvtoolError("the input is nested more deeply than Python's stack", DEBUG_HINT)
    if not isinstance(error, Exception):  # panics of libraries in Rust (PyO3)
        why = first_line(error) or "it does not say why"
        return KvtoolError(f"a library failed on this input: {why}", DEBUG_HINT)
    return None


def _asked_for(said: str) -> str:
    """The refused amount of memory, if an error names it. The rest of torch's message is left
    out."""
    found = ALLOCATE.search(said)
    if found is None:
        return ""
    number, unit = found.groups()
    if unit == "bytes":
        nbytes = int(number)
        large = nbytes >= 2**30
        number, unit = f"{nbytes / 2 ** (30 if large else 20):,.1f}", "GiB" if large else "MiB"
    return f" ({number} {unit} more were asked for)"
