"""kvtool: the workbench for KV caches."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtool import testing as testing
    from kvtool.results import generate as generate
    from kvtool.results import verify as verify

__version__ = "0.1.0"

# Before torch and numba load their threads. These spin while they wait for each other, by default
# so long that where other programs use the processor a check takes five times as long and more.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# What is imported when it is used: torch takes a second.
FUNCTIONS = dict.fromkeys(("verify", "generate"), "kvtool.results")
MODULES = ("testing",)
__all__ = ["__version__", *FUNCTIONS, *MODULES]


def __getattr__(name: str) -> Any:
    if name in FUNCTIONS:
        return getattr(import_module(FUNCTIONS[name]), name)
    if name in MODULES:
        return import_module(f"kvtool.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
