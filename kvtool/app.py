"""The console entry: the commands of the registry as one Typer app, behind one error boundary.

Nothing heavy is imported here. A command's module is imported when the command runs or when help is
shown, and torch only by the work itself.
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import sys
from typing import Annotated, Any, NoReturn, TextIO

import typer
from typer.core import TyperGroup

from kvtool import __version__, ending
from kvtool.config import is_main_rank
from kvtool.errors import CLOSED_PIPE, FileError, KvtoolError, UsageError
from kvtool.registry import COMMANDS, choose, load
from kvtool.ui.apart import FILES, check_apart, named
from kvtool.ui.completion import require_shell
from kvtool.ui.help import HelpPage
from kvtool.ui.inert import guard_libraries
from kvtool.ui.lists import ListCommand
from kvtool.ui.problems import (
    UsageProblem,
    explain_machine,
    explain_usage,
    show_error,
    show_traceback,
)

SETTINGS = {"help_option_names": ["-h", "--help"]}
COMPLETION = "_KVTOOL_COMPLETE"
FULL = 2  # exit code: what was to be printed is not


class Command(HelpPage, ListCommand):
    """Every command: lists in every habit, and a page of help that fits a narrow terminal."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As click's. Raises UsageError for an option that was given as an empty text."""
        if not ctx.resilient_parsing:
            self._refuse_empty(ctx, args)
        try:
            return super().parse_args(ctx, args)
        except UsageProblem as error:
            if getattr(error, "ctx", None) is None:  # Typer forgets it when a value is missing
                error.ctx = ctx
            _name_whole(error, args)
            raise

    def _refuse_empty(self, ctx: Any, args: list[str]) -> None:
        """Raise UsageError for an option that was given as "": `--model "$UNSET"` names no model,
        and an empty path would be the current folder. Lists have words of their own for it."""
        params: list[Any] = list(self.get_params(ctx))
        for param in params:
            listed = getattr(param, "multiple", False) and param.opts[0] != FILES
            if param.param_type_name == "argument" or listed or param.is_flag:
                continue
            for flag in param.opts:
                if f"{flag}=" in args or (flag, "") in itertools.pairwise(args):
                    raise UsageError(f"{flag}: is empty (expected {param.metavar})")

    def invoke(self, ctx: Any) -> Any:
        """As click's. Raises UsageError for two options that write to the same file."""
        params: list[Any] = list(self.get_params(ctx))
        check_apart(named(params, ctx.params))
        return super().invoke(ctx)


class Commands(HelpPage, TyperGroup):
    """The group of all commands in the registry, each loaded when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, without loading a command."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, loaded now; None for a name that is not registered."""
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in self.commands:
            try:
                command = build_command(cmd_name, load(COMMANDS, cmd_name))
            except ImportError as error:
                if ctx.invoked_subcommand == cmd_name:
                    raise
                return _absent(cmd_name, error)
            command.params += [param for param in self.params if "--version" in param.opts]
            self.commands[cmd_name] = command
        return self.commands[cmd_name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As click's. Raises UsageError for an unknown command."""
        name = args[0]
        if not ctx.resilient_parsing and not name.startswith("-"):
            _require_command(name, args[1:])
            ctx.invoked_subcommand = name
        return super().resolve_command(ctx, args)


def _name_whole(error: Any, args: list[str]) -> None:
    """Let an error about "-m" or "-u" name what was written, -model or -quiet."""
    option = getattr(error, "option_name", None) or "--"
    if not option.startswith("--"):
        written = [arg for arg in args if arg[:1] == "-" != arg[1:2] and option[1:] in arg]
        error.option_name = next(iter(written), option)


def _require_command(name: str, rest: list[str]) -> None:
    """Raise UsageError unless `name` is a command; `help` and `version` are options here."""
    if name == "help":
        about = f" {rest[0]}" if rest and rest[0] in COMMANDS else ""
        raise UsageError("help: is not a command", f"Did you mean kvtool{about} --help?")
    if name == "version":
        raise UsageError("version: is not a command", "Did you mean kvtool --version?")
    choose(name, list(COMMANDS), "command")


def build_command(name: str, function: Any) -> Any:
    """Turn an annotated function into a command that takes lists in every habit."""
    single = typer.Typer(add_completion=False)
    single.command(name, cls=Command, context_settings=SETTINGS)(function)
    return typer.main.get_command(single)


def _absent(name: str, error: ImportError) -> Any:
    """A line in the help for a command that cannot be imported: the others must stay readable."""

    def command() -> None:
        raise error

    command.__doc__ = f"(cannot be loaded: {error})"
    return build_command(name, command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvtool {__version__}")
        raise typer.Exit


app = typer.Typer(cls=Commands, context_settings=SETTINGS, invoke_without_command=True)


Version = Annotated[
    bool,
    typer.Option(
        "--version",
        is_eager=True,
        expose_value=False,
        callback=_version,
        help="Show the version and exit.",
    ),
]


@app.callback()
def kvtool(
    ctx: typer.Context,
    version: Version = False,
) -> None:
    """The workbench for KV caches: is it a bug or rounding, and what does the cache buy?"""
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code; every error becomes a line on stderr here."""
    _prepare_streams()
    guard_libraries()
    ending.listen()
    if COMPLETION in os.environ:
        app(prog_name="kvtool")
    code = run(sys.argv[1:] if args is None else args)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk, which was told
            code = code or FULL * (stream is sys.stdout)
            _drop(stream)
    sys.exit(code)


def run(args: list[str]) -> int:
    """Run `args` and return the exit code, after reporting what went wrong, if anything."""
    ending.forget()
    try:
        code = _invoke(args)
        ending.check()
        return code
    except KvtoolError as error:
        return _report(error, args)
    except UsageProblem as error:
        return _report(explain_usage(error), args)
    except (KeyboardInterrupt, typer.Abort) as error:
        return _stop(ending.End.of(error))
    except BrokenPipeError:
        return _close_pipe()
    except SystemExit as error:
        # rich turns a closed pipe into SystemExit(1), which here would read as "a mismatch"
        if isinstance(error.__context__, BrokenPipeError):
            return _close_pipe()
        # Something within ended the process, the user's own decoder say: nothing was finished.
        stopped = KvtoolError(f"the work was ended from within (SystemExit: {error.code})")
        return _report(stopped, args)
    except BaseException as error:  # 1 is an answer, so nothing that was not judged may end with it
        if how := ending.lost():
            return _stop(how)
        known = explain_machine(error)
        if known is None:
            show_traceback()  # a defect of kvtool: a report of it needs the traceback
            return KvtoolError.exit_code
        return _report(known, args)


def _invoke(args: list[str]) -> int:
    group = typer.main.get_command(app)
    code = 0
    try:
        with _context(group, args) as context:
            group.invoke(context)
    except typer.Exit as finished:
        code = finished.exit_code
    sys.stdout.flush()  # here, so that a full disk or a closed pipe is still reported
    return code


def _context(group: Any, args: list[str]) -> Any:
    """Parse what stands before a command, which may be all: --version, --install-completion."""
    require_shell(itertools.takewhile(lambda arg: arg.startswith("-"), args))
    try:
        return group.make_context("kvtool", list(args))
    except SystemExit as done:  # so Typer ends after it has shown or installed the completion
        if isinstance(done.__context__, BrokenPipeError):
            raise
        raise typer.Exit(int(done.code or 0)) from done
    except OSError as error:
        if isinstance(error, BrokenPipeError) or error.errno == errno.ENOSPC:
            raise
        where = error.filename or "the completion"
        raise FileError(f"{where}: cannot be written ({error.strerror})") from error


def _report(error: KvtoolError, args: list[str]) -> int:
    if how := ending.lost():  # which is why: within an import that failed, say
        return _stop(how)
    if "--debug" in args:
        show_traceback()
    if is_main_rank():
        show_error(error)
    return error.exit_code


def _stop(how: ending.End) -> int:
    with contextlib.suppress(OSError):
        if is_main_rank():
            print(f"kvtool: {how.value}", file=sys.stderr, flush=True)
    return how.exit_code


def _close_pipe() -> int:
    for stream in (sys.stdout, sys.stderr):
        _drop(stream)
    return CLOSED_PIPE


def _drop(stream: TextIO) -> None:
    """Let what is left in a stream that takes no more go nowhere: the interpreter flushes it when
    it ends, would complain about it again, and exit with 120."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class ClosedStdout(io.TextIOBase):
    """In place of a stdout that was closed before: what is to be printed is an error, and no
    silence. `held` keeps its number."""

    encoding = "utf-8"

    def __init__(self, held: TextIO) -> None:
        self.held = held

    def writable(self) -> bool:
        """True: what is written is refused in words."""
        return True

    def fileno(self) -> int:
        """That of the file that goes nowhere."""
        return self.held.fileno()

    def write(self, text: str) -> int:
        """Raises FileError."""
        text = "stdout: is closed, and what was found is not told"
        raise FileError(text, "Leave out >&-, or send it to a file.")


def _prepare_streams() -> None:
    """Make stdout and stderr usable when they are closed, or cannot encode what is printed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # A file that is opened later would get its number, and what others print with it.
            nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, ClosedStdout(nowhere) if name == "stdout" else nowhere)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
