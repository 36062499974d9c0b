"""Decoders run uncompiled: checking their torch.compile'd form would be another check."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def eager() -> AbstractContextManager[object]:
    """A context in which nothing is compiled. It does not load the compiler."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextmanager
def quiet() -> Iterator[None]:
    """A context in which libraries do not warn, since calls that are only tried may be wrong."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
