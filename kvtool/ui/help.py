"""Help pages: a usage line, what the command does, and its options in named groups.

Typer's own pages spend five columns of a table on flags and are hard to read at 60 columns; these
give a long flag a line of its own instead, and take half the time to load.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

FLAG_COLUMN = 26  # a longer flag stands on its own line
WHOLE = 30  # columns that are left beside flags at 60
GLUE = "\ue000"  # for a blank at which no line ends; rich also ends one at U+00A0
OWN = "Options"


class HelpPage:
    """Mixed into Typer's command classes, writes the page in place of theirs."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page, as wide as the terminal."""
        from rich.console import Console

        console = Console(highlight=False, markup=False, emoji=False)
        with console.capture() as page:
            _print_page(self, ctx, console)
        lines = page.get().replace(GLUE, " ").splitlines()
        formatter.write("\n".join(line.rstrip() for line in lines))


def _print_page(command: Any, ctx: Any, console: Any) -> None:
    words = " ".join(command.collect_usage_pieces(ctx))
    console.print(f"Usage: {ctx.command_path} {words}\n", style="bold")
    for paragraph in paragraphs(command.help or ""):
        console.print(f"{paragraph}\n")
    groups: dict[str, list[tuple[Text, Text]]] = {}
    if hasattr(command, "list_commands"):
        groups["Commands"] = [_command_line(command, ctx, n) for n in command.list_commands(ctx)]
    groups[OWN] = []
    for param in command.get_params(ctx):
        if not getattr(param, "hidden", False):
            panel = getattr(param, "rich_help_panel", None) or OWN
            groups.setdefault(panel, []).append((_flags(param), _explanation(param)))
    for name, lines in groups.items():
        console.print(f"{name}:", style="bold")
        console.print(_two_columns(lines))
        console.print()


def paragraphs(docstring: str) -> list[str]:
    """The paragraphs of a docstring; the lines of one are joined unless one of them is indented."""
    found = []
    for part in inspect.cleandoc(docstring).split("\n\n"):
        lines = part.strip("\n").splitlines()
        verbatim = any(line.startswith(" ") for line in lines)
        found.append("\n".join(lines) if verbatim else " ".join(lines))
    return [part for part in found if part.strip()]


def _command_line(group: Any, ctx: Any, name: str) -> tuple[Text, Text]:
    from rich.text import Text

    summary = paragraphs(group.get_command(ctx, name).help or "")
    return Text(name, style="cyan"), Text(summary[0] if summary else "")


def _flags(param: Any) -> Text:
    from rich.text import Text

    if param.param_type_name == "argument":
        return Text(param.metavar or param.name.upper(), style="yellow")
    names = sorted(param.opts, key=len) + list(param.secondary_opts)
    text = Text(", ".join(names), style="cyan")
    takes_value = not (getattr(param, "is_flag", False) or getattr(param, "count", False))
    if takes_value:
        text.append(f" {param.metavar or param.name.upper()}", style="yellow")
    return text


def _explanation(param: Any) -> Text:
    from rich.text import Text

    text = Text(" ".join((getattr(param, "help", "") or "").split()))
    default = default_text(param)
    if param.required:
        text.append(" [required]", style="red")
    elif default:
        text.append(" ").append(_whole(f"[default: {default}]"), style="dim")
    return text


def _whole(bracket: str) -> str:
    """Hold its words together, or, if they would not fit beside the flags, the first two."""
    return bracket.replace(" ", GLUE, -1 if len(bracket) <= WHOLE else 1)


def default_text(param: Any) -> str:
    """How the default of an option reads in its help; "" if there is nothing to say."""
    shown = getattr(param, "show_default", True)
    if isinstance(shown, str):
        return shown
    value = param.default
    if not shown or value is None or isinstance(value, bool) or callable(value):
        return ""
    if isinstance(value, (list, tuple)):
        return " ".join(str(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _two_columns(lines: Iterable[tuple[Text, Text]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    lines = list(lines)
    width = max((left.cell_len for left, _ in lines if left.cell_len <= FLAG_COLUMN), default=8)
    page = Table.grid()
    for left, right in lines:
        if left.cell_len > FLAG_COLUMN:
            page.add_row(Text("  ") + left)
            left = Text()
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_column(width=2 + width)
        line.add_row(Text("  ") + left, right)
        page.add_row(line)
    return page
