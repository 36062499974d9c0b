"""Where a step's tokens are, for who stores and reads them in another way than a cache: compiled
code on a CPU, and recordings on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvtool.core.native.arrays import Array


class StepAddresses(NamedTuple):
    """Where a step's tokens are stored, and those before them: in columns by order of arrival."""

    start: int  # how many tokens stand before the first new one
    padding: Array  # (B,) how many at the start of each row are none
    addresses: Array  # (2,layers) of keys and values, (B,Hkv,columns,D) in the spec's dtype
    columns: int
    slot: int  # the column of the first new token
    window: int  # how many positions a token sees, its own included; 0: all before it
    sinks: Array  # (B,2) and besides, the columns from one to another
    # Where what is met quantized is, before the others: (6,layers) the addresses of codes, scales
    # and zero points of keys, and of values, and how they are packed, as compiled/codes.py has it.
    codes: Array = np.empty((6, 0), np.int64)
    packings: Array = np.array([[0, 1, 1, 1, 1]] * 2)
    exact: int = 0  # the first column that is met besides


class GraphStep(NamedTuple):
    """A step of one token a row, for who plays a recording of it."""

    start: int  # how many tokens stand before it
    tables: tuple[Tensor, ...]  # what else a step reads that another one may find changed
    form: tuple[int | None, ...]  # numbers that a recording fixes
    memory: list[Tensor]  # of keys and values: all else that `write` and `attend` reach


@cache
def none_of_each(batch: int) -> tuple[Array, Array]:
    """No padding and no sinks, as StepAddresses has them; nobody writes there."""
    return np.zeros(batch, np.int64), np.zeros((batch, 2), np.int64)


def is_readable(x: Tensor) -> bool:
    """Whether a tensor's numbers stand side by side in memory of the CPU, from its address on."""
    return type(x) is Tensor and x.is_cpu and x.is_contiguous() and x.data_ptr() != 0


def buffer_addresses(
    keys: Sequence[Tensor], values: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype
) -> Array | None:
    """The addresses (2,layers) of keys and values, for code that reads memory by itself; None
    unless all are dense, on the CPU, and of that shape and type."""
    for x in (*keys, *values):
        if x.shape != shape or x.dtype is not dtype or not is_readable(x):
            return None
    return np.array([[x.data_ptr() for x in each] for each in (keys, values)])
