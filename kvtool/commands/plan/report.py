"""What plan found, and what it says of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from kvtool.commands.bench.formatting import tokens
from kvtool.commands.plan.sizes import shown
from kvtool.config import LARGEST_SIZE

KVTOOL = "kvtool"
ORDER = ("fp8", "int8", "int4", "sliding", "none")  # of what loses more and more


@dataclass(frozen=True)
class Row:
    """One kind of cache. Bytes are whole numbers; None: not asked for, or not known."""

    cache: str
    impl: str
    exact: bool  # it loses nothing of what the model sees
    bytes: int
    peak_bytes: int  # right after a prompt of all tokens; this must fit
    bytes_read: int  # of keys and values, by a step of all rows at least
    bytes_per_token: int  # of a row, beyond all windows
    source_bytes: int
    fits: bool | None = None
    most_rows: int | None = None
    most_tokens: int | None = None
    floor_s: float | None = None
    pages: int | None = None
    table_bytes: int | None = None
    waste_bytes: int | None = None


@dataclass
class PlanReport:
    """A model, and what its caches take."""

    model: str
    model_type: str
    dtype: str
    dtype_assumed: bool
    rows_planned: int
    tokens: int
    source_tokens: int
    context: int | None
    layers: list[dict[str, Any]]
    weights_bytes: int | None
    weights_read_bytes: int | None
    weights_said_by: str
    weights_unknown: str
    expanded_token_bytes: int | None
    memory: int | None
    bandwidth: int | None
    caches: list[Row]
    resolved: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """1 if a memory was given and no cache fits into it beside the weights."""
        return int(self.memory is not None and not any(row.fits for row in self.caches))

    @property
    def load(self) -> dict[str, Any]:
        """What is asked for, for CSV and Markdown."""
        source = self.source_tokens or None
        of = {"model": self.model, "dtype": self.dtype}
        return {**of, "rows": self.rows_planned, "tokens": self.tokens, "source_tokens": source}

    @property
    def asked(self) -> str:
        """What is asked for, in words."""
        source = f" and a source of {self.source_tokens:,}" if self.source_tokens else ""
        return f"{counted(self.rows_planned)} of {tokens(self.tokens)}{source}"

    @property
    def conclusion(self) -> str:
        """The recommendation, and the first limit."""
        return self._of_memory() if self.memory is not None else self._of_sizes()

    def _of_sizes(self) -> str:
        first = self._first(self.caches)
        weights = f"{shown(self.weights_bytes)} of weights and " if self.weights_bytes else ""
        said = f"{self.asked}: {weights}{shown(first.bytes)} of keys and values ({named(first)})"
        least = min(self.caches, key=lambda row: row.peak_bytes)
        if least.peak_bytes < first.peak_bytes:
            said += f"; {named(least)} is the smallest, {shown(least.peak_bytes)}"
        return said + self._beyond()

    def _of_memory(self) -> str:
        assert self.memory is not None and self.weights_bytes is not None
        memory = shown(self.memory)
        if self.weights_bytes > self.memory:
            return f"nothing fits: the weights alone, {shown(self.weights_bytes)}, exceed {memory}"
        fitting = [row for row in self.caches if row.fits]
        if not fitting:
            least = min(self.caches, key=lambda row: row.peak_bytes)
            return (
                f"no cache of {self.asked} fits into {memory} beside "
                f"{shown(self.weights_bytes)} of weights; the smallest, "
                f"{named(least)}, {limits(least, self)}{self._beyond()}"
            )
        best = self._first(fitting)
        fit = "fits" if self.rows_planned == 1 else "fit"
        less = any(loss(row) < loss(best) for row in self.caches)  # and does not fit
        why = ", and with no kind that loses less" if less else ""
        return (
            f"take {named(best)}: {self.asked} {fit} into {memory}{why}; the first limit: it "
            f"{limits(best, self)}{self._beyond()}"
        )

    def _beyond(self) -> str:
        if self.context is None or self.tokens <= self.context:
            return ""
        return f"; but the model is made for {tokens(self.context)}"

    def _first(self, rows: list[Row]) -> Row:
        """What loses nothing, if there is one, and of these the smallest; else what loses least."""
        return min(rows, key=lambda row: (loss(row), row.peak_bytes, row.bytes))

    def rows(self) -> list[dict[str, Any]]:
        """The kinds."""
        return [asdict(row) for row in self.caches]

    def to_dict(self) -> dict[str, Any]:
        """What the document says."""
        return {**vars(self), "caches": self.rows(), "conclusion": self.conclusion}


def kind_of(row: Row) -> str:
    """The kind without settings."""
    return row.cache.partition(":")[0]


def loss(row: Row) -> int:
    """A number that is the higher the more a kind loses; 0 if nothing."""
    return 0 if row.exact else 1 + ORDER.index(kind_of(row))


def named(row: Row) -> str:
    """A kind, and whose it is if not ours."""
    return row.cache if row.impl == KVTOOL else f"{row.impl}' {row.cache}"


def counted(rows: int) -> str:
    """So many rows, in words."""
    return f"{rows:,} row{'s' if rows != 1 else ''}"


def limits(row: Row, report: PlanReport) -> str:
    """How far a kind goes."""
    assert row.most_rows is not None and row.most_tokens is not None
    rows = f"{counted(row.most_rows)} of {tokens(report.tokens)}"
    if row.most_rows == LARGEST_SIZE:
        rows = f"any rows of {tokens(report.tokens)}"
    longest = tokens(row.most_tokens)
    if row.most_tokens >= (report.context or LARGEST_SIZE):
        longest = f"the model's {tokens(report.context)}" if report.context else "any tokens"
    where = "one" if report.rows_planned == 1 else f"each of {report.rows_planned:,}"
    return f"holds {rows} or {longest} in {where} at most"
