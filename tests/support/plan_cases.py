"""What caches and weights take in fact, to compare plans with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = 13  # tokens
N_PROMPT = 20  # tokens; as many follow one by one


def storage(tensors: list[Tensor]) -> int:
    """Bytes of the memory behind tensors, once each."""
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def stored_numbers(model: Any) -> int:
    """How many numbers a saved model has: tensors that are tied once."""
    return sum({t.data_ptr(): t.numel() for t in model.state_dict().values()}.values())


def layer_tensors(cache: Any) -> list[Tensor]:
    """Keys and values of all layers that hold some."""
    pairs = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in cache.layers]
    return [t for pair in pairs for t in pair if isinstance(t, Tensor)]


def measured(model: Any, kind: str, capacity: int, seq2seq: bool) -> int:
    """Bytes of transformers' own cache after a prompt and as many tokens one by one, two rows."""
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    text = model.config.get_text_config(decoder=True)
    cache: Any = (
        DynamicCache(config=text)
        if kind == "dynamic"
        else StaticCache(config=text, max_cache_len=capacity)
    )
    ids = torch.randint(5, 100, (2, 2 * N_PROMPT), generator=torch.Generator().manual_seed(0))
    own, names, more = [cache], "input_ids", {}
    if seq2seq:
        own = [cache, DynamicCache()]
        cache, names = EncoderDecoderCache(*own), "decoder_input_ids"
        more["encoder_outputs"] = model.get_encoder()(ids[:, :SOURCE])
    for start, end in [(0, N_PROMPT), *((i, i + 1) for i in range(N_PROMPT, 2 * N_PROMPT))]:
        model(**{names: ids[:, start:end]}, past_key_values=cache, use_cache=True, **more)
    return storage([t for one in own for t in layer_tensors(one)])


def as_file(config: Any, folder: Path) -> Path:
    """A configuration of transformers as its config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(config.to_dict(), default=str))
    return path
