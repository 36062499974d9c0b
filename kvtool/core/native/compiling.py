"""Native code made, or read from disk: one function after the other, by one process at a time."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from kvtool import ending
from kvtool.outside import elsewhere

if TYPE_CHECKING:
    from kvtool.core.native.compiled.tools import Forms

LOG = logging.getLogger("kvtool")
LOCK = "kvtool.lock"
PATIENCE = 1.0  # seconds: reading compiled code takes less


_failure = ""


def failure() -> str:
    """Why `available` last found nothing."""
    return _failure


def available(load: Callable[[], ModuleType]) -> ModuleType | None:
    """The compiled functions that `load` returns; None where numba does not work, beside a newer
    NumPy for example, and `failure` says why."""
    global _failure
    threads = torch.get_num_threads()
    try:
        with elsewhere():  # numba looks for settings where one stands
            return load()
    except Exception as error:  # of numba, LLVM, a file that it kept: PyTorch does without it
        _failure = (str(error).splitlines() or [type(error).__name__])[0]
        return None
    finally:
        torch.set_num_threads(threads)  # numba starts its own, and OpenMP takes that for PyTorch's


def load_all(forms: Forms, name: str) -> None:
    """Compile all functions for their types, or read them from disk; `name` says for what format.

    Says so if it has to compile. Of two processes the second waits, and reads what the first has
    made. A signal is obeyed between two functions: within, LLVM's callbacks would swallow it.
    """
    listed = list(forms)
    started, compiles = time.monotonic(), False
    with _alone(listed[0][0].folder):
        for function, kinds in listed:
            with ending.held():
                made = function.load(*kinds)
            if made and not compiles:
                LOG.info(f"compiling native code for {name}, {_how_often(listed[0][0].folder)} ...")
                compiles = True
    if compiles:
        LOG.info(f"compiled native code in {time.monotonic() - started:.0f} s")


def _how_often(folder: Path | None) -> str:
    if folder is not None:
        return "once after an installation"
    from kvtool.core.native.compiled.tools import NOT_KEPT

    return f"each time, as it cannot be kept ({NOT_KEPT})" if NOT_KEPT else "each time"


@contextmanager
def _alone(folder: Path | None) -> Iterator[None]:
    """While no other process is here with the same folder; with none, or one that cannot be
    locked, every process works for itself."""
    try:
        import fcntl

        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        lock = None if folder is None else os.open(folder / LOCK, flags, 0o600)
    except (ImportError, OSError):
        lock = None
    if lock is None:
        yield
        return
    with open(lock):  # closing it lets go
        patient_until = time.monotonic() + PATIENCE
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() >= patient_until:
                LOG.info("waiting for another process that compiles native code ...")
                fcntl.flock(lock, fcntl.LOCK_EX)
                break
            time.sleep(0.02)
        yield
