"""kvtool: the workbench for KV caches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtool import testing as testing
    from kvtool.core.verify.api import verify as verify

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`kvtool.verify` and `kvtool.testing`, imported when they are used: torch takes a second."""
    if name == "verify":
        from kvtool.core.verify.api import verify

        return verify
    if name == "testing":
        import importlib

        return importlib.import_module("kvtool.testing")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
