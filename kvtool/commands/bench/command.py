"""kvtool bench: what does a cache buy, at which length, for which kind?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtool.commands.bench import compare as bench_compare
from kvtool.commands.bench import peers as bench_peers
from kvtool.commands.bench.compare import Limit
from kvtool.commands.bench.foreign import ForeignSubject, is_foreign
from kvtool.commands.bench.options import BatchSizes, Dtypes, Impls, ThreadCounts
from kvtool.commands.bench.report import BenchReport, ended_text, missing
from kvtool.commands.bench.row import Row
from kvtool.commands.bench.settings import KVTOOL, TRANSFORMERS, Settings
from kvtool.commands.bench.show import draw, show
from kvtool.commands.bench.subject import OwnSubject
from kvtool.config import RunConfig
from kvtool.config.setups import axes_of, name_of, words_of
from kvtool.ending import Ended, until_ended
from kvtool.errors import UsageError
from kvtool.ui import options as o
from kvtool.ui.documents import OF_CHECKS, jsonable, to_json
from kvtool.ui.environment import caption, environment, measured_on
from kvtool.ui.output import NOTHING_DRAWN, Output, present

if TYPE_CHECKING:
    import torch

    from kvtool.core.bench.timing import Cell, Contender, Measurement
    from kvtool.core.bench.traffic import Bandwidth

LENGTHS = [10, 50, 100, 500, 1000]
CACHES = ["none", "dynamic", "static"]
IMPL, DTYPES, BATCH_SIZES, THREADS = [KVTOOL], ["float32"], [1], [0]
PROMPT_LENGTH = 32
COMPARE = "Against an earlier run"


def run(settings: Settings, out: Output) -> BenchReport:
    """Measure within the time budget, and compare with the baseline."""
    import time

    import torch

    from kvtool.core.bench import timing
    from kvtool.core.machine import prepare

    baseline = bench_compare.load(settings.compare) if settings.compare is not None else None
    lengths = sorted(set(settings.lengths))
    if lengths != settings.lengths:
        out.note(f"lengths sorted, each once: {' '.join(map(str, lengths))}")
    settings = settings.resolved(torch.get_num_threads())
    formats: dict[str, torch.dtype] = {}
    for name in reversed(settings.dtypes):  # the first one last: its seed counts
        device, formats[name] = prepare(replace(settings.run, dtype=name))
    formats = {name: formats[name] for name in settings.dtypes}
    kind: Any = ForeignSubject if is_foreign(settings) else OwnSubject
    subject = kind(settings, lengths, device, formats, out)
    settings = subject.settings
    resolved = {
        **subject.facts,
        "device": str(device),
        "lengths": lengths,
        **several(settings),
        **bench_peers.facts(settings),
    }
    now = conditions(settings, resolved)
    if baseline is not None:
        strict = bool(settings.fail_if) and not settings.force
        bench_compare.check_comparable(baseline, now, settings.compare, strict, out)
    contenders = subject.contenders(resolved)
    settings = subject.settings
    started = time.perf_counter()
    rates = read_bandwidths(settings, device)
    measurement = timing.Measurement(contenders, lengths, subject.n_start)
    quality: dict[str, dict[str, Any]] = {}
    with until_ended() as outcome:
        try:
            measure(settings, measurement, out)
        finally:
            if len(settings.thread_counts) > 1:
                torch.set_num_threads(settings.thread_counts[0])
        quality = subject.qualities()
    subject.tell_decoded()
    if outcome.how and not any(cell.runs for cell in measurement.cells):
        if settings.plot is not None:
            out.note(f"--plot {settings.plot}: {NOTHING_DRAWN}")
        raise Ended(outcome.how)
    report = BenchReport(
        *summary(contenders, measurement, subject.weights_read()),
        settings.batch_size,
        settings.prompt_length,
        settings.depth,
        settings.kernels,
        next(iter(rates.values())),
        quality,
        time.perf_counter() - started,
        resolved,
        ended=outcome.how,
        budget=settings.budget,
        repeats=settings.repeats,
        seed=settings.run.seed,
        bandwidths=rates if len(rates) > 1 else {},
    )
    subject.check()
    warn_missing(report, settings, out)
    if baseline is not None and not outcome.how:
        measured = {**now, "measurements": list(map(vars, report.measurements))}
        report.comparison = bench_compare.compare(
            baseline, measured, settings.fail_if, str(settings.compare)
        )
    return report


def several(settings: Settings) -> dict[str, Any]:
    """The number formats and threads for captions, where there are several."""
    return {
        name: list(values)
        for name, values in (("dtype", settings.dtypes), ("threads", settings.thread_counts))
        if len(values) > 1
    }


def read_bandwidths(settings: Settings, device: torch.device) -> dict[int, Bandwidth]:
    """How fast memory is read with each number of threads."""
    import torch

    from kvtool.core.bench.traffic import read_bandwidth

    found = {}
    for threads in reversed(settings.thread_counts):  # the first one last: it stays
        if len(settings.thread_counts) > 1:
            torch.set_num_threads(threads)
        found[threads] = read_bandwidth(device)
    return dict(reversed(found.items()))


def summary(
    contenders: list[Contender], measurement: Measurement, weights: dict[str, int]
) -> tuple[list[Row], dict[str, float | None]]:
    """The report with its rows, and the length from which each kind pays. weights: bytes that a
    step reads, by number format."""
    from kvtool.core.bench import timing

    cells = measurement.cells
    rows = [
        Row.of(cell, speedup, weights[cell.setup.dtype], measurement.expected(cell))
        for cell, speedup in timing.speedups(cells)
    ]
    axes = axes_of(cells)
    uncached = any(kind == "none" for kind, *_ in contenders)
    pays_from = {
        " ".join([*words_of(impl, setup, axes), kind]): timing.crossover(cells, kind, impl, setup)
        for kind, _, impl, setup in contenders
        if kind != "none" and uncached
    }
    return rows, pays_from


def measure(settings: Settings, measurement: Measurement, out: Output) -> None:
    """Measure all cells, with a progress bar."""
    axes = axes_of(measurement.cells)
    with out.progress("bench", settings.repeats * len(measurement.cells)) as bar:

        def advance(cell: Cell) -> None:
            bar.update(f"{name_of(cell, axes)} {cell.length}")
            bar.advance()

        measurement.run(settings.repeats, settings.budget, advance)


def conditions(settings: Settings, resolved: dict[str, Any]) -> dict[str, Any]:
    """The conditions of this run for its document, before anything is measured."""
    return {
        "environment": environment(),
        "settings": jsonable(settings),
        "resolved": resolved,
        "prompt_length": settings.prompt_length,
        "depth": settings.depth,
        "batch_size": settings.batch_size,
    }


def warn_missing(report: BenchReport, settings: Settings, out: Output) -> None:
    """Say which cells a signal or the budget left with fewer samples than asked for."""
    rows = report.measurements
    if report.ended:
        out.warn(ended_text(report))
        return
    if left_out := missing(report):
        out.warn(
            f"--budget {settings.budget:g} s leaves no room, so not measured: {left_out}; give a "
            "larger --budget"
        )
    few = [row for row in rows if 0 < len(row.samples_s) < settings.repeats]
    if few:
        out.note(
            f"{len(few)} of {len(rows)} rows have fewer than {settings.repeats} samples "
            f"(--budget {settings.budget:g} s)"
        )


def command(
    lengths: o.Lengths = LENGTHS,
    caches: o.Caches = CACHES,
    impl: Impls = IMPL,
    prompt_length: Annotated[
        int, typer.Option("--prompt-length", metavar="N", help="Tokens of the prompt.")
    ] = PROMPT_LENGTH,
    depth: Annotated[
        int | None,
        typer.Option(
            "--depth",
            metavar="N",
            help="Time decoding alone, after N tokens that are read first.",
        ),
    ] = None,
    batch_size: BatchSizes = BATCH_SIZES,
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", help="Samples of each row, at most.")
    ] = 7,
    budget: Annotated[
        float,
        typer.Option(
            "--budget",
            metavar="SECONDS",
            help="Time for all runs together; short trials first show what each takes. What does "
            "not fit is left out and named.",
        ),
    ] = 150.0,
    plot: o.Plot = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text whose last tenth gives the perplexity of lossy kinds.",
            show_default="the model's own",
        ),
    ] = None,
    kernels: o.Kernels = "default",
    window: o.Window = None,
    sinks: o.Sinks = None,
    group: o.Group = None,
    residual: o.Residual = None,
    page: o.Page = None,
    n_kv_heads: Annotated[
        int,
        typer.Option(
            "--n-kv-heads",
            metavar="N",
            show_default="the model's",
            help="Key-value heads. If it differs from the model's, random weights are used.",
        ),
    ] = 0,
    save: Annotated[
        str | None,
        typer.Option(
            "--save",
            metavar="NAME",
            help=f"Keep this run in {bench_compare.FOLDER}.",
            rich_help_panel=COMPARE,
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="NAME|FILE",
            help="Show what has changed since a run that was kept.",
            rich_help_panel=COMPARE,
        ),
    ] = None,
    fail_if: Annotated[
        list[str],
        typer.Option(
            "--fail-if",
            metavar="FIELD:LIMIT",
            help="Exit 1 if a row is slower than before by more: median:10% or min:0.5 (seconds).",
            rich_help_panel=COMPARE,
        ),
    ] = [],  # noqa: B006
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Compare although machine or settings differ.",
            rich_help_panel=COMPARE,
        ),
    ] = False,
    model: o.Model = "",
    device: o.Device = "auto",
    dtype: Dtypes = DTYPES,
    threads: ThreadCounts = THREADS,
    seed: o.Seed = 0,
    as_json: o.Json = False,
    output_files: o.OutputOfChecks = [],  # noqa: B006
    github: o.GitHub = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Measure the time to generate n tokens without a cache and with each kind.

    Prompt and allocation are part of the time, but on a GPU not that of a static or paged cache,
    whose steps are recorded by a run before it. Rows give the median and the distance between the
    quartiles (IQR); --json has every sample. Kinds are measured in turns, so that a slow moment of
    the machine hits all of them.

    --impl kvtool transformers measures transformers' generate beside ours, on the same weights and
    with caches that it makes itself; what its loop does around the model is part of its time.
    First, both must generate the same tokens in float32. Neither model goes through
    torch.compile.

      kvtool bench --lengths 10 100 1000 --plot latency.png

      kvtool bench --impl kvtool transformers --caches dynamic
    """
    for path in output_files:
        if not fail_if and path.suffix.lower() == ".xml":
            raise UsageError(
                f"--output {path}: needs --fail-if", "A case is a row that a limit decides."
            )
    out = Output(as_json, output_files, quiet, verbose, OF_CHECKS, github)
    settings = Settings(
        run=RunConfig(model, device, dtype[0], threads[0], seed),
        lengths=lengths,
        caches=o.kinds_with_settings(
            caches, window=window, sinks=sinks, group=group, residual=residual, page=page
        ),
        prompt_length=prompt_length,
        batch_size=batch_size[0],
        repeats=repeats,
        budget=budget,
        plot=plot,
        kernels=kernels,
        depth=depth,
        n_kv_heads=n_kv_heads,
        text=text,
        save=save,
        compare=compare,
        fail_if=tuple(map(Limit.parse, fail_if)),
        force=force,
        impl=tuple(impl),
        dtypes=tuple(dtype),
        batch_sizes=tuple(batch_size),
        thread_counts=tuple(threads),
    )

    # transformers alone takes the name of a type too, which only it can tell.
    known = "" if impl == [TRANSFORMERS] else model
    o.require_inputs(known, ("--text", text, "a text to measure on"))
    if compare is not None:
        bench_compare.load(compare)  # read again, but refused before torch is loaded

    if save is not None:
        out.later(lambda report, content: keep(report, content, save, out))
    if plot is not None:
        out.draw_later(plot, partial(latency_plot, settings=settings))
    present("bench", settings, run, show, out, partial(latency_plot, settings=settings))


def keep(report: BenchReport, content: Mapping[str, Any], name: str, out: Output) -> None:
    """Save the document for later comparisons, unless a signal ended the run."""
    if report.ended:
        out.note(f"--save {name}: nothing is kept of a run that was {report.ended.value}")
        return
    path = bench_compare.save(name, to_json(content).encode())
    out.note(f"saved: {path}")


def latency_plot(report: BenchReport, path: Path, settings: Settings) -> bool:
    """Draw the measured cells, also of a run that a signal or an error ended -> whether there are
    any."""
    if report.measured:
        draw(report, path, caption(measured_on(settings, report.resolved)))
    return bool(report.measured)
