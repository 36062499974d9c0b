"""The options of bench that are lists: what it measures side by side."""

from __future__ import annotations

from typing import Annotated

from kvtool.config import DTYPES, check_int
from kvtool.registry import IMPLEMENTATIONS, choose
from kvtool.ui.lists import list_option, whole_number
from kvtool.ui.options import MACHINE, MODEL


def implementation(text: str, flag: str) -> str:
    """One implementation. Raises UsageError with the nearest name."""
    return choose(text, IMPLEMENTATIONS, flag)


def number_format(text: str, flag: str) -> str:
    """One number format. Raises UsageError with the nearest name."""
    return choose(text, DTYPES, flag)


def batch(text: str, flag: str) -> int:
    """A number of sequences, 1 or more. Raises UsageError."""
    value = whole_number(text, flag)
    check_int(flag, value, 1)
    return value


def thread_count(text: str, flag: str) -> int:
    """A number of threads; 0 is PyTorch's choice. Raises UsageError."""
    value = whole_number(text, flag)
    check_int(flag, value, 0, 4096)
    return value


Impls = Annotated[
    list[str],
    list_option(
        "--impl",
        element=implementation,
        example="kvtool transformers",
        help="Whose code runs the model: kvtool, transformers (kinds none, dynamic, static), or "
        "both in turns. transformers alone takes any causal model of its own: a folder, or a type "
        "such as llama, built tiny with random weights.",
        metavar="NAME...",
        unique=True,
        complete=lambda: list(IMPLEMENTATIONS),
    ),
]
Dtypes = Annotated[
    list[str],
    list_option(
        "--dtype",
        element=number_format,
        example="float32 bfloat16",
        help=f"Number formats, in turns: {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.",
        metavar="TYPE...",
        unique=True,
        complete=lambda: list(DTYPES),
        panel=MODEL,
    ),
]
BatchSizes = Annotated[
    list[int],
    list_option(
        "--batch-size",
        element=batch,
        example="1 8",
        help="Sequences side by side; several numbers are measured in turns.",
        unique=True,
    ),
]
ThreadCounts = Annotated[
    list[int],
    list_option(
        "--threads",
        element=thread_count,
        example="1 2",
        help="CPU threads (0: torch's choice); several numbers are measured in turns.",
        unique=True,
        panel=MACHINE,
    ),
]
