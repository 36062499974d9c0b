"""The folder of one training run: who works in it, what it was started with, and where it stands.

run.json               settings, data and tokenizer; a resumed run must agree with all of it
log.jsonl              one line for every logged step and evaluation
best/ last/            checkpoints: the best by dev score, and the newest
state-STEP-SHA.pt      what a resumed run needs; the last two are kept
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from kvtool.errors import FileError
from kvtool.files import read_json_object, write_durable, write_json

KEPT = 2
STATE = re.compile(r"state-(\d{9})-([0-9a-f]{16})\.pt")


class RunFolder:
    """Use as a context manager: nobody else can work in the folder while it is open.

    Raises FileError for a folder that cannot be written, is in use, or is not empty while `resume`
    is not given; or where there is nothing to resume.
    """

    def __init__(self, path: Path, resume: bool, warn: Callable[[str], None]) -> None:
        self.path = path
        self._warn = warn
        self._prepare(resume)
        self._lock = self._take_lock()

    def _prepare(self, resume: bool) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            names = {entry.name for entry in self.path.iterdir()} - {".lock"}
        except OSError as error:
            raise FileError(f"--out {self.path}: cannot be written ({error.strerror})") from error
        if names and not resume:
            raise FileError(
                f"--out {self.path}: is not empty (found {sorted(names)[0]})",
                "Give --resume to go on with that run, or another folder.",
            )
        if resume and not (self.path / "run.json").is_file():
            raise FileError(f"--out {self.path}: holds no run to resume", "Leave out --resume.")

    def _take_lock(self) -> io.TextIOWrapper:
        import fcntl

        try:
            lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise FileError(f"--out {self.path}: cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            pid = lock.read().strip() or "unknown"
            lock.close()
            raise FileError(
                f"--out {self.path}: in use by pid {pid}", "Wait for it, or use another folder."
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        return lock

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def agree(self, facts: dict[str, Any]) -> None:
        """Record what the run is started with, or raise FileError where a resumed one differs."""
        path = self.path / "run.json"
        if not path.exists():
            write_json(path, facts)
            return
        before = read_json_object(path, "the settings of a run")
        for name in sorted(before.keys() | facts.keys()):
            old, new = before.get(name), facts.get(name)
            if old != new:
                raise FileError(
                    f"--resume: {name} was {old!r} and is now {new!r}",
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
        """The newest state whose SHA-256 is right; damaged ones are left where they are.

        None if no state was ever written. Raises FileError if all are damaged.
        """
        states = self._states()
        for path in states:
            data = path.read_bytes()
            match = STATE.fullmatch(path.name)
            if match and hashlib.sha256(data).hexdigest().startswith(match[2]):
                return torch.load(io.BytesIO(data), weights_only=True)
            self._warn(
                f"{path}: is damaged (its SHA-256 is not {match and match[2]}...); going back"
            )
        if states:
            raise FileError(f"--out {self.path}: every state in it is damaged", "Start a new run.")
        return None

    def _states(self) -> list[Path]:
        """Newest first."""
        found = (entry for entry in self.path.iterdir() if STATE.fullmatch(entry.name))
        return sorted(found, key=lambda path: path.name, reverse=True)

    # --- the log

    def log(self, **fields: Any) -> None:
        """Append one line to log.jsonl."""
        with open(self.path / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(fields) + "\n")

    def rewind_log(self, step: int) -> None:
        """Forget the lines of steps after `step`, and a line that a crash cut short."""
        kept = [line for line in self.read_log() if line["step"] <= step]
        if kept or (self.path / "log.jsonl").exists():
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_durable(self.path / "log.jsonl", text.encode())

    def read_log(self) -> list[dict[str, Any]]:
        return list(self._log_lines())

    def _log_lines(self) -> Iterator[dict[str, Any]]:
        path = self.path / "log.jsonl"
        if not path.exists():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)
