"""How many layers of a large model a scenario goes through.

A cache treats all layers of a kind alike, and rounding does not find a lost token. So a few
scenarios go through all layers of a large model: one step after the other, steps of several tokens,
and rows with padding. The others go through the first layers, among which is one of each kind.
With the exact kernels one kind of cache goes through all: what they add up, and in which order, is
the same in every layer, and what a cache holds there is judged with the default kernels.
"""

from __future__ import annotations

import copy

from torch import nn

from kvtool.config import ModelConfig
from kvtool.core.models import Model
from kvtool.core.verify.model_subject import Formats

DEEP_SCENARIOS = ("decode", "chunks", "padded")
MIN_LAYERS = 2  # so that an index of a layer that is wrong shows


def layers_for(config: ModelConfig, scenario: str, alike: bool = False) -> int:
    """How many layers of a large model a scenario goes through. alike: other kernels go through all
    with this kind of cache, and these kernels with another kind."""
    if scenario in DEEP_SCENARIOS and not alike:
        return config.n_layers
    all_kinds = config.first_window_layer + 1 if config.window else 1
    return min(max(MIN_LAYERS, all_kinds), config.n_layers)


def first_layers(model: Model, n: int) -> Model:
    """The same model with its first `n` layers alone, of the same weights."""
    part = copy.copy(model)
    # A module's copy shares the table of its parts, and that of its weights.
    part._modules = {**model._modules}
    layers = model._modules["layers"]
    assert isinstance(layers, nn.ModuleList)
    part._modules["layers"] = layers[:n]
    part.config = model.config.first_layers(n)
    return part


def cut(formats: Formats, n: int) -> Formats:
    """The formats of a model's first `n` layers; the same if it has no more."""
    if n >= formats.model.config.n_layers:
        return formats
    return Formats(first_layers(formats.model, n), formats.widens)
