"""The tables: adding a cache kind, kernels, a model family or a command is a file and a line here.

Values are "module:attribute" text, so that reading the table imports nothing.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from kvtool.errors import UsageError

CACHES = {
    "none": "kvtool.core.cache.none:NoCache",
    "dynamic": "kvtool.core.cache.dynamic:DynamicCache",
    "static": "kvtool.core.cache.static:StaticCache",
    "sliding": "kvtool.core.cache.sliding:SlidingCache",
    "int8": "kvtool.core.cache.quantized:Int8Cache",
    "int4": "kvtool.core.cache.quantized:Int4Cache",
    "paged": "kvtool.core.cache.paged:PagedCache",
}

KERNELS = {
    "default": "kvtool.core.kernels:DefaultKernels",
    "exact": "kvtool.core.exact:ExactKernels",
}

MODELS = {
    "decoder": "kvtool.core.models.decoder:Decoder",
    "seq2seq": "kvtool.core.models.seq2seq:Seq2Seq",
}

COMMANDS = {
    "train-lm": "kvtool.commands.train_lm:command",
    "train-seq2seq": "kvtool.commands.train_seq2seq:command",
    "generate": "kvtool.commands.generate:command",
    "verify-logits": "kvtool.commands.verify_logits:command",
    "verify-cache": "kvtool.commands.verify_cache:command",
    "bench": "kvtool.commands.bench:command",
}


def choose(value: str, choices: list[str] | tuple[str, ...], flag: str) -> str:
    """Return `value` if it is one of `choices`; else raise UsageError with the nearest name."""
    if value in choices:
        return value
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Choose one of: {', '.join(choices)}."
    raise UsageError(f"{flag}: {value!r} is not known (expected one of {', '.join(choices)})", hint)


def load(table: dict[str, str], name: str) -> Any:
    """Import and return the object that `table` lists under `name`. Raises KeyError."""
    module, attribute = table[name].split(":")
    return getattr(import_module(module), attribute)
