"""Model families, listed in registry.MODELS."""

from __future__ import annotations

from kvtool import registry
from kvtool.config import ModelConfig
from kvtool.core.models.base import Model

__all__ = ["Model", "build_model"]


def build_model(config: ModelConfig) -> Model:
    """A model with random weights (std 1/sqrt(width)), drawn from torch's global generator."""
    return registry.load(registry.MODELS, config.kind)(config)
