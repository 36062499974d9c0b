"""Native code is made once for each format, before it is needed, and by one process at a time."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numba import types

from kvtool.core.bench.timing import Workload
from kvtool.core.kernels.default import DEFAULT, make_kernels
from kvtool.core.native import arrays as native
from kvtool.core.native import compiling
from kvtool.registry import CACHES
from kvtool.ui.output import Output
from small_models import random_model

THREE = """
import numpy
from kvtool.core.native import compiling
from kvtool.core.native.compiled import layers
from numba import float32
forms = list(layers.forms(float32, float32))[:3]
compiling.load_all(forms, "it")
one = numpy.ones((1, 1), "f")
forms[2][0](one, one, one[0], one.copy(), 1, 1)
print(sum(function.function.stats.cache_hits.total() for function, _ in forms))
"""


class Made:
    """Stands for a function that is compiled."""

    def __init__(self, folder: Path | None, load: Callable[[], bool]) -> None:
        self.folder, self._load = folder, load

    def load(self, *kinds: Any) -> bool:
        return self._load()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is told to who waits."""
    found: list[str] = []
    monkeypatch.setattr(compiling.LOG, "info", found.append)
    return found


def test_who_waits_for_the_compiler_is_told_and_who_reads_from_disk_is_not(
    tmp_path: Path, said: list[str]
) -> None:
    compiling.load_all([(Made(tmp_path, lambda: False), ())] * 3, "layers in float32")
    assert not said
    compiling.load_all([(Made(tmp_path, lambda: True), ())] * 3, "layers in float32")
    first, last = said
    assert first == "compiling native code for layers in float32, once after an installation ..."
    assert last.startswith("compiled native code in ")


def test_a_quiet_command_says_nothing_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        Output(quiet=quiet)
        compiling.load_all([(Made(None, lambda: True), ())], "layers in float32")
        assert bool(capsys.readouterr().err) is not quiet
    logging.getLogger("kvtool").handlers.clear()


@pytest.mark.usefixtures("signals_as_in_the_app")
def test_ctrl_c_ends_it_between_two_functions(tmp_path: Path) -> None:
    """LLVM's callbacks print and swallow what a signal raises within."""
    done: list[int] = []

    def load(number: int) -> bool:
        if number == 2:
            os.kill(os.getpid(), signal.SIGINT)
        done.append(number)
        return True

    forms = [(Made(tmp_path, lambda number=number: load(number)), ()) for number in range(5)]
    with pytest.raises(KeyboardInterrupt):
        compiling.load_all(forms, "it")
    assert done == [0, 1, 2]
    with open(tmp_path / compiling.LOCK) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # was let go


def test_a_second_process_waits_for_the_first_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    waits = threading.Event()

    def tell(text: str) -> None:
        done.append(text)
        waits.set()

    monkeypatch.setattr(compiling.LOG, "info", tell)
    monkeypatch.setattr(compiling, "PATIENCE", 0.0)
    forms = [(Made(tmp_path, lambda: bool(done.append("made"))), ())]
    with open(tmp_path / compiling.LOCK, "a") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = threading.Thread(target=compiling.load_all, args=(forms, "it"))
        second.start()
        assert waits.wait(60)
        assert done == ["waiting for another process that compiles native code ..."]
    second.join(60)
    assert done[1:] == ["made"]


def test_a_folder_that_cannot_be_locked_is_no_fault(tmp_path: Path) -> None:
    made: list[int] = []
    for folder in (None, tmp_path / "none"):
        compiling.load_all([(Made(folder, lambda: bool(made.append(1))), ())], "it")
    assert len(made) == 2


def test_code_that_calls_code_from_disk_is_found_there(tmp_path: Path) -> None:
    """numba's own list of what to load first lacks what a function got from disk itself."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    for hits in ("0", "3"):
        ran = subprocess.run(
            [sys.executable, "-c", THREE], env=environment, capture_output=True, text=True
        )
        assert (ran.returncode, ran.stdout.split()) == (0, [hits]), ran.stderr


@pytest.mark.parametrize(
    ("dtype", "batch"),
    [(torch.float32, 1), (torch.float32, 3), (torch.bfloat16, 3), (torch.float64, 1)],
    ids=str,
)
def test_no_kind_of_cache_needs_code_that_was_not_prepared(dtype: torch.dtype, batch: int) -> None:
    """What is compiled while it is timed would be published as latency."""
    native.prepare(torch.empty(0, dtype=dtype))
    code = native.decoder_code(dtype)
    assert code is not None
    functions = {function for function, _ in code.forms(types.float32, types.float32)}
    model = random_model(context=256).to(dtype)
    prompt = torch.randint(model.config.vocab_size, (batch, 40))
    for kernels in (DEFAULT, make_kernels("exact")):
        work = Workload(model, prompt, kernels)
        for kind in [*CACHES, "sliding:window=16", "sliding:window=16:sinks=0"]:
            work.run(kind, 80)
    for function in functions:
        assert set(function.function.overloads) == set(function.forms), function.name


def test_python_is_told_of_a_function_that_only_compiled_code_can_call() -> None:
    """numba would end the process."""
    layers = pytest.importorskip("kvtool.core.native.compiled.layers")
    with pytest.raises(TypeError, match=r"layers\.linear.* is for compiled code"):
        layers.linear()
    assert layers.activate.entry and not layers.linear.entry
