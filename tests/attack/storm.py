"""Thousands of mutants, each read by a command in a process that was forked with all libraries
loaded. A mutant may be loaded or refused in one line; whatever else happens is an escape.
"""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from judge import Limits, why_not_held
from mutants import mutate
from subjects import Subject

from kvtool import app

LIMITS = Limits(seconds=20.0, memory=3 * 2**29)  # of the processor; bytes beyond the libraries'
SILENT = 60.0  # seconds, after which a process hangs
ADDRESSES = 8 * 2**30  # bytes that a process may ask for beside what it has
RESET_PEAK = "5"  # what clear_refs is told (proc(5))


@dataclass
class Storm:
    """What became of the mutants of each subject: how many were loaded, answered no, refused."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    escapes: list[str] = field(
        default_factory=list
    )  # in words, with the number that makes it again
    slowest: float = 0.0  # seconds of processor time
    largest: int = 0  # bytes
    seconds: float = 0.0

    def take(self, subject: str, said: dict[str, Any]) -> None:
        self.counts.setdefault(subject, Counter())[said["what"]] += 1
        self.slowest = max(self.slowest, said.get("seconds", 0.0))
        self.largest = max(self.largest, said.get("memory", 0))
        if said["what"] == "escaped":
            self.escapes.append(f"{subject}, mutant {said['seed']} ({said['done']}): {said['why']}")


def storm(
    subjects: Sequence[Subject], n: int, root: Path, jobs: int = 2, first: int = 0,
    tell: Callable[[int], None] = lambda n: None,
) -> Storm:  # fmt: skip
    """Try mutants `first` to `first + n - 1`; the subject of each follows from its number."""
    found, started = Storm(), time.monotonic()
    plan = _plan(subjects)
    pending = {job: iter(range(first + job, first + n, jobs)) for job in range(jobs)}
    workers = {job: _Worker(subjects, plan, root / f"job{job}") for job in range(jobs)}
    done = 0
    for job, worker in workers.items():
        worker.give(next(pending[job], None))
    while busy := {w.answers: job for job, w in workers.items() if w.seed is not None}:
        ready, _, _ = select.select(list(busy), [], [], 1.0)
        for job in [busy[handle] for handle in ready] + [
            job for job in busy.values() if workers[job].silent > SILENT
        ]:
            worker = workers[job]
            if worker.seed is None:
                continue
            found.take(plan(worker.seed).name, worker.answer())
            done += 1
            tell(done)
            worker.give(next(pending[job], None))
    for worker in workers.values():
        worker.end()
    found.seconds = time.monotonic() - started
    return found


def _plan(subjects: Sequence[Subject]) -> Callable[[int], Subject]:
    shares = [subject for subject in subjects for _ in range(subject.share)]
    return lambda seed: shares[seed * 7919 % len(shares)]


class _Worker:
    """A forked process that reads numbers of mutants and says what became of each."""

    def __init__(
        self, subjects: Sequence[Subject], plan: Callable[[int], Subject], place: Path
    ) -> None:
        self.plan, self.place = plan, place
        self.seed: int | None = None
        self.since = 0.0
        self._fork()

    def _fork(self) -> None:
        sys.stdout.flush()
        ask_read, self._ask = os.pipe()
        self.answers, answer_write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._ask)
            os.close(self.answers)
            _serve(ask_read, answer_write, self.plan, self.place)
        os.close(ask_read)
        os.close(answer_write)

    @property
    def silent(self) -> float:
        return time.monotonic() - self.since

    def give(self, seed: int | None) -> None:
        self.seed, self.since = seed, time.monotonic()
        if seed is not None:
            os.write(self._ask, f"{seed}\n".encode())

    def answer(self) -> dict[str, Any]:
        """What the process said; if it hangs or has died, that, and another takes its place."""
        line = b""
        while self.silent <= SILENT and not line.endswith(b"\n"):
            if not select.select([self.answers], [], [], 1.0)[0]:
                continue
            block = os.read(self.answers, 65536)
            if not block:
                break
            line += block
        if line.endswith(b"\n"):
            said: dict[str, Any] = json.loads(line)
            return said
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        why = "hung" if self.silent > SILENT else f"the process died ({code})"
        note = self.place / "done"
        done = note.read_text() if note.exists() else "?"
        self._close()
        self._fork()
        return {"what": "escaped", "why": why, "seed": self.seed, "done": done}

    def _close(self) -> None:
        os.close(self._ask)
        os.close(self.answers)

    def end(self) -> None:
        self._close()
        os.kill(self.pid, signal.SIGKILL)  # it would wait as long as others hold its pipe, too
        os.waitpid(self.pid, 0)


def _serve(ask: int, answer: int, plan: Callable[[int], Subject], place: Path) -> None:
    """The loop of a forked process; never returns."""
    place.mkdir(parents=True, exist_ok=True)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, used + ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    captured = [os.open(place / name, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for name in ("o", "e")]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(captured[0], 1)
    os.dup2(captured[1], 2)
    sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    try:
        with open(ask) as numbers:
            for line in numbers:
                said = _try(int(line), plan(int(line)), place, captured)
                os.write(answer, json.dumps(said).encode() + b"\n")
    finally:
        os._exit(0)


def _try(seed: int, subject: Subject, place: Path, captured: list[int]) -> dict[str, Any]:
    for handle in captured:
        os.ftruncate(handle, 0)
        os.lseek(handle, 0, os.SEEK_SET)
    folder = subject.copied(place / "mutant")
    done = mutate(folder, list(subject.names), seed)
    (place / "done").write_text(done)
    before, started = _peak(reset=True), time.process_time()
    code: int | str
    try:
        code = app.run(subject.argv(folder))
    except BaseException as error:  # nothing may come through: that is what is looked for
        code = f"{type(error).__name__} came through: {str(error)[:200]}"
    sys.stdout.flush()
    sys.stderr.flush()
    seconds, memory = time.process_time() - started, _peak() - before
    out, err = (os.pread(handle, 2**20, 0).decode(errors="replace") for handle in captured)
    why = why_not_held(code, out, err, seconds, memory, LIMITS)
    what = "escaped" if why else {0: "loaded", 1: "answered no", 2: "refused"}[int(code)]
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "what": what, "why": why, "seed": seed, "done": done, "seconds": seconds, "memory": memory
    }  # fmt: skip


def _peak(reset: bool = False) -> int:
    """The most memory of this process in bytes, since it was last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0
