"""The folder of one training run: who works in it, what it was started with, and where it stands.

run.json               settings, data and tokenizer; a resumed run must agree with all of it
log.jsonl              one line for every logged step and evaluation
best/ last/            checkpoints: the best by dev score, and the newest
tensorboard/           the log again, for TensorBoard, if it was asked for
state-STEP-SHA.pt      what a resumed run needs; the last two are kept, and any that is damaged
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from kvtool.core.facts import changes, flat
from kvtool.errors import FileError, UsageError, first_line
from kvtool.files import take_lock, write_durable, write_json
from kvtool.reading import read_json_object

KEPT = 2
LOCK, RUN, LOG, EVENTS = ".lock", "run.json", "log.jsonl", "tensorboard"
DAMAGED = ".damaged"
TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # what a killed write_durable leaves behind
# What runs did that were started before the setting was there.
BEFORE = {"average": 0, "schedule": "cosine"}
STATE = re.compile(r"state-(\d{9})-([0-9a-f]{16})\.pt")


class RunFolder:
    """Use as a context manager: nobody else can work in the folder while it is open.

    Raises FileError for a folder that cannot be written, is in use, or is not empty while `resume`
    is not given; or where there is nothing to resume.
    """

    def __init__(self, path: Path, resume: bool, warn: Callable[[str], None]) -> None:
        self.path = path
        self._warn = warn
        self._lock: io.TextIOWrapper | None = None
        self._events: Any = None
        names = self._names(make=not resume)
        # Any other folder is somebody else's: it is refused without a trace.
        if names & {LOCK, RUN} or not (names or resume):
            self._lock = self._take_lock()
            self._remove_unfinished()
            names = self._names()
        try:
            self._check(names - {LOCK}, resume)
        except FileError:
            self.__exit__()
            raise

    @classmethod
    def probe(cls, path: Path, resume: bool) -> None:
        """Raise what opening it would raise, before there is any work to lose; leaves no trace."""
        absent = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
        locked_before = os.path.exists(path / LOCK)
        with cls(path, resume, lambda _: None), contextlib.suppress(OSError):
            if not locked_before:
                (path / LOCK).unlink()
            for folder in absent:
                folder.rmdir()

    def _names(self, make: bool = False) -> set[str]:
        try:
            if make:
                self.path.mkdir(parents=True, exist_ok=True)
            return {entry.name for entry in self.path.iterdir()}
        except FileNotFoundError:
            return set()
        except OSError as error:
            is_file = isinstance(error, (FileExistsError, NotADirectoryError))
            raise FileError(
                f"--out {self.path}: cannot be written ({error.strerror})",
                "Give a folder, not a file." if is_file else "",
            ) from error

    def _check(self, names: set[str], resume: bool) -> None:
        if names and not resume:
            raise FileError(
                f"--out {self.path}: is not empty (found {min(names)})",
                "Give --resume to go on with that run, or another folder.",
            )
        if resume and RUN not in names:
            raise FileError(f"--out {self.path}: holds no run to resume", "Leave out --resume.")

    def _take_lock(self) -> io.TextIOWrapper:
        lock = take_lock(self.path / LOCK, f"--out {self.path}", "folder")
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        return lock

    def _remove_unfinished(self) -> None:
        for folder in (self.path, self.path / "best", self.path / "last"):
            for entry in folder.iterdir() if folder.is_dir() else ():
                if TEMPORARY.fullmatch(entry.name):
                    with contextlib.suppress(OSError):
                        entry.unlink()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            self._events.close()
        if self._lock is not None:
            self._lock.close()

    def agree(self, facts: dict[str, Any]) -> None:
        """Record what the run is started with, or raise FileError where a resumed one differs."""
        path = self.path / RUN
        if not path.exists():
            write_json(path, facts)
            return
        now = flat(facts)
        before = {name: value for name, value in BEFORE.items() if name in now}
        before |= flat(read_json_object(path, "the settings of a run"))
        if changed := changes(before, now):
            raise FileError(
                f"--resume: {', '.join(changed)}",
                "Resume with the settings, data and tokenizer that the run was started with.",
            )

    # --- state: all or nothing

    def save_state(self, step: int, state: dict[str, Any]) -> None:
        """Write everything that a resumed run needs; the two newest are kept."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        digest = hashlib.sha256(data).hexdigest()[:16]
        write_durable(self.path / f"state-{step:09d}-{digest}.pt", data)
        for old in self._states()[KEPT:]:
            with contextlib.suppress(OSError):
                old.unlink()

    def load_state(self) -> dict[str, Any] | None:
        """The newest state whose SHA-256 is right; damaged ones before it are set aside.

        None if no state was ever written. Raises FileError if all are damaged.
        """
        damaged: list[Path] = []
        for path in self._states():
            data = _intact(path)
            if data is not None:
                for bad in damaged:  # else they would be counted among those that are kept
                    os.replace(bad, f"{bad}{DAMAGED}")
                return torch.load(io.BytesIO(data), weights_only=True)
            damaged.append(path)
            self._warn(f"{path}: is damaged (its SHA-256 is not that of its name); going back")
        if damaged:
            raise FileError(f"--out {self.path}: every state in it is damaged", "Start a new run.")
        return None

    def _states(self) -> list[Path]:
        """Newest first."""
        found = (entry for entry in self.path.iterdir() if STATE.fullmatch(entry.name))
        return sorted(found, key=lambda path: path.name, reverse=True)

    # --- the log

    def log(self, **fields: Any) -> None:
        """Append one line to log.jsonl. Raises FileError, and ValueError on NaN."""
        line = json.dumps(fields, allow_nan=False)
        try:
            with open(self.path / LOG, "a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            message = f"{self.path / LOG}: cannot be written ({error.strerror})"
            raise FileError(message) from error
        self._show(fields)

    def rewind_log(self, step: int) -> None:
        """Forget the lines of steps after `step`, and a line that a crash cut short."""
        if (self.path / LOG).exists():
            kept = [line for line in self.read_log() if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_durable(self.path / LOG, text.encode())

    def open_events(self, step: int) -> None:
        """Show the log in TensorBoard too, from now on; what it shows of steps after `step` goes.

        A folder without events gets those of the log so far. Raises UsageError where TensorBoard is
        not installed, and FileError.
        """
        folder = self.path / EVENTS
        past = [] if folder.exists() else self.read_log()
        try:
            self._events = event_writer()(str(folder), purge_step=step + 1)
        except OSError as error:
            raise FileError(f"{folder}: cannot be written ({error.strerror})") from error
        for fields in past:
            self._show(fields)

    def _show(self, fields: Mapping[str, Any]) -> None:
        if self._events is None:
            return
        figures = {f"train/{n}": fields[n] for n in ("loss", "lr", "grad_norm") if n in fields}
        if fields.get("tokens") and fields["seconds"]:
            figures["train/tokens_per_s"] = fields["tokens"] / fields["seconds"]
        for part in ("valid", "averaged"):
            figures |= {f"{part}/{name}": value for name, value in fields.get(part, {}).items()}
        for name, value in figures.items():
            self._events.add_scalar(name, value, fields["step"])
        self._events.flush()  # or a kill would take the last two minutes with it

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of log.jsonl, without those that a crash or a person has spoilt."""
        return list(self._log_lines())

    def _log_lines(self) -> Iterator[dict[str, Any]]:
        path = self.path / LOG
        if not path.exists():
            return
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                fields = json.loads(line)
                if isinstance(fields, dict) and isinstance(fields.get("step"), int):
                    yield fields


def event_writer() -> Any:
    """torch's SummaryWriter. Raises UsageError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f"--tensorboard: TensorBoard cannot be used ({first_line(error)})",
            "Install it with pip install tensorboard.",
        ) from error
    return SummaryWriter


def _intact(path: Path) -> bytes | None:
    """The bytes of a state, or None if they cannot be read or are not those that were written."""
    match = STATE.fullmatch(path.name)
    with contextlib.suppress(OSError):
        data = path.read_bytes()
        if match and hashlib.sha256(data).hexdigest().startswith(match[2]):
            return data
    return None
