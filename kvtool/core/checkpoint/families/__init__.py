"""Checkpoint folders of Hugging Face: a configuration and a name map for each model_type.

All become kvtool's own decoder: a family says which ModelConfig has its mathematics, and which of
its tensors are ours. Adding one is a file and a line in FAMILIES.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtool.config import ModelConfig, check_int
from kvtool.core.checkpoint.families import (
    deepseek,
    gemma,
    gpt2,
    granite,
    llama,
    olmo2,
    phi3,
    smollm3,
)
from kvtool.core.checkpoint.families.fields import Fields
from kvtool.core.checkpoint.families.weights import NameMap, RenamedFile
from kvtool.core.checkpoint.weight_files import WeightFile
from kvtool.errors import FileError, UsageError
from kvtool.reading import MAX_CONFIG_BYTES, read_json_object

__all__ = ["FAMILIES", "Family", "end_ids"]

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Family:
    """How to read one model_type."""

    read: Callable[[Fields], ModelConfig]
    names: Callable[[ModelConfig], NameMap]
    prefix: str  # of the names, if the logits head is in the file too
    beside: tuple[str, ...] = ()  # name prefixes of tensors outside the language model

    def config(self, data: Mapping[str, Any], where: str) -> ModelConfig:
        """The model's configuration; `where` names the file in errors. Raises FileError for a field
        that is missing or invalid, or unknown, since it might change the model."""
        fields = Fields(data)
        try:
            config = self.read(fields)
            fields.finish()
        except UsageError as error:
            raise FileError(f"{where}: {error.message}", error.hint) from error
        return config

    def weights(self, source: WeightFile, config: ModelConfig) -> RenamedFile:
        """Their tensors under kvtool's names. Raises FileError for a tensor that is missing or has
        another shape."""
        names = self.names(config)
        return RenamedFile(source, names, self.prefix, config.tied, beside=self.beside)


FAMILIES = {
    "gpt2": Family(gpt2.read, gpt2.names, gpt2.PREFIX),
    "llama": Family(llama.read_llama, llama.names, llama.PREFIX),
    "mistral": Family(llama.read_mistral, llama.names, llama.PREFIX),
    "qwen2": Family(llama.read_qwen2, llama.names, llama.PREFIX),
    "qwen3": Family(llama.read_qwen3, llama.names, llama.PREFIX),
    "granite": Family(granite.read, llama.names, llama.PREFIX),
    "smollm3": Family(smollm3.read, llama.names, llama.PREFIX),
    "phi3": Family(phi3.read, phi3.names, llama.PREFIX),
    "olmo2": Family(olmo2.read, llama.names, llama.PREFIX),
    "gemma2": Family(gemma.read_gemma2, llama.names, llama.PREFIX),
    "gemma3_text": Family(gemma.read_gemma3, llama.names, llama.PREFIX),
    "gemma3": Family(gemma.read_gemma3_folder, llama.names, gemma.PREFIX, gemma.BESIDE),
    "deepseek_v2": Family(deepseek.read_v2, deepseek.names, llama.PREFIX),
    "deepseek_v3": Family(deepseek.read_v3, deepseek.names, llama.PREFIX),
}


def end_ids(folder: Path, data: Mapping[str, Any]) -> frozenset[int]:
    """The tokens that end a text, from generation_config.json or else from config.json `data`.

    Raises FileError.
    """
    path, found = folder / "config.json", data.get("eos_token_id")
    if os.path.lexists(folder / GENERATION_CONFIG):
        own = read_json_object(
            folder / GENERATION_CONFIG, "settings of generation", MAX_CONFIG_BYTES
        )
        if own.get("eos_token_id") is not None:
            path, found = folder / GENERATION_CONFIG, own["eos_token_id"]
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for token in ids:
        try:
            check_int("eos_token_id", token, 0)
        except UsageError as error:
            raise FileError(f"{path}: {error.message}") from error
    return frozenset(ids)
