"""generate with small models, and bytes on its stdin."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cli_probe import Ran
from small_models import answer, save_decoder, save_seq2seq


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("decoder"), positions="rotary")


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_seq2seq(tmp_path_factory.mktemp("seq2seq"))


@pytest.fixture
def generate(kv: Callable[..., Ran], decoder: Path) -> Callable[..., Ran]:
    def call(*args: str, model: Path = decoder) -> Ran:
        return kv(
            "--model", str(model), "--threads", "1", "--device", "cpu", *args, command="generate"
        )

    return call


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Put bytes on stdin."""

    def put(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return put


def texts(ran: Ran) -> list[str]:
    return [result["text"] for result in answer(ran)["results"]]
