"""What decoding one token must read from memory, and how fast this machine reads."""

from __future__ import annotations

import torch
from torch import nn

from kvtool.core.models import Model
from kvtool.core.timing import now

LARGE = 2**28  # bytes; more than a processor's own caches hold
TRIES = 5


def weights_read(model: Model) -> int:
    """Bytes of weights that a decoding step reads once, whatever its batch.

    All of the decoder but the tables in which it looks up single rows, and but the projections of
    the source, which were computed once.
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


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second at which a large array is summed, with the threads that torch has now.

    The best of several tries. The array exceeds the processor's own caches: a small model, which
    fits into them, may be read faster.
    """
    array = torch.ones(LARGE // 4, device=device)
    best = 0.0
    for _ in range(TRIES):
        started = now(device)
        array.sum()
        best = max(best, LARGE / max(now(device) - started, 1e-9))
    return best
