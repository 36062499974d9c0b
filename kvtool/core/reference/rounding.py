"""What an engine rounds that computes with right weights: tried on our own model, one by one.

The weights are the same; engines round what flows between them. A run in float32 with such a
rounding, beside the float64 run, says how far a right server may be.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kvtool.core.models import Model
from kvtool.core.models.layers import Linear

Rounded = Callable[[Tensor], Tensor]
BITS_8 = 127


def eight_bits(block: int) -> Rounded:
    """Blocks of whole numbers of 8 bits with one scale each, as llama.cpp makes of the input of a
    quantised matrix: Q8_0 or Q8_1 (32 values), Q8_K (256)."""

    def rounded(x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, block))
        scale = blocks.abs().amax(-1, keepdim=True) / BITS_8
        whole = (blocks / scale.clamp(min=1e-30)).round()
        return (whole * _half(scale)).flatten(-2)

    return rounded


def _half(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(x.dtype)


def _brain(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


@contextlib.contextmanager
def inputs(model: Model, rounded: Rounded) -> Iterator[None]:
    """Round what each matrix is multiplied by."""

    def hook(layer: Linear, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounded(given[0]), *given[1:])

    with _hooked(model, lambda layer: layer.register_forward_pre_hook(hook)):
        yield


@contextlib.contextmanager
def half_cache(model: Model) -> Iterator[None]:
    """Round queries, keys and values to float16, as a cache of that format holds them."""

    def hook(layer: Linear, given: Any, found: Tensor) -> Tensor:
        return _half(found)

    names = {id(layer): name for name, layer in model.named_modules()}
    is_qkv = lambda layer: names[id(layer)].endswith("attn.qkv")  # noqa: E731
    with _hooked(model, lambda layer: layer.register_forward_hook(hook) if is_qkv(layer) else None):
        yield


@contextlib.contextmanager
def coarser_weights(model: Model, bits: int = 4, block: int = 32) -> Iterator[None]:
    """Round each matrix to `bits` in blocks: other weights, of the same model. A matrix whose rows
    are no whole number of blocks is one block a row."""
    most = 2 ** (bits - 1) - 1

    def hook(layer: Linear, given: tuple[Any, ...], found: Tensor) -> Tensor:
        rows = layer.weight
        blocks = rows.unflatten(-1, (-1, block)) if rows.shape[-1] % block == 0 else rows[:, None]
        scale = (blocks.abs().amax(-1, keepdim=True) / most).clamp(min=1e-30)
        other = ((blocks / scale).round() * scale).flatten(-2)
        return torch.nn.functional.linear(given[0], other, layer.bias)

    with _hooked(model, lambda layer: layer.register_forward_hook(hook)):
        yield


@contextlib.contextmanager
def _hooked(model: Model, attach: Callable[[Linear], Any]) -> Iterator[None]:
    handles = [attach(layer) for layer in model.modules() if isinstance(layer, Linear)]
    try:
        yield
    finally:
        for handle in handles:
            if handle is not None:
                handle.remove()


@contextlib.contextmanager
def expected(model: Model, stored: str, block: int) -> Iterator[None]:
    """What an engine rounds that serves weights which are `stored` so: a format of GGUF, or of a
    folder, spelled as --dtype is. block: values of a block of that format; 1 if it has none."""
    with contextlib.ExitStack() as stack:
        if block > 1:
            stack.enter_context(inputs(model, eight_bits(256 if block == 256 else 32)))
        elif stored in ("BF16", "bfloat16", "float32"):  # engines serve float32 folders in it
            stack.enter_context(inputs(model, _brain))
        elif stored in ("F16", "float16"):
            stack.enter_context(inputs(model, _half))
        stack.enter_context(half_cache(model))
        yield


def described(stored: str, block: int) -> str:
    """What `expected` rounds, in words."""
    if block > 1:
        return "activations of 8 bits, a float16 cache"
    kind = {"F32": "", "F16": "float16", "float16": "float16"}.get(stored, "bfloat16")
    return f"activations in {kind}, a float16 cache" if kind else "a float16 cache"
