"""The one sink: results on stdout, talk on stderr, for people or as JSON.

Commands return data and hand it to `present`; nothing else prints.
"""

from __future__ import annotations

import logging
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from kvtool.errors import UsageError
from kvtool.files import write_durable
from kvtool.ui.documents import SUFFIXES, Report, check_destination, document, render, to_json
from kvtool.ui.environment import caption, measured_on, peak_memory
from kvtool.ui.progress import Progress, open_progress
from kvtool.ui.tables import Column, build_table

Settings = TypeVar("Settings")
Result = TypeVar("Result", bound=Report)

MARKS = {True: ("✓", "OK", "green"), False: ("✗", "FAILED", "red"), None: ("!", "!", "yellow")}


class Output:
    """Where a command's words go. With `json`, nothing meant for people reaches stdout."""

    def __init__(
        self,
        json: bool = False,
        output_file: Path | None = None,
        quiet: bool = False,
        verbose: bool = False,
        suffixes: Sequence[str] = SUFFIXES,
    ) -> None:
        """Raises UsageError or FileError if `output_file` cannot be written, or has none of the
        `suffixes`: before any work."""
        if quiet and verbose:
            raise UsageError("--quiet: contradicts --verbose", "Give one of them.")
        if output_file is not None:
            check_destination(output_file, suffixes)
        self.json = json
        self.output_file = output_file
        self.quiet = quiet
        self.verbose = verbose
        self.caption = ""  # what the next table is of
        self._out = Console(highlight=False, markup=False, emoji=False)
        self._err = Console(highlight=False, markup=False, emoji=False, stderr=True)
        Notes.take(self)

    @property
    def interactive(self) -> bool:
        """Whether a person reads stdout: a terminal, and no JSON."""
        return not self.json and self._out.is_terminal

    def table(
        self, title: str, columns: Sequence[Column | str], rows: Sequence[Sequence[str]]
    ) -> None:
        """Print rows of texts; on a screen too narrow for the columns, as several tables. The first
        table has the caption."""
        if self.json:
            return
        parts = build_table(title, columns, rows, self._out.width, self._out.encoding)
        if title:
            self._block(next(parts))
        if self.caption:
            self._block(Text(self.caption, style="dim"))  # as wide as the table, not more
            self.caption = ""
        for part in parts:
            self._block(part)

    def _block(self, part: RenderableType) -> None:
        """Print what is as wide as the screen; to a file or pipe without blanks at line ends."""
        if self._out.is_terminal:
            self._out.print(part)
            return
        with self._out.capture() as captured:
            self._out.print(part)
        for line in captured.get().splitlines():
            self._out.print(line.rstrip(), soft_wrap=True)

    def text(self, text: str = "", style: str = "", end: str = "\n", wrap: bool = True) -> None:
        """Print a paragraph, wrapped on a terminal only; without `wrap` what is to be copied."""
        if not self.json:
            soft = not (wrap and self._out.is_terminal)
            self._out.print(text, style=style, end=end, soft_wrap=soft)

    def verdict(self, ok: bool | None, text: str) -> None:
        """Print the final sentence: right, wrong, or (None) undecided."""
        symbol, word, colour = MARKS[ok]
        mark = symbol if self._out.encoding.startswith("utf") else word
        line = Text.assemble(
            (mark, f"bold {colour}"), " ", (text, colour if ok is not True else "")
        )
        if not self.json:
            self._out.print(line, soft_wrap=not self._out.is_terminal)

    def stream(self, text: str) -> None:
        """Write raw text to stdout and flush it, so that a token is seen when it is made."""
        if not self.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def note(self, text: str) -> None:
        """Talk on stderr; -q silences it."""
        if not self.quiet:
            self._say(text, "dim")

    def hint(self, text: str) -> None:
        """Say on stderr what to do next, in a line that can be copied; -q silences it."""
        if not self.quiet:
            self._err.print(f"hint: {text}", style="cyan", soft_wrap=True)

    def warn(self, text: str) -> None:
        """Say on stderr what may spoil the result; never silenced."""
        self._say(f"warning: {text}", "yellow")

    def detail(self, text: str) -> None:
        """Say on stderr what only -v asks for."""
        if self.verbose:
            self.note(text)

    def _say(self, text: str, style: str) -> None:
        """Print on stderr, wrapped between words on a terminal only: paths stay whole."""
        if self._err.is_terminal:
            text = textwrap.fill(
                text, self._err.width, break_long_words=False, break_on_hyphens=False
            )
        self._err.print(text, style=style, soft_wrap=True)

    def progress(self, description: str, total: int | None) -> AbstractContextManager[Progress]:
        """A bar on stderr while the block runs, if stderr is a terminal and -q is not given.

        >>> with out.progress("training", total=100) as bar:
        ...     bar.advance()
        ...     bar.update(loss=1.25)
        """
        shown = self._err.is_terminal and not self.quiet
        return open_progress(self._err if shown else None, description, total)


def present(
    command: str,
    settings: Settings,
    run: Callable[[Settings, Output], Result],
    show: Callable[[Result, Output], None],
    out: Output,
    keep: Callable[[Result, dict[str, Any]], None] | None = None,
) -> NoReturn:
    """Run a command's work, print or write its report, and leave with the report's exit code.

    `settings` is a dataclass or a mapping; all of it goes into the document, which `keep` is given
    too. Raises typer.Exit.
    """
    report = run(settings, out)
    if out.json or out.output_file is not None or keep is not None:
        content: dict[str, Any] = document(command, settings, report)
        if keep is not None:
            keep(report, content)
        if out.output_file is not None:
            write_durable(out.output_file, render(out.output_file, content, report))
        if out.json:
            sys.stdout.write(to_json(content))
    if not out.json:
        out.caption = caption(measured_on(settings, getattr(report, "resolved", {})))
        show(report, out)
    if out.output_file is not None:
        out.note(f"written to {out.output_file}")
    if peak := peak_memory():
        out.detail(f"peak memory: {peak / 2**20:,.0f} MiB")
    raise typer.Exit(report.exit_code)


class Notes(logging.Handler):
    """What the core says of its own accord, as notes of the Output that was made last."""

    def __init__(self, output: Output) -> None:
        super().__init__()
        self.output = output

    @classmethod
    def take(cls, output: Output) -> None:
        logger = logging.getLogger("kvtool")
        logger.handlers = [cls(output)]
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.output.note(record.getMessage())
