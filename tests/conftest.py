"""Fixtures that several files of tests share."""

from __future__ import annotations

import signal
import sys
import types
from collections.abc import Callable, Iterator

import pytest

from cli_probe import Ran, probe
from kvtool import app, registry


@pytest.fixture
def probe_command(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Offer `kvtool probe`, and undo what `run` does to signals."""
    module = types.ModuleType("kvtool_probe")
    module.command = probe  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kvtool_probe", module)
    monkeypatch.setitem(registry.COMMANDS, "probe", "kvtool_probe:command")
    monkeypatch.setenv("COLUMNS", "80")
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
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
