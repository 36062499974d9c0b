"""How much memory work will take, in bytes: counted before it begins, from sizes alone."""

from __future__ import annotations

import torch
from torch import nn

from kvtool.config import ModelConfig

FLOAT64 = torch.float64.itemsize
SCENARIO = 512  # tokens of all rows; no scenario but the one on the prompt feeds more
FEWER = "Free memory, ask for fewer --tokens, or check a smaller model."
PIECE = 2**25  # logits that are held at once where only sums over them are wanted


def converted(model: nn.Module, dtype: torch.dtype) -> int:
    """What a copy of a model in another format takes; nothing if it is the model's own."""
    weights = list(model.parameters())  # those that are shared once
    if all(weight.dtype == dtype for weight in weights):
        return 0
    return dtype.itemsize * sum(weight.numel() for weight in weights)


def widened(model: nn.Module) -> int:
    """What a model takes in float64 whose weights are widened as they are read: the largest."""
    return FLOAT64 * max(weight.numel() for weight in model.parameters())


def activations(config: ModelConfig, n_tokens: int, itemsize: int) -> int:
    """Bytes of the widest moment of a pass over `n_tokens` of all rows: a layer's queries, keys and
    values, or its feed-forward network, and the values around them."""
    heads = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    wide = config.d_ff * (3 if config.gated else 2)
    return n_tokens * (3 * config.d_model + max(2 * heads, wide)) * itemsize


def arms(n_vocab: int, n_prompt: int, n_tokens: int, itemsize: int) -> int:
    """The logits that judging a cache on a prompt and `n_tokens` after it holds: of both arms, in
    the working format, in float64 and promoted, and what it takes to compare a step."""
    held = 2 * max(n_prompt + n_tokens, SCENARIO) * n_vocab * (itemsize + 2 * FLOAT64)
    return held + 3 * n_prompt * n_vocab * FLOAT64


def verdicts(config: ModelConfig, n_prompt: int, n_tokens: int, itemsize: int) -> int:
    """What judging a cache takes beside the weights: logits as `arms`, a cache and a pass."""
    n = max(n_prompt + n_tokens, SCENARIO)
    cache = 2 * n * config.n_layers * config.n_kv_heads * config.head_dim * FLOAT64
    logits = arms(config.vocab_size, n_prompt, n_tokens, itemsize)
    return logits + cache + activations(config, n, FLOAT64)


def witness(model: nn.Module, against: str | None, widens: bool = False) -> int:
    """What is held of the weights at most, beside a model in its working format, to compare it
    with a reference that `against` computes, and with itself in float64: both at once never are.

    widens: whether weights are widened as they are read.
    """
    weights = list(model.parameters())
    n, itemsize = sum(weight.numel() for weight in weights), weights[0].dtype.itemsize
    itemsize = max(itemsize, torch.float32.itemsize)  # as most are stored
    largest = widened(model)
    if widens:
        return n * itemsize + 2 * largest
    again = n * (itemsize + FLOAT64)
    if against == "transformers":  # what is stored, twice or converted, and their model
        return max(n * (2 * itemsize + FLOAT64), again)
    return max(n * itemsize + largest, again) if against else again


def reference(config: ModelConfig, n_tokens: int, longest: int, itemsize: int) -> int:
    """Bytes of comparing logits with a reference of `n_tokens`, beside the weights: the reference,
    and both runs over the longest of its texts."""
    held = n_tokens * config.vocab_size * FLOAT64
    runs = longest * config.vocab_size * (itemsize + 2 * FLOAT64)
    # Their implementations keep the scores of a layer whole.
    scores = 3 * config.n_heads * longest**2 * FLOAT64
    return held + runs + scores + activations(config, longest, FLOAT64)


def piece(vocab_size: int, n_tokens: int) -> int:
    """How many of `n_tokens` can be predicted at once, so that their logits are PIECE or fewer."""
    return max(min(PIECE // vocab_size, n_tokens), 1)


def quality(config: ModelConfig, n_tokens: int, itemsize: int) -> int:
    """Bytes of comparing the predictions of two caches over `n_tokens`, beside the weights: the
    logits of a piece, and in float64 twice those of each and a sum's terms."""
    n = piece(config.vocab_size, n_tokens)
    logits = n * config.vocab_size * (2 * itemsize + 5 * FLOAT64)
    caches = 4 * n_tokens * config.n_layers * config.n_kv_heads * config.head_dim * itemsize
    return logits + caches + activations(config, n, itemsize)
