"""What every benchmark runs on: the shipped model on the CPU, one thread.

Each is a test too: with --benchmark-disable it runs once, untimed, and its result is checked.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvtool.config import ModelConfig
from kvtool.core.checkpoint import checkpoint
from kvtool.core.models import Model, build_model
from kvtool.files import DEFAULT_MODEL, weights_folder


@pytest.fixture(autouse=True)
def one_thread_without_gradients() -> Iterator[None]:
    """So that machines with more cores, and runs beside other work, stay comparable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model() -> Model:
    """The shipped model, or random weights of its sizes, which take the same time."""
    if (weights_folder() / DEFAULT_MODEL / "model.safetensors").is_file():
        return checkpoint.load("", torch.device("cpu"), torch.float32).model
    torch.manual_seed(0)
    return build_model(ModelConfig(vocab_size=1024)).eval()
