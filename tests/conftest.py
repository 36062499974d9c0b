"""Fixtures that several files of tests share."""

from __future__ import annotations

import os

# Before torch is loaded. Models here are tiny: a second thread would only be waited for, and on a
# busy machine for long. Tests of threads set their number themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import signal
import sys
import types
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import warm_python as warm
from cli_probe import Ran, probe
from kvtool import app, ending, registry

# A shell has its background jobs ignore Ctrl-C, and kvtool lets it be; its tests shall not differ.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def nothing_is_left_to_the_next_test() -> Iterator[None]:
    """A command sets the number of PyTorch's threads, and a signal may not have arrived yet."""
    yield
    set_threads()
    ending.forget()


def set_threads() -> None:
    # Loaded here, since the process that hands tests to others has no use for it.
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


# Native code is compiled once after an installation, in a minute and a half, by one process while
# others wait. Of two processes that have half of all tests each, the first begins with what has it
# compiled, and the second with these, which hardly use it.
SELDOM_NATIVE = ("servers", "text", "training", "ui")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def folder(item: pytest.Item) -> str:
        return item.nodeid.partition("/")[2].partition("/")[0]

    others = [item for item in items if folder(item) not in SELDOM_NATIVE]
    seldom = [item for item in items if folder(item) in SELDOM_NATIVE]
    others.sort(key=lambda item: folder(item) != "native")
    half = min(len(items) // 2, len(others))
    items[:] = [*others[:half], *seldom, *others[half:]]


def pytest_collection_finish() -> None:
    """Files of tests may import numba, which sets the number as well. What they have imported
    stays to the end: Python's collector need not walk through it again and again, nor as often as
    for a program that waits for its garbage."""
    set_threads()
    gc.freeze()
    gc.set_threshold(20_000)


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A program to start as one starts Python, which has loaded torch and the modules named."""
    folder = tmp_path_factory.mktemp("warm-python")
    return lambda *modules: warm.command(folder, *modules)


@pytest.fixture
def probe_command(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Offer `kvtool probe`, and undo what tests of it do to signals."""
    module = types.ModuleType("kvtool_probe")
    module.command = probe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvtool_probe", module)
    monkeypatch.setitem(registry.COMMANDS, "probe", "kvtool_probe:command")
    monkeypatch.setenv("COLUMNS", "80")
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    ending.forget()
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.fixture
def kv(probe_command: None, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run `kvtool probe` with some arguments, given as one text or several."""

    def call(*args: str, command: str = "probe") -> Ran:
        code = app.run(([command] if command else []) + list(args))
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


@pytest.fixture
def signals_as_in_the_app() -> Iterator[None]:
    """Handlers as `kvtool` sets them."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ending.listen()
    yield
    ending.forget()
    for number, handler in kept.items():
        signal.signal(number, handler)


# Options of pytest-benchmark that want times; each core but one would only disturb them.
TIMED = ("only", "enable", "compare", "save", "autosave", "json")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """One process where times are wanted, pages are written or output is let through, and for files
    that are named, which are often over before another process has loaded torch. `-n 2` has two.
    """
    option = config.option
    alone = any(getattr(option, f"benchmark_{name}") for name in TIMED)
    alone = alone or option.update_listings or option.capture == "no"
    return 0 if alone or all(".py" in arg for arg in config.args) else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kills", type=int, default=0, help="random moments that tests/training/test_crash.py adds"
    )
    parser.addoption(
        "--update-listings",
        metavar="WORD",
        default="",
        help="print listings of commands with WORD, or all, anew; see test_listings.py",
    )


# --- pytest-benchmark. These hooks are here because it loads a baseline before tests/benchmarks
# is looked at.

MACHINE = ("machine", "system", "python_implementation", "python_version")
COMMIT = ("id", "time", "dirty")


def pytest_configure(config: pytest.Config) -> None:
    """Find the baselines of pyproject.toml from whatever folder pytest is started in, and run each
    benchmark once where several processes run."""
    config.option.benchmark_disable |= config.option.dist != "no"
    storage = config.option.benchmark_storage
    if f"--benchmark-storage={storage}" in config.getini("addopts"):
        config.option.benchmark_storage = str(config.rootpath / storage.removeprefix("file://"))


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Keep what explains a timing; the host's name and other private things are not saved."""
    cpu = {key: machine_info["cpu"].get(key) for key in ("brand_raw", "arch", "count")}
    kept = {key: machine_info[key] for key in MACHINE}
    machine_info.clear()
    machine_info.update(kept, cpu=cpu, torch=version("torch"))


def pytest_benchmark_update_commit_info(commit_info: dict[str, Any]) -> None:
    """Without the names of branches and folders, and without git's error messages."""
    for key in commit_info.keys() - COMMIT:
        del commit_info[key]


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_compare_machine_info(benchmarksession: Any) -> Generator[None, object, object]:
    """Its warning that machines differ names the storage relative to the current folder, and
    fails if it is not below that: stand where it is."""
    here = Path.cwd()
    os.chdir(benchmarksession.storage.path.parent)
    try:
        return (yield)
    finally:
        os.chdir(here)
