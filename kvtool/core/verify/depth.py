"""What part of a large model a scenario goes through: how many layers, how many tokens.

A cache treats all layers of a kind alike, and rounding does not find a lost token. So a few
scenarios go through all layers of a large model: one step after the other, steps of several tokens,
and rows with padding. The others go through the first layers, among which is one of each kind.
With the exact kernels one kind of cache goes through all: what they add up, and in which order, is
the same in every layer, and what a cache holds there is judged with the default kernels.

Behind two layers most of the work would be the vocabulary's, of which no cache knows. So these
scenarios have the first tokens alone, twice as many as a hidden state has channels or more: with so
many logits no two hidden states have the same ones.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, TypeVar

from torch import nn

from kvtool.config import ModelConfig
from kvtool.core.models import Model
from kvtool.core.verify.model_subject import Formats

DEEP_SCENARIOS = ("decode", "chunks", "padded")
MIN_LAYERS = 2  # so that an index of a layer that is wrong shows
MIN_TOKENS = 4096  # of the vocabulary


def layers_for(config: ModelConfig, scenario: str, alike: bool = False) -> int:
    """How many layers of a large model a scenario goes through. alike: other kernels go through all
    with this kind of cache, and these kernels with another kind."""
    if scenario in DEEP_SCENARIOS and not alike:
        return config.n_layers
    all_kinds = config.first_window_layer + 1 if config.window else 1
    return min(max(MIN_LAYERS, all_kinds), config.n_layers)


def first_layers(model: Model, n: int) -> Model:
    """The same model with its first `n` layers alone, and the first tokens of its vocabulary, of
    the same weights."""
    config = model.config.first_layers(n)
    n_tokens = min(max(MIN_TOKENS, 2 * config.d_model), config.vocab_size)
    part = _copied(model)
    layers, embed, head = (model._modules[name] for name in ("layers", "embed", "head"))
    assert isinstance(layers, nn.ModuleList) and embed is not None and head is not None
    shared: dict[int, nn.Parameter] = {}  # a head that is tied stays so
    part._modules["embed"] = few = _copied(embed)
    few._modules["tokens"] = _first_rows(embed.tokens, n_tokens, shared)
    part._modules["head"] = _first_rows(head, n_tokens, shared)
    part._modules["layers"] = layers[:n]
    part.config = dataclasses.replace(config, vocab_size=n_tokens)
    return part


T = TypeVar("T", bound=nn.Module)


def _copied(module: T) -> T:
    """A copy with tables of its own of the same parts and weights, which `copy` would share."""
    found = copy.copy(module)
    found._modules, found._parameters = {**module._modules}, {**module._parameters}
    return found


def _first_rows(module: Any, n: int, known: dict[int, nn.Parameter]) -> Any:
    """An embedding or a linear layer with the first `n` rows of its weight. known: those of the
    weights that were met, by their identity."""
    found, weight = _copied(module), module.weight
    if id(weight) not in known:
        known[id(weight)] = nn.Parameter(weight[:n], requires_grad=False)
    found._parameters["weight"] = known[id(weight)]
    if isinstance(module, nn.Embedding):
        found.num_embeddings = n
    else:
        found.out_features = n
    return found


def cut(formats: Formats, n: int) -> Formats:
    """The formats of a model's first `n` layers; the same if it has no more."""
    if n >= formats.model.config.n_layers:
        return formats
    return Formats(first_layers(formats.model, n), formats.widens, formats.is_large)
