"""Compiling native code, or loading it from disk, by one process at a time."""

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
PATIENCE = 1.0  # seconds to wait in silence; loading compiled code takes less


_failure = ""


def failure() -> str:
    """Why `available` last returned None; empty if it never did."""
    return _failure


def available(load: Callable[[], ModuleType]) -> ModuleType | None:
    """The module that `load` returns, or None if numba does not work, as with a NumPy too new for
    it; `failure` then says why."""
    global _failure
    threads = torch.get_num_threads()
    try:
        with elsewhere():  # numba looks for settings in the current folder
            return load()
    except Exception as error:  # from numba, LLVM or a cached file: PyTorch works without them
        _failure = (str(error).splitlines() or [type(error).__name__])[0]
        return None
    finally:
        torch.set_num_threads(threads)  # numba sets its own number, which OpenMP applies to PyTorch


def load_all(forms: Forms, name: str) -> None:
    """Compile all functions for their types, or load them from disk, and log if it compiles.

    name: what is compiled, for the log. A second process waits, then loads what the first compiled.
    Signals are held until a function is done, since LLVM's callbacks would swallow them.
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
    """Hold the lock of a folder. Without a folder, or if it cannot be locked, each process goes on
    without a lock."""
    try:
        import fcntl

        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        lock = None if folder is None else os.open(folder / LOCK, flags, 0o600)
    except (ImportError, OSError):
        lock = None
    if lock is None:
        yield
        return
    with open(lock):  # closing it releases the lock
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
