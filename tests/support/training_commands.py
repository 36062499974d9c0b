"""train-lm and train-seq2seq on data of a few kilobytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cli_probe import Ran
from kvtool.ui import plots

SIZES = ["--d-model", "16", "--heads", "2", "--context", "32", "--dropout", "0"]
PLACE = ["--device", "cpu", "--threads", "1"]
FAST = [*SIZES, *PLACE, "--no-amp", "--steps", "3", "--batch-tokens", "64", "--warmup", "1"]
LM = [*FAST, "--layers", "1", "--vocab-size", "260"]
WORDS = [f"{a}{b}{a}" for a in "abcdef" for b in "xyz"] + ["an", "ox", "we", "go", "up", "is"]
Command = Callable[..., Ran]
LOSS_PLOT = plots.loss_plot


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "verse.txt"
    path.write_text("".join(f"{i} men went to mow, went to mow a meadow.\n" for i in range(460)))
    assert 18_000 < path.stat().st_size < 22_000
    return path


@pytest.fixture(scope="module")
def tsv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.tsv"
    path.write_text("".join(f"{word}\t{' '.join(word.upper())}\n" for word in WORDS))
    return path


def without_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in place of the plot of a run, which takes two thirds of its time."""
    monkeypatch.setattr(plots, "loss_plot", lambda path, *args: args[-1](path, b"a plot"))


@pytest.fixture
def lm(kv: Command, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run train-lm on the verse; later arguments take the place of earlier ones."""
    without_plot(monkeypatch)

    def call(*args: str) -> Ran:
        given = ["--data", str(text), "--out", str(tmp_path / "run"), *LM]
        return kv(*given, *args, command="train-lm")

    return call


@pytest.fixture
def seq2seq(kv: Command, tsv: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    without_plot(monkeypatch)

    def call(*args: str) -> Ran:
        given = ["--data", str(tsv), "--out", str(tmp_path / "run"), *FAST, "--vocab-size", "300"]
        return kv(*given, *args, command="train-seq2seq")

    return call


@pytest.fixture(params=["lm", "seq2seq"])
def either(request: pytest.FixtureRequest) -> Command:
    return request.getfixturevalue(request.param)
