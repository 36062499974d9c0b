"""bench on a small decoder, and a clock that is turned by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli_probe import Ran
from kvtool.core.bench import timing, traffic
from small_models import save_decoder


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"), n_layers=1)


@pytest.fixture(autouse=True)
def small_array(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the memory's speed quickly, if not well."""
    monkeypatch.setattr(traffic, "ARRAY_BYTES", 2**20)


@pytest.fixture
def bench(kv: Callable[..., Ran], decoder: Path) -> Callable[..., Ran]:
    """Run bench with two samples a row after a prompt of four tokens."""

    def call(*args: str, model: Path = decoder) -> Ran:
        given = ["--model", str(model), "--threads", "1", "--device", "cpu"]
        for flag, value in {"--repeats": "2", "--prompt-length": "4", "--lengths": "3"}.items():
            given += [] if flag in args else [flag, value]
        return kv(*given, *args, command="bench")

    return call


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let a run take as long as `cost(kind, length)` says, in seconds, without running it."""

    def make(cost: Callable[[str, int], float]) -> None:
        clock = {"now": 0.0}

        def run(self: timing.Workload, kind: str, length: int) -> timing.TimedRun:
            clock["now"] += cost(kind, length)
            seconds, nbytes = cost(kind, length), self.predicted(kind, length)
            return timing.TimedRun(seconds, 0.0, seconds, seconds / length, nbytes, nbytes)

        monkeypatch.setattr(timing.Workload, "run", run)
        monkeypatch.setattr(timing, "now", lambda device: clock["now"])
        fake = type("Clock", (), {"perf_counter": staticmethod(lambda: clock["now"])})
        monkeypatch.setattr(timing, "time", fake)

    return make


def cells(document: dict[str, Any]) -> list[tuple[int, str]]:
    return [(row["length"], row["cache"]) for row in document["measurements"]]
