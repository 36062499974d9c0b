"""A decoding step written flat: what `Decoder.forward` does to one new token a row, in a few calls.

Calling modules and looking up their weights takes as long as a small model's products. The flat
form does the same operations in the same order, so its logits are the modules' bit for bit;
`verify-cache` compares it, as the cached arm, with the modules' whole pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache as once
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.core import native
from kvtool.core.attention import CrossAttention, SelfAttention, merge_heads, split_heads
from kvtool.core.cache import Cache, Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.exact import ExactKernels
from kvtool.core.kernels import DefaultKernels
from kvtool.core.layers import MLP, Dropout, LayerNorm, Linear, RMSNorm, Table, TokenEmbedding
from kvtool.core.models.base import Model
from kvtool.core.models.decoder import Block, Decoder
from kvtool.core.models.seq2seq import Seq2Seq
from kvtool.core.rope import Rotary

Decode = Callable[[Tensor, Step, Cache, "CrossCache | None", bool], Tensor]
Layer = Callable[[Any], Any]  # of the vectors of one token a row: tensors (B,1,d) or arrays (B,d)

# What a model is made of. A subclass may do something else, and is left to do it.
KNOWN = {
    Seq2Seq, Decoder, Block, SelfAttention, CrossAttention, Linear, LayerNorm, RMSNorm, MLP,
    Dropout, Rotary, Table, TokenEmbedding, nn.Embedding, nn.ModuleList,
}  # fmt: skip
KERNELS = {DefaultKernels, ExactKernels}  # with which modules too use native code


def decoding_form(model: Model) -> Decode:
    """`model`, called as `Model.forward`, but single tokens take the flat form where it has one.

    It is made for one loop: it keeps the weights that the model has at its first single token. A
    model that is watched by hooks, compiled, or made of other modules than ours is returned as it
    is.
    """
    decoder = model.decoder if isinstance(model, Seq2Seq) else model
    watched = nn.modules.module._has_any_global_hook()  # such as torch's FlopCounterMode has
    if watched or not all(map(_is_known, (model, *decoder.modules()))):
        return model
    assert isinstance(decoder, Decoder)
    reads = bool(model.config.n_encoder_layers)
    stored = model.config.n_kv_heads, model.config.head_dim, decoder.head.weight.dtype
    usual = once(lambda: FlatDecoder(decoder))
    # Asked where single tokens come: weights that need gradients are readable without them.
    arrays = once(lambda: ArrayDecoder(decoder) if native.can_read(*decoder.parameters()) else None)

    def decode(
        tokens: Tensor, step: Step, cache: Cache, source: CrossCache | None, last: bool
    ) -> Tensor:
        if tokens.shape[1] > 1 or (source is not None) != reads:
            return model(tokens, step, cache, source, last)
        kernels = type(step.kernels)
        # Modules take exact rows through native code however many there are.
        few = tokens.shape[0] <= native.FEW or kernels is ExactKernels
        spec = cache.spec
        fits = (spec.n_kv_heads, spec.head_dim, spec.dtype) == stored
        unwatched = not (torch.is_grad_enabled() or native.watched())
        form = arrays() if few and fits and unwatched and kernels in KERNELS else None
        return (form or usual())(tokens, step, cache, source)

    return decode


def _is_known(module: nn.Module) -> bool:
    watched = module._forward_hooks or module._forward_pre_hooks
    watched = watched or module._backward_hooks or module._backward_pre_hooks
    replaced = any(map(callable, vars(module).values()))
    return type(module) in KNOWN and not (watched or replaced or module.training)


class FlatBlock(NamedTuple):
    """A block's layers between its attentions."""

    first: Sequence[Layer]  # norm1, and the projection to queries, keys and values
    out: Layer
    cross: Sequence[Layer]  # norm_cross, and the projection to queries; or nothing
    cross_out: Layer | None
    last: Sequence[Layer]  # norm2, and the feed-forward network


class FlatDecoder:
    """The step of a Decoder for one new token a row, on the weights that it has now."""

    def __init__(self, decoder: Decoder) -> None:
        c = decoder.config
        self.embed, self.rotary = decoder.embed, decoder.rotary
        self.head_dim, self.window = c.head_dim, c.window
        self.n_heads = [c.n_heads, c.n_kv_heads, c.n_kv_heads]
        self.first_window_layer = c.first_window_layer
        self.blocks = [self._block(block) for block in decoder.layers if isinstance(block, Block)]
        self.logits = self._normed(decoder.norm, decoder.head)

    def __call__(
        self, tokens: Tensor, step: Step, cache: Cache, source: CrossCache | None
    ) -> Tensor:
        """tokens (B,1) -> logits (B,1,V)"""
        near, x = step.within(self.window), self._embedded(tokens, step)
        for i, block in enumerate(self.blocks):
            seen = near if i >= self.first_window_layer else step
            y = self._attended(i, self._through(block.first, x, step), seen, cache)
            x = x + self._through((block.out,), y, step)
            if block.cross_out is not None and source is not None:
                q = self._heads(self._through(block.cross, x, step))
                y = self._merged(source.attend(i, q, step.kernels))
                x = x + self._through((block.cross_out,), y, step)
            x = x + self._through(block.last, x, step)
        return self._result(self._through(self.logits, x, step))

    def _attended(self, layer: int, qkv: Any, step: Step, cache: Cache) -> Any:
        q, k, v = self._turned(self._heads(qkv), step)
        return self._merged(cache.attend(layer, q, k, v, step))

    def _turned(self, heads: Tensor, step: Step) -> tuple[Tensor, ...]:
        """(B,H+2*Hkv,1,D) -> queries, keys and values, by their positions."""
        q, k, v = heads.split_with_sizes(self.n_heads, dim=1)
        if self.rotary is None:
            return q, k, v
        return self.rotary(q, step.q_pos), self.rotary(k, step.q_pos), v

    def _block(self, block: Block) -> FlatBlock:
        attn, cross = block.attn, block.cross
        return FlatBlock(
            (*self._normed(block.norm1, attn.qkv), *self._head_norms(attn)),
            self._layer(attn.out),
            self._normed(block.norm_cross, cross.q) if cross and block.norm_cross else (),
            self._layer(cross.out) if cross else None,
            self._network(block.norm2, block.mlp),
        )

    def _layer(self, module: nn.Module) -> Layer:
        """A layer as a function that has its weights at hand."""
        if isinstance(module, LayerNorm):
            shape, (scale, shift) = module.normalized_shape, (module.weight, module.bias)
            return lambda x: torch.layer_norm(x, shape, scale, shift, module.eps)
        if isinstance(module, Linear):
            weight, bias = module.weight, module.bias
            return lambda x: F.linear(x, weight, bias)
        return module

    def _normed(self, norm: nn.Module, linear: Linear) -> Sequence[Layer]:
        return self._layer(norm), self._layer(linear)

    def _head_norms(self, attn: SelfAttention) -> Sequence[Layer]:
        return () if attn.q_norm is None else (attn.normalise,)

    def _network(self, norm: nn.Module, mlp: MLP) -> Sequence[Layer]:
        return self._layer(norm), self._layer(mlp.up), mlp.activate, self._layer(mlp.down)

    def _embedded(self, tokens: Tensor, step: Step) -> Any:
        return self.embed(tokens, step.q_pos)

    def _through(self, layers: Sequence[Layer], x: Any, step: Step) -> Any:
        return step.kernels.rows(x, *layers)

    def _heads(self, x: Any) -> Tensor:
        """-> (B,heads,1,D)"""
        return split_heads(x, self.head_dim)

    def _merged(self, y: Tensor) -> Any:
        """(B,heads,1,D) -> the vectors of tokens"""
        return merge_heads(y)

    def _result(self, x: Any) -> Tensor:
        return x


class ArrayDecoder(FlatDecoder):
    """The same in native code, which is faster for a few rows."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        embed = decoder.embed
        self.tokens = native.array(embed.tokens.weight)
        self.positions = None if embed.positions is None else native.array(embed.positions.weight)
        self.table = None if embed.table is None else native.array(embed.table.table)

    def _layer(self, module: nn.Module) -> Layer:
        assert isinstance(module, Linear)
        return module.on_arrays()

    def _normed(self, norm: nn.Module, linear: Linear) -> Sequence[Layer]:
        assert isinstance(norm, LayerNorm | RMSNorm)
        return (native.normed_linear(norm.weights(), linear.weights()),)

    def _network(self, norm: nn.Module, mlp: MLP) -> Sequence[Layer]:
        assert isinstance(norm, LayerNorm | RMSNorm)
        up, down = mlp.up.weights(), mlp.down.weights()
        return (native.normed_network(norm.weights(), up, mlp.activation, down),)

    def _head_norms(self, attn: SelfAttention) -> Sequence[Layer]:
        if attn.q_norm is None:
            return ()
        # On a tensor of the same memory: its norms are native code themselves.
        return (lambda x: attn.normalise(torch.from_numpy(x)[:, None])[:, 0].numpy(),)

    def _embedded(self, tokens: Tensor, step: Step) -> Any:
        ids = tokens.numpy()[:, 0]
        if min(ids.tolist()) < 0:  # which NumPy would count from the end
            raise IndexError(f"token {ids.min()} is not in the vocabulary")
        x = self.tokens.take(ids, 0)  # (B,d)
        pos = np.maximum(step.q_pos.numpy()[:, 0], 0)
        if self.table is not None:
            return x * self.embed.scale + self.table.take(pos, 0).astype(x.dtype)
        return x if self.positions is None else x + self.positions.take(pos, 0)

    def _attended(self, layer: int, qkv: Any, step: Step, cache: Cache) -> Any:
        if getattr(cache.attend, "__func__", None) is not Cache.attend:  # a way of its own
            return super()._attended(layer, qkv, step, cache)
        if self.rotary is not None:
            qkv = torch.cat(self._turned(self._heads(qkv), step), dim=1).numpy()
        y = cache.attend_few(layer, qkv.reshape(len(qkv), -1, self.head_dim), step)
        return y.reshape(len(y), -1)

    def _through(self, layers: Sequence[Layer], x: Any, step: Step) -> Any:
        for layer in layers:
            x = layer(x)
        return x

    def _heads(self, x: Any) -> Tensor:
        return torch.from_numpy(x).view(x.shape[0], -1, 1, self.head_dim)

    def _merged(self, y: Tensor) -> Any:
        return y.numpy().reshape(y.shape[0], -1)

    def _result(self, x: Any) -> Tensor:
        return torch.from_numpy(x)[:, None]
