"""Tells refusals from crashes: a refusal is an error that the decoder's author wrote.

A refusal is raised by a `raise` or an `assert` in the decoder's own code. An error of torch, for
example of shapes that do not fit, is a crash.
"""

from __future__ import annotations

import dis
import os

import torch

import kvtool
from kvtool.errors import first_line

NOT_ITS_OWN = tuple(  # folders of torch's code, and of kvtool's
    os.path.dirname(os.path.abspath(package.__file__ or "")) + os.sep for package in (torch, kvtool)
)


class OneAtATime(NotImplementedError):
    """A module that is given all ids so far answers for the last of them alone."""


def is_refusal(error: BaseException) -> bool:
    """Whether an error was raised on purpose, and not because of another that was not."""
    if isinstance(error, OneAtATime):
        return True
    if not isinstance(error, Exception) or error.__traceback__ is None:
        return False
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    if not raised or code.co_filename.startswith(NOT_ITS_OWN):
        return False
    before = error.__cause__ or error.__context__
    return before is None or is_refusal(before)


def in_words(error: BaseException) -> str:
    """The message of a refusal."""
    return f"{type(error).__name__}: {first_line(error)}".rstrip(": ")
