"""The report of bench: its rows, and the sentences that follow from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kvtool.commands.bench.advice import recommendation
from kvtool.commands.bench.cases import limit_cases
from kvtool.commands.bench.compare import Comparison
from kvtool.commands.bench.formatting import brief, listed, number, seconds, tokens, verb
from kvtool.commands.bench.row import Row
from kvtool.config.setups import axes_of, name_of, words_of
from kvtool.ending import End
from kvtool.ui.cases import Case
from kvtool.ui.output import MARKS

if TYPE_CHECKING:
    from kvtool.core.bench.traffic import Bandwidth


@dataclass
class BenchReport:
    """All rows, and the conclusions from them."""

    measurements: list[Row]
    pays_from: dict[str, float | None]  # `name` -> the length from which on it beats no cache
    batch_size: int
    prompt_length: int
    depth: int | None
    kernels: str
    bandwidth: Bandwidth  # as measured in this run, with the first number of threads
    quality: dict[str, dict[str, Any]]  # of each lossy kind
    seconds: float
    resolved: dict[str, Any] = field(default_factory=dict)  # the settings that were left open
    comparison: Comparison = field(default_factory=Comparison)
    ended: End | None = None  # by what, so that samples are missing
    budget: float = 0.0  # seconds
    repeats: int = 1
    seed: int = 0
    bandwidths: dict[int, Bandwidth] = field(default_factory=dict)  # by threads, if several

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
        return [sentence for sentence in (*found, self.recommendation) if sentence]

    @property
    def recommendation(self) -> str:
        """Which kind suits this load, and why; "" where there is no choice, or samples are missing
        because of a signal."""
        if self.ended:
            return ""
        lossy = self.resolved.get("lossy", [])
        return recommendation(self.measurements, self.quality, lossy)

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
        batches = dict.fromkeys(str(row.batch_size) for row in self.measurements)
        return {
            "batch_size": ", ".join(batches) if len(batches) > 1 else self.batch_size,
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
            **{k: v for k, v in vars(self).items() if k not in ("comparison", "bandwidths")},
            **vars(self.comparison),
            "bandwidth": self.bandwidth.best,
            "bandwidth_samples": self.bandwidth.rates,
            "bandwidth_disturbed": self.bandwidth.disturbed,
            "own_caches": self.bandwidth.own_caches,
            "bandwidth_by_threads": {n: found.best for n, found in self.bandwidths.items()},
            "recommendation": self.recommendation,
            "conclusion": " ".join([*self.sentences, *marked]),
        }

    @property
    def longest(self) -> list[Row]:
        """The longest measured row of each kind with a token's time."""
        found = {(r.cache, r.impl, r.setup): r for r in self.measurements if r.token_s}
        return list(found.values())

    @property
    def impls(self) -> list[str]:
        """The implementations of the rows."""
        return list(dict.fromkeys(row.impl for row in self.measurements))

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes on which the rows differ, beside length and kind."""
        return axes_of(self.measurements)

    def name(self, row: Row) -> str:
        """Its kind of cache, behind what tells it from others of that kind."""
        return name_of(row, self.axes)

    def read_rate(self, row: Row) -> Bandwidth:
        """How fast memory was read with the row's number of threads."""
        return self.bandwidths.get(row.threads, self.bandwidth)


def pays_text(report: BenchReport) -> str:
    """The length from which each cache pays, in words."""
    if not report.pays_from:
        caching = any(row.cache != "none" for row in report.measurements)
        other = "none" if caching else "a kind that caches, such as dynamic,"
        return f"Add {other} to --caches to see what a cache buys."
    groups: dict[tuple[str, str], list[str]] = {}
    by_name: dict[str, list[Row]] = {}
    for row in report.measurements:
        by_name.setdefault(report.name(row), []).append(row)
    for kind, length in report.pays_from.items():
        rows = by_name[kind]
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
    every: dict[str, list[str]] = {}  # the names of each kind
    for name in report.pays_from:
        every.setdefault(by_name[name][0].cache, []).append(name)
    sentences = []
    for (forms, rest), names in groups.items():
        kinds = brief(names, every) if report.axes else names
        sentences.append(f"{listed(kinds)} {verb(kinds, forms)} {rest}")
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
    fastest = max(rows, key=lambda row: row.tokens_per_s or 0)
    least = min(row.bytes_measured or 0 for row in rows)
    smallest = listed([report.name(row) for row in rows if row.bytes_measured == least])
    rates = [r.tokens_per_s or 0 for r in report.measurements if r.length == max(lengths)]
    of_caches = "" if max(rates) == fastest.tokens_per_s else "of the caches "
    return (
        f"At {tokens(max(lengths))} {report.name(fastest)} is fastest {of_caches}here "
        f"({number(fastest.tokens_per_s, 1, ',.0f')} tokens/s), and {smallest} smallest "
        f"({least / 1024:,.0f} KiB)."
    )


def versus_text(report: BenchReport) -> str:
    """By how much one implementation is faster than the other with each kind, at the longest length
    at which both were measured; "" of a single one."""
    if len(report.impls) < 2:
        return ""
    one, other = report.impls
    axes = [axis for axis in report.axes if axis != "impl"]
    medians: dict[tuple[int, str, str], dict[str, float]] = {}
    for r in report.measurements:
        if r.median_s:
            words = " ".join(words_of("", r.setup, axes))
            medians.setdefault((r.length, r.cache, words), {})[r.impl] = r.median_s
    both = [key for key, found in medians.items() if len(found) == 2]
    if not both:
        return f"{one} and {other} were not measured beside each other."
    longest = max(length for length, *_ in both)
    factors: dict[tuple[str, str], dict[str, list[tuple[float, str]]]] = {}
    for length, kind, words in both:
        if length != longest:
            continue
        found = medians[length, kind, words]
        ratio = found[other] / found[one]
        order = (one, other) if ratio >= 1 else (other, one)
        by_kind = factors.setdefault(order, {})
        by_kind.setdefault(kind, []).append((max(ratio, 1 / ratio), words))
    said = []
    for (faster, slower), by_kind in factors.items():
        parts = [part for kind, ratios in by_kind.items() for part in factor_texts(kind, ratios)]
        said.append(f"{faster} is faster than {slower} by a factor of {listed(parts)}")
    return f"At {tokens(longest)} {'; '.join(said)}."


def factor_texts(kind: str, ratios: list[tuple[float, str]]) -> list[str]:
    """The factors of a kind in each setup; of more than two the range.

    >>> factor_texts("static", [(2.0, "batch-1"), (1.5, "batch-2"), (1.75, "batch-4")])
    ['1.50 to 2.00 with static (3 setups)']
    """
    how = "without a cache" if kind == "none" else f"with {kind}"
    if len(ratios) > 2:
        least, most = min(ratios)[0], max(ratios)[0]
        return [f"{least:.2f} to {most:.2f} {how} ({len(ratios)} setups)"]
    return [f"{ratio:.2f} {how}" + f" ({words})" * bool(words) for ratio, words in ratios]


def missing_text(report: BenchReport) -> str:
    """What was left out, and why; "" if nothing was."""
    if report.ended:
        return f"{ended_text(report).capitalize()}."
    said = [f"Not measured: {why}." for why in report.resolved.get("not_measured", ())]
    if left_out := missing(report):
        said.append(f"Left out by --budget {report.budget:g} s: {left_out}.")
    return " ".join(said)


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
