"""Shows the report of bench: the tables, the conclusion, and the figure."""

from __future__ import annotations

from pathlib import Path

from kvtool.commands.bench.compare import Change
from kvtool.commands.bench.formatting import listed, number, seconds
from kvtool.commands.bench.memory import memory_text
from kvtool.commands.bench.report import BenchReport, missing_text, pays_text
from kvtool.commands.bench.row import Row
from kvtool.ui.output import Output
from kvtool.ui.tables import Column


def show(report: BenchReport, out: Output) -> None:
    """The tables, and in words which cache pays, is fastest and smallest."""
    columns = [
        Column("tokens", key=True),
        *key_columns(report),
        Column("median ms"),
        Column("IQR ms"),
        Column("samples", spare=1),
        Column("tokens/s"),
        Column("speed-up"),
        Column("cache KiB"),
        Column("predicted KiB", spare=2),
    ]
    rows = [
        [
            str(row.length),
            *key_cells(report, row),
            median_text(row),
            number(row.iqr_s, 1000, ",.1f"),
            str(len(row.samples_s)),
            number(row.tokens_per_s, 1, ",.0f"),
            number(row.speedup, 1, ".2f", "x"),
            number(row.bytes_measured, 1 / 1024, ",.0f"),
            number(row.bytes_predicted, 1 / 1024, ",.0f"),
        ]
        for row in report.measurements
    ]
    out.table(title(report), columns, rows)
    show_tokens(report, out)
    for sentence in report.sentences:
        out.text(sentence)
    show_changes(report, out)


HEADINGS = {"impl": "impl", "dtype": "dtype", "batch_size": "batch", "threads": "threads"}


def key_columns(report: BenchReport) -> list[Column]:
    """The columns that tell rows of a length apart: the kind, and what else differs."""
    numbers = ("batch_size", "threads")
    more = [Column(HEADINGS[a], "right" if a in numbers else "left", key=True) for a in report.axes]
    return [Column("cache", "left", key=True), *more]


def key_cells(report: BenchReport, row: Row) -> list[str]:
    """The cells of those columns."""
    return [row.cache, *(str(getattr(row, axis)) for axis in report.axes)]


def median_text(row: Row) -> str:
    """The median in milliseconds; for a row that was left out, its expected time: ~2.2 s."""
    if row.median_s is None and row.would_take_s is not None:
        return f"~{seconds(row.would_take_s)}"
    return number(row.median_s, 1000, ",.1f")


def title(report: BenchReport) -> str:
    """The title of the table and the figure: what was timed."""
    what = f"Time to generate, prompt of {report.prompt_length}"
    if report.depth is not None:
        what = f"Time to decode behind {report.depth} tokens"
    kernels = "" if report.kernels == "default" else f", {report.kernels} kernels"
    if kernels and len(report.impls) > 1:
        kernels += " of kvtool"
    batches = dict.fromkeys(str(row.batch_size) for row in report.measurements)
    return f"{what}, batch of {listed(list(batches))}{kernels}"


def show_tokens(report: BenchReport, out: Output) -> None:
    """One token more at the longest length of each kind: its time, what it reads, and how well a
    lossy kind predicts."""
    if not report.longest:
        return
    columns = [
        *key_columns(report),
        Column("tokens"),
        Column("prefill ms"),
        Column("one more ms"),
        Column("reads KiB"),
        Column("GB/s"),
        Column("% of memory's"),
    ]
    beside = bool(report.quality) and not report.axes  # else each would be said many times
    if beside:
        columns += [Column("KL nats"), Column("perplexity")]
    rows = []
    for row in report.longest:
        rate = row.token_bytes / row.token_s if row.token_bytes and row.token_s else None
        cells = [
            *key_cells(report, row),
            str(row.length),
            number(row.prefill_s, 1000, ",.1f"),
            number(row.token_s, 1000, ",.3f"),
            number(row.token_bytes, 1 / 1024, ",.0f"),
            number(rate, 1e-9, ",.1f"),
            number(rate, 100 / report.read_rate(row).best, ".0f"),
        ]
        rows.append(cells + quality_cells(report, row.cache) * beside)
    out.table("One more token at the longest length", columns, rows)
    show_waits(report, out)
    if report.quality and not beside:
        columns = [Column("cache", "left", key=True), Column("KL nats"), Column("perplexity")]
        lossy = [[kind, *quality_cells(report, kind)] for kind in report.quality]
        out.table("What is lost", columns, lossy)
    out.text(memory_text(report))
    if report.quality:
        full = next(iter(report.quality.values()))
        out.text(
            f"Quality on {full['n_tokens']:,} tokens of {full['text']}: without a loss the "
            f"perplexity is {full['lossless_perplexity']:.2f}."
        )


def quality_cells(report: BenchReport, kind: str) -> list[str]:
    """How well a lossy kind predicts; dashes for others."""
    found = report.quality.get(kind, {})
    return [number(found.get("kl"), 1, ".2g"), number(found.get("perplexity"), 1, ".2f")]


def show_waits(report: BenchReport, out: Output) -> None:
    """How long a user waits for the first token and between two, at the longest length of each."""
    rows = [row for row in report.longest if row.between_tokens_s is not None]
    if not rows:
        return
    columns = key_columns(report)
    cells = [key_cells(report, row) for row in rows]
    for what, field, decimals in (("first", "first_token", 1), ("next", "between_tokens", 2)):
        for name, end in (("median", ""), ("p90", "_p90"), ("p99", "_p99")):
            waits = [getattr(row, f"{field}{end}_s") for row in rows]
            if any(wait is not None for wait in waits):  # a percentile needs many runs
                columns.append(Column(f"{what} {name} ms"))
                for cell, wait in zip(cells, waits, strict=True):
                    cell.append(number(wait, 1000, f",.{decimals}f"))
    out.table("Time to the first token, and from each to the next", columns, cells)


def show_changes(report: BenchReport, out: Output) -> None:
    """The changes since the baseline, and whether they are within the limits."""
    comparison = report.comparison
    if comparison.changes:
        columns = [Column("tokens", key=True), Column("cache", "left", key=True)]
        columns += [Column("before ms"), Column("now ms"), Column("change")]
        rows = [
            [
                str(change.length),
                change_name(report, change),
                number(change.before_s, 1000, ",.1f"),
                number(change.now_s, 1000, ",.1f"),
                row["change"],
            ]
            for change, row in zip(comparison.changes, comparison.rows(), strict=True)
        ]
        out.table(f"Medians against {comparison.baseline}", columns, rows)
    for ok, sentence in comparison.verdicts:
        out.verdict(ok, sentence)


def change_name(report: BenchReport, change: Change) -> str:
    """Its kind of cache, behind what tells it from others."""
    whose = [change.impl] * (len(report.impls) > 1)
    return " ".join([*whose, *change.setup.split(), change.cache])


def draw(report: BenchReport, path: Path, about: str = "") -> None:
    """The figure: latency against length, and the cache's memory against length."""
    from kvtool.ui.plots import bench_plot

    times: dict[str, list[tuple[int, list[float]]]] = {}
    memory: dict[str, list[tuple[int, int]]] = {}
    for row in report.measurements:
        if row.samples_s:
            times.setdefault(report.name(row), []).append((row.length, row.samples_s))
            if row.bytes_measured:
                memory.setdefault(report.name(row), []).append((row.length, row.bytes_measured))
    # Those that lie between two measured lengths; the caption tells of the others.
    marks = {
        kind: length
        for kind, length in report.pays_from.items()
        if length is not None and length > times[kind][0][0]
    }
    found = [pays_text(report) if report.pays_from else "", missing_text(report)]
    said = " ".join(sentence for sentence in found if sentence)
    bench_plot(path, times, memory, marks, said, f"{title(report)}\n{about}")
