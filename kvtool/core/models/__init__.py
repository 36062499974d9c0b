"""Model families, listed in registry.MODELS."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from kvtool import registry
from kvtool.config import OWN, ModelConfig, own_types
from kvtool.core.models.base import Model

__all__ = ["Model", "build_model", "model_class", "read_config"]


def model_class(family: str) -> type[Model]:
    """The class of a registered family. Raises UsageError for an unknown one."""
    registry.choose(family, tuple(registry.MODELS), "--family")
    return registry.load(registry.MODELS, family)


def build_model(config: ModelConfig) -> Model:
    """A model with random weights (std 1/sqrt(width)), drawn from torch's global generator.

    Fields that the family adds to ModelConfig, and that `config` lacks, take their defaults. Raises
    UsageError for an unknown family.
    """
    family = model_class(config.kind)
    if not isinstance(config, family.config_class):
        fields = dataclasses.fields(ModelConfig)
        config = family.config_class(**{f.name: getattr(config, f.name) for f in fields})
    return family(config)


def read_config(data: Mapping[str, Any], where: str) -> ModelConfig:
    """The configuration in a checkpoint's config.json, of the class that its family has.

    data: the parsed file. where: its name, for errors. Raises FileError for wrong fields.
    """
    kind = data.get("model_type")
    family = str(kind).removeprefix(OWN) if kind in own_types() else "decoder"
    return model_class(family).config_class.from_dict(data, where)
