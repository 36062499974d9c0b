"""How fast memory was read, and what that says of the tokens of bench."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtool.commands.bench.formatting import brief, listed, verb

if TYPE_CHECKING:
    from kvtool.commands.bench.report import BenchReport


def memory_text(report: BenchReport) -> str:
    """How fast memory was read, and why tokens may have been read faster."""
    found, gb = report.bandwidth, 1e-9
    by_threads = {n: f"{each.best * gb:,.1f} GB/s" for n, each in report.bandwidths.items()}
    rates = listed(
        [f"{rate} by {n} thread{'s' * (n != 1)}" for n, rate in by_threads.items()]
        or [f"{found.best * gb:,.1f} GB/s"]
    )
    said = f"Memory was read at {rates} in this run."
    for each in report.bandwidths.values() or [found]:
        if each.disturbed:
            slow, fast = (f"{rate * gb:,.1f}" for rate in (min(each.rates), each.best))
            said += f" The reading was disturbed ({slow} to {fast} GB/s), and may be too low."
    faster = [
        row
        for row in report.longest
        if row.token_s
        and row.token_bytes
        and row.token_bytes / row.token_s > report.read_rate(row).best
    ]
    stay = found.own_caches or 0
    # What cannot have stayed there came from memory, and no faster than memory is.
    inside = [
        r
        for r in faster
        if (r.token_bytes or 0) - stay <= report.read_rate(r).best * (r.token_s or 0)
    ]
    every: dict[str, list[str]] = {}
    for row in report.longest:
        every.setdefault(row.cache, []).append(report.name(row))
    outside = brief([report.name(row) for row in faster if row not in inside], every)
    if inside:
        names = brief(list(map(report.name, inside)), every)
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
