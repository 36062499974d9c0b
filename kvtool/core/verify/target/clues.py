"""Sizes and special ids in a decoder's attributes, which the check should feed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from kvtool.core.verify.target.attributes import CONFIG_NAMES, owned_modules

SIZES = re.compile(r"window|chunk|block_size|page_size|tile_size|prefill_step", re.IGNORECASE)
IDS = re.compile(r"(_token_ids?|_token_index|_token_idx|^(bos|eos|sep|unk|mask|image)_id)$")
PADS = re.compile(r"pad", re.IGNORECASE)  # no text has this id


def sizes(decoder: Any, context: int) -> tuple[int, ...]:
    """The tokens of its windows, chunks and blocks, if well below its context: in nanoGPT
    `block_size` is the context."""
    found = {n for name, n in _numbers(decoder) if SIZES.search(name) and 2 <= n <= context // 2}
    return tuple(sorted(found))


def special_ids(decoder: Any, vocab_size: int) -> tuple[int, ...]:
    """The ids to which an attribute gives a meaning, except padding, which no text contains."""
    found = {
        n
        for name, n in _numbers(decoder)
        if IDS.search(name) and not PADS.search(name) and 0 <= n < vocab_size
    }
    return tuple(sorted(found))


def _numbers(decoder: Any) -> Iterator[tuple[str, int]]:
    """The whole numbers among the attributes of a decoder, its modules and their configurations,
    alone or in a list, each with its name."""
    for holder in _holders(decoder):
        held = holder if isinstance(holder, dict) else getattr(holder, "__dict__", {})
        own = () if isinstance(holder, (dict, nn.Module)) else vars(type(holder)).items()
        for name, value in (*held.items(), *own):
            if not isinstance(name, str) or isinstance(value, (nn.Module, property)):
                continue
            for leaf in tree_leaves(value) if isinstance(value, (list, tuple)) else [value]:
                if isinstance(leaf, int) and not isinstance(leaf, bool):
                    yield name, leaf


def _holders(decoder: Any) -> Iterator[Any]:
    seen: set[int] = set()
    for owner in (decoder, *owned_modules(decoder).values()):
        configs = [getattr(owner, name, None) for name in CONFIG_NAMES]
        nested = [
            value
            for config in configs
            for value in (getattr(config, "__dict__", None) or {}).values()
            if hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module))
        ]
        for holder in (owner, *configs, *nested):
            if holder is not None and id(holder) not in seen:
                seen.add(id(holder))
                yield holder
