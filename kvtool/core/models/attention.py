"""Multi-head attention over a sequence itself, with or without a cache, and over a source."""

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
    """(B,T,H*D) -> (B,H,T,D)"""
    return x.view(*x.shape[:2], -1, head_dim).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B,H,T,D) -> (B,T,H*D)"""
    return x.transpose(1, 2).flatten(2)


def attended(
    layer: int, q: Tensor, k: Tensor, v: Tensor, step: Step, cache: Cache | None
) -> Tensor:
    """What queries (B,H,T,D) gather from keys and values (B,Hkv,T,D) of the step and, with a cache,
    those before them -> (B,H,T,D)."""
    if cache is not None:
        return cache.attend(layer, q, k, v, step)
    if step.quantization is not None:
        k, v = step.quantization.both_copies(k, v, step.q_pos)
    return step.kernels.attention(q, k, v, step.mask, step.causal)


class SelfAttention(nn.Module):
    """Each token attends to those that the step lets it see: (B,T,d) -> (B,T,d).

    With fewer key-value heads than heads, a group of query heads shares one (Ainslie 2023).
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
        """Queries, keys and values of each token, side by side: (B,T,d) -> (B,T,(H+2*Hkv)*D)"""
        return self.normalise(self.qkv(x))

    def normalise(self, qkv: Tensor) -> Tensor:
        """Norms of queries and keys, where there are any, in what `qkv` gave."""
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
        heads = split_heads(
            step.kernels.per_token(x, self.project), self.head_dim
        )  # (B,H+2*Hkv,T,D)
        q, k, v = heads.split_with_sizes(self.qkv_heads, dim=1)
        q, k = self.placed(q, k, step.q_pos, rotary)
        y = attended(self.layer, q, k, v, step, cache)
        return step.kernels.per_token(merge_heads(y), self.out)


class CrossAttention(nn.Module):
    """Each token attends to the whole source: (B,T,d) -> (B,T,d)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width, kv_width = (n * config.head_dim for n in (config.n_heads, config.n_kv_heads))
        self.q = Linear(config.d_model, width, bias=config.has_bias("qkv"))
        self.kv = Linear(config.d_model, 2 * kv_width, bias=config.has_bias("qkv"))
        self.out = Linear(width, config.d_model, bias=config.has_bias("out"))

    def project(self, memory: Tensor, kernels: Kernels = DEFAULT) -> tuple[Tensor, Tensor]:
        """Keys and values of an encoded source (B,S,d) -> twice (B,Hkv,S,D)."""
        k, v = kernels.per_token(memory, self.kv).chunk(2, dim=-1)
        return split_heads(k, self.head_dim), split_heads(v, self.head_dim)

    def forward(self, x: Tensor, source: CrossCache, kernels: Kernels = DEFAULT) -> Tensor:
        q = split_heads(kernels.per_token(x, self.q), self.head_dim)
        y = source.attend(self.layer, q, kernels)
        return kernels.per_token(merge_heads(y), self.out)
