"""Shows the report of bench: the tables, the conclusion, and the figure."""

from __future__ import annotations

from pathlib import Path

from kvtool.commands.bench.formatting import number, seconds
from kvtool.commands.bench.report import BenchReport, Row, memory_text, missing_text, pays_text
from kvtool.ui.output import Output
from kvtool.ui.tables import Column


def show(report: BenchReport, out: Output) -> None:
    """The tables, and in words which cache pays, is fastest and smallest."""
    several = len(report.impls) > 1
    columns = [
        Column("tokens", key=True),
        Column("cache", "left", key=True),
        *[Column("impl", "left", key=True)] * several,
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
            row.cache,
            *[row.impl] * several,
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
    return f"{what}, batch of {report.batch_size}{kernels}"


def show_tokens(report: BenchReport, out: Output) -> None:
    """One token more at the longest length of each kind: its time, what it reads, and how well a
    lossy kind predicts."""
    if not report.longest:
        return
    several = len(report.impls) > 1
    columns = [
        Column("cache", "left", key=True),
        *[Column("impl", "left", key=True)] * several,
        Column("tokens"),
        Column("prefill ms"),
        Column("one more ms"),
        Column("reads KiB"),
        Column("GB/s"),
        Column("% of memory's"),
    ]
    if report.quality:
        columns += [Column("KL nats"), Column("perplexity")]
    rows = []
    for row in report.longest:
        rate = row.token_bytes / row.token_s if row.token_bytes and row.token_s else None
        cells = [
            row.cache,
            *[row.impl] * several,
            str(row.length),
            number(row.prefill_s, 1000, ",.1f"),
            number(row.token_s, 1000, ",.3f"),
            number(row.token_bytes, 1 / 1024, ",.0f"),
            number(rate, 1e-9, ",.1f"),
            number(rate, 100 / report.bandwidth.best, ".0f"),
        ]
        if report.quality:
            found = report.quality.get(row.cache, {})
            cells += [
                number(found.get("kl"), 1, ".2g"),
                number(found.get("perplexity"), 1, ".2f"),
            ]
        rows.append(cells)
    out.table("One more token at the longest length", columns, rows)
    out.text(memory_text(report))
    if report.quality:
        full = next(iter(report.quality.values()))
        out.text(
            f"Quality on {full['n_tokens']:,} tokens of {full['text']}: without a loss the "
            f"perplexity is {full['lossless_perplexity']:.2f}."
        )


def show_changes(report: BenchReport, out: Output) -> None:
    """The changes since the baseline, and whether they are within the limits."""
    comparison = report.comparison
    if comparison.changes:
        columns = [Column("tokens", key=True), Column("cache", "left", key=True)]
        columns += [Column("before ms"), Column("now ms"), Column("change")]
        rows = [
            [
                str(change.length),
                report.name(change),
                number(change.before_s, 1000, ",.1f"),
                number(change.now_s, 1000, ",.1f"),
                row["change"],
            ]
            for change, row in zip(comparison.changes, comparison.rows(), strict=True)
        ]
        out.table(f"Medians against {comparison.baseline}", columns, rows)
    for ok, sentence in comparison.verdicts:
        out.verdict(ok, sentence)


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
