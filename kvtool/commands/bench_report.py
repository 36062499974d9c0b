"""What bench found: its rows, the tables, the sentence at the end, and the figure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.ending import End
from kvtool.ui.output import Output
from kvtool.ui.tables import Column

if TYPE_CHECKING:
    from kvtool.commands.bench_compare import Change
    from kvtool.core.timing import Cell


@dataclass
class Row:
    """One kind of cache at one length; None was not measured."""

    length: int
    impl: str
    cache: str
    median_s: float | None
    iqr_s: float | None
    tokens_per_s: float | None
    speedup: float | None
    bytes_predicted: int | None
    bytes_measured: int | None
    prefill_s: float | None
    token_s: float | None  # one more token, at this length
    token_bytes: int | None  # weights, keys and values that it reads
    samples_s: list[float]

    @classmethod
    def of(cls, cell: Cell, speedup: float | None, batch: int, weights: int) -> Row:
        """A cell of measurements as the report gives it."""
        read = cell.runs[-1].read if cell.runs else None
        return cls(
            length=cell.length,
            impl=cell.impl,
            cache=cell.cache,
            median_s=cell.median,
            iqr_s=cell.iqr,
            tokens_per_s=batch * cell.length / cell.median if cell.median else None,
            speedup=speedup,
            bytes_predicted=cell.bytes_predicted,
            bytes_measured=cell.bytes_measured if cell.runs else None,
            prefill_s=middle(run.prefill_s for run in cell.runs),
            token_s=middle(run.token_s for run in cell.runs),
            token_bytes=weights + read if read else None,
            samples_s=cell.samples,
        )


@dataclass
class Report:
    """All rows, and what follows from them."""

    measurements: list[Row]
    pays_from: dict[str, float | None]  # `name` -> the length from which on it beats no cache
    batch_size: int
    prompt_length: int
    depth: int | None
    kernels: str
    bandwidth: float  # bytes a second, as measured in this run
    quality: dict[str, dict[str, Any]]  # of each lossy kind
    seconds: float
    resolved: dict[str, Any] = field(default_factory=dict)  # the settings that were left open
    changes: list[Change] = field(default_factory=list)  # against the baseline
    regressions: list[str] = field(default_factory=list)
    ended: End | None = None  # by what, so that samples are missing

    @property
    def exit_code(self) -> int:
        if self.ended is not None:
            return self.ended.exit_code
        measured = any(row.samples_s for row in self.measurements)
        return 0 if measured and not self.regressions else 1

    def rows(self) -> list[dict[str, Any]]:
        return [vars(row) for row in self.measurements]

    @property
    def impls(self) -> list[str]:
        """The implementations that there are."""
        return list(dict.fromkeys(row.impl for row in self.measurements))

    def name(self, row: Row | Change) -> str:
        """Its kind of cache, and of which implementation if there are several."""
        return label(row.impl, row.cache, len(self.impls) > 1)


def label(impl: str, cache: str, several: bool) -> str:
    return f"{impl} {cache}" if several else cache


def middle(values: Iterable[float | None]) -> float | None:
    """The median of those that are there."""
    from statistics import median

    found = [value for value in values if value is not None]
    return median(found) if found else None


def show(report: Report, out: Output) -> None:
    """The tables, and in words which cache pays, is fastest and smallest."""
    several = len(report.impls) > 1
    columns = [
        Column("tokens", key=True),
        Column("cache", "left", key=True),
        *[Column("impl", "left", key=True)] * several,
        Column("median ms"),
        Column("IQR ms"),
        Column("samples"),
        Column("tokens/s"),
        Column("speed-up"),
        Column("cache KiB"),
        Column("predicted KiB", spare=int(several)),
    ]
    rows = [
        [
            str(row.length),
            row.cache,
            *[row.impl] * several,
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
    out.table(title(report), columns, rows)
    show_tokens(report, out)
    out.text(pays_text(report))
    for sentence in (best_text(report), versus_text(report)):
        if sentence:
            out.text(sentence)


def title(report: Report) -> str:
    what = f"Time to generate, prompt of {report.prompt_length}"
    if report.depth is not None:
        what = f"Time to decode behind {report.depth} tokens"
    kernels = "" if report.kernels == "default" else f", {report.kernels} kernels"
    if kernels and len(report.impls) > 1:
        kernels += " of kvtool"
    return f"{what}, batch of {report.batch_size}{kernels}"


def show_tokens(report: Report, out: Output) -> None:
    """One token more at the longest length of each kind: its time, what it reads, and how well a
    lossy kind predicts."""
    longest = {(row.cache, row.impl): row for row in report.measurements if row.token_s}
    if not longest:
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
    rows, fastest = [], 0.0
    for row in longest.values():
        rate = row.token_bytes / row.token_s if row.token_bytes and row.token_s else None
        fastest = max(fastest, rate or 0.0)
        cells = [
            row.cache,
            *[row.impl] * several,
            str(row.length),
            number(row.prefill_s, 1000, ",.1f"),
            number(row.token_s, 1000, ",.3f"),
            number(row.token_bytes, 1 / 1024, ",.0f"),
            number(rate, 1e-9, ",.1f"),
            number(rate, 100 / report.bandwidth, ".0f"),
        ]
        if report.quality:
            found = report.quality.get(row.cache, {})
            cells += [
                number(found.get("kl"), 1, ".2g"),
                number(found.get("perplexity"), 1, ".2f"),
            ]
        rows.append(cells)
    out.table("One more token at the longest length", columns, rows)
    out.text(f"Memory was read at {report.bandwidth * 1e-9:,.1f} GB/s in this run.")
    if fastest > report.bandwidth:
        out.text("What is read faster than that has stayed in the processor's own caches.")
    if report.quality:
        full = next(iter(report.quality.values()))
        out.text(
            f"Quality on {full['n_tokens']:,} tokens of {full['text']}: without a loss the "
            f"perplexity is {full['lossless_perplexity']:.2f}."
        )


def number(value: float | None, scale: float, form: str, unit: str = "") -> str:
    """A figure for the table; a dash for what was not measured."""
    return "-" if value is None else f"{value * scale:{form}}{unit}"


def pays_text(report: Report) -> str:
    """From which length on a cache is worth having."""
    if not report.pays_from:
        return "Add none to --caches to see what a cache buys."
    groups: dict[tuple[str, str], list[str]] = {}
    for kind, length in report.pays_from.items():
        rows = [row for row in report.measurements if report.name(row) == kind]
        compared = [row.length for row in rows if row.speedup]
        if not compared:
            said = "was|were", "not measured beside no cache"
        elif length is None:
            said = "does|do", f"not pay at {compared[-1]} tokens, the most measured"
        elif length == compared[0]:
            said = "pays|pay", f"from {compared[0]} tokens on, the fewest measured"
        else:
            said = "pays|pay", f"from about {length:.0f} tokens on"
        groups.setdefault(said, []).append(kind)
    sentences = [
        f"{listed(kinds)} {verb.split('|')[len(kinds) > 1]} {rest}"
        for (verb, rest), kinds in groups.items()
    ]
    return "; ".join(sentences) + "."


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, or `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def best_text(report: Report) -> str:
    """Which kinds are fastest and smallest at the longest length at which several were measured."""
    by_length: dict[int, list[Row]] = {}
    for row in report.measurements:
        if row.median_s is not None and row.cache != "none":
            by_length.setdefault(row.length, []).append(row)
    lengths = [length for length, rows in by_length.items() if len(rows) > 1]
    if not lengths:
        return ""
    rows = by_length[max(lengths)]
    fastest = min(rows, key=lambda row: row.median_s or 0)
    least = min(row.bytes_measured or 0 for row in rows)
    smallest = listed([report.name(row) for row in rows if row.bytes_measured == least])
    return (
        f"At {max(lengths):,} tokens {report.name(fastest)} is fastest here "
        f"({number(fastest.tokens_per_s, 1, ',.0f')} tokens/s), and {smallest} smallest "
        f"({least / 1024:,.0f} KiB)."
    )


def versus_text(report: Report) -> str:
    """By how much one implementation is faster than the other with each kind, at the longest length
    at which both were measured; "" of a single one."""
    if len(report.impls) < 2:
        return ""
    medians = {(r.length, r.cache, r.impl): r.median_s for r in report.measurements if r.median_s}
    one, other = report.impls
    both = [(n, kind) for n, kind, impl in medians if impl == one and (n, kind, other) in medians]
    if not both:
        return f"{one} and {other} were not measured beside each other."
    longest = max(both)[0]
    factors: dict[tuple[str, str], list[str]] = {}
    for kind in (kind for n, kind in both if n == longest):
        ratio = medians[longest, kind, other] / medians[longest, kind, one]
        order = (one, other) if ratio >= 1 else (other, one)
        how = "without a cache" if kind == "none" else f"with {kind}"
        factors.setdefault(order, []).append(f"{max(ratio, 1 / ratio):.2f} {how}")
    said = [
        f"{faster} is faster than {slower} by a factor of {listed(found)}"
        for (faster, slower), found in factors.items()
    ]
    return f"At {longest:,} tokens {'; '.join(said)}."


def draw(report: Report, path: Path) -> None:
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
    bench_plot(path, times, memory, marks, pays_text(report) if report.pays_from else "")
