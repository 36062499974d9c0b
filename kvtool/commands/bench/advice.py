"""Which kind of cache suits the load that was measured, and why, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kvtool.commands.bench.formatting import listed, tokens, verb
from kvtool.commands.bench.row import Row
from kvtool.config.setups import Setup, axes_of, name_of, words_of

NEAR = 1.1  # times as long as the fastest: what takes less memory is worth that
FEW = 3  # samples, from which on they tell the noise


class Advice(NamedTuple):
    """The kind for one setup and length."""

    kind: str  # behind its implementation, where there are several
    why: str
    loss: str  # what it loses; "" if nothing
    way_out: str  # and what loses nothing
    few: bool  # too few samples tell the noise


class Measured(NamedTuple):
    """What was measured of all rows together."""

    axes: tuple[str, ...]  # on which they differ
    quality: Mapping[str, Mapping[str, Any]]  # of lossy kinds
    lossy: Sequence[str]

    def name(self, row: Row) -> str:
        """Its kind, behind its implementation if there are several."""
        return name_of(row, [axis for axis in self.axes if axis == "impl"])


def recommendation(
    measurements: Sequence[Row], quality: Mapping[str, Mapping[str, Any]], lossy: Sequence[str]
) -> str:
    """Which kind to use for this load, for each setup that was measured; "" without a choice.

    It is the one with the least memory of those that take up to 10 % longer than the fastest, or
    that differ from it by less than the noise. What a lossy one loses is said.
    """
    measured = Measured(axes_of(measurements), quality, lossy)
    found: dict[Setup, Advice] = {}
    rows_of: dict[Setup, list[Row]] = {}
    for setup in dict.fromkeys(row.setup for row in measurements):
        rows = [r for r in measurements if r.setup == setup and r.median_s is not None]
        lengths = [row.length for row in rows]
        several = [n for n in lengths if lengths.count(n) > 1]
        if several:
            rows_of[setup] = [row for row in rows if row.length == max(several)]
            found[setup] = _advice(measured, rows_of[setup])
    if not found:
        return ""
    lengths = [rows[0].length for rows in rows_of.values()]
    least, most = min(lengths), max(lengths)
    at = tokens(most) if least == most else f"{least:,} to {tokens(most)}"
    setups = {row.setup for row in measurements}
    if len(setups) > 1:
        return f"For this load, at {at}: {_in_short(measured, found, len(setups))}."
    (advice,) = found.values()
    return f"For this load, at {at}: {advice.kind}{advice.why}{advice.loss}{advice.way_out}."


def _in_short(measured: Measured, found: Mapping[Setup, Advice], n_setups: int) -> str:
    """The kind for each of several setups, without the figures that the table has."""
    axes = [axis for axis in measured.axes if axis != "impl"]
    setups: dict[str, list[str]] = {}
    losses: dict[str, list[Advice]] = {}
    for setup, advice in found.items():
        setups.setdefault(advice.kind, []).append(" ".join(words_of("", setup, axes)))
        losses.setdefault(advice.kind, []).append(advice)
    parts = []
    for kind, names in sorted(setups.items(), key=lambda item: -len(item[1])):
        where = f"in {listed(names)}"
        if 2 * len(names) > n_setups > 2:
            where = f"in {'all' if len(names) == n_setups else 'most'} setups"
        ways_out = {advice.way_out for advice in losses[kind]}
        way_out = ways_out.pop() if len(ways_out) == 1 else ""  # each setup has its own
        parts.append(f"{kind} {where}{losses[kind][0].loss}{way_out}")
    rule = "the fastest, or the least memory within 10 % of the fastest or within the noise"
    if any(advice.few for advice in found.values()):
        rule += f", which fewer than {FEW} samples do not tell"
    return f"{'; '.join(parts)} ({rule})"


def _advice(measured: Measured, rows: list[Row]) -> Advice:
    """The kind for one setup and length, and why."""
    fastest, *others = ordered = sorted(rows, key=lambda row: row.median_s or 0.0)
    alike = [row for row in others if _is_noise(fastest, row)]
    near = [fastest, *(r for r in others if r in alike or _times(r, fastest) <= NEAR)]
    chosen = min(near, key=lambda row: (row.bytes_measured or 0, row.median_s))
    if chosen is fastest and not alike:
        times = f"{_times(others[0], fastest):.2f} times"
        why = f" is the fastest ({measured.name(others[0])} takes {times} as long)"
    else:
        why = f", {_reason(measured, fastest, chosen, alike, near)}"
    few = any(len(row.samples_s) < FEW for row in ordered)
    if few:
        why += f", though fewer than {FEW} samples do not tell the noise"
    return Advice(measured.name(chosen), why, *_loss(measured, chosen, near), few)


def _reason(
    measured: Measured, fastest: Row, chosen: Row, alike: Sequence[Row], near: Sequence[Row]
) -> str:
    """Why one is chosen that is not the fastest beyond all doubt."""
    memory = _memory(measured, chosen, [row for row in near if row is not chosen])
    if chosen is fastest or chosen in alike:
        same = [measured.name(row) for row in (fastest, *alike) if row is not chosen]
        noise = f"{verb(same, 'differs|differ')} from it by less than the noise"
        return f"since {listed(same)} {noise}{f' and it {memory}' if memory else ''}"
    longer = f"{_times(chosen, fastest) - 1:.0%}".replace("%", " %")
    return f"since it {memory} and only {longer} longer than {measured.name(fastest)}, the fastest"


def _memory(measured: Measured, chosen: Row, others: list[Row]) -> str:
    """What the chosen one takes beside the fastest of the others that take more."""
    more = [row for row in others if (row.bytes_measured or 0) > (chosen.bytes_measured or 0)]
    if not more:
        return ""
    least, other = (f"{(row.bytes_measured or 0) / 1024:,.0f} KiB" for row in (chosen, more[0]))
    return f"takes the least memory ({least}, and {measured.name(more[0])} {other})"


def _loss(measured: Measured, chosen: Row, near: list[Row]) -> tuple[str, str]:
    """What a lossy kind loses, and which kind of the near ones loses nothing."""
    if chosen.cache not in measured.lossy:
        return "", ""
    found = measured.quality.get(chosen.cache)
    what = (
        f"its predictions are {found['kl']:.2g} nats a token from those without a loss (KL), "
        f"and its perplexity {found['perplexity']:.2f} instead of "
        f"{found['lossless_perplexity']:.2f}"
        if found
        else "how much was not measured"
    )
    exact = [row for row in near if row.cache not in measured.lossy and row.cache != "none"]
    way_out = f"; without a loss, {measured.name(exact[0])}" if exact else ""
    return f", but it is lossy: {what}", way_out


def _times(row: Row, other: Row) -> float:
    return (row.median_s or 0.0) / (other.median_s or 1.0)


def _is_noise(fastest: Row, row: Row) -> bool:
    """Whether the medians differ by no more than the wider of both spreads."""
    spreads = [each.iqr_s for each in (fastest, row) if each.iqr_s is not None]
    return bool(spreads) and (row.median_s or 0.0) - (fastest.median_s or 0.0) <= max(spreads)
