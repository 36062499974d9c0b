"""The tables: adding a cache kind, kernels, a model family or a command is a file and a line here.

Values are "module:attribute" text, so that reading the table imports nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from kvtool.errors import UsageError
from kvtool.nearest import did_you_mean, nearest_names
from kvtool.reading import quoted, short

CACHES = {
    "none": "kvtool.core.cache.none:NoCache",
    "dynamic": "kvtool.core.cache.dynamic:DynamicCache",
    "static": "kvtool.core.cache.static:StaticCache",
    "sliding": "kvtool.core.cache.sliding:SlidingCache",
    "int8": "kvtool.core.cache.quantized:Int8Cache",
    "int4": "kvtool.core.cache.quantized:Int4Cache",
    "fp8": "kvtool.core.cache.float8:Float8Cache",
    "paged": "kvtool.core.cache.paged:PagedCache",
}

# What a user may choose of a kind: `sliding:window=64:sinks=4`, or --window 64 --sinks 4.
CACHE_SETTINGS = {
    "sliding": ("window", "sinks"),
    "int8": ("group", "residual"),
    "int4": ("group", "residual"),
    "paged": ("page",),
}

IMPLEMENTATIONS = ("kvtool", "transformers")  # whose code runs a model

# Caches of transformers, which verify-cache --impl transformers judges.
TRANSFORMERS_CACHES = {
    "dynamic": "DynamicCache, with the sliding and linear layers that the configuration asks for",
    "static": "StaticCache, for as many tokens as there is room for",
    "quantized": "QuantizedCache, its codes replaced by exact values",
    "own": "what the model itself keeps, where it takes none of these",
}

# Kinds of its models, in the order in which a sweep judges them; a type may be both.
TRANSFORMERS_MODELS = {"causal": "causal language models", "seq2seq": "encoder-decoders"}

KERNELS = {
    "default": "kvtool.core.kernels.default:DefaultKernels",
    "exact": "kvtool.core.kernels.exact:ExactKernels",
}

MODELS = {
    "decoder": "kvtool.core.models.decoder:Decoder",
    "seq2seq": "kvtool.core.models.seq2seq:Seq2Seq",
    "general": "kvtool.core.models.general:GeneralDecoder",
    "latent": "kvtool.core.models.latent:LatentDecoder",
}

MAX_LISTED = 12  # names in an error; of more, the nearest are

COMMANDS = {
    "train-lm": "kvtool.commands.train.lm:command",
    "train-seq2seq": "kvtool.commands.train.seq2seq:command",
    "generate": "kvtool.commands.generate.command:command",
    "verify-logits": "kvtool.commands.verify.logits:command",
    "verify-cache": "kvtool.commands.verify.cache:command",
    "bench": "kvtool.commands.bench.command:command",
    "evaluate": "kvtool.commands.evaluate:command",
    "promote": "kvtool.commands.promote:command",
    "plan": "kvtool.commands.plan.command:command",
}


def choose(value: str, choices: list[str] | tuple[str, ...], flag: str) -> str:
    """Return `value` if it is one of `choices`; else raise UsageError with the nearest name."""
    if value in choices:
        return value
    text = short(str(value))
    near = nearest_names(text, choices, 2)
    shown = ", ".join(choices)
    if len(choices) > MAX_LISTED:
        closest = difflib.get_close_matches(text, choices, n=5, cutoff=0.0)
        shown = f"{', '.join(closest)} and {len(choices) - len(closest):,} more"
    raise UsageError(
        f"{flag}: {quoted(value)} is not known (expected one of {shown})", did_you_mean(near)
    )


def split_kind(text: str, flag: str = "--cache") -> tuple[str, dict[str, int]]:
    """A kind of cache and its settings: "paged:page=8" -> ("paged", {"page": 8}).

    Raises UsageError for an unknown kind or setting, and for a value that is no whole number.
    """
    name, *pairs = text.split(":")
    choose(name, tuple(CACHES), flag)
    known = CACHE_SETTINGS.get(name, ())
    settings = {}
    for pair in pairs:
        setting, _, value = pair.partition("=")
        if setting not in known:
            has = f"expected one of {', '.join(known)}" if known else "it has none"
            raise UsageError(f"{flag}: {name} has no setting {setting!r} ({has})")
        if not (value.isascii() and value.isdigit()) or len(value) > 9:
            raise UsageError(f"{flag}: {setting}: {quoted(value)} is not a whole number")
        settings[setting] = int(value)
    return name, settings


def with_settings(kind: str, given: Mapping[str, int | None]) -> str:
    """`kind` with those of the given settings that its kind has and its text does not say; None is
    not given."""
    name, settings = split_kind(kind)
    for key in CACHE_SETTINGS.get(name, ()):
        value = given.get(key)
        if value is not None:
            settings.setdefault(key, value)
    return ":".join([name, *(f"{key}={value}" for key, value in settings.items())])


def with_own_window(kind: str, window: int) -> str:
    """`kind` with the model's own `window`, if it has one, where its text says none."""
    return with_settings(kind, {"window": window or None})


def load(table: dict[str, str], name: str) -> Any:
    """Import and return the object that `table` lists under `name`. Raises KeyError."""
    module, attribute = table[name].split(":")
    return getattr(import_module(module), attribute)
