"""Model families, listed in registry.MODELS."""

from __future__ import annotations

from torch import nn

from kvtool import registry
from kvtool.config import ModelConfig


def build_model(config: ModelConfig) -> nn.Module:
    """A model with random weights (std 1/sqrt(width)), drawn from torch's global generator."""
    return registry.load(registry.MODELS, config.kind)(config)
