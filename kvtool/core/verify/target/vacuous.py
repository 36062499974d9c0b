"""Users' decoders for which equal logits would prove nothing about the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kvtool.core.verify.target.attributes import contents, owned_modules
from kvtool.core.verify.target.work import work

HISTORY = 24  # tokens over which the work of a step is compared with that of a pass


def unused(subject: Any) -> str | None:
    """The message for an unused cache: a step computes as much as a pass over the history."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(subject.vocab_size, (1, HISTORY), generator=generator).to(subject.device)
    state = subject.prefilled(ids[:, :-1])
    held = [leaf for leaf in contents(state) if isinstance(leaf, nn.Module)]
    modules = [m for owner in held for m in owner.modules()]
    modules += owned_modules(subject.decoder).values()
    step = work(lambda: subject.step(ids[:, -1:], state), modules)
    whole = work(lambda: subject.call_full(ids), modules)
    if not whole or step < whole / 2:
        return None
    return f"a step computes as much as a pass over all {HISTORY} tokens: the cache is not used"


def self_compared(subject: Any) -> str | None:
    """The message for a `full` made of several steps: the cache would be compared with itself."""
    held, right = getattr(subject.decoder, "__dict__", {"step": None}), subject.decoder.step
    if "step" in held:
        return None
    n_steps = 0

    def counted(*args: Any) -> Any:
        nonlocal n_steps
        n_steps += 1
        return right(*args)

    held["step"] = counted
    try:
        subject.call_full(torch.zeros(1, 4, dtype=torch.long, device=subject.device))
    finally:
        del held["step"]
    if n_steps < 2:  # one step from an empty state is a pass over the whole sequence
        return None
    return "full is made of steps: the cache would be compared with itself"
