"""Ways for a process that trains to die, each at a count of what it does and never at a time.

A clock kills a slow machine's run in the middle and a fast one's after its end. What a run does is
the same everywhere, so that a death which counts steps, writes or calls always comes where it was
aimed; it leaves a line in a file of its own, so that one can see that it came.

`python deaths.py DEATH N AFTER MARKS train-lm ...` is `kvtool train-lm ...`, and dies.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from kvtool import files, folders
from kvtool.core.training.runs import RunFolder
from kvtool.core.training.train import Trainer

KILLED = -signal.SIGKILL


class Aim(NamedTuple):
    """Die at the `n`-th event (from 1) that comes after the process has saved `after` states."""

    death: str  # a name in DEATHS
    n: int
    after: int = 0

    def __str__(self) -> str:
        behind = f" after {self.after} saved" if self.after else ""
        return f"{self.death} {self.n}{behind}"


def arm(aim: Aim, marks: Path) -> None:
    """Have this process die as aimed, with a line in `marks` just before."""

    def mark(where: str = "") -> None:
        with open(marks, "a", encoding="utf-8") as file:
            file.write(f"{aim}{where}\n")

    def ready() -> None:
        DEATHS[aim.death](aim.n, mark)

    if aim.after:
        when_saved(aim.after, ready)
    else:
        ready()


def when_saved(n: int, act: Callable[[], object]) -> None:
    """Call `act` once this process has saved its `n`-th state."""
    save, left = RunFolder.save_state, itertools.count(n - 1, -1)

    def saved(*args: Any) -> None:
        save(*args)
        if next(left) == 0:
            act()

    RunFolder.save_state = saved  # type: ignore[method-assign]


def marked(marks: Path) -> list[str]:
    """What has died, in order."""
    return marks.read_text(encoding="utf-8").splitlines() if marks.exists() else []


def nth(n: int, act: Callable[..., object], original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, but its n-th call (from 1) is `act`."""
    calls = itertools.count(1)

    def call(*args: Any, **kwargs: Any) -> Any:
        return (act if next(calls) == n else original)(*args, **kwargs)

    return call


# --- the deaths; `mark` is called where they come

Mark = Callable[..., None]


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL did not kill")


def _dies(mark: Mark) -> Callable[..., NoReturn]:
    def act(*_: object, **__: object) -> NoReturn:
        mark()
        die()

    return act


def _halves(mark: Mark, then: Callable[[], NoReturn]) -> Callable[[int], NoReturn]:
    """In the place of fsync: half of what was written reaches the disk."""

    def act(handle: int) -> NoReturn:
        os.ftruncate(handle, os.fstat(handle).st_size // 2)
        mark()
        then()

    return act


def at_step(n: int, mark: Mark) -> None:
    """When the weights have changed, and before it is told."""
    Trainer._report = nth(n, _dies(mark), Trainer._report)  # type: ignore[method-assign]


def at_evaluation(n: int, mark: Mark) -> None:
    """When the score is known, and nothing of it is saved."""
    Trainer._is_better = nth(n, _dies(mark), Trainer._is_better)  # type: ignore[method-assign]


def at_rename(n: int, mark: Mark) -> None:
    os.replace = nth(n, _dies(mark), os.replace)


def in_write(n: int, mark: Mark) -> None:
    """A torn write."""
    # A file is synced, its folder, the next file, ...
    os.fsync = nth(2 * n - 1, _halves(mark, die), os.fsync)


def in_full_disk(n: int, mark: Mark) -> None:
    """No death, but an error in the middle of a write."""

    def fail() -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = nth(2 * n - 1, _halves(mark, fail), os.fsync)


def in_plain_write(n: int, mark: Mark) -> None:
    """As `in_write`, with a planted bug: files are written in place."""
    os.fsync = nth(n, _halves(mark, die), os.fsync)
    for module in (files, folders):
        module.write_at = plain_write  # type: ignore[attr-defined]


def plain_write(folder: int, name: str, data: bytes) -> None:
    """The mistake that write_at is there to prevent: a file is emptied, then written."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with open(os.open(name, flags, 0o666, dir_fd=folder), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def at_call(n: int, mark: Mark) -> None:
    """Before a call of a function in C, wherever it is: a moment like any other."""

    def act(frame: FrameType) -> None:
        mark(f", {Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
        die()

    each_call(nth(n, act, lambda _: None))


def each_call(act: Callable[[FrameType], object]) -> None:
    """Call `act` before each call of a function in C, with the frame that makes it."""

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "c_call":
            sys.setprofile(None)
            act(frame)
            sys.setprofile(profile)

    sys.setprofile(profile)


DEATHS: dict[str, Callable[[int, Mark], None]] = {
    "step": at_step,
    "evaluation": at_evaluation,
    "write": in_write,
    "rename": at_rename,
    "call": at_call,
    "full disk": in_full_disk,
    "plain write": in_plain_write,
}


if __name__ == "__main__":
    from kvtool.app import main

    death, number, after, path, *words = sys.argv[1:]
    arm(Aim(death, int(number), int(after)), Path(path))
    main(words)
