"""The one sink: results on stdout, talk on stderr, for people or as JSON.

Commands return data and hand it to `present`; nothing else prints. What is printed is inert: names,
fields of files and what a model writes cannot steer the terminal. What cannot be written costs
nothing that was found: results are told first, and the error comes last.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from kvtool.config import is_main_rank
from kvtool.errors import KvtoolError, UsageError, first_line
from kvtool.files import write_durable
from kvtool.ui.documents import (
    PAGE,
    SUFFIXES,
    Report,
    check_destination,
    document,
    markdown,
    render,
    to_json,
)
from kvtool.ui.environment import caption, measured_on, peak_memory
from kvtool.ui.github import add_summary, annotated, error_annotation
from kvtool.ui.inert import in_a_line, visible
from kvtool.ui.problems import explain_machine
from kvtool.ui.progress import Progress, open_progress
from kvtool.ui.tables import Column, build_table

if TYPE_CHECKING:
    from kvtool.ui.page import Draw

Settings = TypeVar("Settings")
Result = TypeVar("Result", bound=Report)
Write = Callable[[Any, Mapping[str, Any]], None]  # what a report, and its document, leave in a file

MARKS = {True: ("✓", "OK", "green"), False: ("✗", "FAILED", "red"), None: ("!", "!", "yellow")}
NOTHING_DRAWN = "nothing was measured, so nothing is drawn"


class Output:
    """Where a command's words go. With `json`, nothing meant for people reaches stdout."""

    def __init__(
        self,
        json: bool = False,
        output_files: Path | Sequence[Path] | None = None,
        quiet: bool = False,
        verbose: bool = False,
        suffixes: Sequence[str] = SUFFIXES,
        github: bool = False,
    ) -> None:
        """Raises UsageError or FileError if one of `output_files` cannot be written, or has none of
        the `suffixes`: before any work."""
        if github and json:
            raise UsageError("--github: contradicts --json", "Both are for stdout. Give one.")
        if quiet and verbose:
            raise UsageError("--quiet: contradicts --verbose", "Give one of them.")
        paths = [output_files] if isinstance(output_files, Path) else output_files or []
        for path in paths:
            check_destination(path, suffixes)
        self.json = json
        self.github = github
        self.output_files = tuple(dict.fromkeys(paths))
        self.quiet = quiet
        self.verbose = verbose
        self.caption = ""  # what the next table is of
        self.failed: list[Exception] = []  # what could not be written
        self.page: Callable[[Mapping[str, Any], Any], str] | None = None  # of .html
        self._later: list[Write] = []
        self._unheard: OSError | None = None  # stdout took no more of a stream
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
            # As wide as the table, not more.
            self._block(Text(in_a_line(self.caption), style="dim"))
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
            self._out.print(in_a_line(text), style=style, end=end, soft_wrap=soft)

    def echo(self, text: str) -> None:
        """Show, dimmed, the text before the streamed one."""
        if not self.json:
            soft = not self._out.is_terminal
            self._out.print(visible(text), style="dim", end="", soft_wrap=soft)

    def verdict(self, ok: bool | None, text: str) -> None:
        """Print the final sentence: right, wrong, or (None) undecided."""
        symbol, word, colour = MARKS[ok]
        mark = symbol if self._out.encoding.startswith("utf") else word
        sentence = (in_a_line(text), colour if ok is not True else "")
        line = Text.assemble((mark, f"bold {colour}"), " ", sentence)
        if not self.json:
            self._out.print(line, soft_wrap=not self._out.is_terminal)

    def stream(self, text: str) -> None:
        """Write text of a model to stdout and flush it, so that a token is seen when it is made.

        A terminal gets it inert, with its tabs and line breaks; a pipe or a file gets it as it is,
        for there it is data. Where stdout takes no more, the work goes on if it is written to a
        file too.
        """
        if self.json or self._unheard is not None:
            return
        try:
            sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()
        except OSError as error:
            if not self._writes:
                raise
            self._unheard = error

    def note(self, text: str) -> None:
        """Talk on stderr; -q silences it."""
        if not self.quiet:
            self._say(text, "dim")

    def hint(self, text: str) -> None:
        """Say on stderr what to do next, in a line that can be copied; -q silences it."""
        if not self.quiet:
            self._talk(f"hint: {in_a_line(text)}", "cyan")

    def warn(self, text: str) -> None:
        """Warn on stderr of what may spoil the result; never silenced."""
        self._say(f"warning: {text}", "yellow")

    def detail(self, text: str) -> None:
        """Print a detail on stderr, with -v only."""
        if self.verbose:
            self.note(text)

    def _say(self, text: str, style: str) -> None:
        """Print on stderr, wrapped between words on a terminal only: paths stay whole."""
        text = in_a_line(text)
        if self._err.is_terminal:
            text = textwrap.fill(
                text, self._err.width, break_long_words=False, break_on_hyphens=False
            )
        self._talk(text, style)

    def _talk(self, text: str, style: str) -> None:
        with contextlib.suppress(OSError):  # a log on a full disk must not cost the result
            self._err.print(text, style=style, soft_wrap=True)

    def progress(self, description: str, total: int | None) -> AbstractContextManager[Progress]:
        """A bar on stderr while the block runs, if stderr is a terminal and -q is not given.

        >>> with out.progress("training", total=100) as bar:
        ...     bar.advance()
        ...     bar.update(loss=1.25)
        """
        shown = self._err.is_terminal and not self.quiet
        return open_progress(self._err if shown else None, description, total)

    def later(self, write: Write) -> None:
        """Have `write(report, document)` called once the result is told and --output is written."""
        self._later.append(write)

    def draw_later(self, path: Path, draw: Draw) -> None:
        """Have the plot of the report drawn then, and named; `draw` returns False if it has nothing
        to draw."""

        def write(report: Any, _: object) -> None:
            drawn = draw(report, path) is not False
            self.note(f"plot: {path}" if drawn else f"--plot {path}: {NOTHING_DRAWN}")

        self.later(write)

    def attempt(self, write: Callable[[], object]) -> bool:
        """Whether `write()` worked. If not, the result is still found and shown, and the command
        ends with this error."""
        try:
            write()
        except Exception as error:
            self.failed.append(error)
            return False
        return True

    @property
    def documented(self) -> bool:
        """Whether the document goes to stdout or a file, or is to be annotated."""
        return self.json or self._writes or self.github

    @property
    def _writes(self) -> bool:
        return bool(self.output_files or self._later)

    def _write_all(self, report: Report, content: Mapping[str, Any]) -> None:
        def whole(path: Path) -> None:
            if path.suffix.lower() == PAGE and self.page:
                data = self.page(content, report).encode()
            else:
                data = render(path, content, report)
            write_durable(path, data)
            self.note(f"written to {path}")

        for path in self.output_files:
            self.attempt(partial(whole, path))
        if self.github:
            self.attempt(lambda: add_summary(markdown(content, report)))
        for write in self._later:
            self.attempt(partial(write, report, content))

    @contextlib.contextmanager
    def telling(self, report: Report, content: Mapping[str, Any]) -> Iterator[None]:
        """Tell the result in the block, then write it, whatever became of the block. Raises what
        was raised there, or the first of what could not be written; warns of the others."""
        lost: BaseException | None = None
        try:
            yield
            sys.stdout.flush()
            if self._unheard is not None:
                raise self._unheard
        except BaseException as error:
            lost = error
        self._write_all(report, content)
        # A closed pipe is no error; rich makes a SystemExit of it.
        if lost is None or (self.failed and isinstance(lost, (BrokenPipeError, SystemExit))):
            lost = self.failed.pop(0) if self.failed else None
        self.warn_of_failed()
        if lost is not None:
            raise lost

    @contextlib.contextmanager
    def without_commands(self) -> Iterator[None]:
        """With --github, have GitHub take nothing in the block for a command of a workflow: names
        and texts there may be anybody's."""
        token = f"kvtool-{os.urandom(16).hex()}" if self.github else ""
        if token:
            self.text(f"::stop-commands::{token}", wrap=False)
        try:
            yield
        finally:
            if token:
                self.text(f"::{token}::", wrap=False)

    def annotate(self, lines: Sequence[str]) -> None:
        """With --github, print annotations."""
        for line in lines if self.github else ():
            self.text(line, wrap=False)

    def warn_of_failed(self) -> None:
        """Say what could not be written, where something else is the error."""
        for error in self.failed:
            known = error if isinstance(error, KvtoolError) else explain_machine(error)
            self.warn(known.message if known else f"{type(error).__name__}: {first_line(error)}")
        self.failed.clear()


def output_of_rank(
    as_json: bool,
    output_files: Path | Sequence[Path] | None,
    quiet: bool,
    verbose: bool,
    suffixes: Sequence[str] = SUFFIXES,
    github: bool = False,
) -> Output:
    """Where words go; those of a process that follows another go nowhere."""
    if not is_main_rank():
        return Output(quiet=True)
    return Output(as_json, output_files, quiet, verbose, suffixes, github)


def present(
    command: str,
    settings: Settings,
    run: Callable[[Settings, Output], Result],
    show: Callable[[Result, Output], None],
    out: Output,
    draw: Draw | None = None,
) -> NoReturn:
    """Run a command's work, print its report, then write it, and leave with its exit code.

    `settings` is a dataclass or a mapping; all of it goes into the document. draw: draws the plot
    of a page, if there is something to draw. Raises typer.Exit, or the error of the first file that
    could not be written.
    """
    if any(path.suffix.lower() == PAGE for path in out.output_files):
        out.page = partial(_page, show, draw, out)
    try:
        report = run(settings, out)
    except BaseException as error:
        out.warn_of_failed()
        if isinstance(error, KvtoolError):
            out.annotate([error_annotation(command, error)])
        raise
    content = document(command, settings, report) if out.documented else {}
    with out.telling(report, content):
        if out.json:
            sys.stdout.write(to_json(content))
        else:
            out.caption = caption(measured_on(settings, getattr(report, "resolved", {})))
            with out.without_commands():
                show(report, out)
            if out.github:
                out.annotate(annotated(content, report))
    if peak := peak_memory():
        out.detail(f"peak memory: {peak / 2**20:,.0f} MiB")
    raise typer.Exit(report.exit_code)


def _page(
    show: Callable[[Any, Any], None],
    draw: Draw | None,
    out: Output,
    content: Mapping[str, Any],
    report: Any,
) -> str:
    """The page of a report; without its plot if that cannot be drawn, which is told at the end."""
    from kvtool.ui.page import picture, to_page, told_by  # not for help, which is to be instant

    drawn: list[str] = []
    if draw is not None:
        out.attempt(lambda: drawn.append(picture(draw, report)))
    return to_page(content, told_by(show, report), "".join(drawn))


class Notes(logging.Handler):
    """Log records of the core, as notes of the latest Output."""

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
