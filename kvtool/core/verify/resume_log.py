"""The log of results for --resume. Each result is added when it is reached, so that interrupted
work can go on."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from kvtool.core.facts import changed, changes, flat
from kvtool.errors import FileError
from kvtool.files import take_lock
from kvtool.reading import parse_json, read_bytes

SCHEMA = "kvtool.results/1"
BEGINNING = f'{{"schema": "{SCHEMA}"'.encode()
MAX_RESULTS_BYTES = 2**28  # bytes
DECISIVE = ("check", "model")  # where these differ, nearly all else does
SHA256 = "sha256"
MAX_NAMED = 5  # differences in one line
T = TypeVar("T")


class ResumeLog(Generic[T]):
    """A file of JSON lines that --resume named: what the results are of, then a result in each.

    make: builds a result, a dataclass, from its fields. `results` are those in the file; a last
    line that was cut off is none. No other process can use the file until this is left as a context
    manager. Raises FileError for a file that is in use or that something else wrote, and for
    results of other `facts`, naming the difference.
    """

    def __init__(self, path: Path, make: Callable[..., T], facts: Mapping[str, Any]) -> None:
        self.path = path
        self.make = make
        header = {"schema": SCHEMA, "of": flat(facts)}
        self.header = json.dumps(header, default=str).encode()
        # How a line is written, and whether that worked: --resume's file may be left incomplete.
        self.attempt: Callable[[Callable[[], None]], bool] = _always
        self._writable = True
        self._existed = path.exists()
        self._lock = take_lock(path, f"--resume {path}", "file")
        try:
            self.results: list[T] = self._read()
        except FileError:
            self.__exit__()
            raise

    def __enter__(self) -> ResumeLog[T]:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._existed and not os.fstat(self._lock.fileno()).st_size:
            self.path.unlink(missing_ok=True)  # nothing was reached: no trace
        self._lock.close()

    def _read(self) -> list[T]:
        if not self.path.exists() or (self.path.is_file() and not self.path.stat().st_size):
            return []
        data = read_bytes(self.path, "results to go on from", "--resume", MAX_RESULTS_BYTES)
        lines = io.BytesIO(data)
        first = lines.readline()
        if not first.endswith(b"\n"):
            if not BEGINNING.startswith(first[: len(BEGINNING)]):
                self._refuse(1)
            return []
        self._check_header(first)
        whole = (line for line in lines if line.endswith(b"\n"))
        return [self._result(i, line) for i, line in enumerate(whole, start=2)]

    def _check_header(self, line: bytes) -> None:
        try:
            before = parse_json(line)
            same_kind, facts = before["schema"] == SCHEMA, dict(before["of"])
        except (ValueError, TypeError, KeyError) as error:
            self._refuse(1, error)
        if not same_kind:
            self._refuse(1)
        if differences := _differences(facts, json.loads(self.header)["of"]):
            raise FileError(
                f"--resume {self.path}: has results of another check: {differences}",
                "Give the settings, model and versions that it was begun with, or another file.",
            )

    def _result(self, number: int, line: bytes) -> T:
        try:
            result = self.make(**parse_json(line, finite=False))
            _check_types(result)
            return result
        except (ValueError, TypeError) as error:
            self._refuse(number, error)

    def _refuse(self, number: int, error: Exception | None = None) -> NoReturn:
        what = "no result of this command" if number > 1 else "not where its results begin"
        raise FileError(
            f"--resume {self.path}: line {number} is {what}",
            "It takes a file that verify-cache --resume wrote, or a new one.",
        ) from error

    def require(self, fits: Callable[[T], bool]) -> None:
        """Raise FileError, and let go of the file, at the first result that does not fit; each is
        asked about once, in order."""
        for number, result in enumerate(self.results, start=2):
            if not fits(result):
                self.__exit__()
                self._refuse(number)

    def append(self, result: T) -> None:
        """Add a result, in place of a line that was cut off; none after one that `attempt` could
        not write. Raises FileError unless `attempt` keeps it."""
        fields: Any = result
        line = json.dumps(dataclasses.asdict(fields)).encode() + b"\n"
        self._writable = self._writable and self.attempt(partial(self._write, line))

    def _write(self, line: bytes) -> None:
        try:
            with self.path.open("a+b") as file:
                file.seek(0)
                whole = file.read().rfind(b"\n") + 1
                file.truncate(whole)
                file.write(line if whole else self.header + b"\n" + line)
        except OSError as error:
            raise FileError(
                f"--resume {self.path}: cannot be written ({error.strerror})"
            ) from error


def _always(write: Callable[[], None]) -> bool:
    write()
    return True


def _check_types(result: Any) -> None:
    """Raise TypeError unless each field of a dataclass has its declared type."""
    for name, kind in get_type_hints(type(result)).items():
        if not _fits(getattr(result, name), kind):
            raise TypeError(f"{name} is not {kind}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value from JSON fits a type of a result's field."""
    parts = get_args(kind)
    outer = get_origin(kind)
    if outer is dict:
        return isinstance(value, dict) and all(_fits(part, parts[1]) for part in value.values())
    if outer is list:
        return isinstance(value, list) and all(_fits(part, parts[0]) for part in value)
    if parts:  # a union
        return any(_fits(value, part) for part in parts)
    return type(value) is kind or (kind is float and type(value) is int)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The differences in words, the most important first. Another check or model is named alone."""
    names = changed(before, now)
    names = [name for name in DECISIVE if name in names] or sorted(names, key=lambda n: n != SHA256)
    shown = names[:MAX_NAMED]
    words = [word for n in shown for word in changes({n: before.get(n)}, {n: now.get(n)})]
    n_more = len(names) - len(shown)
    return ", ".join(words) + (f" and {n_more} more" if n_more else "")
