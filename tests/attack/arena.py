"""Where one attack is tried: a folder of the attacker's making, a canary outside it, and kvtool as
a user starts it, with its time, memory and words taken."""

from __future__ import annotations

import json
import os
import pty
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from judge import STEERS, Limits, why_not_held

LIMITS = Limits(seconds=60.0, memory=5 * 2**29)  # of a process with torch, perhaps transformers
PATIENCE = 240.0  # seconds on the wall, after which a command hangs
ENDS_WITHIN = 10.0  # seconds after a signal
KVTOOL = (sys.executable, "-P", "-m", "kvtool")
KEEPS = "to be kept"
RESET = "\x1b[0m"  # is written at the end of every process that has loaded colorama


@dataclass(frozen=True)
class Try:
    """A command, and what holding the attack means.

    refused: exit 2 in one line; else the command does its work, or (None) either of them.
    says: words that must be said. signal: is sent when the command has run for `after` seconds.
    held: looks at what was written, and returns what is wrong.
    """

    argv: Sequence[str | Path]
    refused: bool | None = True
    says: str = ""
    cwd: Path | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    tty: bool = False
    signal: signal.Signals | None = None
    after: float = 6.0
    held: Callable[[Ended], str] = lambda ended: ""
    python: tuple[str, ...] = KVTOOL
    file_limit: int | None = None  # bytes that a file may have: what a full disk looks like


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float  # of processor time
    memory: int  # bytes, its peak
    ends_after: float = 0.0  # seconds from the signal to the end


@dataclass(frozen=True)
class Attack:
    """One thing that a stranger may try; `prepare` lays it out and says what a user would run."""

    kind: str
    name: str
    prepare: Callable[[Arena], Try]


ATTACKS: list[Attack] = []


def attack(kind: str, name: str) -> Callable[[Callable[[Arena], Try]], Callable[[Arena], Try]]:
    """Put a function into the list of attacks."""

    def decorate(prepare: Callable[[Arena], Try]) -> Callable[[Arena], Try]:
        ATTACKS.append(Attack(kind, name, prepare))
        return prepare

    return decorate


class Arena:
    """A fresh folder `here`, sound models to spoil, and files that must stay as they are."""

    def __init__(self, here: Path, sound: Path) -> None:
        self.here, self._sound = here, sound
        here.mkdir(parents=True)
        self.canary = here.parent / f"{here.name}-canary"  # outside
        self.canary.write_text(KEEPS)
        self.trap = here.parent / f"{here.name}-ran"  # what code of a stranger would make

    def model(self, name: str = "own", called: str = "model") -> Path:
        """A copy of a sound model: own, pair, theirs, shards, pickle."""
        return Path(shutil.copytree(self._sound / name, self.here / called))

    def file(self, name: str, called: str = "") -> Path:
        """A copy of a sound file: c.safetensors, r.npz, r.safetensors, b.json."""
        return Path(shutil.copy(self._sound / "files" / name, self.here / (called or name)))

    def run(self) -> Path:
        """A copy of the folder of a run that was ended, and `pairs.tsv` beside it."""
        shutil.copytree(self._sound / "runs", self.here, dirs_exist_ok=True)
        return self.here / "run"

    @property
    def code(self) -> str:
        """Python that springs the trap."""
        return f"open({str(self.trap)!r}, 'w').write('ran')"

    def why_not_held(self, tried: Try) -> str:
        """Run the command -> in words what was not held; "" if all was."""
        ended = launch(tried, tried.cwd or self.here)
        if self.trap.exists():
            return "code of the stranger ran"
        if self.canary.read_text() != KEEPS:
            return "a file elsewhere was written"
        if tried.signal is not None:
            return _why_not_ended(ended, tried.signal)
        said = ended.out + ended.err
        if tried.tty and (found := STEERS.search(ended.out.removesuffix(RESET))):
            return f"the control character {found[0]!r} reached the terminal"
        why = why_not_held(
            ended.code, ended.out, ended.err, ended.seconds, ended.memory, LIMITS, talks=True
        )
        if why:
            return why
        if tried.refused is not None and (ended.code == 2) != tried.refused:
            return f"exit {ended.code}: {said.strip()[-300:]}"
        if tried.says not in said:
            return f"not said: {tried.says!r}, but: {said.strip()[-300:]}"
        return tried.held(ended)


def _why_not_ended(ended: Ended, number: signal.Signals) -> str:
    if ended.code == 2:  # it was refused before the signal came
        return why_not_held(2, ended.out, ended.err, 0, 0, LIMITS, talks=True)
    if ended.code not in (128 + number, -number):
        return f"exit {ended.code} after {number.name}"
    if ended.ends_after > ENDS_WITHIN:
        return f"it ended {ended.ends_after:.0f} s after {number.name}"
    return ""


def launch(tried: Try, cwd: Path) -> Ended:
    """Run a command as a user would, with nothing of this process but its packages."""
    env = {**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1", **tried.env}
    env.pop("PYTHONPATH", None)
    if tried.tty:
        env["TERM"] = "dumb"  # then every escape sequence that comes is somebody else's
    argv = [*tried.python, *map(str, tried.argv)]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if tried.file_limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (tried.file_limit, tried.file_limit))

    ours, theirs = pty.openpty() if tried.tty else os.pipe()
    process = subprocess.Popen(
        argv, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=theirs, stderr=subprocess.PIPE,
        preexec_fn=limit,
    )  # fmt: skip
    os.close(theirs)
    out: list[bytes] = []
    err: list[bytes] = []
    readers = [
        threading.Thread(target=_drain, args=(ours, out)),
        threading.Thread(target=_drain, args=(process.stderr.fileno(), err)),  # type: ignore[union-attr]
    ]
    for reader in readers:
        reader.start()
    status, usage, signalled = _wait(process, tried)
    for reader in readers:
        reader.join(5.0)
    text = [b"".join(part).decode(errors="replace").replace("\r\n", "\n") for part in (out, err)]
    seconds = usage.ru_utime + usage.ru_stime
    return Ended(status, *text, seconds, usage.ru_maxrss * 1024, signalled)


def _drain(handle: int, into: list[bytes]) -> None:
    while True:
        try:
            select.select([handle], [], [])
            block = os.read(handle, 65536)
        except (OSError, ValueError):  # a terminal whose other end is closed
            return
        if not block:
            return
        into.append(block)


def _wait(process: subprocess.Popen[bytes], tried: Try) -> tuple[int, Any, float]:
    """Exit code, what it used, and how long after the signal it ended."""
    started, sent = time.monotonic(), 0.0
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, usage, time.monotonic() - sent if sent else 0.0
        now = time.monotonic()
        if tried.signal is not None and not sent and now - started > tried.after:
            process.send_signal(tried.signal)
            sent = now
        if now - started > PATIENCE or (sent and now - sent > 4 * ENDS_WITHIN):
            process.kill()
            sent = sent or started
        time.sleep(0.02)


# --- what attacks are made of


def edit(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; None takes one out."""
    data = {**json.loads(path.read_text()), **changes}
    kept = {name: value for name, value in data.items() if value is not None}
    path.write_text(json.dumps(kept))


def safetensors_of(header: Any, data: bytes = b"") -> bytes:
    """A safetensors file with this header, text as it is."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and what follows it."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def with_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})
