"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one small vector a token is cached.

A token's keys and values, those of all heads, are linear in its latent c, a vector of `kv_rank`
numbers, but for `rotary_dim` channels of a key that turn, and that all heads share. So a cache
holds c and those channels. Absorbed, a score is (W_uk^T q) . c + q_rope . k_rope, and a head's
output W_uv of what the weights make of c: the attention of many query heads over one key head of
`kv_rank + rotary_dim` channels, whose values are its keys. It is computed so with a cache and
without, so that both do the same and, with exact kernels, have the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from kvtool.config import ModelConfig, check_bool, check_int
from kvtool.core.cache import Cache, Step
from kvtool.core.models.attention import attended, merge_heads, split_heads
from kvtool.core.models.general import GeneralBlock, GeneralConfig, GeneralDecoder
from kvtool.core.models.layers import Linear, RMSNorm
from kvtool.core.models.rope import Rotary
from kvtool.errors import UsageError

EPS = 1e-6  # of the norms of latents, whatever the configuration says


@dataclass(frozen=True)
class LatentConfig(GeneralConfig):
    """A GeneralConfig with the sizes of latents. 0: what suits the width of the model.

    `n_kv_heads` and `head_size` are those of what is cached: one head of kv_rank + rotary_dim.
    """

    family: str = "latent"
    q_rank: int = 0  # of the latent of queries; 0: they have none
    kv_rank: int = 0
    still_dim: int = 0  # channels of a query or key that do not turn ("nope")
    value_dim: int = 0
    interleaved: bool = False  # channels that turn together stand side by side, not half a head off

    def __post_init__(self) -> None:
        sizes = ("d_model", "n_heads", "q_rank", "kv_rank", "still_dim", "value_dim", "rotary_dim")
        for name in sizes:
            check_int(name, getattr(self, name), 0)
        check_bool("interleaved", self.interleaved)
        usual = max(self.d_model // max(self.n_heads, 1) // 2 * 2, 2)
        defaults = {"kv_rank": 2 * usual, "still_dim": usual, "value_dim": usual}
        for name, size in {**defaults, "rotary_dim": usual}.items():
            object.__setattr__(self, name, getattr(self, name) or size)
        if self.n_kv_heads not in (0, 1, self.n_heads):  # 0 becomes n_heads in other families
            raise UsageError(
                f"--n-kv-heads: {self.n_kv_heads} is not for latent attention (expected 1)"
            )
        object.__setattr__(self, "n_kv_heads", 1)
        object.__setattr__(self, "head_size", self.kv_rank + self.rotary_dim)
        if not self.attention_scale:
            object.__setattr__(self, "attention_scale", self.query_dim**-0.5)
        super().__post_init__()
        if self.qk_norm:
            raise UsageError("qk_norm: is not for latent attention, whose keys are never made")

    def _says_how_to_turn(self) -> bool:  # rotary_dim is a size, whether it turns or not
        return bool(self.unrotated_layers or self.window_theta)

    @property
    def query_dim(self) -> int:
        """Channels of a head's query: those that do not turn, then those that do."""
        return self.still_dim + self.rotary_dim

    @property
    def shared_values(self) -> bool:
        return True


class LatentAttention(nn.Module):
    """Each token attends to those that the step lets it see, by latents: (B,T,d) -> (B,T,d)."""

    def __init__(self, config: LatentConfig, layer: int) -> None:
        super().__init__()
        c, self.layer = config, layer
        self.n_heads, self.scale = c.n_heads, c.score_scale(layer)
        self.ranks, self.parts = [c.kv_rank, c.rotary_dim], [c.still_dim, c.rotary_dim]
        self.interleaved = c.interleaved
        bias = c.has_bias("qkv")
        self.q_down = Linear(c.d_model, c.q_rank, bias=bias) if c.q_rank else None
        self.q_norm = RMSNorm(c.q_rank, eps=EPS) if c.q_rank else None
        self.q = Linear(c.q_rank or c.d_model, c.n_heads * c.query_dim, bias=False)
        self.kv_down = Linear(c.d_model, sum(self.ranks), bias=bias)
        self.kv_norm = RMSNorm(c.kv_rank, eps=EPS)
        # Of each head, what makes a key of a latent, then what makes a value.
        self.kv = Linear(c.kv_rank, c.n_heads * (c.still_dim + c.value_dim), bias=False)
        self.out = Linear(c.n_heads * c.value_dim, c.d_model, bias=c.has_bias("out"))

    def queries(self, x: Tensor) -> Tensor:
        """Queries of each token, as they meet latents: (B,T,d) -> (B,T,H*(rank+rope))"""
        if self.q_down is not None and self.q_norm is not None:
            x = self.q_norm(self.q_down(x))
        still, turning = self._heads(self.q(x)).split(self.parts, dim=-1)  # (B,T,H,...)
        to_key = self._expansion()[:, : self.parts[0]]  # (H,still,rank)
        absorbed = torch.einsum("bthi,hir->bthr", still, to_key)
        return torch.cat([absorbed, turning], dim=-1).flatten(2)

    def latents(self, x: Tensor) -> Tensor:
        """What is cached of each token, not turned yet: (B,T,d) -> (B,T,rank+rope)"""
        latent, turning = self.kv_down(x).split(self.ranks, dim=-1)
        return torch.cat([self.kv_norm(latent.contiguous()), turning], dim=-1)

    def values(self, y: Tensor) -> Tensor:
        """What heads gathered of latents, as values, and through `out`: (B,T,H*rank) -> (B,T,d)"""
        to_value = self._expansion()[:, self.parts[0] :]  # (H,value,rank)
        return self.out(torch.einsum("bthr,hvr->bthv", self._heads(y), to_value).flatten(2))

    def forward(self, x: Tensor, step: Step, cache: Cache | None, rotary: Rotary | None) -> Tensor:
        per_token, width = step.kernels.per_token, sum(self.ranks)
        q = self._turned(split_heads(per_token(x, self.queries), width), step.q_pos, rotary)
        latent = self._turned(split_heads(per_token(x, self.latents), width), step.q_pos, rotary)
        y = attended(self.layer, q * self.scale, latent, latent, step, cache)
        return per_token(merge_heads(y[..., : self.ranks[0]]), self.values)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, -1))

    def _expansion(self) -> Tensor:
        """The weight of `kv`, head by head: (H,still+value,rank)"""
        return self.kv.weight.view(self.n_heads, -1, self.ranks[0])

    def _turned(self, x: Tensor, pos: Tensor, rotary: Rotary | None) -> Tensor:
        """(B,H,T,rank+rope) with the last channels turned by positions (B,T)."""
        if rotary is None:
            return x
        still, turning = x.split(self.ranks, dim=-1)
        if self.interleaved:  # a product of two stays what it is if both are reordered
            turning = torch.cat([turning[..., 0::2], turning[..., 1::2]], dim=-1)
        return torch.cat([still, rotary(turning, pos)], dim=-1)


class LatentBlock(GeneralBlock):
    """A GeneralBlock with latent attention."""

    def make_attention(self, config: GeneralConfig, layer: int) -> nn.Module:
        assert isinstance(config, LatentConfig)
        return LatentAttention(config, layer)


class LatentDecoder(GeneralDecoder):
    """A decoder-only Transformer with latent attention."""

    config_class: ClassVar[type[ModelConfig]] = LatentConfig
    tensors_per_layer = 9  # at least: q, kv_down, its norm, kv, out, up, down, two norms

    def make_block(self, layer: int) -> nn.Module:
        assert isinstance(self.config, LatentConfig)
        return LatentBlock(self.config, layer)
