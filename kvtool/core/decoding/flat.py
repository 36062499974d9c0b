"""A decoding step written flat: what `Decoder.forward` does to new tokens, in a few calls.

Calling modules and looking up their weights takes as long as a small model's products. The flat
forms do the same operations in the same order, so their logits are the modules' bit for bit;
`verify-cache` compares them, as the cached arm, with the modules' whole pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.core.cache import Cache, CacheSpec, Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.cache.direct_access import DirectAccess
from kvtool.core.decoding import cuda_graphs as graphs
from kvtool.core.decoding.native_decoder import NO_SOURCE, NativeDecoder
from kvtool.core.kernels.default import DefaultKernels, Kernels
from kvtool.core.kernels.exact import ExactKernels
from kvtool.core.models.attention import CrossAttention, SelfAttention, merge_heads, split_heads
from kvtool.core.models.base import Model
from kvtool.core.models.decoder import Block, Decoder
from kvtool.core.models.layers import (
    MLP,
    Dropout,
    LayerNorm,
    Linear,
    RMSNorm,
    Table,
    TokenEmbedding,
)
from kvtool.core.models.rope import Rotary
from kvtool.core.models.seq2seq import Seq2Seq
from kvtool.core.native import arrays as native
from kvtool.core.native.arrays import Array

Decode = Callable[[Tensor, Step, Cache, "CrossCache | None", bool], Tensor]
Layer = Callable[[Tensor], Tensor]

# What a model is made of, and how each works. A subclass or a patch may do something else, and is
# left to do it.
KNOWN: dict[type, Any] = {
    kind: kind.forward
    for kind in (
        Seq2Seq, Decoder, Block, SelfAttention, CrossAttention, Linear, LayerNorm, RMSNorm, MLP,
        Dropout, Rotary, Table, TokenEmbedding, nn.Embedding, nn.ModuleList,
    )
}  # fmt: skip
KERNELS: dict[type, Any] = {
    kind: (kind.rows, kind.attention) for kind in (DefaultKernels, ExactKernels)
}
IDS = (torch.int64, torch.int32)


def decoding_form(model: Model | DecodingForm) -> Model | DecodingForm:
    """`model`, called as `Model.forward`, but few tokens take the flat form where it has one.

    It is made for one loop: it keeps the weights that the model has at its first few tokens. A
    model that is watched by hooks, compiled, or made of other modules than ours is returned as it
    is.
    """
    if isinstance(model, DecodingForm):
        return model
    decoder = model.decoder if isinstance(model, Seq2Seq) else model
    watched = nn.modules.module._has_any_global_hook()  # such as torch's FlopCounterMode has
    if watched or not all(map(_is_known, (model, *decoder.modules()))):
        return model
    assert isinstance(decoder, Decoder)
    return DecodingForm(model, decoder)


class DecodingForm:
    """A model whose few tokens are decoded in native code, and single ones of many rows in PyTorch
    by a FlatDecoder, on a GPU in recordings where the cache has a fixed place."""

    def __init__(self, model: Model, decoder: Decoder) -> None:
        self.model, self.decoder, self.config = model, decoder, model.config
        self.reads = bool(decoder.config.n_encoder_layers)
        self._flat: FlatDecoder | None = None
        device = decoder.head.weight.device
        capture = graphs.capture_for(device)
        self._graphs = None if capture is None else graphs.Graphs(decoder, capture, device)
        self._native: NativeDecoder | None = None
        self._usual = True  # whether its layers are as configured, as far as is known
        self._spec: CacheSpec | None = None  # the last that `at_once` could serve

    def __call__(
        self, tokens: Tensor, step: Step, cache: Cache, source: CrossCache | None, last: bool
    ) -> Tensor:
        asks = (source is not None) != self.reads or not _are_usual(step.kernels)
        if asks or tokens.shape[1] > 1:
            return self.model(tokens, step, cache, source, last)
        few = not torch.is_grad_enabled() and self._few(tokens, step.kernels)
        if not (few and self._reads_weights()):
            return self._flat_form()(tokens, step, cache, source)
        place = NO_SOURCE if source is None else source.step_addresses(cache.spec, len(tokens))
        form = self._native
        fits = form is not None and form.stores_in(cache.spec) and tokens.dtype in IDS
        if form is None or place is None or not fits:
            return self.model(tokens, step, cache, source, last)
        return form.layerwise_step(tokens, step, cache, place)

    def records(self, cache: Cache) -> bool:
        """Whether single-token steps with this cache are recorded, so that the first ones take
        longer than those after them."""
        kernels = cache.spec.kernels
        # Others ask the device which keys are seen, and wait for the answer.
        usual = type(kernels) is DefaultKernels and _are_usual(kernels)
        return self._graphs is not None and cache.compilable and usual

    def at_once(
        self, new: Array | Tensor, cache: Cache, source: CrossCache | None, last: bool
    ) -> Array | None:
        """A whole step, `begin` and `commit` included, as `engine.advance`, but without gradients:
        new (B,T) -> logits (B,T,V) or (B,1,V), those of half formats in float32; None if it must be
        done by parts. Raises CapacityError, and IndexError for a token or position that does not
        exist."""
        batch, n = new.shape
        if self._graphs is not None or not self._fits(new, cache, source):
            return None
        if not (self._few(new, cache.spec.kernels) and self._reads_weights()):
            return None
        form = self._native
        if form is None:
            return None
        if cache.spec is not self._spec:  # else asked before
            if not _are_usual(cache.spec.kernels) or not form.stores_in(cache.spec):
                return None
            self._spec = cache.spec
        if isinstance(new, Tensor):
            if new.dtype not in IDS or not new.is_cpu:
                return None
            new = new.numpy()
        source_place = NO_SOURCE if source is None else source.step_addresses(cache.spec, batch)
        if source_place is None or not isinstance(cache, DirectAccess):
            return None
        place = cache.step_addresses(n)
        if place is None or (place.window and form.config.window):
            return None
        logits = form.at_once(new, place, source_place, last)
        cache.commit(n)
        return logits

    def recorded(self, new: Tensor, cache: Cache, source: CrossCache | None) -> Tensor | None:
        """A whole step of one token a row, `begin` and `commit` included, as `engine.advance`, but
        without gradients and from a recording: new (B,1) -> logits (B,1,V); None if it must be done
        otherwise. Raises CapacityError."""
        if self._graphs is None or new.shape[1] != 1 or not self._fits(new, cache, source):
            return None
        if not self.records(cache):
            return None
        return self._graphs(self._flat_form(), new, cache, source)

    def _fits(self, new: Array | Tensor, cache: Cache, source: CrossCache | None) -> bool:
        """Whether the cache has the new tokens' rows, and there is a source if the model reads."""
        batch = new.shape[0]
        return batch == cache.batch > 0 and (source is not None) == self.reads

    def _flat_form(self) -> FlatDecoder:
        self._flat = self._flat or FlatDecoder(self.decoder)
        return self._flat

    def _few(self, tokens: Array | Tensor, kernels: Kernels) -> bool:
        """Whether modules too would take so many tokens through native code, now."""
        batch, n = tokens.shape
        # Exact kernels do so however many there are.
        few = batch * n <= native.FEW or type(kernels) is ExactKernels
        return few and not native.away()

    def _reads_weights(self) -> bool:
        """Whether native code can read the weights; its form is then there, unless there are other
        layers than the configuration says, which are left to modules."""
        if self._native is not None:
            return True
        with torch.no_grad():  # who calls wants none, and weights that need gradients are readable
            if not native.can_read(self.decoder.head.weight):
                return False
            if self._usual:
                self._native = NativeDecoder.of(self.decoder)
                self._usual = self._native is not None
        return True


def _are_usual(kernels: Kernels) -> bool:
    """Whether they are those with which modules, too, use native code."""
    kind = type(kernels)
    return KERNELS.get(kind) == (kind.rows, kind.attention) and not vars(kernels)


def _is_known(module: nn.Module) -> bool:
    watched = module._forward_hooks or module._forward_pre_hooks
    watched = watched or module._backward_hooks or module._backward_pre_hooks
    replaced = any(map(callable, vars(module).values()))
    known = KNOWN.get(type(module)) is type(module).forward
    return known and not (watched or replaced or module.training)


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
        self.logits = self._layers(decoder.norm, decoder.head)

    def __call__(
        self, tokens: Tensor, step: Step, cache: Cache, source: CrossCache | None
    ) -> Tensor:
        """tokens (B,1) -> logits (B,1,V)"""
        near, x, rows = step.within(self.window), self.embed(tokens, step.q_pos), step.kernels.rows
        for i, block in enumerate(self.blocks):
            seen = near if i >= self.first_window_layer else step
            q, k, v = self._turned(rows(x, *block.first), step)
            x = x + rows(merge_heads(cache.attend(i, q, k, v, seen)), block.out)
            if block.cross_out is not None and source is not None:
                q = split_heads(rows(x, *block.cross), self.head_dim)
                x = x + rows(merge_heads(source.attend(i, q, step.kernels)), block.cross_out)
            x = x + rows(x, *block.last)
        return rows(x, *self.logits)

    def _turned(self, qkv: Tensor, step: Step) -> tuple[Tensor, ...]:
        """(B,1,(H+2*Hkv)*D) -> queries, keys and values (B,heads,1,D), by their positions."""
        q, k, v = split_heads(qkv, self.head_dim).split_with_sizes(self.n_heads, dim=1)
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
        """A layer as a function that has its weights at hand."""
        if isinstance(module, LayerNorm):
            shape, (scale, shift) = module.normalized_shape, (module.weight, module.bias)
            return lambda x: torch.layer_norm(x, shape, scale, shift, module.eps)
        if isinstance(module, Linear):
            weight, bias = module.weight, module.bias
            return lambda x: F.linear(x, weight, bias)
        return module
