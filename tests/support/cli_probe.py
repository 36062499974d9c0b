"""`kvtool probe`, a small command that exists only in tests, and how to read a run of it."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from kvtool.config import RunConfig
from kvtool.errors import CheckFailed, FileError
from kvtool.ui import options, output, tables
from kvtool.ui.options import Caches, Debug, Json, Lengths, OutputFile, Quiet, Verbose

LENGTHS = [10, 50]
HANGS = 900  # seconds; ends what would never end, and decides nothing else
MISSING = FileError("weights/none: not found", "Did you mean weights/one?")
CPU_MEMORY = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 34359738368 bytes. Error code 12 (Cannot allocate memory)"
)


class PanicException(BaseException):
    """Looks like what a panic of a library in Rust raises."""


WORK: dict[str, Callable[[], None]] = {
    "fine": lambda: None,
    "missing": lambda: fail(MISSING),
    "nan": lambda: fail(CheckFailed("logits: NaN at step 3")),
    "lines": lambda: fail(FileError("a\nb\x1b[31m: is\n  odd")),
    "memory": lambda: fail(MemoryError()),
    "torch memory": lambda: fail(RuntimeError("CUDA out of memory. Tried to allocate 8.00 GiB\n")),
    "cpu memory": lambda: fail(RuntimeError(CPU_MEMORY)),
    "defect": lambda: fail(ZeroDivisionError("a defect")),
    "recursion": lambda: fail(RecursionError("maximum recursion depth exceeded")),
    "panic": lambda: fail(PanicException("index \x1b[31m out of range\nnote: run with")),
    "runtime": lambda: fail(RuntimeError("shapes differ")),
    "ctrl-c": lambda: fail(KeyboardInterrupt()),
    "sigterm": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "sigterm lost": lambda: swallow(),
    "sigterm lost, then a defect": lambda: (swallow(), fail(ZeroDivisionError("a defect")))[0],
    "sigterm lost, then an error": lambda: (swallow(), fail(MISSING))[0],
    "disk full": lambda: fail(OSError(28, "No space left on device", "best.safetensors")),
    "quota": lambda: fail(OSError(errno.EDQUOT, "Disk quota exceeded")),
    "exit 1": lambda: fail(typer.Exit(1)),
}


def swallow() -> None:
    """As imports do that take any exception for a module that is not there."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException:
        return


def fail(error: BaseException) -> None:
    raise error


@dataclass
class Report:
    lengths: list[int]
    caches: list[str]
    gap: float = float("nan")
    exit_code: int = 0
    conclusion: str = "It is even."

    def rows(self) -> list[dict[str, Any]]:
        return [{"length": n, "gap": self.gap, "even": n % 2 == 0} for n in self.lengths]


def probe(
    lengths: Lengths = LENGTHS,
    caches: Caches = options.ALL_CACHES,
    cache: options.Cache = "static",
    plot: options.Plot = None,
    prompt: options.Prompt = None,
    work: Annotated[str, typer.Option("--work", metavar="NAME", help="What to do.")] = "fine",
    rate: Annotated[float, typer.Option("--rate", metavar="X", help="A number.")] = 0.5,
    wrong: Annotated[bool, typer.Option("--wrong", help="Answer no.")] = False,
    model: options.Model = "",
    device: options.Device = "auto",
    dtype: options.Dtype = "float32",
    threads: options.Threads = 0,
    seed: options.Seed = 0,
    as_json: Json = False,
    output_file: OutputFile = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Probe the command line.

    More words about it.

      kvtool probe --lengths 10 50
    """
    out = output.Output(as_json, output_file, quiet, verbose)
    settings = RunConfig(model, device, dtype, threads, seed)

    def work_through(_: RunConfig, out: output.Output) -> Report:
        out.note("working")
        out.detail("in detail")
        WORK[work]()
        return Report(lengths, caches, exit_code=1 if wrong else 0)

    output.present("probe", settings, work_through, show, out)


def show(report: Report, out: output.Output) -> None:
    out.table("lengths", [tables.Column("length")], [[str(n)] for n in report.lengths])
    out.text(f"caches: {' '.join(report.caches)}")
    out.verdict(report.exit_code == 0, "all of them [really]")
    out.hint("try more")


@dataclass
class Ran:
    code: int
    out: str
    err: str


def refused(ran: Ran) -> str:
    """The message of a run that was refused as it should be: exit 2 and one line on stderr."""
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("kvtool: error: ")
    assert ran.err.count("\n") == 1
    return ran.err.removeprefix("kvtool: error: ").rstrip("\n")


def lengths_of(ran: Ran) -> list[int]:
    assert ran.code == 0, ran.err
    return json.loads(ran.out)["lengths"]
