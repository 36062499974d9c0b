"""What a lossy cache costs in accuracy: its predictions compared with those of a lossless one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kvtool.core.cache import Cache, CacheSpec, make_cache
from kvtool.core.decoding.engine import advance, generate
from kvtool.core.decoding.sampling import Sampler
from kvtool.core.footprint import piece
from kvtool.core.models import Model


@dataclass(frozen=True)
class Quality:
    """How predictions of each next token of a text differ between a kind of cache and a lossless
    one."""

    kl: float  # nats a token, KL(lossless || this kind)
    same_top1: float  # share of tokens whose likeliest successor is the same
    perplexity: float  # of the text's tokens
    lossless_perplexity: float
    n_tokens: int


@torch.inference_mode()
def measure_quality(model: Model, kind: str, ids: Tensor, block: int) -> Quality:
    """Predict each token of `ids` (n,) from those before it in its block of `block` tokens.

    A block is fed in pieces whose logits fit into memory. What a token sees does not depend on the
    pieces, for any kind of cache.
    """
    kl = same = lossy = lossless = 0.0
    n = 0
    for text in ids.split(block):
        if len(text) < 2:
            continue
        caches = [make_cache(name, _spec(model, len(text))) for name in (kind, "dynamic")]
        size = piece(model.config.vocab_size, len(text))
        for read, wanted in zip(text[:-1].split(size), text[1:, None].split(size), strict=True):
            found, full = (_log_probs(model, cache, read) for cache in caches)
            kl += float(F.kl_div(found, full, log_target=True, reduction="sum"))
            same += float((found.argmax(-1) == full.argmax(-1)).sum())
            lossy -= float(found.gather(1, wanted).sum())
            lossless -= float(full.gather(1, wanted).sum())
            n += len(wanted)
    return Quality(kl / n, same / n, math.exp(lossy / n), math.exp(lossless / n), n)


def own_text(model: Model, n_tokens: int, seed: int) -> Tensor:
    """Tokens (n,) sampled from the model, to measure on if no text is given."""
    device = next(model.parameters()).device
    start = torch.zeros(1, 1, dtype=torch.long, device=device)
    spec = _spec(model, n_tokens)
    sampler = Sampler(temperature=1.0, seed=seed)
    tokens = generate(model, start, make_cache("dynamic", spec), n_tokens - 1, sampler)
    return torch.cat([start[0], *tokens])


def _log_probs(model: Model, cache: Cache, ids: Tensor) -> Tensor:
    """Log probabilities (n,V), float64, of what follows each of the next tokens `ids` (n,)."""
    return advance(model, cache, ids[None])[0].double().log_softmax(-1)


def _spec(model: Model, capacity: int) -> CacheSpec:
    weight = next(model.parameters())
    return CacheSpec.of(model.config, 1, capacity, weight.dtype, weight.device)
