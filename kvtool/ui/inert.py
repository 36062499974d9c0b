"""Makes untrusted text inert: characters that would steer a terminal are shown as escapes.

Names of files, fields of baselines and what a model writes may hold anything. Whatever is shown of
them goes through here: all that Output prints, errors, tracebacks, tables, pictures, documents, and
what libraries say of their own accord.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import warnings
from typing import TextIO

# The C0 controls but tab and line feed, DEL, the C1 controls (ECMA-48), what reorders or joins text
# and breaks lines (Unicode UAX 9 and 14), and halves of surrogate pairs, which nothing can encode.
# What joins letters, no-break blanks and all that has a shape stay.
STEERS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff]"
)


def visible(text: str) -> str:
    """`text` with an escape for each character that could steer a terminal; tabs and lines stay.

    >>> visible("a\\x1b[2J\\tb\\r\\n")
    'a\\\\x1b[2J\\tb\\n'
    """
    return STEERS.sub(_escape, text.replace("\r\n", "\n"))


def in_a_line(text: str) -> str:
    """The same with escapes for tabs and line breaks too: a name cannot begin a line of its own.

    >>> in_a_line("a\\n✓ all is well")
    'a\\\\n✓ all is well'
    """
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def guard_libraries() -> None:
    """Make Python's warnings and log records inert."""
    warnings.showwarning = _show_warning
    logging.setLogRecordFactory(_Record)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    said = warnings.formatwarning(message, category, filename, lineno, line)
    with contextlib.suppress(OSError):
        (file or sys.stderr).write(visible(said))


class _Record(logging.LogRecord):
    def getMessage(self) -> str:  # noqa: N802
        return visible(super().getMessage())
