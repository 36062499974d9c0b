"""The folder of one training run: its lock, its settings, its log and its states.

run.json               settings, data and tokenizer; a resumed run must have the same
log.jsonl              one line for each logged step and evaluation
best/ last/            checkpoints: the best by dev score, and the newest
loss.png               a plot of the log
tensorboard/           the log for TensorBoard, if it was asked for
state-STEP-SHA.pt      all that a resumed run needs; the last two are kept, and damaged ones

A run may come from an untrusted source. So links are not followed, files with other names are not
overwritten, and the contents of the log and the states are checked before use.
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

from kvtool import ending
from kvtool.core.checkpoint.weight_files import WEIGHTS
from kvtool.core.facts import changes, flat
from kvtool.core.machine import require_memory
from kvtool.core.training.run_files import Strange, log_line, unpickled
from kvtool.errors import FileError, UsageError, first_line
from kvtool.files import (
    BEST,
    CHECKPOINTS,
    EVENTS,
    LOCK,
    LOG,
    PLOT,
    RUN,
    STATE,
    json_bytes,
    take_lock,
)
from kvtool.folders import Folder
from kvtool.outside import elsewhere
from kvtool.reading import MAX_JSON_BYTES, json_object

KEPT = 2
DAMAGED = ".damaged"
SHOWN = 8  # settings that an error names at most
MAX_LOG_BYTES = 2**26  # bytes
MAX_LINES = 250_000  # of the log; enough for two million steps, and read in seconds
MAX_LINE_BYTES = 2**16  # bytes; a run writes about a hundred
CHECKED_EVERY = 2**15  # lines; after so many, reading looks for a signal
TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # the file of a write that was killed
# The values of settings that older runs did not record.
BEFORE = {"average": 0, "schedule": "cosine"}


class RunFolder:
    """The open folder of a run, a context manager; no other process can use it meanwhile.

    path: the folder; a new run makes it. resume: continue the run in it. warn: called with
    sentences for the user. probing: leave unfinished files as they are.
    Raises FileError if the folder cannot be written, is in use, is not empty without `resume`, has
    no run to resume, or contains links.
    """

    def __init__(
        self, path: Path, resume: bool, warn: Callable[[str], None], probing: bool = False
    ) -> None:
        self.path = path
        self._warn = warn
        self._lock: io.TextIOWrapper | None = None
        self._events: Any = None
        self._open: Folder | None = None
        try:
            names = self._names(make=not resume)
            # Any other folder is not a run's. It is refused, and nothing is written to it.
            if names & {LOCK, RUN} or not (names or resume):
                self._require_own(names)
                self._lock = self._take_lock(probing)
                if not probing:
                    self._remove_unfinished()
                names = {name for name in self._names() if not TEMPORARY.fullmatch(name)}
            self._check(names - {LOCK}, resume)
        except BaseException:
            self.__exit__()
            raise

    @classmethod
    def probe(cls, path: Path, resume: bool) -> None:
        """Raise the errors of opening the folder, before other work; it changes nothing.

        Raises FileError as RunFolder.
        """
        absent = [folder for folder in (path, *path.parents) if not os.path.exists(folder)]
        locked_before = os.path.lexists(path / LOCK)
        with cls(path, resume, lambda _: None, probing=True) as run:
            if not locked_before:
                run._folder.remove(LOCK)
            with contextlib.suppress(OSError):
                for folder in absent:
                    folder.rmdir()

    @property
    def _folder(self) -> Folder:
        assert self._open is not None, "it was opened, or an error raised"
        return self._open

    def _names(self, make: bool = False) -> set[str]:
        try:
            if make:
                self.path.mkdir(parents=True, exist_ok=True)
            if self._open is None:
                self._open = Folder.at(self.path)
            return self._open.names()
        except FileNotFoundError:
            return set()
        except OSError as error:
            is_file = isinstance(error, (FileExistsError, NotADirectoryError))
            raise FileError(
                f"--out {self.path}: cannot be written ({error.strerror})",
                "Give a folder, not a file." if is_file else "",
            ) from error

    def _require_own(self, names: set[str]) -> None:
        """Raise FileError for a link, FIFO or device with the name of a run's file, and for a file
        in place of a folder, or a folder in place of a file."""
        for name in sorted(names):
            if name in (LOCK, RUN, LOG, PLOT):
                self._folder.require_own(name, "a file of this run", folder=False)
            elif STATE.fullmatch(name):  # a folder counts as a damaged state
                self._folder.require_own(name, "a file of this run")
            elif name in (*CHECKPOINTS, EVENTS):
                self._folder.require_own(name, "a folder of this run", folder=True)
                with self._folder.below(name) as folder:
                    for entry in sorted(folder.names()):
                        folder.require_own(entry, "a file of this run")

    def _check(self, names: set[str], resume: bool) -> None:
        if names and not resume:
            raise FileError(
                f"--out {self.path}: is not empty (found {min(names)})",
                "Give --resume to go on with that run, or another folder.",
            )
        if resume and RUN not in names:
            raise FileError(f"--out {self.path}: holds no run to resume", "Leave out --resume.")

    def _take_lock(self, probing: bool) -> io.TextIOWrapper:
        lock = take_lock(self.path / LOCK, f"--out {self.path}", "folder", self._folder)
        if not probing:
            lock.seek(0)
            lock.truncate()
            lock.write(str(os.getpid()))
            lock.flush()
        return lock

    def _remove_unfinished(self) -> None:
        with contextlib.ExitStack() as stack:
            folders = [self._folder]
            for name in CHECKPOINTS:
                if (self.path / name).is_dir():
                    folders.append(stack.enter_context(self._folder.below(name)))
            for folder in folders:
                for name in filter(TEMPORARY.fullmatch, folder.names()):
                    folder.remove(name)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            self._events.close()
        if self._lock is not None:
            self._lock.close()
        if self._open is not None:
            self._open.close()

    def agree(self, facts: dict[str, Any]) -> None:
        """Record the facts of a new run, or compare them with those of a resumed one.

        Raises FileError if a resumed run differs, and names the settings.
        """
        if RUN not in self._folder.names():
            self._folder.write(RUN, json_bytes(facts))
            return
        now = flat(facts)
        before = {name: value for name, value in BEFORE.items() if name in now}
        before |= flat(self._settings())
        if changed := changes(before, now):
            more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            raise FileError(
                f"--resume: {', '.join(changed[:SHOWN])}{more}",
                "Resume with the settings, data and tokenizer that the run was started with.",
            )

    def _settings(self) -> dict[str, Any]:
        data = self._folder.read(RUN, "the settings of a run", MAX_JSON_BYTES)
        return json_object(self.path / RUN, data)

    def write(self, path: Path, data: bytes) -> None:
        """Replace a file of the run durably (with fsync). Raises FileError."""
        self._folder.write(path.name, data)

    def save_checkpoint(self, name: str, files: Mapping[str, bytes]) -> None:
        """Write the files of a checkpoint in their order, each durably. Raises FileError.

        name: of its folder, "best" or "last".
        """
        with self._folder.below(name, make=True) as folder:
            for file, data in files.items():
                folder.write(file, data)

    def require_best(self, step: int) -> None:
        """Raise FileError if the best checkpoint, of `step`, is missing.

        It may be newer than the state, since a kill can come after the checkpoint is written.
        """
        if not (self.path / BEST / WEIGHTS).is_file():
            raise FileError(
                f"--out {self.path}: its best checkpoint is missing ({BEST}/, of step {step:,})",
                "Put it back, or start a new run.",
            )

    # --- state: all or nothing

    def save_state(self, step: int, state: dict[str, Any]) -> None:
        """Write a state durably, and remove all but the two newest. Raises FileError."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        digest = hashlib.sha256(data).hexdigest()[:16]
        self._folder.write(f"state-{step:09d}-{digest}.pt", data)
        for old in self._states()[KEPT:]:
            self._folder.remove(old)

    def load_state(self, check: Callable[[Any, int], Any] = lambda state, step: state) -> Any:
        """Load the newest state with the right SHA-256 -> the result of `check(state, step)`.

        None if there is no state. Newer states that are damaged are renamed. Raises FileError if
        all are damaged, if a state has more than tensors, numbers and texts, or if `check` raises
        Strange. Raises CapacityError for too little memory.
        """
        damaged: list[str] = []
        for name in self._states():
            path, data = self.path / name, self._intact(name)
            if data is not None:
                try:
                    state = check(unpickled(data), int(name.split("-")[1]))
                except Strange as error:
                    hint = "Start a new run, or remove that state."
                    raise FileError(f"{path}: {error}", hint) from error
                self._set_aside(damaged)
                return state
            damaged.append(name)
        if damaged:
            raise FileError(f"--out {self.path}: every state in it is damaged", "Start a new run.")
        return None

    def _set_aside(self, damaged: list[str]) -> None:
        """Rename damaged states, so that they do not count among the two that are kept."""
        if not damaged:
            return
        more = f", and so are {len(damaged) - 1:,} more" if len(damaged) > 1 else ""
        why = "its SHA-256 is not that of its name"
        for bad in damaged:
            self._folder.rename(bad, f"{bad}{DAMAGED}")
        self._warn(f"{self.path / damaged[0]}: is damaged ({why}){more}; going back")

    def _states(self) -> list[str]:
        """The names of all states, the newest first."""
        return sorted(filter(STATE.fullmatch, self._folder.names()), reverse=True)

    def _intact(self, name: str) -> bytes | None:
        """The bytes of a state; None if they cannot be read or have the wrong SHA-256.

        Raises CapacityError for too little memory.
        """
        match = STATE.fullmatch(name)
        with contextlib.suppress(FileError):
            size = self._folder.size(name)
            require_memory(str(self.path / name), size, torch.device("cpu"))
            data = self._folder.read(name, "a state", size)
            if match and hashlib.sha256(data).hexdigest().startswith(match[2]):
                return data
        return None

    # --- the log

    def log(self, **fields: Any) -> None:
        """Append one line to log.jsonl. Raises FileError, and ValueError for NaN or infinity."""
        line = json.dumps(fields, allow_nan=False)
        self._folder.append(LOG, f"{line}\n".encode())
        self._show(fields)

    def rewind_log(self, step: int) -> None:
        """Remove the lines of steps after `step`, and a line that a crash cut short."""
        if LOG in self._folder.names():
            kept = (line for line, fields in self._log_lines() if fields["step"] <= step)
            self._folder.write(LOG, b"".join(kept))

    def open_events(self, step: int) -> None:
        """Write the log for TensorBoard too from now on, and hide its events after `step`.

        A new folder gets the events of the whole log. Raises UsageError if TensorBoard is not
        installed, and FileError if the folder cannot be written.
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
        if fields.get("tokens") and fields.get("seconds"):
            figures["train/tokens_per_s"] = fields["tokens"] / fields["seconds"]
        for part in ("valid", "averaged"):
            figures |= {f"{part}/{name}": value for name, value in fields.get(part, {}).items()}
        for name, value in figures.items():
            self._events.add_scalar(name, value, fields["step"])
        self._events.flush()  # or a kill would lose the events of the last two minutes

    def read_log(self) -> list[dict[str, Any]]:
        """The fields of all valid lines of log.jsonl. Raises FileError if it cannot be read or is
        too long."""
        return [fields for _, fields in self._log_lines()]

    def _log_lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Yield each valid line with its fields."""
        if LOG not in self._folder.names():
            return
        data = self._folder.read(LOG, "the log of a run", MAX_LOG_BYTES)
        for number, line in enumerate(io.BytesIO(data), start=1):
            if number > MAX_LINES:
                raise FileError(
                    f"{self.path / LOG}: is too long for the log of a run "
                    f"(more than {MAX_LINES:,} lines)"
                )
            if number % CHECKED_EVERY == 0:
                ending.check()
            if len(line) <= MAX_LINE_BYTES and (
                fields := log_line(line.decode("utf-8", "replace"))
            ):
                yield line.rstrip(b"\r\n") + b"\n", fields


def event_writer() -> Any:
    """The class torch.utils.tensorboard.SummaryWriter. Raises UsageError without TensorBoard."""
    try:
        with elsewhere():
            from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError(
            f"--tensorboard: TensorBoard cannot be used ({first_line(error)})",
            "Install it with pip install tensorboard.",
        ) from error
    return SummaryWriter
