"""Compares bench with an earlier run: where runs are saved, what changed, and what is a
regression."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

from kvtool.commands.bench.formatting import tokens
from kvtool.config.setups import Setup, words_of
from kvtool.errors import FileError, UsageError
from kvtool.files import NAME, SAVED, saved_run
from kvtool.folders import Folder
from kvtool.reading import nearest, read_json_object, short

if TYPE_CHECKING:
    from kvtool.ui.output import Output

FOLDER = Path(*SAVED)
SCHEMA = "kvtool.bench/1"
MAX_ROWS, MAX_SAMPLES = 100_000, 1_000_000  # of a row
MAX_SECONDS = 1e9  # seconds
FIELDS: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "median": median,
    "mean": mean,
    "max": max,
}
# Figures of a row, of all its tokens: the waits for the first one and between two of them.
FIGURES = tuple(
    f"{wait}{part}" for wait in ("first_token", "between_tokens") for part in ("", "_p90", "_p99")
)
LIMIT = re.compile(r"(\w+):(\d+(?:\.\d+)?)(%?)")
# What must be equal for times to be comparable, by its place in the document.
SAME = {
    "processor": ("environment", "cpu"),
    "threads": ("environment", "threads"),
    "torch": ("environment", "torch"),
    "number format": ("settings", "run", "dtype"),
    "kernels": ("settings", "kernels"),
    "device": ("resolved", "device"),
    "model": ("resolved", "sha256"),
    "prompt": ("prompt_length",),
    "depth": ("depth",),
    "batch": ("batch_size",),
    "transformers": ("resolved", "transformers"),  # its version
}
OF_SOME = {"transformers"}  # what only some runs have: one without it has no rows to compare
# Of these, a run may have several values, which its settings list; then its rows tell them apart.
LISTED = {"number format": "dtypes", "batch": "batch_sizes", "threads": "thread_counts"}
AXES = {"dtype": "number format", "batch_size": "batch", "threads": "threads"}  # of a row


@dataclass(frozen=True)
class Measured:
    """A row as it was measured. Rows of older runs have no setup of their own: None in it."""

    length: int
    impl: str
    cache: str
    axes: tuple[Any, ...]  # the values of a Setup, None of older runs
    samples: list[float]  # seconds
    figures: dict[str, float | None]

    def value(self, field: str) -> float | None:
        """A field that a limit may be on, in seconds; None if it was not measured."""
        if field in FIGURES:
            return self.figures[field]
        return FIELDS[field](self.samples) if self.samples else None

    def key(self, axes: Sequence[int]) -> tuple[object, ...]:
        """What tells it from the other rows, where those differ on these axes."""
        return self.length, self.impl, self.cache, *(self.axes[i] for i in axes)

    def setup(self, axes: Sequence[int]) -> str:
        """What tells it from the other rows in words, where those differ on these axes."""
        setup = Setup(*self.axes)
        return " ".join(words_of("", setup, [Setup._fields[i] for i in axes]))


def row_name(impl: str, setup: str, cache: str, length: int) -> str:
    """How sentences call a row: its kind and length, behind what tells it from others."""
    whose = "" if impl == "kvtool" else impl
    return f"{' '.join(filter(None, (whose, setup, cache)))} at {tokens(length)}"


@dataclass(frozen=True)
class Limit:
    """How much slower a row may be than the baseline's: `median:10%`, or in seconds `min:0.5`."""

    field: str
    most: float
    percent: bool

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Read pytest-benchmark's grammar, FIELD:NUMBER or FIELD:NUMBER%. Raises UsageError."""
        match = LIMIT.fullmatch(text)
        if match is None or match[1] not in (*FIELDS, *FIGURES):
            raise UsageError(
                f"--fail-if: {text!r} is not a limit (expected a field, a colon and seconds or a "
                "percentage)",
                f"Write median:10%, or min:0.5 for seconds; fields: "
                f"{', '.join((*FIELDS, *FIGURES))}.",
            )
        return cls(match[1], float(match[2]), bool(match[3]))

    def __str__(self) -> str:
        most = f"{self.most:g} %" if self.percent else f"{self.most:g} s"
        return f"{most} ({self.field})"

    def exceeded(self, name: str, before: Measured, now: Measured) -> str:
        """A sentence if a row is slower than the baseline's by more than the limit, or if that
        cannot be told; else ""."""
        old, new = before.value(self.field), now.value(self.field)
        if old is None or new is None:
            where = "in the baseline" if old is None else "here"
            return f"{name}: {self.field} was not measured {where}"
        if new - old <= (old * self.most / 100 if self.percent else self.most):
            return ""
        return (
            f"{name}: {self.field} {old * 1000:,.1f} -> {new * 1000:,.1f} ms "
            f"({new / old - 1:+.0%}), beyond the limit of {self}"
        )


@dataclass(frozen=True)
class Change:
    """One kind at one length, then and now."""

    length: int
    impl: str
    cache: str
    before_s: float  # medians
    now_s: float
    setup: str = ""  # in words, where rows differ in it

    @property
    def name(self) -> str:
        """As `row_name`."""
        return row_name(self.impl, self.setup, self.cache, self.length)


@dataclass(frozen=True)
class Comparison:
    """The changes since a saved run, and whether they are within the limits."""

    baseline: str = ""  # as it was asked for; "" of a run that is compared with none
    limits: tuple[Limit, ...] = ()
    changes: list[Change] = field(default_factory=list)  # of the rows that both have
    regressions: list[str] = field(default_factory=list)  # why the answer is no
    not_measured_now: list[str] = field(default_factory=list)  # though asked for
    not_in_baseline: list[str] = field(default_factory=list)

    @property
    def verdicts(self) -> list[tuple[bool | None, str]]:
        """The verdicts in words: right, wrong, or (None) neither."""
        said: list[tuple[bool | None, str]] = []
        if not self.limits:  # with limits that is a regression
            said += [(None, sentence) for sentence in self.not_measured_now]
        said += [(None, sentence) for sentence in self.not_in_baseline]
        said += [(False, sentence) for sentence in self.regressions]
        if self.limits and not self.regressions:
            most = " or ".join(map(str, self.limits))
            said.append((True, f"no row is slower than {self.baseline} by more than {most}"))
        return said

    def rows(self) -> list[dict[str, Any]]:
        """The changes as flat rows."""
        return [
            {
                **{name: value for name, value in vars(change).items() if name != "setup"},
                **({"setup": change.setup} if change.setup else {}),
                "change": f"{change.now_s / change.before_s - 1:+.1%}",
            }
            for change in self.changes
        ]


def place(name: str) -> Path:
    """Where `--save NAME` puts a run, in a folder that is made. Raises UsageError for a name that
    is no file name, and FileError."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"--save: {name!r} is not a name (expected letters, digits, '.', '-' and '_')"
        )
    with _folder(make=True) as folder:
        folder.require_own(f"{name}.json", "a file")
    return FOLDER / f"{name}.json"


def save(name: str, data: bytes) -> Path:
    """Save a run at `place`, durably. Raises FileError."""
    path = place(name)
    with _folder() as folder:
        folder.write(path.name, data)
    return path


def _folder(make: bool = False) -> Folder:
    """The folder of all runs, reached through no link, since the current folder may be a
    stranger's. Raises FileError."""
    try:
        found = Folder.at(Path())
    except OSError as error:
        raise FileError(f"{FOLDER}: cannot be opened ({error.strerror})") from error
    for name in SAVED:
        with found:
            found = found.below(name, make)
    return found


def load(text: str) -> dict[str, Any]:
    """The document of a saved run, by name or by path. Raises FileError."""
    path = saved_run(text)
    if not os.path.lexists(path):
        raise FileError(f"--compare {text}: not found", nearest(path) or "Save a run with --save.")
    if path.parent == FOLDER:
        with _folder() as folder:
            folder.require_own(path.name, "a file")
    content = read_json_object(path, "a run that bench saved")
    if content.get("schema") != SCHEMA:
        found = f"schema {short(repr(content.get('schema')))}, expected {SCHEMA}"
        raise FileError(f"{path}: is not a run of bench ({found})")
    try:
        rows_of(content)
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path}: its measurements are damaged ({_said(error)})") from error
    return content


def _said(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else short(str(error))


def rows_of(content: Mapping[str, Any]) -> list[Measured]:
    """The rows of a document, each once; a row may have no samples.

    Raises KeyError, TypeError or ValueError for what bench cannot have written.
    """
    rows, found = content["measurements"], dict[object, Measured]()
    if not isinstance(rows, list) or len(rows) > MAX_ROWS:
        raise TypeError(f"they are no list of up to {MAX_ROWS:,} rows")
    common = tuple(_at(content, SAME[what]) for what in AXES.values())
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {number} is no object")
        measured = _measured(row, number, common)
        key = measured.key(range(len(AXES)))
        if key in found:
            raise ValueError(f"{_name(measured, number)}, is there twice")
        found[key] = measured
    return list(found.values())


def _name(row: Measured, number: int) -> str:
    return f"row {number}, {short(row.cache, 20)!r} at {row.length}"


def _measured(row: Mapping[str, Any], number: int, common: Sequence[Any]) -> Measured:
    # Runs that were kept before there was a choice are kvtool's.
    key = row["length"], row.get("impl", "kvtool"), row["cache"]
    if [type(part) for part in key] != [int, str, str] or key[0] < 1:
        raise TypeError(f"{short(repr(key))} is no length, implementation and kind")
    axes = tuple(row.get(name, value) for name, value in zip(AXES, common, strict=True))
    if any(
        type(a) not in (kind, type(None)) for a, kind in zip(axes, (str, int, int), strict=True)
    ):
        raise TypeError(f"{short(repr(axes))} is no number format, batch and threads")
    found = Measured(*key, axes, [], {})
    name, samples = _name(found, number), row["samples_s"]
    if not isinstance(samples, list) or len(samples) > MAX_SAMPLES:
        raise TypeError(f"the samples of {name} are no list of up to {MAX_SAMPLES:,}")
    for sample in samples:
        found.samples.append(_seconds(sample, f"{name}, has a sample"))
    for figure in FIGURES:
        value = row.get(f"{figure}_s")
        known = None if value is None else _seconds(value, f"{name}, has a {figure}", zero=True)
        found.figures[figure] = known
    return found


def _seconds(value: Any, what: str, zero: bool = False) -> float:
    in_range = type(value) in (int, float) and 0 <= value < MAX_SECONDS
    if not in_range or not (value or zero):
        raise ValueError(f"{what} of {short(repr(value), 20)} s")
    return float(value)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences that make two runs incomparable, in words."""
    found = []
    for what, place in SAME.items():
        if _lists(before, what) or _lists(now, what):
            continue
        old, new = _at(before, place), _at(now, place)
        if old != new and not (what in OF_SOME and None in (old, new)):
            found.append(f"{what} was {short(str(old))} and is {new}")
    return found


def _lists(content: Mapping[str, Any], what: str) -> bool:
    """Whether a run has several values of a condition."""
    found = _at(content, ("settings", LISTED[what])) if what in LISTED else None
    return isinstance(found, list) and len(found) > 1


def _at(content: Any, place: Sequence[str]) -> Any:
    for key in place:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def compare(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    limits: Sequence[Limit],
    baseline: str = "the baseline",
) -> Comparison:
    """Changes of the rows that both have, a sentence for each that exceeds a limit, and one for
    each that only one of them has; `now` has a row for all that was asked for.

    Number format, batch and threads are conditions of a whole run, unless one of the two has
    several: then only rows are compared that are alike in them.
    """
    then, asked = rows_of(before), rows_of(now)
    axes = [
        i
        for i in range(len(AXES))
        if any(len({r.axes[i] for r in rows}) > 1 for rows in (then, asked))
    ]
    known = {row.key(axes): row for row in then}
    found = Comparison(baseline, tuple(limits))
    for row in asked:
        old = known.get(row.key(axes))
        setup = row.setup(axes)
        name = row_name(row.impl, setup, row.cache, row.length)
        if old and old.samples and not row.samples:
            found.not_measured_now.append(f"{name}: in the baseline, not measured now")
        elif row.samples and not (old and old.samples):
            found.not_in_baseline.append(f"{name}: not in the baseline")
        if not old or not old.samples or not row.samples:
            continue
        medians = median(old.samples), median(row.samples)
        found.changes.append(Change(row.length, row.impl, row.cache, *medians, setup))
        exceeded = (limit.exceeded(name, old, row) for limit in limits)
        found.regressions.extend(filter(None, exceeded))
    if limits:
        found.regressions.extend(found.not_measured_now)
        if not found.changes:
            found.regressions.append("no row was measured both times")
    return found


def check_comparable(
    before: Mapping[str, Any], now: Mapping[str, Any], name: str | None, strict: bool, out: Output
) -> None:
    """Say what differs from the baseline's conditions; raise FileError if that is to be `strict`,
    as where a verdict is wanted."""
    different = differences(before, now)
    if not different:
        return
    if strict:
        raise FileError(
            f"--compare {name}: times are not comparable ({'; '.join(different)})",
            "Save a run of this machine and these settings, or give --force.",
        )
    out.warn(f"--compare {name}: not the same conditions: {'; '.join(different)}")
