"""Options that take a list, in three habits: `--n 1 2`, `--n 1,2` and `--n 1 --n 2`.

Typer knows only the last. `ListCommand` rewrites the first into it while parsing, and `list_option`
splits at commas and turns each element into a value. A command with such an option takes no
positional argument, because `--n 1 2 word` could not tell where the list ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import takewhile
from typing import Any

import typer
from typer.core import TyperCommand

from kvtool.config import check_int
from kvtool.errors import UsageError
from kvtool.ui.apart import FILES, WRITTEN

# (text, flag) -> a value, or a list of values; raises UsageError naming the flag
Element = Callable[[str, str], Any]

RANGE = re.compile(r"(\d+)-(\d+)(?:([+*])(\d+))?")
MAX_IN_RANGE = 1000
NEGATIVE_NUMBER = re.compile(r"-\.?\d")
OPEN_LIST = "kvtool.open_list"


def list_option(
    flag: str,
    *,
    element: Element,
    example: str,
    help: str,
    metavar: str = "N...",
    unique: bool = False,
    complete: Callable[[], list[str]] | None = None,
    panel: str | None = None,
) -> Any:
    """Declare an option of one or more values, to stand in `Annotated[list[T], list_option(...)]`.

    `element` parses one value. `unique` drops repeated values. The default of the parameter must be
    a list of values that need no parsing.
    """

    def collect(values: list[Any] | None) -> list[Any]:
        found = parse_elements(flag, values or [], element, example)
        return list(dict.fromkeys(found)) if unique else found

    def suggest(incomplete: str) -> list[str]:
        return [name for name in complete() if name.startswith(incomplete)] if complete else []

    return typer.Option(
        flag,
        help=help,
        metavar=metavar,
        parser=_unchanged,  # else Typer would refuse 'ten' first, in words that are not ours
        callback=collect,
        autocompletion=suggest if complete else None,
        rich_help_panel=panel,
    )


def _unchanged(value: Any) -> Any:
    return value


def parse_elements(flag: str, values: Iterable[Any], element: Element, example: str) -> list[Any]:
    """Split texts at commas and parse each piece; values that are not text are defaults, and stay.

    >>> parse_elements("--lengths", ["10,50", "100"], length, "10 50 100")
    [10, 50, 100]

    Raises UsageError for a flag without a value, and when a piece means nothing.
    """
    values = list(values)
    found: list[Any] = []
    for value in values:
        if not isinstance(value, str):
            found.append(value)
            continue
        pieces = [piece.strip() for piece in value.split(",")]
        if "" in pieces[1:-1]:  # at the ends a comma is a habit: "10, 50"
            raise UsageError(f"{flag}: {value!r} has an empty element", "Take out a comma.")
        for i, piece in enumerate(pieces):
            if not piece:
                continue
            try:
                one = element(piece, flag)
            except UsageError as error:
                hint = _rejoined(pieces, i, element, flag) or error.hint
                raise UsageError(error.message, hint) from error
            found += one if isinstance(one, list) else [one]
    if "" in values or (values and not found):  # "" is what repeat_flags makes of a bare flag
        raise UsageError(f"{flag}: needs at least one value, e.g. {flag} {example}")
    return found


def _rejoined(pieces: list[str], i: int, element: Element, flag: str) -> str:
    """How to write settings that were split off an element by commas, from the i-th piece on, which
    means nothing alone: "sliding:window=16,sinks=0"; "" if it is something else."""
    whole = list(takewhile(lambda piece: "=" in piece and ":" not in piece, pieces[i:]))
    if not i or not whole:
        return ""
    meant = ":".join([pieces[i - 1], *whole])
    try:
        element(meant, flag)
    except UsageError:
        return ""
    return f"Write {meant}."


def whole_number(text: str, flag: str) -> int:
    """Parse decimal digits with an optional sign. Raises UsageError."""
    try:
        return int(text)
    except ValueError:  # also more than 4300 digits, which no message should repeat in full
        shown = text if len(text) <= 40 else f"{text[:37]}..."
        raise UsageError(f"{flag}: {shown!r} is not a whole number") from None


def length(text: str, flag: str) -> int:
    """Parse a number of tokens, 1 or more. Raises UsageError."""
    value = whole_number(text, flag)
    if value < 1:
        raise UsageError(f"{flag}: {value} is not a length: must be 1 or more")
    check_int(flag, value, 1)
    return value


def lengths(text: str, flag: str) -> list[int]:
    """Parse a number of tokens, or a range of them, as llama-bench writes ranges.

    >>> lengths("16-128*2", "--lengths")
    [16, 32, 64, 128]
    >>> lengths("10-40+10", "--lengths")
    [10, 20, 30, 40]

    Raises UsageError, also for a range that is empty, never ends, or has over MAX_IN_RANGE values.
    """
    match = RANGE.fullmatch(text)
    if match is None:
        return [length(text, flag)]
    first, last = length(match[1], flag), length(match[2], flag)
    by = int(match[4] or 1)
    if first > last:
        raise UsageError(f"{flag}: {text} is empty (expected the smaller length first)")
    if by < (2 if match[3] == "*" else 1):
        raise UsageError(f"{flag}: {text} never ends (expected *2 or more, or +1 or more)")
    found: list[int] = []
    while first <= last:
        if len(found) == MAX_IN_RANGE:
            raise UsageError(
                f"{flag}: {text} is more than {MAX_IN_RANGE:,} lengths",
                f"Try {match[1]}-{match[2]}*2.",
            )
        found.append(first)
        first = first * by if match[3] == "*" else first + by
    return found


class ListCommand(TyperCommand):
    """A command whose list options also take their values separated by spaces."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the flag of a list before each of its values. Raises UsageError."""
        flags: set[str] = set()
        arity: dict[str, int] = {}
        params: list[Any] = list(self.get_params(ctx))
        for param in params:
            if getattr(param, "multiple", False) and param.opts[0] != FILES:
                flags.update(param.opts)
            elif param.param_type_name == "option":
                takes_value = not (param.is_flag or param.count)
                arity.update(dict.fromkeys(param.opts, param.nargs if takes_value else 0))
        repeated, open_flag = repeat_flags(list(args), flags, arity)
        single = {p.opts[0] for p in params if not getattr(p, "multiple", False)}
        refuse_repeated(repeated, single & set(WRITTEN), arity)
        ctx.meta[OPEN_LIST] = open_flag
        return super().parse_args(ctx, repeated)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Inside a list, complete its next element; elsewhere, the names of options."""
        open_flag = ctx.meta.get(OPEN_LIST)
        if open_flag and not incomplete.startswith("-"):
            for param in self.get_params(ctx):
                if open_flag in param.opts:
                    return param.shell_complete(ctx, incomplete)
        return super().shell_complete(ctx, incomplete)


def repeat_flags(
    args: list[str], flags: set[str], arity: dict[str, int]
) -> tuple[list[str], str | None]:
    """Rewrite `--n 1 2` into `--n 1 --n 2` for every list option in `flags`.

    `arity` says how many values each other option takes, so that `--prompt --n` is left alone.
    Also returned is the flag whose list the arguments end in. A flag without a value is given "",
    which `parse_elements` refuses.
    """
    rewritten: list[str] = []
    open_flag: str | None = None
    index = 0
    while index < len(args):
        token = args[index]
        index += 1
        open_flag = None
        if token == "--":
            return [*rewritten, *args[index - 1 :]], None
        flag, equals, first = token.partition("=")
        if flag not in flags:
            end = index + arity.get(token, 0)
            rewritten += [token, *args[index:end]]
            index = end
            continue
        values = [first] if equals else []
        while index < len(args) and _is_value(args[index]):
            values.append(args[index])
            index += 1
        for value in values or [""]:
            rewritten += [flag, value]
        open_flag = flag
    return rewritten, open_flag


def refuse_repeated(args: list[str], flags: Iterable[str], arity: dict[str, int]) -> None:
    """Raise UsageError for one of `flags` that is given twice: it names a file, and the first one
    would not be written."""
    seen: set[str] = set()
    rest = iter(args)
    for token in rest:
        if token == "--":
            return
        flag = token.partition("=")[0]
        if flag in seen:
            raise UsageError(f"{flag}: is given twice", "Give one: only the last would be written.")
        seen.update({flag} & set(flags))
        for _ in range(arity.get(token, 0)):
            next(rest, None)


def _is_value(token: str) -> bool:
    return token == "-" or not token.startswith("-") or bool(NEGATIVE_NUMBER.match(token))
