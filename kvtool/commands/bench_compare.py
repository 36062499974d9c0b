"""bench against an earlier run: where runs are kept, what changed, and what is a regression."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from kvtool.errors import FileError, UsageError
from kvtool.files import nearest, read_json_object

FOLDER = Path(".benchmarks") / "kvtool"
SCHEMA = "kvtool.bench/1"
NAME = re.compile(r"[\w.-]+")
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

    def exceeded(self, before: Sequence[float], now: Sequence[float]) -> bool:
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


def place(name: str) -> Path:
    """Where `--save NAME` puts a run, in a folder that is made. Raises UsageError for a name that
    is no file name, and FileError."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"--save: {name!r} is not a name (expected letters, digits, '.', '-' and '_')"
        )
    try:
        FOLDER.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"--save: {FOLDER} cannot be made ({error.strerror})") from error
    return FOLDER / f"{name}.json"


def load(text: str) -> dict[str, Any]:
    """The document of a saved run, by name or by path. Raises FileError."""
    path = Path(text)
    if NAME.fullmatch(text) and not path.is_file():
        path = FOLDER / f"{text}.json"
    if not path.exists():
        raise FileError(f"--compare {text}: not found", nearest(path) or "Save a run with --save.")
    content = read_json_object(path, "a run that bench saved")
    if content.get("schema") != SCHEMA:
        raise FileError(
            f"{path}: is not a run of bench (schema {content.get('schema')!r}, expected {SCHEMA})"
        )
    try:
        samples_of(content)
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path}: its measurements are damaged ({error!r})") from error
    return content


def samples_of(content: Mapping[str, Any]) -> dict[tuple[int, str, str], list[float]]:
    """Seconds of each length, implementation and kind."""
    return {_key(row): [float(s) for s in row["samples_s"]] for row in content["measurements"]}


def _key(row: Mapping[str, Any]) -> tuple[int, str, str]:
    # Runs that were kept before there was a choice are kvtool's.
    return int(row["length"]), str(row.get("impl", "kvtool")), str(row["cache"])


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What makes two runs incomparable, in words."""
    found = []
    for what, place in SAME.items():
        old, new = _at(before, place), _at(now, place)
        if old != new and not (what in OF_SOME and None in (old, new)):
            found.append(f"{what} was {old} and is {new}")
    return found


def _at(content: Any, place: Sequence[str]) -> Any:
    for key in place:
        content = content.get(key) if isinstance(content, Mapping) else None
    return content


def compare(
    before: Mapping[str, Any], now: Sequence[Mapping[str, Any]], limits: Sequence[Limit]
) -> tuple[list[Change], list[str]]:
    """Changes of the rows that both have, and a sentence for each that exceeds a limit."""
    old = samples_of(before)
    changes, regressions = [], []
    for row in now:
        length, impl, cache = key = _key(row)
        then, samples = old.get(key), row["samples_s"]
        if not then or not samples:
            continue
        changes.append(Change(length, impl, cache, median(then), median(samples)))
        for limit in limits:
            if limit.exceeded(then, samples):
                was, is_now = (FIELDS[limit.field](values) for values in (then, samples))
                whose = "" if impl == "kvtool" else f"{impl} "
                regressions.append(
                    f"{whose}{cache} at {length} tokens: {limit.field} {was * 1000:,.1f} -> "
                    f"{is_now * 1000:,.1f} ms ({is_now / was - 1:+.0%})"
                )
    if limits and not changes:
        regressions.append("no row was measured both times")
    return changes, regressions
