"""How many layers of a large model a scenario goes through.

A cache treats all layers of a kind alike, and rounding does not find a lost token. So a few
scenarios go through all layers of a large model: one step after the other, steps of several tokens,
and rows with padding. The others go through the first layers, among which is one of each kind.
"""

from __future__ import annotations

import copy

from torch import nn

from kvtool.core.models import Model
from kvtool.core.verify.model_subject import Formats

DEEP_SCENARIOS = ("decode", "chunks", "padded")
MIN_LAYERS = 2  # so that an index of a layer that is wrong shows


def layers_for(formats: Formats, scenario: str) -> int:
    """How many layers of a large model a scenario goes through."""
    config = formats.model.config
    if scenario in DEEP_SCENARIOS:
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
