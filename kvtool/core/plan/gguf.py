"""A GGUF file, planned from its header."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from kvtool.config import check_int
from kvtool.core.checkpoint.gguf.header import GGUFHeader
from kvtool.core.plan.described import EXPERT, Described, Weights
from kvtool.core.plan.layers import MAX_LAYERS, Layer, Shapes
from kvtool.errors import FileError, UsageError
from kvtool.reading import quoted

USUAL = "float16"  # what llama.cpp keeps keys and values in
# Whose layers keep keys and values of each token, all alike but for their heads. Of those with
# windows, which layers have one is not in the file.
PLAIN = (
    "arcee", "bitnet", "bloom", "command-r", "dbrx", "ernie4_5", "exaone", "falcon", "gemma",
    "glm4", "gpt2", "gptneox", "granite", "granitemoe", "internlm2", "llama", "minicpm", "mpt",
    "nemotron", "olmo", "olmo2", "olmoe", "phi2", "qwen", "qwen2", "qwen2moe", "qwen3", "qwen3moe",
    "refact", "smollm3", "stablelm", "starcoder", "starcoder2", "xverse",
)  # fmt: skip
LATENT = "deepseek2"
EVERY = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "cohere2": 4}  # this layer sees all
TABLE, HEAD = "token_embd.weight", "output.weight"
LOOKED_UP = re.compile(r"^(token_embd|position_embd|per_layer_token_embd)\.weight$")


def describe_gguf(path: Path, dtype: str | None) -> Described:
    """What the header says. Raises FileError for an architecture that is not known."""
    header = GGUFHeader(path, "--model")
    try:
        shapes = _shapes(header)
    except UsageError as error:
        message = f"{header.where}: {header.architecture}: {error.message}"
        raise FileError(message, error.hint) from error
    used, n = (_number(header, f"expert_{x}", 0) for x in ("used_count", "count"))
    total = read = 0
    for name, tensor in header.tensors.items():
        nbytes = tensor.end - tensor.begin
        total += nbytes
        if LOOKED_UP.match(name) and (name != TABLE or HEAD in header.tensors):
            continue
        read += nbytes * used // n if n and EXPERT.search(name) else nbytes
    weights = Weights(total, read, "headers")
    return Described(str(path), header.architecture, dtype or USUAL, shapes, weights)


def _shapes(h: GGUFHeader) -> Shapes:
    name = h.architecture
    if name not in (*PLAIN, *EVERY, LATENT):
        raise UsageError("cannot be planned: what its layers keep is not known")
    n_layers, context = _number(h, "block_count"), _number(h, "context_length", 0) or None
    check_int("block_count", n_layers, 1, MAX_LAYERS)
    n_heads = _by_layer(h, "attention.head_count", n_layers)
    if name == LATENT:
        rank, turning = _number(h, "attention.kv_lora_rank"), _number(h, "rope.dimension_count")
        wide = _number(h, "attention.key_length_mla", 0) or _number(h, "attention.key_length")
        value = _number(h, "attention.value_length_mla", 0) or _number(h, "attention.value_length")
        layers = (Layer(1, rank + turning, 0),) * n_layers
        return Shapes(layers, n_layers, context=context, expanded=n_heads[0] * (wide + value))
    n_kv_heads = _by_layer(h, "attention.head_count_kv", n_layers, n_heads)
    d_model = _number(h, "embedding_length")
    if d_model % n_heads[0] and not _number(h, "attention.key_length", 0):
        raise UsageError(f"attention.head_count: {n_heads[0]} do not divide {d_model}")
    key = _number(h, "attention.key_length", d_model // n_heads[0])
    value = _number(h, "attention.value_length", key)
    window = _number(h, "attention.sliding_window", 0)
    every = EVERY.get(name, 0)
    if window and not every and window < (context or window + 1):
        raise UsageError("cannot be planned: which of its layers have the window is not known")
    windows = [window if every and (i + 1) % every else 0 for i in range(n_layers)]
    layers = tuple(Layer(n_kv_heads[i], key, value, windows[i]) for i in range(n_layers))
    return Shapes(layers, n_layers, context=context)


def _number(h: GGUFHeader, name: str, default: int | None = None) -> int:
    value = h.get(f"{h.architecture}.{name}", default)
    if value is None:
        raise UsageError(f"{name} is missing")
    check_int(name, value, 0 if default == 0 else 1)
    return int(value)


def _by_layer(
    h: GGUFHeader, name: str, n_layers: int, default: list[int] | None = None
) -> list[int]:
    value: Any = h.get(f"{h.architecture}.{name}")
    if value is None:
        if default is None:
            raise UsageError(f"{name} is missing")
        return default
    found = value if isinstance(value, list) else [value] * n_layers
    if len(found) != n_layers:
        raise UsageError(f"{name}: {quoted(str(value)[:40])} is not one for each of {n_layers}")
    for one in found:
        check_int(name, one, 1)
    return found
