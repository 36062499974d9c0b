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


Key = tuple[int, str, str]  # length, implementation, kind of cache


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
        if match is None or match[1] not in FIELDS:
            raise UsageError(
                f"--fail-if: {text!r} is not a limit (expected a field, a colon and seconds or a "
                "percentage)",
                f"Write median:10%, or min:0.5 for seconds; fields: {', '.join(FIELDS)}.",
            )
        return cls(match[1], float(match[2]), bool(match[3]))

    def __str__(self) -> str:
        most = f"{self.most:g} %" if self.percent else f"{self.most:g} s"
        return f"{most} ({self.field})"

    def exceeded(self, before: Sequence[float], now: Sequence[float]) -> bool:
        """Whether samples, in seconds, are slower than the baseline's by more than the limit."""
        old, new = FIELDS[self.field](before), FIELDS[self.field](now)
        return new - old > (old * self.most / 100 if self.percent else self.most)


@dataclass(frozen=True)
class Change:
    """One kind at one length, then and now."""

    length: int
    impl: str
    cache: str
    before_s: float  # medians
    now_s: float


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
            {**vars(change), "change": f"{change.now_s / change.before_s - 1:+.1%}"}
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
        samples_of(content)
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path}: its measurements are damaged ({_said(error)})") from error
    return content


def _said(error: Exception) -> str:
    return f"{error} is missing" if isinstance(error, KeyError) else short(str(error))


def samples_of(content: Mapping[str, Any]) -> dict[Key, list[float]]:
    """Seconds of each length, implementation and kind; a row may have none.

    Raises KeyError, TypeError or ValueError for what bench cannot have written.
    """
    rows, found = content["measurements"], {}
    if not isinstance(rows, list) or len(rows) > MAX_ROWS:
        raise TypeError(f"they are no list of up to {MAX_ROWS:,} rows")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise TypeError(f"row {number} is no object")
        key, samples = _key(row), row["samples_s"]
        name = f"row {number}, {short(key[2], 20)!r} at {key[0]}"
        if key in found:
            raise ValueError(f"{name}, is there twice")
        if not isinstance(samples, list) or len(samples) > MAX_SAMPLES:
            raise TypeError(f"the samples of {name} are no list of up to {MAX_SAMPLES:,}")
        for sample in samples:
            if type(sample) not in (int, float) or not 0 < sample < MAX_SECONDS:
                raise ValueError(f"{name}, has a sample of {short(repr(sample), 20)} s")
        found[key] = [float(sample) for sample in samples]
    return found


def _key(row: Mapping[str, Any]) -> Key:
    # Runs that were kept before there was a choice are kvtool's.
    key = row["length"], row.get("impl", "kvtool"), row["cache"]
    if [type(part) for part in key] != [int, str, str] or key[0] < 1:
        raise TypeError(f"{short(repr(key))} is no length, implementation and kind")
    return key


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences that make two runs incomparable, in words."""
    found = []
    for what, place in SAME.items():
        old, new = _at(before, place), _at(now, place)
        if old != new and not (what in OF_SOME and None in (old, new)):
            found.append(f"{what} was {short(str(old))} and is {new}")
    return found


def _at(content: Any, place: Sequence[str]) -> Any:
    for key in place:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def compare(
    before: Mapping[str, Any],
    now: Sequence[Mapping[str, Any]],
    limits: Sequence[Limit],
    baseline: str = "the baseline",
) -> Comparison:
    """Changes of the rows that both have, a sentence for each that exceeds a limit, and one for
    each that only one of them has; `now` has a row for all that was asked for."""
    old = samples_of(before)
    found = Comparison(baseline, tuple(limits))
    for row in now:
        length, impl, cache = key = _key(row)
        then, samples = old.get(key), row["samples_s"]
        whose = "" if impl == "kvtool" else f"{impl} "
        name = f"{whose}{cache} at {tokens(length)}"
        if then and not samples:
            found.not_measured_now.append(f"{name}: in the baseline, not measured now")
        elif samples and not then:
            found.not_in_baseline.append(f"{name}: not in the baseline")
        if not then or not samples:
            continue
        found.changes.append(Change(length, impl, cache, median(then), median(samples)))
        for limit in limits:
            if limit.exceeded(then, samples):
                was, is_now = (FIELDS[limit.field](values) for values in (then, samples))
                found.regressions.append(
                    f"{name}: {limit.field} {was * 1000:,.1f} -> {is_now * 1000:,.1f} ms "
                    f"({is_now / was - 1:+.0%}), beyond the limit of {limit}"
                )
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
