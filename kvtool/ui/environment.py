"""The environment of a result: versions, processor, threads, commit. Imports nothing heavy."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvtool import __version__
from kvtool.config import RunConfig
from kvtool.files import PACKAGE
from kvtool.ui.inert import in_a_line

LONGEST_NAME = 40  # characters of a model's name in a caption


def environment() -> dict[str, Any]:
    """Describe this process and machine; a fact that cannot be found is None, and nothing raises.

    Packages are named only if the work imported them: asking must not load them.
    """
    names = ("torch", "numpy", "numba", "transformers")
    torch, numpy, *others = (sys.modules.get(name) for name in names)
    return {
        "kvtool": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch and str(torch.__version__),
        "numpy": numpy and str(numpy.__version__),
        **{name: str(m.__version__) for name, m in zip(names[2:], others, strict=True) if m},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch and torch.get_num_threads(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def measured_on(settings: Any, resolved: Mapping[str, Any]) -> dict[str, Any]:
    """What a result is of and where it is from, for captions and tables: as much as is known.

    `resolved` is what a command found out: the path and SHA-256 of its model, its device, and the
    settings of its caches.
    """
    run = settings if isinstance(settings, RunConfig) else getattr(settings, "run", None)
    if run is None:
        return {}
    torch = sys.modules.get("torch")
    on_gpu = torch and str(resolved.get("device", "")).startswith("cuda")
    facts = {
        "model": model_name(run.model, resolved),
        "sha256": resolved.get("sha256"),
        "dtype": resolved.get("dtype", run.dtype),
        "stored_dtype": resolved.get("stored_dtype"),
        "threads": resolved.get("threads") or (torch and torch.get_num_threads()),
        "processor": torch.cuda.get_device_name() if torch and on_gpu else cpu_name(),
        "cache_settings": cache_settings(resolved),
    }
    return {name: value for name, value in facts.items() if value}


def cache_settings(resolved: Mapping[str, Any], only: str = "") -> str:
    """The settings of the kinds of caches that a command found out, or of one of them alone.

    >>> cache_settings({"cache_settings": {"static": {}, "paged": {"page": 16}}})
    'paged: page 16'
    """
    found = resolved.get("cache_settings", {})
    return "; ".join(
        f"{kind.partition(':')[0]}: {', '.join(f'{k} {v}' for k, v in chosen.items())}"
        for kind, chosen in found.items()
        if chosen and only in ("", kind)
    )


def model_name(asked: str, resolved: Mapping[str, Any]) -> str:
    """A short name of the model: as it was asked for, or the end of its path."""
    path = Path(str(resolved.get("model", "")))
    # A run's checkpoints are best and last.
    end = path.name if path.name not in ("best", "last") else "/".join(path.parts[-2:])
    short = asked and len(asked) <= LONGEST_NAME and not Path(asked).is_absolute()
    name = asked if path.name and short else end
    return f"{name} {note}".strip() if (note := resolved.get("changed")) else name


def caption(facts: Mapping[str, Any], n_digits: int = 8) -> str:
    """What `measured_on` found, in a line, with the first `n_digits` of the checksum.

    >>> caption({"model": "a", "sha256": "0123456789ab", "dtype": "float32", "threads": 2})
    'a (01234567), float32, 2 threads'

    Several number formats, or numbers of threads, are lists.
    """
    model, sha256 = facts.get("model", ""), facts.get("sha256", "")
    dtype, stored, threads = (
        " and ".join(map(str, found)) if isinstance(found, (list, tuple)) else found
        for found in map(facts.get, ("dtype", "stored_dtype", "threads"))
    )
    parts = [
        f"{model} ({sha256[:n_digits]})" if model and sha256 else model,
        f"{dtype} (stored in {stored})" if stored and stored != dtype else dtype,
        f"{threads} thread{'s' if threads != 1 else ''}" if threads else "",
        facts.get("processor", ""),
    ]
    line = ", ".join(part for part in parts if part)
    return in_a_line("; ".join(part for part in (line, facts.get("cache_settings", "")) if part))


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
    """The peak of this process's main memory in bytes; None if the system does not count it."""
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
    head = _git(checkout, "rev-parse", "HEAD")
    if not head:
        return None
    # `describe --dirty` would write the index, and might leave its lock behind on a full disk.
    changed = _git(checkout, "--no-optional-locks", "status", "--porcelain", "-uno")
    return f"{head}-dirty" if changed else head


def _git(checkout: Path, *words: str) -> str:
    """What git answers; "" if it cannot."""
    try:
        done = subprocess.run(
            ["git", *words], cwd=checkout, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
