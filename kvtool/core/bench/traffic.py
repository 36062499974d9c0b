"""What decoding one token must read from memory, and how fast this machine reads."""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from kvtool.core.bench.timing import now
from kvtool.core.models import Model

ARRAY_BYTES = 2**28  # bytes; more than a processor's own caches hold
TRIES = 5
STEADY = 0.8  # the share of the best reading that the median reaches if nothing disturbs it
CACHES = Path("/sys/devices/system/cpu")


def weights_read(model: Model) -> int:
    """Bytes of weights that a decoding step reads once, whatever its batch.

    All of the decoder except embedding tables, of which single rows are read, and the projections
    of the source, which are computed once.
    """
    decoder: nn.Module = getattr(model, "decoder", model)
    looked_up = {
        id(parameter)
        for module in decoder.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    # A table that is tied to the head is read as a whole.
    looked_up -= {
        id(module.weight) for module in decoder.modules() if isinstance(module, nn.Linear)
    }
    return sum(
        parameter.numel() * parameter.itemsize
        for name, parameter in decoder.named_parameters()
        if id(parameter) not in looked_up and ".cross.kv." not in name
    )


@dataclass(frozen=True)
class Bandwidth:
    """How fast a large array was read, in bytes a second, each time; and how many bytes stay in the
    processor's own caches, as far as it says."""

    rates: tuple[float, ...]
    own_caches: int | None = None

    @property
    def best(self) -> float:
        """The highest rate, in bytes a second."""
        return max(self.rates)

    @property
    def disturbed(self) -> bool:
        """Whether most readings were far from the best, so that the best may be too low as well."""
        return statistics.median(self.rates) < STEADY * self.best


def read_bandwidth(device: torch.device) -> Bandwidth:
    """Bytes a second at which a large array is summed, with the threads that torch has now.

    The array exceeds the processor's own caches: a small model, which fits into them, may be read
    faster.
    """
    array = torch.ones(ARRAY_BYTES // 4, device=device)
    rates = []
    for _ in range(TRIES):
        started = now(device)
        array.sum()
        rates.append(ARRAY_BYTES / max(now(device) - started, 1e-9))
    return Bandwidth(tuple(rates), own_caches(device))


def own_caches(device: torch.device) -> int | None:
    """Bytes that the caches of the processors hold which this process may use, or those of the GPU;
    None if nobody says (Linux does, in sysfs)."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", None)
    if not hasattr(os, "sched_getaffinity"):
        return None
    found = {}
    for processor in os.sched_getaffinity(0):
        for folder in CACHES.joinpath(f"cpu{processor}", "cache").glob("index*"):
            try:
                kind, level, size, shared = (
                    (folder / name).read_text(encoding="ascii").strip()
                    for name in ("type", "level", "size", "shared_cpu_list")
                )
                if kind != "Instruction":
                    found[level, shared] = int(size.removesuffix("K")) * 1024
            except (OSError, ValueError):
                continue
    return sum(found.values()) or None
