"""Attention of whole prompts in compiled code, where that takes less time than PyTorch."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from kvtool.core.native import arrays as native

LEAST = 128  # tokens; for fewer PyTorch's attention takes as long
WHOLE = 64  # numbers of a head that compiled/prompts.py multiplies at once, and keys of a block


def can_attend(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `attention` can be used, and takes less time; shapes as `Kernels.attention`."""
    return (
        q.shape[2] == k.shape[2] >= LEAST
        and k.shape == v.shape
        and (q.shape[0], q.shape[3]) == (k.shape[0], k.shape[3])
        and not q.shape[3] % WHOLE
        and not q.shape[1] % k.shape[1]
        and q.dtype is not torch.float64
        and native.fills_registers()
        and native.can_read(q, k, v)
    )


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`Kernels.attention`, causal, of as many queries as keys, in float32. Ask `serves` first."""
    batch, _, n, width = q.shape
    heads, blocks = batch * k.shape[1], -(-n // WHOLE)
    queries = native.computed(q.transpose(1, 2))  # (B,T,H,D)
    y = np.empty_like(queries)
    keys = np.empty((heads, blocks, width, WHOLE), np.float32)
    values = np.empty((heads, blocks, WHOLE, width), np.float32)
    _code().pack(*(native.computed(x).reshape(heads, n, width) for x in (k, v)), keys, values)
    _code().attend_prompt(queries, keys, values, y, native.threads_for(native.MIN_SHARED))
    return torch.from_numpy(y).transpose(1, 2).to(q.dtype)


@cache
def _code() -> ModuleType:
    """What `can_read` has loaded with the layers."""
    return importlib.import_module("kvtool.core.native.compiled.prompts")
