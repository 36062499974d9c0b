"""Decoders run as they are written: what torch.compile would make of them is another check."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def eager() -> AbstractContextManager[object]:
    """Within, nothing is compiled. Where nobody has loaded the compiler, it is not loaded."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def quiet() -> Iterator[None]:
    """Within, libraries do not warn: whatever is only tried out may be called in a wrong way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
