"""A decoding step in native code: one call for the whole step, or calls for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from kvtool.config import ModelConfig
from kvtool.core.cache import Cache, CacheSpec, Step
from kvtool.core.cache.cross import SourceAddresses
from kvtool.core.cache.direct_access import StepAddresses
from kvtool.core.models.decoder import Block, Decoder
from kvtool.core.models.layers import LayerNorm, Linear, RMSNorm
from kvtool.core.native import arrays as native
from kvtool.core.native import compiling
from kvtool.core.native.arrays import Array

MAX_CALL_TOKENS = 256  # tokens; Ctrl-C takes effect only after a call
NO_SOURCE = SourceAddresses(np.empty((2, 0), np.int64), 0, np.empty((0, 2), np.int64))


class NativeDecoder:
    """The step of a Decoder; it keeps the weights that the decoder has at construction.

    It does the operations of the modules in the same order, so it gives the same bits. After the
    weights have moved in memory, as by share_memory, make a new one.
    """

    @classmethod
    def of(cls, decoder: Decoder) -> NativeDecoder | str:
        """The native form of a decoder, or a str that says why there is none.

        Every layer must be as the configuration says, with contiguous weights of the right shape:
        compiled code does not check, and would read beyond them.
        """
        c = decoder.config
        if len(decoder.layers) != c.n_layers:
            return f"the model has {len(decoder.layers)} layers (configured: {c.n_layers})"
        for i, block in enumerate(decoder.layers):
            if not _is_usual(c, i, block):
                return f"layer {i} is not as configured"
        if decoder.norm.eps is None:
            return "the last norm has no epsilon"
        blocks, ends = [_parts(c, block) for block in decoder.layers], _ends(decoder)
        constants = _constants(decoder)
        weights = [sized for part in chain(*blocks, ends) for sized in part.weights()]
        read = weights + [(table, shape) for table, shape in constants if table is not None]
        for x, shape in read:
            if x.shape != shape:
                return f"a weight has the shape {tuple(x.shape)} (configured: {shape})"
            if not x.is_contiguous():
                return f"a weight of shape {shape} is not contiguous"
        if not all(x.dtype is torch.float64 and x.is_cpu for x, _ in read[len(weights) :]):
            return "a table of positions is not float64 on the CPU"
        if why := native.why_unreadable(*(weight for weight, _ in weights)):
            return why
        code = native.decoder_code(decoder.head.weight.dtype)
        if code is None:
            return f"native code could not be had ({compiling.failure()})"
        return cls(decoder, blocks, [tensor for tensor, _ in read], code)

    def __init__(
        self,
        decoder: Decoder,
        blocks: Sequence[Sequence[Part]],
        read: Sequence[Tensor],
        code: ModuleType,
    ) -> None:
        self.code, self.config = code, decoder.config
        self.dtype = decoder.head.weight.dtype
        self.kind = native.kind_of(self.dtype)
        self.computed = native.computed(decoder.head.weight[:0]).dtype
        c, embed, head = decoder.config, decoder.embed, decoder.head
        # Keeps the memory at the addresses alive, even if a parameter gets another tensor.
        self.kept = [tensor.detach() for tensor in read]
        windows = [c.window if i >= c.first_window_layer else 0 for i in range(c.n_layers)]
        records = [(*map(Part.record, block), windows[i]) for i, block in enumerate(blocks)]
        self.blocks = np.array(records, self.code.BLOCK)
        positions = None if embed.positions is None else embed.positions.weight
        tables = embed.tokens.weight, positions, *(table for table, _ in _constants(decoder))
        sizes = len(embed.tokens.weight), c.context, c.n_heads, c.n_kv_heads, c.head_dim
        found = *sizes, native.number_of(c.activation), embed.scale
        ends = norm_record(decoder.norm), linear_record(head)
        self.model = np.array([(*map(_address, tables), *found, *ends)], self.code.MODEL)
        device = head.weight.device
        self.stored = c.n_layers, c.n_kv_heads, c.head_dim, self.dtype, device
        self.n_logits = len(head.weight)
        self.token_size = 2 * c.n_kv_heads * c.head_dim  # keys and values of a layer
        self.largest = max(tensor.numel() for tensor in read)

    def stores_in(self, spec: CacheSpec) -> bool:
        """Whether a cache with that spec has the model's sizes, dtype and device."""
        sizes = spec.n_layers, spec.n_kv_heads, spec.head_dim
        return self.stored == (*sizes, spec.dtype, spec.device)

    def one_call_step(
        self, tokens: Array, memory: StepAddresses, source: SourceAddresses, last: bool
    ) -> Array:
        """A step in one compiled call, which also writes the keys and values to the cache.

        tokens (B,T) -> logits (B,T,V), or (B,1,V) of the last token with `last`; in float32 for
        half formats. Raises IndexError for a token or position that does not exist.
        """
        batch, n = tokens.shape
        if batch * n <= MAX_CALL_TOKENS:
            return self._part(tokens, 0, memory, source, last)
        width = max(MAX_CALL_TOKENS // batch, 1)
        parts = [
            self._part(tokens[:, first : first + width], first, memory, source, last)
            for first in range(0, n, width)
        ]
        return parts[-1] if last else np.concatenate(parts, axis=1)

    def _part(
        self, tokens: Array, first: int, memory: StepAddresses, source: SourceAddresses, last: bool
    ) -> Array:
        """`one_call_step` for a part of the tokens, which begins with number `first`."""
        batch, n = tokens.shape
        start = memory.start + first
        memory = memory._replace(start=start, slot=memory.slot + first) if first else memory
        ids = np.ascontiguousarray(tokens, np.int64).reshape(-1)
        logits = np.empty((batch if last else batch * n, self.n_logits), self.computed)
        known = self.code.decode(
            self.model, self.blocks, ids, tuple(memory), tuple(source), logits, self.kind,
            *self._threads(batch * (start + n), source),
        )  # fmt: skip
        if not known:
            self._refuse(ids)
        return logits.reshape(batch, -1, self.n_logits)

    def layerwise_step(
        self, tokens: Array, step: Step, cache: Cache, source: SourceAddresses
    ) -> Tensor:
        """A step layer by layer, for a cache that stores and attends by itself.

        tokens (B,1) -> logits (B,1,V). Raises IndexError as `one_call_step`, and ValueError if the
        cache returns another shape or dtype.
        """
        c, batch, model = self.config, len(tokens), (self.model, self.blocks)
        ids, pos = (
            np.ascontiguousarray(x, np.int64).reshape(batch) for x in (tokens, step.q_pos.numpy())
        )
        x = np.empty((batch, c.d_model), self.computed)
        if not self.code.embed(self.model, ids, pos, x, self.kind):
            self._refuse(ids)
        windowed, threads = step.within(c.window), self._threads(0, source)
        qkv_heads = [c.n_heads, c.n_kv_heads, c.n_kv_heads]
        for i in range(c.n_layers):
            qkv = np.empty((batch, sum(qkv_heads), c.head_dim), self.computed)
            self.code.before_attention(*model, i, x, pos, qkv, self.kind, *threads)
            heads = torch.from_numpy(qkv).to(self.dtype)[:, :, None]
            q, k, v = heads.split_with_sizes(qkv_heads, dim=1)
            layer_step = windowed if i >= c.first_window_layer else step
            y = self._given(cache.attend(i, q, k, v, layer_step), (batch, c.n_heads, 1, c.head_dim))
            self.code.after_attention(*model, i, y, x, self.kind, *source, *threads)
        logits = np.empty((batch, 1, self.n_logits), self.computed)
        self.code.logits_of(self.model, x, logits[:, 0], self.kind, *threads)
        return torch.from_numpy(logits).to(self.dtype)

    def _threads(self, n_seen: int, source: SourceAddresses) -> tuple[int, int]:
        """How many threads share a layer or an attention, and from how many numbers on.

        n_seen: the tokens whose keys and values the step reads, in all rows.
        """
        n_seen = max(n_seen, len(source.seen) * source.columns)
        return native.threads_for(max(self.largest, n_seen * self.token_size)), native.MIN_SHARED

    def _given(self, y: Tensor, shape: tuple[int, ...]) -> Array:
        """The result of a cache's attention (B,H,1,D) as an array (B,H,D). Raises ValueError for
        another shape or dtype."""
        if (y.shape, y.dtype) != (shape, self.dtype):
            raise ValueError(
                f"attention gave {tuple(y.shape)} {y.dtype} (expected {shape} {self.dtype})"
            )
        return native.computed(y)[:, :, 0]

    def _refuse(self, ids: Array) -> NoReturn:
        wrong = ids[(ids < 0) | (ids >= self.model[0]["n_vocab"])].tolist()
        what = f"token {wrong[0]} is" if wrong else f"tokens beyond {self.config.context} are"
        raise IndexError(f"{what} unknown to the model")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def linear_record(layer: Linear | None) -> tuple[int, ...]:
    """A linear layer, or None, as a record compiled.decoder.LINEAR."""
    if layer is None:
        return 0, 0, 0, 0
    return _address(layer.weight), _address(layer.bias), *layer.weight.shape


def norm_record(norm: LayerNorm | RMSNorm | None) -> tuple[float, ...]:
    """A norm, or None, as a record compiled.decoder.NORM."""
    if norm is None:
        return 0, 0, 0, 0, 0.0
    centred = isinstance(norm, LayerNorm)
    shift = _address(norm.bias) if isinstance(norm, LayerNorm) else 0
    return _address(norm.weight), shift, len(norm.weight), centred, norm.eps or 0.0


class Part(NamedTuple):
    """A layer with weights, or None, and the shape that the weight must have."""

    layer: Any  # an nn.Module or None
    shape: tuple[int, ...]

    def weights(self) -> list[tuple[Tensor, tuple[int, ...]]]:
        """The tensors that native code reads, each with the shape that it must have."""
        if self.layer is None:
            return []
        weight, bias = self.layer.weight, getattr(self.layer, "bias", None)
        found = [(weight if isinstance(weight, Tensor) else torch.empty(0), self.shape)]
        return found if bias is None else [*found, (bias, self.shape[:1])]

    def record(self) -> tuple[float, ...]:
        """The layer as a record compiled.decoder.NORM or LINEAR."""
        return (norm_record if len(self.shape) == 1 else linear_record)(self.layer)


def _is_usual(c: ModelConfig, i: int, block: nn.Module) -> bool:
    """Whether block i has exactly the parts and sizes that the configuration says."""
    if type(block) is not Block:
        return False
    attn, cross, norms = block.attn, block.cross, (block.norm1, block.norm2, block.norm_cross)
    reads = bool(c.n_encoder_layers)
    heads, stored = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    return (
        (attn.layer, attn.head_dim, attn.qkv_widths) == (i, c.head_dim, [heads, stored, stored])
        and (cross is not None) == (block.norm_cross is not None) == reads
        and (cross is None or (cross.layer, cross.head_dim) == (i, c.head_dim))
        and (attn.q_norm is not None) == (attn.k_norm is not None) == c.qk_norm
        and block.mlp.activation == c.activation
        and all(x is None or x.eps is not None for x in (*norms, attn.q_norm, attn.k_norm))
    )


def _constants(decoder: Decoder) -> list[tuple[Tensor | None, tuple[int, ...]]]:
    """The position tables in float64, in the order of compiled.decoder.TABLES, each with the shape
    that it must have."""
    c, waves, rotary = decoder.config, decoder.embed.table, decoder.rotary
    return [
        (None if waves is None else waves.table, (c.context, c.d_model)),
        (None if rotary is None else rotary.table.table, (c.context, c.head_dim)),
    ]


def _ends(decoder: Decoder) -> list[Part]:
    """The layers before and after the blocks."""
    c, embed, head = decoder.config, decoder.embed, decoder.head
    return [
        Part(embed.tokens, (len(embed.tokens.weight), c.d_model)),
        Part(embed.positions, (c.context, c.d_model)),
        Part(decoder.norm, (c.d_model,)),
        Part(head, (len(head.weight), c.d_model)),
    ]


def _parts(c: ModelConfig, block: nn.Module) -> list[Part]:
    """The norms and linear layers of a block, in the order of compiled.decoder.BLOCK."""
    assert isinstance(block, Block)
    attn, cross, mlp = block.attn, block.cross, block.mlp
    heads, stored = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    wide = mlp.down.weight.shape[-1]
    return [
        Part(block.norm1, (c.d_model,)),
        Part(attn.q_norm, (c.head_dim,)),
        Part(attn.k_norm, (c.head_dim,)),
        Part(block.norm_cross, (c.d_model,)),
        Part(block.norm2, (c.d_model,)),
        Part(attn.qkv, (heads + 2 * stored, c.d_model)),
        Part(attn.out, (c.d_model, heads)),
        Part(cross and cross.q, (heads, c.d_model)),
        Part(cross and cross.out, (c.d_model, heads)),
        Part(mlp.up, (wide * (2 if c.gated else 1), c.d_model)),
        Part(mlp.down, (c.d_model, wide)),
    ]
