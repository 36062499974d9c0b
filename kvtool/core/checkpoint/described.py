"""What a checkpoint says of its model beside the weights: the configuration and the tokenizers."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from kvtool.config import OWN, ModelConfig, own_types
from kvtool.core.checkpoint.families import FAMILIES, Family, end_ids
from kvtool.core.checkpoint.gguf.tokens import read_tokenizer
from kvtool.core.checkpoint.gguf.weights import GGUFModel
from kvtool.core.checkpoint.weight_files import CONFIG, refuse_lookalike
from kvtool.core.models import read_config
from kvtool.core.text.tokenizer import NoTokenizer, Tokenizer
from kvtool.errors import FileError
from kvtool.files import CHECKPOINT_FOLDER
from kvtool.reading import MAX_CONFIG_BYTES, quoted, read_json_object

TOKENIZER, SOURCE, TARGET = "tokenizer.json", "source.json", "target.json"
LOG = logging.getLogger("kvtool")


def described_in(folder: Path) -> Path:
    """The file with the configuration: config.json, or the GGUF file itself."""
    return folder if folder.is_file() else folder / CONFIG


def read_described(folder: Path) -> tuple[ModelConfig, Family | GGUFModel | None]:
    """The configuration, and the family whose names the weights have; None for kvtool's own."""
    if folder.is_file():
        found = GGUFModel(folder)
        return found.config, found
    path = folder / CONFIG
    if not os.path.lexists(path):
        raise FileError(
            f"--model {folder}: holds no {CONFIG}: not a checkpoint folder", CHECKPOINT_FOLDER
        )
    refuse_lookalike(path, "a configuration")
    data = read_json_object(path, "a configuration", MAX_CONFIG_BYTES)
    kind = data.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is not None:
        return family.config(data, str(path)), family
    if kind not in own_types():
        is_own = isinstance(kind, str) and kind.startswith(OWN)
        own = "A family of your own needs its line in MODELS (docs/extending.md)."
        raise FileError(
            f"{path}: model_type {quoted(kind)} is not supported "
            f"(expected one of {', '.join((*own_types(), *FAMILIES))})",
            own if is_own else "kvtool never runs code from a checkpoint.",
        )
    return read_config(data, str(path)), None


def read_tokenizers(
    folder: Path, config: ModelConfig, family: Family | GGUFModel | None
) -> tuple[Tokenizer, Tokenizer | None]:
    if isinstance(family, GGUFModel):
        field = "rows of token_embd.weight"
        tokenizer = _checked(read_tokenizer(family.header), folder, field, config.vocab_size)
        return tokenizer, None
    if family is not None:
        if not os.path.lexists(folder / TOKENIZER):
            return NoTokenizer(folder / TOKENIZER), None
        tokenizer = _read_tokenizer(folder / TOKENIZER, "vocab_size", config.vocab_size)
        ends = end_ids(
            folder, read_json_object(folder / CONFIG, "a configuration", MAX_CONFIG_BYTES)
        )
        return tokenizer.as_it_is(ends), None
    if not config.n_encoder_layers:
        return _read_tokenizer(folder / TOKENIZER, "vocab_size", config.vocab_size), None
    source = _read_tokenizer(folder / SOURCE, "source_vocab_size", config.source_vocab_size)
    return _read_tokenizer(folder / TARGET, "vocab_size", config.vocab_size), source


def _read_tokenizer(path: Path, field: str, embedded: int) -> Tokenizer:
    refuse_lookalike(path, "a tokenizer")
    return _checked(Tokenizer.load(path), path, f"{field} of {CONFIG}", embedded)


def _checked(tokenizer: Tokenizer, path: Path, field: str, embedded: int) -> Tokenizer:
    """The tokenizer, if an embedding of `embedded` tokens has all of its ids. Raises FileError."""
    if tokenizer.vocab_size > embedded:
        raise FileError(
            f"{path}: has {tokenizer.vocab_size} tokens "
            f"(expected {embedded} or fewer, the {field})",
            "The model has no embedding for the rest: the tokenizer is another model's.",
        )
    for what, token in tokenizer.named_ids.items():
        if token >= embedded:
            raise FileError(
                f"{path}: {what} has the token {token} (expected one below {embedded}, the {field})"
            )
    if tokenizer.left_out:
        what = " and ".join(tokenizer.left_out)
        LOG.info(f"{path}: its {what}, for batches in training, will not be done")
    return tokenizer
