"""Attacks by the folder of a run, and by links."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from arena import Arena, Try, attack
from attacks_sizes import archive, bomb
from commands import (
    BENCH,
    CODE,
    PICKLES,
    SOUND,
)
from subjects import RUN

LINKS = "Links within a run"
LOGS = "Logs and states that are not a run's"


# --- runs


def _resumed(a: Arena, **options: Any) -> Try:
    return Try([*RUN, "3", "--resume"], cwd=a.here, **options)


@attack(SOUND, "train-seq2seq --resume")
def _(a: Arena) -> Try:
    a.run()
    return _resumed(a, refused=False)


for name in (".lock", "log.jsonl", "run.json", "loss.png", "last/config.json"):

    def _linked(a: Arena, name: str = name) -> Try:
        path, other = a.run() / name, a.here / "other"
        other.write_bytes(path.read_bytes() if path.exists() else b"")
        before = other.read_bytes()
        path.unlink(missing_ok=True)
        path.symlink_to(other)

        def held(ended: Any) -> str:
            return "" if other.read_bytes() == before else "what it links to was written"

        return _resumed(a, refused=None if name == "loss.png" else True, held=held)

    attack(LINKS, f"{name} is a link to a file elsewhere")(_linked)


for name in ("last", "best"):

    def _folder(a: Arena, name: str = name) -> Try:
        run, other = a.run(), a.model(called="other")
        before = {p.name: p.read_bytes() for p in other.iterdir()}
        shutil.rmtree(run / name)
        (run / name).symlink_to(other)

        def held(ended: Any) -> str:
            after = {p.name: p.read_bytes() for p in other.iterdir()}
            return "" if after == before else "a model elsewhere was overwritten"

        return _resumed(a, says="link", held=held)

    attack(LINKS, f"{name} is a link to another model's folder")(_folder)


@attack(LINKS, "log.jsonl is a hard link to a file elsewhere")
def _(a: Arena) -> Try:
    path = a.run() / "log.jsonl"
    path.unlink()
    os.link(a.canary, path)
    return _resumed(a, refused=None)


@attack(LINKS, "a state is a link to a file elsewhere")
def _(a: Arena) -> Try:
    run = a.run()
    state = sorted(run.glob("state-*.pt"))[-1]
    state.rename(a.here / "moved.pt")
    state.symlink_to(a.here / "moved.pt")
    return _resumed(a, says="link")


@attack(LINKS, ".benchmarks/kvtool is a link to another folder")
def _(a: Arena) -> Try:
    other = a.here / "other"
    other.mkdir()
    (a.here / ".benchmarks").mkdir()
    (a.here / ".benchmarks" / "kvtool").symlink_to(other)
    argv = ["bench", "--model", a.model(), *BENCH]
    return Try([*argv, "--save", "x"], says="link",
               held=lambda e: "written elsewhere" if any(other.iterdir()) else "")  # fmt: skip


@attack(LINKS, ".benchmarks/kvtool/NAME.json is a link to a file elsewhere")
def _(a: Arena) -> Try:
    folder = a.here / ".benchmarks" / "kvtool"
    folder.mkdir(parents=True)
    (folder / "x.json").symlink_to(a.canary)
    argv = ["bench", "--model", a.model(), *BENCH]
    return Try([*argv, "--save", "x"], refused=None)


@attack(LINKS, "a FIFO is the log of a run")
def _(a: Arena) -> Try:
    path = a.run() / "log.jsonl"
    path.unlink()
    os.mkfifo(path)
    return _resumed(a)


@attack(LINKS, "a FIFO is the lock of a run")
def _(a: Arena) -> Try:
    path = a.run() / ".lock"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return _resumed(a)


for line in (
    '{"step": true}', '{"step": 1e99}', '{"step": -5, "loss": "x"}', '{"step": 1, "loss": [1]}',
    '{"step": 1, "loss": NaN}', '{"step": 1, "valid": 7}', '{"step": ' + "9" * 5000 + "}",
    "[" * 100_000, '{"step": 1, "seconds": "a", "tokens": {}}',
):  # fmt: skip

    def _line(a: Arena, line: str = line) -> Try:
        path = a.run() / "log.jsonl"
        path.write_text(path.read_text() + line + "\n")
        return _resumed(a, refused=None)

    attack(LOGS, f"a line of the log: {line[:30]}")(_line)


for what, line, times in (
    ("a million lines", '{"step": 1}\n', 1_000_000),
    ("60 MB of empty lines", "\n", 60_000_000),
):
    for number in (None, signal.SIGTERM):

        def _long(a: Arena, line: str = line, times: int = times, number: Any = number) -> Try:
            path = a.run() / "log.jsonl"
            path.write_text(line * times)
            return _resumed(a, refused=None, signal=number, after=3.0)

        attack(LOGS, f"a log of {what}{', then SIGTERM' if number else ''}")(_long)


for what, name in (("another model", "pair"), ("a decoder", "own")):

    def _other_best(a: Arena, name: str = name) -> Try:
        run, other = a.run(), a.model(name, "other")
        shutil.rmtree(run / "best")
        other.rename(run / "best")
        return _resumed(a)

    attack(LOGS, f"{what} in place of the run's best")(_other_best)


def _changed_state(a: Arena, change: Callable[[dict[str, Any]], None]) -> Try:
    path = sorted((a.run()).glob("state-*.pt"))[-1]
    state = torch.load(path, weights_only=True)
    change(state)
    return _with_state(a, state)


@attack(LOGS, "a state of a step that its name denies")
def _(a: Arena) -> Try:
    def change(state: dict[str, Any]) -> None:
        for part in state.values():
            if isinstance(part, dict) and "step" in part:
                part["step"] = 2**52
        if "step" in state:
            state["step"] = 2**52

    return _changed_state(a, change)


def _with_state(a: Arena, state: Any) -> Try:
    run = a.here / "run"
    if not run.exists():
        a.run()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return _with_bytes(a, run, buffer.getvalue())


def _with_bytes(a: Arena, run: Path, data: bytes) -> Try:
    """A run goes on whose only state is `data`, by its right name."""
    for old in run.glob("state-*.pt"):
        old.unlink()
    digest = hashlib.sha256(data).hexdigest()[:16]
    (run / f"state-000000002-{digest}.pt").write_bytes(data)
    return _resumed(a)


for what, state in (
    ("empty", {}), ("a list", [1, 2]), ("of wrong types", {"model": 1, "optimizer": "x"}),
):  # fmt: skip
    attack(LOGS, f"a state that is {what}")(lambda a, state=state: _with_state(a, state))


@attack(PICKLES, "a key of 60 doubled tuples in a state of a run")
def _(a: Arena) -> Try:
    archive(a.here / "bomb.pt", bomb(60))
    return _with_bytes(a, a.run(), (a.here / "bomb.pt").read_bytes())


class _Opens:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@attack(CODE, "a state of a run is a pickle that runs")
def _(a: Arena) -> Try:
    return _with_state(a, {"model": _Opens(a.trap)})
