"""A decoding step in PyTorch without calls of modules: `Decoder.forward` for one token a row.

In a small model, calling modules and looking up their weights takes as long as the matrix products.
The flat form does the same operations in the same order, so its logits equal the modules' bit for
bit. `verify-cache` uses it as the cached arm, and compares it with the modules' uncached pass.

Modules without nn.Module.__call__ that look up each weight once were tried instead. They were
slower: a little at sixteen rows, by more than 10 % at one row without native code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.core.cache import Cache, Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.models.attention import merge_heads, split_heads
from kvtool.core.models.decoder import Block, Decoder
from kvtool.core.models.layers import LayerNorm, Linear

Layer = Callable[[Tensor], Tensor]


class FlatBlock(NamedTuple):
    """The layers of a block, without its attentions."""

    first: Sequence[Layer]  # norm1, then the projection to queries, keys and values
    out: Layer
    cross: Sequence[Layer]  # norm_cross, then the projection to queries; () without a source
    cross_out: Layer | None
    last: Sequence[Layer]  # norm2, then the feed-forward network


class FlatDecoder:
    """The step of a Decoder for one new token a row; it keeps the weights of its construction."""

    def __init__(self, decoder: Decoder) -> None:
        c = decoder.config
        self.embed, self.rotary = decoder.embed, decoder.rotary
        self.head_dim, self.window = c.head_dim, c.window
        self.qkv_heads = [c.n_heads, c.n_kv_heads, c.n_kv_heads]
        self.first_window_layer = c.first_window_layer
        self.blocks = [self._block(block) for block in decoder.layers if isinstance(block, Block)]
        self.logits = self._layers(decoder.norm, decoder.head)

    def __call__(
        self, tokens: Tensor, step: Step, cache: Cache, source: CrossCache | None
    ) -> Tensor:
        """tokens (B,1) -> logits (B,1,V); the caller commits the step."""
        x, per_token = self.embed(tokens, step.q_pos), step.kernels.per_token
        windowed = step.within(self.window)
        for i, block in enumerate(self.blocks):
            layer_step = windowed if i >= self.first_window_layer else step
            q, k, v = self._rotated_qkv(per_token(x, *block.first), step)
            x = x + per_token(merge_heads(cache.attend(i, q, k, v, layer_step)), block.out)
            if block.cross_out is not None and source is not None:
                q = split_heads(per_token(x, *block.cross), self.head_dim)
                x = x + per_token(merge_heads(source.attend(i, q, step.kernels)), block.cross_out)
            x = x + per_token(x, *block.last)
        return per_token(x, *self.logits)

    def _rotated_qkv(self, qkv: Tensor, step: Step) -> tuple[Tensor, ...]:
        """qkv (B,1,(H+2*Hkv)*D) -> q, k, v (B,heads,1,D), rotated if positions are rotary."""
        q, k, v = split_heads(qkv, self.head_dim).split_with_sizes(self.qkv_heads, dim=1)
        if self.rotary is None:
            return q, k, v
        return self.rotary(q, step.q_pos), self.rotary(k, step.q_pos), v

    def _block(self, block: Block) -> FlatBlock:
        attn, cross, mlp = block.attn, block.cross, block.mlp
        head_norms = () if attn.q_norm is None else (attn.normalise,)
        return FlatBlock(
            (*self._layers(block.norm1, attn.qkv), *head_norms),
            self._layer(attn.out),
            self._layers(block.norm_cross, cross.q) if cross and block.norm_cross else (),
            self._layer(cross.out) if cross else None,
            (*self._layers(block.norm2, mlp.up), mlp.activate, self._layer(mlp.down)),
        )

    def _layers(self, *modules: nn.Module) -> Sequence[Layer]:
        return tuple(map(self._layer, modules))

    def _layer(self, module: nn.Module) -> Layer:
        """A layer as a function that does not look up its weights."""
        if isinstance(module, LayerNorm):
            shape, (scale, shift) = module.normalized_shape, (module.weight, module.bias)
            return lambda x: torch.layer_norm(x, shape, scale, shift, module.eps)
        if isinstance(module, Linear):
            weight, bias = module.weight, module.bias
            return lambda x: F.linear(x, weight, bias)
        return module
