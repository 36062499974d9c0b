"""verify-cache on small models."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cli_probe import Ran
from small_models import (
    save_decoder,
    save_seq2seq,
)

PROMPT = "Hear me speak."


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_decoder(tmp_path_factory.mktemp("decoder"), n_kv_heads=2, positions="rotary"))


@pytest.fixture(scope="module")
def seq2seq(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_seq2seq(tmp_path_factory.mktemp("seq2seq")))


@pytest.fixture
def check(kv: Callable[..., Ran], decoder: str) -> Callable[..., Ran]:
    """Run verify-cache on a decoder, 8 tokens after a short prompt."""

    def call(*args: str, model: str = decoder) -> Ran:
        given = ["--model", model, "--threads", "1", "--device", "cpu"]
        given += [] if "--tokens" in args else ["--tokens", "8"]
        given += [] if "--prompt" in args else ["--prompt", PROMPT]
        return kv(*given, *args, command="verify-cache")

    return call
