"""The report of bench: its rows, and the sentences that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvtool.commands.bench.cases import limit_cases
from kvtool.commands.bench.compare import Change, Comparison
from kvtool.commands.bench.formatting import label, listed, number, seconds, tokens, verb
from kvtool.ending import End
from kvtool.ui.cases import Case
from kvtool.ui.output import MARKS

if TYPE_CHECKING:
    from kvtool.core.bench.timing import Cell
    from kvtool.core.bench.traffic import Bandwidth


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
    would_take_s: float | None = None  # a run, where there is no sample; estimated

    @classmethod
    def of(
        cls,
        cell: Cell,
        speedup: float | None,
        batch: int,
        weights: int,
        expected: float | None = None,
    ) -> Row:
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
            would_take_s=None if cell.runs else expected,
        )


@dataclass
class BenchReport:
    """All rows, and the conclusions from them."""

    measurements: list[Row]
    pays_from: dict[str, float | None]  # `name` -> the length from which on it beats no cache
    batch_size: int
    prompt_length: int
    depth: int | None
    kernels: str
    bandwidth: Bandwidth  # as measured in this run
    quality: dict[str, dict[str, Any]]  # of each lossy kind
    seconds: float
    resolved: dict[str, Any] = field(default_factory=dict)  # the settings that were left open
    comparison: Comparison = field(default_factory=Comparison)
    ended: End | None = None  # by what, so that samples are missing
    budget: float = 0.0  # seconds
    repeats: int = 1
    seed: int = 0

    @property
    def measured(self) -> bool:
        """Whether there is a sample at all."""
        return any(row.samples_s for row in self.measurements)

    @property
    def exit_code(self) -> int:
        """That of a signal; else 0, or 1 for a regression and where nothing was measured."""
        if self.ended is not None:
            return self.ended.exit_code
        return 0 if self.measured and not self.comparison.regressions else 1

    @property
    def sentences(self) -> list[str]:
        """The conclusions from the rows, and what is missing."""
        if not self.measured:
            return [nothing_text(self)]
        found = [pays_text(self), best_text(self), versus_text(self), missing_text(self)]
        return [sentence for sentence in found if sentence]

    def rows(self) -> list[dict[str, Any]]:
        """The rows without the samples, which only JSON has."""
        return [
            {
                **{k: v for k, v in vars(row).items() if k != "samples_s"},
                "samples": len(row.samples_s),
            }
            for row in self.measurements
        ]

    @property
    def load(self) -> dict[str, Any]:
        """The load of the run: its prompt length or its depth."""
        return {
            "batch_size": self.batch_size,
            "prompt_length": self.prompt_length if self.depth is None else None,
            "depth": self.depth,
            "kernels": self.kernels,
            "seed": self.seed,
        }

    def cases(self) -> list[Case]:
        """A case for each row that a limit decides."""
        return limit_cases(self.comparison)

    def more_rows(self) -> dict[str, list[dict[str, Any]]]:
        """The table of changes, under its heading, if this run was compared."""
        heading = f"Medians against {self.comparison.baseline}"
        return {heading: self.comparison.rows()} if self.comparison.changes else {}

    def to_dict(self) -> dict[str, Any]:
        """The fields of the JSON document."""
        marked = [f"{MARKS[ok][0]} {said}." for ok, said in self.comparison.verdicts]
        return {
            **{name: value for name, value in vars(self).items() if name != "comparison"},
            **vars(self.comparison),
            "bandwidth": self.bandwidth.best,
            "bandwidth_samples": self.bandwidth.rates,
            "bandwidth_disturbed": self.bandwidth.disturbed,
            "own_caches": self.bandwidth.own_caches,
            "conclusion": " ".join([*self.sentences, *marked]),
        }

    @property
    def longest(self) -> list[Row]:
        """The longest measured row of each kind with a token's time."""
        found = {(row.cache, row.impl): row for row in self.measurements if row.token_s}
        return list(found.values())

    @property
    def impls(self) -> list[str]:
        """The implementations of the rows."""
        return list(dict.fromkeys(row.impl for row in self.measurements))

    def name(self, row: Row | Change) -> str:
        """Its kind of cache, and of which implementation if there are several."""
        return label(row.impl, row.cache, len(self.impls) > 1)


def middle(values: Iterable[float | None]) -> float | None:
    """The median of the known figures."""
    from statistics import median

    found = [value for value in values if value is not None]
    return median(found) if found else None


def pays_text(report: BenchReport) -> str:
    """The length from which each cache pays, in words."""
    if not report.pays_from:
        caching = any(row.cache != "none" for row in report.measurements)
        other = "none" if caching else "a kind that caches, such as dynamic,"
        return f"Add {other} to --caches to see what a cache buys."
    groups: dict[tuple[str, str], list[str]] = {}
    for kind, length in report.pays_from.items():
        rows = [row for row in report.measurements if report.name(row) == kind]
        compared = [row.length for row in rows if row.speedup]
        if not compared:
            said = "was|were", "not measured beside no cache"
        elif length is None:
            said = "does|do", f"not pay at {tokens(compared[-1])}, the most measured"
        elif length == compared[0]:
            said = "pays|pay", f"from {tokens(compared[0])} on, the fewest measured"
        else:
            said = "pays|pay", f"from about {tokens(first_above(length))} on"
        groups.setdefault(said, []).append(kind)
    sentences = [
        f"{listed(kinds)} {verb(kinds, forms)} {rest}" for (forms, rest), kinds in groups.items()
    ]
    return "; ".join(sentences) + "."


def first_above(crossing: float) -> int:
    """The first whole length that is not below a crossing, which is known to some digits only.

    >>> first_above(1.3), first_above(10.000000001)
    (2, 10)
    """
    return math.ceil(crossing * (1 - 1e-6))


def best_text(report: BenchReport) -> str:
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
        f"At {tokens(max(lengths))} {report.name(fastest)} is fastest here "
        f"({number(fastest.tokens_per_s, 1, ',.0f')} tokens/s), and {smallest} smallest "
        f"({least / 1024:,.0f} KiB)."
    )


def versus_text(report: BenchReport) -> str:
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
    return f"At {tokens(longest)} {'; '.join(said)}."


def missing_text(report: BenchReport) -> str:
    """What was left out, and why; "" if nothing was."""
    if report.ended:
        return f"{ended_text(report).capitalize()}."
    left_out = missing(report)
    return f"Left out by --budget {report.budget:g} s: {left_out}." if left_out else ""


def ended_text(report: BenchReport) -> str:
    """What is missing because a signal ended the run; "" if none did."""
    if report.ended is None:
        return ""
    made = sum(len(row.samples_s) for row in report.measurements)
    all_runs = len(report.measurements) * report.repeats
    if made == all_runs:
        return f"{report.ended.value} behind the last of {all_runs} runs"
    return f"{report.ended.value} after {made} of {all_runs} runs"


def missing(report: BenchReport) -> str:
    """The rows without a sample, and what each would take."""
    groups: dict[str, list[Row]] = {}
    for row in report.measurements:
        if not row.samples_s:
            groups.setdefault(report.name(row), []).append(row)
    said = []
    for name, rows in groups.items():
        lengths = [f"{row.length:,}" for row in rows[:-1]] + [tokens(rows[-1].length)]
        takes = [f" (about {seconds(t)})" if (t := row.would_take_s) else "" for row in rows]
        said.append(f"{name} at {listed([n + t for n, t in zip(lengths, takes, strict=True)])}")
    return "; ".join(said)


def nothing_text(report: BenchReport) -> str:
    """The conclusion without any sample."""
    known = [row for row in report.measurements if row.would_take_s is not None]
    least = min(known, key=lambda row: row.would_take_s or 0.0, default=None)
    said = f"Nothing was measured within --budget {report.budget:g} s"
    if least is None:
        return f"{said}."
    takes = seconds(least.would_take_s or 0.0)
    return f"{said}: {report.name(least)} at {tokens(least.length)} would take about {takes}."


def memory_text(report: BenchReport) -> str:
    """How fast memory was read, and why tokens may have been read faster."""
    found, gb = report.bandwidth, 1e-9
    slow, fast = (f"{rate * gb:,.1f}" for rate in (min(found.rates), found.best))
    said = f"Memory was read at {fast} GB/s in this run."
    if found.disturbed:
        said += f" The reading was disturbed ({slow} to {fast} GB/s), and may be too low."
    faster = [
        row
        for row in report.longest
        if row.token_s and row.token_bytes and row.token_bytes / row.token_s > found.best
    ]
    stay = found.own_caches or 0
    # What cannot have stayed there came from memory, and no faster than memory is.
    inside = [r for r in faster if (r.token_bytes or 0) - stay <= found.best * (r.token_s or 0)]
    outside = [report.name(row) for row in faster if row not in inside]
    if inside:
        names = [report.name(row) for row in inside]
        said += (
            f" What {listed(names)} {verb(names, 'reads|read')} faster than that has stayed in the "
            f"processor's own caches ({stay / 2**20:,.0f} MiB), all of it or a part."
        )
    if outside:
        why = "they hold too little for that, so the speed of memory was measured too low"
        if found.own_caches is None:
            why = "nobody says what they hold"
        said += (
            f" Tokens of {listed(outside)} read faster than that, which the processor's own caches "
            f"do not explain: {why}."
        )
    return said
