"""What a result was measured on: versions, processor, threads, commit. Imports nothing heavy."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvtool import __version__
from kvtool.files import PACKAGE


def environment() -> dict[str, Any]:
    """Describe this process and machine; a fact that cannot be found is None, and nothing raises.

    torch and numpy are named only if the work imported them: asking must not load them.
    """
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    return {
        "kvtool": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch and str(torch.__version__),
        "numpy": numpy and str(numpy.__version__),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch and torch.get_num_threads(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_name() -> str | None:
    """The model of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, UnicodeDecodeError):
        pass
    return platform.processor() or None


def peak_memory() -> int | None:
    """Bytes of main memory that this process has held at most; None where nobody counts them."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    # In kilobytes on Linux and in bytes on macOS (getrusage(2) of each).
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cores() -> int | None:
    """How many processors this process may use, which in a container is fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def commit() -> str | None:
    """The commit of the checkout that kvtool runs from, "-dirty" if it was changed since."""
    checkout = PACKAGE.parent
    if not (checkout / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
