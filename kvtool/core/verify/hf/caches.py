"""The caches that transformers makes for a model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvtool.core.verify.target.subject import NEEDED
from kvtool.errors import pass_on_shortage

BACKENDS = ("quanto", "hqq", "fp8")  # of QuantizedCache; the first that is installed counts


def make_cache(kind: str, config: Any, capacity: int) -> Any:
    """A cache of transformers for a model. Raises what it raises."""
    from transformers import DynamicCache, QuantizedCache, StaticCache

    text = config.get_text_config(decoder=True)
    if kind == "dynamic":
        return DynamicCache(config=text)
    if kind == "static":
        return StaticCache(config=text, max_cache_len=capacity)
    backend = quantized_backend()
    settings = {} if backend == "fp8" else {"residual_length": 8, "q_group_size": 16}
    cache = QuantizedCache(backend, text, **settings)
    for layer in cache.layers:
        disable_rounding(layer, paired=backend == "fp8")
    return cache


def attention_limits(config: Any) -> tuple[list[int], bool]:
    """The windows of a model's layers in tokens, and whether the room of a static cache ends in one
    of them: that of a state or of a ring does not."""
    from transformers.cache_utils import StaticLayer

    layers = make_cache("dynamic", config, NEEDED).layers
    windows = [window for layer in layers if (window := getattr(layer, "sliding_window", None))]
    try:
        static = make_cache("static", config, NEEDED).layers
    except Exception as error:  # layers of which there is no static kind
        pass_on_shortage(error)
        return windows, False
    return windows, any(isinstance(s, StaticLayer) and not s.is_sliding for s in static)


def quantized_backend() -> str:
    """The first backend of QuantizedCache that is installed."""
    from transformers.utils import is_hqq_available, is_optimum_quanto_available

    installed = {"quanto": is_optimum_quanto_available(), "hqq": is_hqq_available(), "fp8": True}
    return next(name for name in BACKENDS if installed[name])


def disable_rounding(layer: Any, paired: bool) -> None:
    """Let a quantized layer keep the values themselves as its codes.

    transformers has no uncached pass that quantizes alike. But all else that the layer does must be
    right to rounding. paired: the backend's codes come with a scale.
    """
    layer._quantize = (lambda tensor, scale=None: (tensor, 1.0)) if paired else _as_it_is
    layer._dequantize = (lambda codes: codes[0]) if paired else _as_it_is


def _as_it_is(tensor: Tensor, axis: int = 0) -> Tensor:
    return tensor
