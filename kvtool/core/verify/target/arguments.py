"""The arguments of a step besides its ids: positions and masks."""

from __future__ import annotations

import torch
from torch import Tensor

from kvtool.core.verify.subject import Start

POSITION_FORMS = {
    "rows": "arange(past, past + n) for each row",
    "line": "arange(past, past + n)",
    "int": "past",
    "starts": "past for each row",
}
# (n, T): n new tokens and all T that there are.
MASK_FORMS = {
    "seen": "(n, T), True where a token may look",
    "seen, of heads": "(B, 1, n, T), True where a token may look",
    "added": "(n, T), -inf where a token may not look",
    "added, of heads": "(B, 1, n, T), -inf where a token may not look",
    "seen, of rows": "(B, n, T), True where a token may look",
    "seen, of room": "(B, n, room), True where a token may look",
    "hidden": "(n, T), True where a token may not look",
    "hidden, of heads": "(B, 1, n, T), True where a token may not look",
    "ones": "ones (B, T)",
    "trues": "all True (B, T)",
}


def mask(
    form: str, batch: int, past: int, n: int, room: int, like: Tensor, padding: Tensor | None = None
) -> Tensor:
    """The mask of a step of n tokens behind `past`. like: a weight, for format and device."""
    total = past + n
    kind, _, shape = form.partition(", of ")
    columns = torch.arange(room if shape == "room" else total, device=like.device)
    if kind in ("ones", "trues"):
        if padding is None:
            seen = torch.ones(batch, total, dtype=torch.bool, device=like.device)
        else:
            seen = Start(batch, 0, padding).real(0, total)
        return seen.long() if kind == "ones" else seen
    seen = columns <= torch.arange(past, total, device=like.device)[:, None]
    if shape:
        seen = seen.expand(batch, *seen.shape)
    if shape == "heads":
        seen = seen[:, None]
    if kind == "hidden":
        return ~seen
    if kind == "added":
        hidden = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
        return hidden.masked_fill(~seen, float("-inf"))
    return seen
