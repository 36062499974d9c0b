"""Multi-head attention: self-attention with or without a cache, and cross-attention to a source."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kvtool.config import ModelConfig
from kvtool.core.cache import Cache, Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.kernels.default import DEFAULT, Kernels
from kvtool.core.models.layers import Linear, make_head_norm
from kvtool.core.models.rope import Rotary


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """Split each token into heads: (B,T,H*D) -> (B,H,T,D)."""
    return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Join the heads of each token: (B,H,T,D) -> (B,T,H*D)."""
    return x.transpose(1, 2).flatten(2)


def attended(
    layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step, cache: Cache | None
) -> Tensor:
    """What queries (B,H,T,D) gather from keys and values (B,Hkv,T,D) of the step and, with a cache,
    those before them -> (B,H,T,D)."""
    return step.attend(q, k, v) if cache is None else cache.attend(layer, q, k, v, step)


class SelfAttention(nn.Module):
    """Self-attention: each token attends to those that the step's mask shows it.

    With fewer key-value heads than query heads, a group of query heads shares one (Ainslie 2023).
    """

    by_token = True  # of `project`, as in layers.Plain

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        kv_width = config.n_kv_heads * config.head_dim
        self.qkv_widths = [config.n_heads * config.head_dim, kv_width, kv_width]
        self.qkv_heads = [config.n_heads, config.n_kv_heads, config.n_kv_heads]
        self.qkv = Linear(config.d_model, sum(self.qkv_widths), bias=config.has_bias("qkv"))
        self.q_norm = make_head_norm(config) if config.qk_norm else None
        self.k_norm = make_head_norm(config) if config.qk_norm else None
        self.out = Linear(self.qkv_widths[0], config.d_model, bias=config.has_bias("out"))

    def project(self, x: Tensor) -> Tensor:
        """The queries, keys and values of each token: (B,T,d) -> (B,T,(H+2*Hkv)*D)."""
        return self.normalise(self.qkv(x))

    def normalise(self, qkv: Tensor) -> Tensor:
        """Apply the norms of queries and keys, if there are any, to the output of `self.qkv`.

        (B,T,(H+2*Hkv)*D) -> the same shape.
        """
        if self.q_norm is None or self.k_norm is None:
            return qkv
        q, k, v = qkv.split(self.qkv_widths, dim=-1)
        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        return torch.cat([q, k, v], dim=-1)

    def placed(
        self, q: Tensor, k: Tensor, pos: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys (B,heads,T,D) as attention takes them, at positions (B,T)."""
        return (q, k) if rotary is None else (rotary(q, pos), rotary(k, pos))

    def forward(self, x: Tensor, step: Step, cache: Cache | None, rotary: Rotary | None) -> Tensor:
        """x (B,T,d) -> (B,T,d); with a cache, also write the keys and values of x to it."""
        heads = split_heads(
            step.kernels.per_token(x, self.project), self.head_dim
        )  # (B,H+2*Hkv,T,D)
        q, k, v = heads.split_with_sizes(self.qkv_heads, dim=1)
        q, k = self.placed(q, k, step.q_pos, rotary)
        y = attended(self.layer, q, k, v, step, cache)
        return step.kernels.per_token(merge_heads(y), self.out)


class CrossAttention(nn.Module):
    """Cross-attention: each token attends to the whole source."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width, kv_width = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
        self.q = Linear(config.d_model, width, bias=config.has_bias("qkv"))
        self.kv = Linear(config.d_model, 2 * kv_width, bias=config.has_bias("qkv"))
        self.out = Linear(width, config.d_model, bias=config.has_bias("out"))

    def project(self, memory: Tensor, kernels: Kernels = DEFAULT) -> tuple[Tensor, Tensor]:
        """The keys and values of an encoded source: memory (B,S,d) -> k, v (B,Hkv,S,D)."""
        k, v = kernels.per_token(memory, self.kv).chunk(2, dim=-1)
        return split_heads(k, self.head_dim), split_heads(v, self.head_dim)

    def forward(self, x: Tensor, source: CrossCache, kernels: Kernels = DEFAULT) -> Tensor:
        """x (B,T,d) -> (B,T,d)."""
        q = split_heads(kernels.per_token(x, self.q), self.head_dim)
        y = source.attend(self.layer, q, kernels)
        return kernels.per_token(merge_heads(y), self.out)
