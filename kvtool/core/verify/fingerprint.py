"""The SHA-256 of weights, by which a resumed run recognises its model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def fingerprint(modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of all weights and tables, by their names."""
    digest = hashlib.sha256()
    held = {f"{name}.{key}": t for name, m in modules.items() for key, t in m.state_dict().items()}
    for name, tensor in sorted({**held, **tensors}.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().tobytes() if values.numel() else b"")
    return digest.hexdigest()
