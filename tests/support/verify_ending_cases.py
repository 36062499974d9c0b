"""Each way of checking, and signals at a moment of one's choice."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli_probe import Ran
from kvtool.core.verify.mutants import selftest
from small_models import save_decoder

FEW = ["decode", "chunks", "crop"]
TARGET = """
from torch import nn, zeros
class Right:
    vocab_size, context = 5, 128
    def __init__(self): self.scale = zeros(3)
    def full(self, ids): return nn.functional.one_hot(ids.cumsum(1) % 5, 5).float()
    def step(self, ids, state):
        total = ids.cumsum(1) + (0 if state is None else state)
        return nn.functional.one_hot(total % 5, 5).float(), total[:, -1:]
    def crop(self, state, length): raise NotImplementedError("it cannot go back")
right = Right()
"""  # it holds numbers, so that there is something to convert to float64


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_decoder(tmp_path_factory.mktemp("decoder")))


@pytest.fixture
def modes(decoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What is given to each way of checking that reaches several verdicts."""
    monkeypatch.setattr(selftest, "MUTANTS", selftest.MUTANTS[:5])
    right = dataclasses.replace(selftest.LOOKALIKES[0], scenarios=tuple(FEW))
    monkeypatch.setattr(selftest, "LOOKALIKES", (right,))
    file = tmp_path / "decoder_of_a_user.py"
    file.write_text(TARGET)
    few = ["--tokens", "4", "--scenarios", *FEW]
    return {
        "kvtool": ["--model", decoder, "--caches", "static", "sliding", "--prompt", "ab", *few],
        "transformers": ["--impl", "transformers", "--model", "gpt2", *few],
        "target": ["--target", f"{file}:right", *few],
        "self-test": ["--self-test"],
    }


@pytest.fixture
def verify(kv: Callable[..., Ran]) -> Callable[..., Ran]:
    def call(*args: str) -> Ran:
        return kv(*args, "--device", "cpu", "--threads", "1", command="verify-cache")

    return call


Hook = Callable[..., Callable[[], int]]


@pytest.fixture
def at_call(monkeypatch: pytest.MonkeyPatch) -> Hook:
    """Do something at the n-th call of a function of a class or module -> how often it was called,
    which begins anew with each hook."""

    def hook(owner: Any, name: str, n: int, act: Callable[[], None]) -> Callable[[], int]:
        right = getattr(owner, name)
        count = [0]

        def counted(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == n:
                act()
            return right(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
        return lambda: count[0]

    return hook


def send(number: int = signal.SIGINT) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def verdicts(report: dict[str, Any]) -> list[tuple[Any, ...]]:
    """What was found, in order, without how long it took."""
    if "planted" in report:
        return [tuple(map(str, o.values())) for o in (*report["planted"], *report["lookalikes"])]
    return [tuple(map(str, row.values())) for row in report["checks"]]
