"""The interface of all models, on which the rest of kvtool relies."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from kvtool.config import ModelConfig
from kvtool.core.cache import Cache, Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.kernels.default import DEFAULT, Kernels


class Model(nn.Module):
    """A function of (weights, tokens, step, cache, source) without state between calls.

    So one object runs cached and uncached side by side. A family is a subclass whose constructor
    takes only its configuration, and a line in registry.MODELS.
    """

    config_class: ClassVar[type[ModelConfig]] = ModelConfig
    tensors_per_layer: ClassVar[int] = 1  # at least; a file with fewer is refused unread
    config: ModelConfig

    def forward(
        self,
        tokens: Tensor,
        step: Step | None = None,
        cache: Cache | None = None,
        source: CrossCache | None = None,
        last: bool = False,
    ) -> Tensor:
        """tokens (B,T) -> logits (B,T,V), or (B,1,V) of the last token alone with `last`.

        Without `step` the tokens are whole sequences; each token sees itself and those before it.
        With a cache, `step` is what `cache.begin(T)` returned. Encoder-decoders need `source`.
        Raises ValueError if one of these is missing.
        """
        raise NotImplementedError

    def encode(self, tokens: Tensor, mask: Tensor, kernels: Kernels = DEFAULT) -> CrossCache:
        """Encode sources (B,S) with mask (B,S) bool, True = real -> their keys and values.

        Raises NotImplementedError for a decoder-only model.
        """
        raise NotImplementedError("a decoder-only model has no encoder")


def uncached_step(tokens: Tensor, cache: Cache | None) -> Step:
    """The step of a pass over tokens (B,T), for which none was given. Raises ValueError if there is
    a cache, whose `begin` gives the step."""
    if cache is not None:
        raise ValueError("a cache needs the step that its begin() returned")
    batch, n = tokens.shape
    return Step.full(batch, n, tokens.device)
