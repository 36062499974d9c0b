"""kvtool promote: the same numbers in F32, for a second server."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from kvtool.config import check_int
from kvtool.errors import UsageError
from kvtool.ui import options as o
from kvtool.ui.documents import check_writable
from kvtool.ui.output import Output, present
from kvtool.ui.tables import Column

SUFFIX = ".gguf"
PORT = 8081
# Of llama-server: an f32 cache, and no kernel that rounds to half precision on the way.
FLAGS = "--cache-type-k f32 --cache-type-v f32 --flash-attn off"
OTHER_MODEL = (
    "With the first blocks alone it is another, smaller model, whose answers mean nothing and "
    "whose cache works as before: compare it with itself alone, with its cache and without."
)


@dataclass(frozen=True)
class Settings:
    """The settings of promote."""

    model: Path
    out: Path
    layers: int | None = None  # None: all

    def __post_init__(self) -> None:
        if self.layers is not None:
            check_int("--layers", self.layers, 1)
        if self.out.suffix.lower() != SUFFIX:
            found = self.out.suffix or "no suffix"
            raise UsageError(f"--out {self.out}: {found} (expected {SUFFIX})")
        check_writable(self.out, "--out")


@dataclass
class PromoteReport:
    """The written tensors, by their format before."""

    formats: list[dict[str, Any]]
    nbytes: int
    nbytes_before: int
    blocks: int
    blocks_before: int
    command: str  # that starts the second server
    resolved: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0

    @property
    def is_smaller(self) -> bool:
        """Whether blocks were left out."""
        return self.blocks < self.blocks_before

    @property
    def conclusion(self) -> str:
        """The last line, in words."""
        what = "the same numbers in F32"
        if self.is_smaller:
            what = f"the first {self.blocks} of {self.blocks_before} blocks in F32"
        return f"{what}: {self.resolved['out']}, {_size(self.nbytes)}"

    def rows(self) -> list[dict[str, Any]]:
        """The formats."""
        return self.formats

    def to_dict(self) -> dict[str, Any]:
        """The fields of the JSON document."""
        return {**vars(self), "conclusion": self.conclusion}


def _size(nbytes: int) -> str:
    from kvtool.core.checkpoint.gguf.promote import gib

    return gib(nbytes)


def run(settings: Settings, out: Output) -> PromoteReport:
    """Say how large the file will be, then write it."""
    from kvtool.core.checkpoint.gguf import promote
    from kvtool.core.checkpoint.gguf.header import GGUFHeader

    source = GGUFHeader(settings.model)
    found = promote.plan(source, settings.layers)
    free = promote.require_room(found, settings.out)
    out.note(f"needs {promote.gib(found.nbytes)} at {settings.out} ({promote.gib(free)} free)")
    if found.is_smaller:
        out.note(OTHER_MODEL)
    mib = 2**20
    with out.progress("promote, MiB", found.nbytes // mib) as bar:
        written = 0

        def progress(n: int, name: str) -> None:
            nonlocal written
            bar.advance((written + n) // mib - written // mib)
            bar.update(name)
            written += n

        promote.write(found, settings.out, progress)
    return PromoteReport(
        formats=[_row(name, pairs) for name, pairs in _by_format(found.tensors).items()],
        nbytes=found.nbytes,
        nbytes_before=source.size,
        blocks=found.n_blocks,
        blocks_before=found.n_blocks_before,
        command=f"llama-server --model {shlex.quote(str(settings.out))} {FLAGS} --port {PORT}",
        resolved={
            "model": str(settings.model),
            "out": str(settings.out),
            "architecture": source.architecture,
        },
    )


def _by_format(pairs: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for before, after in pairs:
        found.setdefault(before.format.name, []).append((before, after))
    return found


def _row(name: str, pairs: list[Any]) -> dict[str, Any]:
    return {
        "format": name,
        "tensors": len(pairs),
        "values": sum(before.n_values for before, _ in pairs),
        "bytes": sum(before.end - before.begin for before, _ in pairs),
        "bytes_after": sum(after.end - after.begin for _, after in pairs),
    }


def show(report: PromoteReport, out: Output) -> None:
    """A row for each format, the conclusion and the command for the second server."""
    columns = [
        Column("format", "left", key=True),
        Column("tensors"),
        Column("values"),
        Column("MiB"),
        Column("MiB after"),
    ]
    rows = [
        [
            row["format"],
            str(row["tensors"]),
            f"{row['values']:,}",
            f"{row['bytes'] / 2**20:,.1f}",
            f"{row['bytes_after'] / 2**20:,.1f}",
        ]
        for row in report.formats
    ]
    out.table("Promoted to F32", columns, rows)
    out.verdict(True, report.conclusion)
    out.text()
    out.text("Start a second server on it, with the other flags of the first:")
    out.text(report.command, wrap=False)


def command(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL.gguf", help="The quantised model, in one file.")
    ],
    out_file: Annotated[
        Path,
        typer.Option("--out", metavar="FILE.gguf", help="The file to write; not there yet."),
    ],
    layers: Annotated[
        int | None,
        typer.Option(
            "--layers",
            metavar="N",
            show_default="all",
            help="Keep the first N blocks alone if all would be too large. This is another model, "
            "whose cache works as before.",
        ),
    ] = None,
    as_json: o.Json = False,
    output_file: o.OutputFile = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Write the numbers of a quantised GGUF file in F32, for a second server.

    A quantised model hides small faults in its rounding; the same numbers in four bytes each, with
    an f32 cache and without flash attention, show them. Nothing is quantised anew and nothing is
    lost: each tensor is what the package gguf dequantises, and all else is kept.

      kvtool promote model-Q4_K_M.gguf --out model-F32.gguf
    """
    out = Output(as_json, output_file, quiet, verbose)
    present("promote", Settings(model, out_file, layers), run, show, out)
