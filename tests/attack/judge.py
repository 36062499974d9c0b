"""When an attack has been held: the command said yes, no, or why not, within bounds."""

from __future__ import annotations

import re
from dataclasses import dataclass

ERROR = "kvtool: error: "
LONGEST_LINE = 2000  # characters; more is no line that a person reads
STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
TALK = ("warning: ", "hint: ")  # may stand before an error


@dataclass(frozen=True)
class Limits:
    """What one command may take."""

    seconds: float  # of processor time
    memory: int  # bytes


def why_not_held(
    code: int | str,
    out: str,
    err: str,
    seconds: float,
    memory: int,
    limits: Limits,
    talks: bool = False,
) -> str:
    """Why the end of a command was no answer and no refusal, in words; "" if it was one.

    talks: whether notes are allowed, which -q would silence.
    """
    if code not in (0, 1, 2):
        return f"it ended with {code}"
    if "Traceback" in err or "panicked" in err:
        return f"a traceback: {_last(err)}"
    if found := STEERS.search(err):
        return f"the control character {found[0]!r} reached stderr"
    lines = [line for line in err.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(ERROR)]
    if code == 2 and len(errors) != 1:
        return f"{len(errors)} error lines: {_last(err)}"
    if code == 1 and not (errors or out.strip()):
        return "the answer was no, without a word"
    if code == 0 and errors:
        return f"an error, and exit 0: {errors[0][:200]}"
    strange = [line for line in lines if not line.startswith((ERROR, *TALK))]
    if strange and not talks:
        return f"something else was said: {strange[0][:200]}"
    if lines and max(map(len, lines)) > LONGEST_LINE:
        return f"a line of {max(map(len, lines)):,} characters: {max(lines, key=len)[:100]}"
    if seconds > limits.seconds:
        return f"it took {seconds:.0f} s of a processor: {_last(err)}"
    if memory > limits.memory:
        return f"it took {memory / 2**20:,.0f} MiB: {_last(err)}"
    return ""


def _last(err: str) -> str:
    return (err.strip().splitlines() or [""])[-1][:300]
