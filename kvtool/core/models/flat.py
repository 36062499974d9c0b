"""A decoding step written flat: what `Decoder.forward` does to one new token a row, in a few calls.

Calling modules and looking up their weights takes as long as a third of a small model's products.
The flat form does the same operations on the same tensors in the same order, so its logits are the
modules' bit for bit; `verify-cache` compares it, as the cached arm, with the modules' whole pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.core.attention import CrossAttention, SelfAttention, merge_heads, split_heads
from kvtool.core.cache import Cache, Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.kernels import Layer
from kvtool.core.layers import (
    ACTIVATION,
    LARGE,
    MLP,
    Dropout,
    LayerNorm,
    Linear,
    RMSNorm,
    Table,
    TokenEmbedding,
)
from kvtool.core.models.base import Model
from kvtool.core.models.decoder import Block, Decoder
from kvtool.core.models.seq2seq import Seq2Seq
from kvtool.core.rope import Rotary

Decode = Callable[[Tensor, Step, Cache, "CrossCache | None", bool], Tensor]

# What a model is made of. A subclass may do something else, and is left to do it.
KNOWN = {
    Seq2Seq, Decoder, Block, SelfAttention, CrossAttention, Linear, LayerNorm, RMSNorm, MLP,
    Dropout, Rotary, Table, TokenEmbedding, nn.Embedding, nn.ModuleList,
}  # fmt: skip


def decoding_form(model: Model) -> Decode:
    """`model`, called as `Model.forward`, but single tokens take the flat form where it has one.

    It is made for one loop: it keeps the weights that the model has now. A model that is watched by
    hooks, compiled, or made of other modules than ours is returned as it is.
    """
    decoder = model.decoder if isinstance(model, Seq2Seq) else model
    watched = nn.modules.module._has_any_global_hook()  # such as torch's FlopCounterMode has
    if watched or not all(map(_is_known, (model, *decoder.modules()))):
        return model
    assert isinstance(decoder, Decoder)
    flat, reads = FlatDecoder(decoder), bool(model.config.n_encoder_layers)

    def decode(
        tokens: Tensor, step: Step, cache: Cache, source: CrossCache | None, last: bool
    ) -> Tensor:
        if tokens.shape[1] == 1 and (source is not None) == reads:
            return flat(tokens, step, cache, source)
        return model(tokens, step, cache, source, last)

    return decode


def _is_known(module: nn.Module) -> bool:
    watched = module._forward_hooks or module._forward_pre_hooks
    replaced = "forward" in vars(module) or module._compiled_call_impl is not None
    return type(module) in KNOWN and not (watched or replaced or module.training)


class FlatBlock(NamedTuple):
    """A block's layers between its attentions, each a function of (B,1,width)."""

    first: tuple[Layer, ...]  # norm1, and the projection to queries, keys and values
    out: Layer
    cross: tuple[Layer, ...]  # norm_cross, and the projection to queries; or nothing
    cross_out: Layer | None
    last: tuple[Layer, ...]  # norm2, and the feed-forward network


class FlatDecoder:
    """The step of a Decoder for one new token a row, on the weights that it has now."""

    def __init__(self, decoder: Decoder) -> None:
        c = decoder.config
        self.embed, self.rotary = decoder.embed, decoder.rotary
        self.head_dim, self.window = c.head_dim, c.window
        self.n_heads = [c.n_heads, c.n_kv_heads, c.n_kv_heads]
        self.first_window_layer = c.first_window_layer
        self.blocks = [_flat_block(block) for block in decoder.layers if isinstance(block, Block)]
        self.logits = _flat(decoder.norm), _flat(decoder.head)

    def __call__(
        self, tokens: Tensor, step: Step, cache: Cache, source: CrossCache | None
    ) -> Tensor:
        """tokens (B,1) -> logits (B,1,V)"""
        rows, near = step.kernels.rows, step.within(self.window)
        x = self.embed(tokens, step.q_pos)
        for i, block in enumerate(self.blocks):
            heads = split_heads(rows(x, *block.first), self.head_dim)  # (B,H+2*Hkv,1,D)
            q, k, v = heads.split_with_sizes(self.n_heads, dim=1)
            if self.rotary is not None:
                q, k = self.rotary(q, step.q_pos), self.rotary(k, step.q_pos)
            y = cache.attend(i, q, k, v, near if i >= self.first_window_layer else step)
            x = x + rows(merge_heads(y), block.out)
            if block.cross_out is not None and source is not None:
                y = source.attend(
                    i, split_heads(rows(x, *block.cross), self.head_dim), step.kernels
                )
                x = x + rows(merge_heads(y), block.cross_out)
            x = x + rows(x, *block.last)
        return rows(x, *self.logits)


def _flat_block(block: Block) -> FlatBlock:
    attn, cross, mlp = block.attn, block.cross, block.mlp
    project = attn.project if attn.q_norm is not None else _flat(attn.qkv)
    if mlp.activation == "swiglu":
        network: tuple[Layer, ...] = (mlp,)
    else:
        network = _flat(mlp.up), ACTIVATION[mlp.activation], _flat(mlp.down)
    return FlatBlock(
        (_flat(block.norm1), project),
        _flat(attn.out),
        (_flat(block.norm_cross), _flat(cross.q)) if cross and block.norm_cross else (),
        _flat(cross.out) if cross else None,
        (_flat(block.norm2), *network),
    )


def _flat(module: nn.Module) -> Layer:
    """A layer as a function that has its weights at hand."""
    if isinstance(module, LayerNorm):
        shape, scale, shift, eps = module.normalized_shape, module.weight, module.bias, module.eps
        return lambda x: torch.layer_norm(x, shape, scale, shift, eps)
    if isinstance(module, Linear) and module.weight.numel() < LARGE:
        weight, bias = module.weight, module.bias
        return lambda x: F.linear(x, weight, bias)
    return module  # larger ones may go to several threads
