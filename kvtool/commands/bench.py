"""kvtool bench: what does a cache buy, at which length, for which kind?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from kvtool.config import RunConfig, check_float, check_int
from kvtool.errors import CapacityError, FileError
from kvtool.ui import options as o
from kvtool.ui.output import Output, present
from kvtool.ui.tables import Column

LENGTHS = [10, 50, 100, 500, 1000]
CACHES = ["none", "dynamic", "static"]


@dataclass(frozen=True)
class Settings:
    """Everything that bench was asked for."""

    run: RunConfig
    lengths: list[int]
    caches: list[str]
    prompt_length: int
    batch_size: int
    repeats: int
    budget: float
    plot: Path | None
    kernels: str = "default"

    def __post_init__(self) -> None:
        check_int("--prompt-length", self.prompt_length, 1)
        check_int("--batch-size", self.batch_size, 1)
        check_int("--repeats", self.repeats, 1)
        check_float("--budget", self.budget, 0.0, open_low=True)
        if self.plot is not None and self.plot.is_dir():
            raise FileError(f"--plot {self.plot}: is a folder (expected a file)")
        if self.plot is not None and not self.plot.parent.is_dir():
            raise FileError(f"--plot {self.plot}: the folder {self.plot.parent} does not exist")


@dataclass
class Row:
    """One kind of cache at one length; None was not measured."""

    length: int
    cache: str
    median_s: float | None
    iqr_s: float | None
    tokens_per_s: float | None
    speedup: float | None
    bytes_predicted: int
    bytes_measured: int | None
    samples_s: list[float]


@dataclass
class Report:
    """All rows, and from which length on each kind is faster than no cache."""

    measurements: list[Row]
    pays_from: dict[str, float | None]
    batch_size: int
    prompt_length: int
    kernels: str
    seconds: float
    resolved: dict[str, Any] = field(default_factory=dict)  # the settings that were left open

    @property
    def exit_code(self) -> int:
        return 0 if any(row.samples_s for row in self.measurements) else 1

    def rows(self) -> list[dict[str, Any]]:
        return [vars(row) for row in self.measurements]


def run(settings: Settings, out: Output) -> Report:
    """Measure within the budget, then draw."""
    import time

    import torch

    from kvtool.core import checkpoint, timing
    from kvtool.core.kernels import make_kernels
    from kvtool.core.machine import prepare

    lengths = sorted(set(settings.lengths))
    if lengths != settings.lengths:
        out.note(f"lengths sorted, each once: {' '.join(map(str, lengths))}")
    device, dtype = prepare(settings.run)
    loaded = checkpoint.load(settings.run.model, device, dtype)
    check_fits(settings, lengths, loaded.config, device, dtype)
    vocab = loaded.config.source_vocab_size or loaded.config.vocab_size
    prompt = torch.randint(vocab, (settings.batch_size, settings.prompt_length)).to(device)
    started = time.perf_counter()
    total = settings.repeats * len(lengths) * len(settings.caches)
    with out.progress("bench", total) as bar:

        def advance(cell: timing.Cell) -> None:
            bar.update(f"{cell.cache} {cell.length}")
            bar.advance()

        cells = timing.measure(
            timing.Workload(loaded.model, prompt, make_kernels(settings.kernels)),
            lengths,
            settings.caches,
            settings.repeats,
            settings.budget,
            advance,
        )
    rows = [row_of(cell, speedup, settings) for cell, speedup in timing.speedups(cells)]
    kinds = [kind for kind in settings.caches if kind != "none"]
    pays = {kind: timing.crossover(cells, kind) for kind in kinds if "none" in settings.caches}
    tell_missing(rows, settings, out)
    resolved = {
        "model": str(loaded.path),
        "sha256": loaded.sha256,
        "device": str(device),
        "lengths": lengths,
    }
    return Report(
        rows,
        pays,
        settings.batch_size,
        settings.prompt_length,
        settings.kernels,
        time.perf_counter() - started,
        resolved,
    )


def check_fits(
    settings: Settings, lengths: list[int], config: Any, device: Any, dtype: Any
) -> None:
    """Raise CapacityError if the longest run exceeds the context or the memory."""
    from kvtool.core.cache import CacheSpec
    from kvtool.core.machine import require_memory

    start = 1 if config.n_encoder_layers else settings.prompt_length
    longest_prompt = config.context if config.n_encoder_layers else config.context - 1
    if settings.prompt_length > longest_prompt:
        raise CapacityError(
            f"--prompt-length {settings.prompt_length}: is too long (the model holds "
            f"{config.context} tokens)",
            f"The longest that fits is {longest_prompt}.",
        )
    if start + lengths[-1] > config.context:
        raise CapacityError(
            f"--lengths {lengths[-1]}: with a prompt of {start} tokens is beyond the context (the "
            f"model holds {config.context})",
            f"The longest that fits is {config.context - start}.",
        )
    spec = CacheSpec.of(config, settings.batch_size, start + lengths[-1], dtype, device)
    require_memory("the caches", 2 * spec.capacity * spec.token_nbytes, device)


def row_of(cell: Any, speedup: float | None, settings: Settings) -> Row:
    """A cell of measurements as the report gives it."""
    n_tokens = settings.batch_size * cell.length
    return Row(
        length=cell.length,
        cache=cell.cache,
        median_s=cell.median,
        iqr_s=cell.iqr,
        tokens_per_s=n_tokens / cell.median if cell.median else None,
        speedup=speedup,
        bytes_predicted=cell.bytes_predicted,
        bytes_measured=cell.bytes_measured if cell.samples else None,
        samples_s=cell.samples,
    )


def tell_missing(rows: list[Row], settings: Settings, out: Output) -> None:
    """Say which cells the budget left with fewer samples than asked for."""
    none = [f"{row.cache} {row.length}" for row in rows if not row.samples_s]
    if none:
        out.warn(
            f"--budget {settings.budget:g} s was spent: not measured: {', '.join(none)}; "
            "give a larger --budget"
        )
    few = [row for row in rows if 0 < len(row.samples_s) < settings.repeats]
    if few:
        out.note(
            f"{len(few)} of {len(rows)} rows have fewer than {settings.repeats} samples "
            f"(--budget {settings.budget:g} s)"
        )


def show(report: Report, out: Output) -> None:
    """The table, and where a cache starts to pay."""
    columns = [
        Column("tokens", key=True),
        Column("cache", "left", key=True),
        Column("median ms"),
        Column("IQR ms"),
        Column("samples"),
        Column("tokens/s"),
        Column("speed-up"),
        Column("cache KiB"),
        Column("predicted KiB"),
    ]
    rows = [
        [
            str(row.length),
            row.cache,
            number(row.median_s, 1000, ",.1f"),
            number(row.iqr_s, 1000, ",.1f"),
            str(len(row.samples_s)),
            number(row.tokens_per_s, 1, ",.0f"),
            number(row.speedup, 1, ".2f", "x"),
            number(row.bytes_measured, 1 / 1024, ",.0f"),
            number(row.bytes_predicted, 1 / 1024, ",.0f"),
        ]
        for row in report.measurements
    ]
    title = f"Time to generate, prompt of {report.prompt_length}, batch of {report.batch_size}"
    if report.kernels != "default":
        title += f", {report.kernels} kernels"
    out.table(title, columns, rows)
    out.text(pays_text(report))


def number(value: float | None, scale: float, form: str, unit: str = "") -> str:
    """A figure for the table; a dash for what was not measured."""
    return "-" if value is None else f"{value * scale:{form}}{unit}"


def pays_text(report: Report) -> str:
    """From which length on a cache is worth having."""
    if not report.pays_from:
        return "Add none to --caches to see what a cache buys."
    parts = []
    for kind, length in report.pays_from.items():
        compared = [r.length for r in report.measurements if r.cache == kind and r.speedup]
        if not compared:
            parts.append(f"{kind} was not measured beside no cache")
        elif length is None:
            parts.append(f"{kind} does not pay at {compared[-1]} tokens, the most measured")
        elif length == compared[0]:
            parts.append(f"{kind} pays from {compared[0]} tokens on, the fewest measured")
        else:
            parts.append(f"{kind} pays from about {length:.0f} tokens on")
    return "; ".join(parts) + "."


def draw(report: Report, path: Path) -> None:
    """The plot of latency against length."""
    from kvtool.ui.plots import latency_plot

    series: dict[str, list[tuple[int, list[float]]]] = {}
    for row in report.measurements:
        if row.samples_s:
            series.setdefault(row.cache, []).append((row.length, row.samples_s))
    latency_plot(path, series, report.pays_from)


def command(
    lengths: o.Lengths = LENGTHS,
    caches: o.Caches = CACHES,
    prompt_length: Annotated[
        int, typer.Option("--prompt-length", metavar="N", help="Tokens of the prompt.")
    ] = 32,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", help="Sequences side by side.")
    ] = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", help="Samples of each row, at most.")
    ] = 7,
    budget: Annotated[
        float,
        typer.Option(
            "--budget", metavar="SECONDS", help="Start no run that would end later than this."
        ),
    ] = 150.0,
    plot: o.Plot = None,
    kernels: o.Kernels = "default",
    model: o.Model = "",
    device: o.Device = "auto",
    dtype: o.Dtype = "float32",
    threads: o.Threads = 0,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    output_file: o.OutputFile = None,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Measure the time to generate n tokens without a cache and with each kind.

    Prompt and allocation are part of the time. Rows give the median and the distance between the
    quartiles (IQR); --json has every sample. Kinds are measured in turns, so that a slow moment of
    the machine hits all of them.

      kvtool bench --lengths 10 100 1000 --plot latency.png
    """
    out = Output(as_json, output_file, quiet, verbose)
    settings = Settings(
        run=RunConfig(model, device, dtype, threads, seed),
        lengths=lengths,
        caches=caches,
        prompt_length=prompt_length,
        batch_size=batch_size,
        repeats=repeats,
        budget=budget,
        plot=plot,
        kernels=kernels,
    )

    def work(settings: Settings, out: Output) -> Report:
        report = run(settings, out)
        if settings.plot is not None and report.exit_code == 0:
            draw(report, settings.plot)
            out.note(f"plot: {settings.plot}")
        return report

    present("bench", settings, work, show, out)
