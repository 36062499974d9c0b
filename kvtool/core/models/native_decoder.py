"""A decoder's step in native code: one call for a few tokens, or one before and after attention."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from kvtool.config import ModelConfig
from kvtool.core import native
from kvtool.core.cache import Cache, Step
from kvtool.core.cache.base import InPlace
from kvtool.core.cache.cross import InPlaceSource
from kvtool.core.layers import LayerNorm, Linear, RMSNorm
from kvtool.core.models.decoder import Block, Decoder
from kvtool.core.native import Array

NO_SOURCE = InPlaceSource(np.empty((0, 2), np.int64), 0, np.empty((0, 2), np.int64))


class NativeDecoder:
    """The step of a Decoder on the weights that it has now, which it keeps.

    The same functions in the same order as the modules', so the same bits. For a decoder that
    `fits_together` and whose weights `native.can_read`.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.code, self.config = native.decoder_code(), decoder.config
        c, embed, head = decoder.config, decoder.embed, decoder.head
        tables = (
            embed.tokens.weight,
            None if embed.positions is None else embed.positions.weight,
            None if embed.table is None else embed.table.table,
            None if decoder.rotary is None else decoder.rotary.table.table,
        )
        # What the addresses point to, also when a parameter is given other memory.
        self.kept = [x.detach() for x in (*decoder.parameters(), *tables) if x is not None]
        windows = [c.window if i >= c.first_window_layer else 0 for i in range(c.n_layers)]
        blocks = [(*block_record(block), windows[i]) for i, block in enumerate(decoder.layers)]
        self.blocks = np.array(blocks, self.code.BLOCK)
        sizes = len(tables[0]), c.context, c.n_heads, c.n_kv_heads, c.head_dim
        found = *sizes, native.number_of(c.activation), embed.scale
        ends = norm_record(decoder.norm), linear_record(head)
        self.model = np.array([(*map(_address, tables), *found, *ends)], self.code.MODEL)
        self.dtype = native.array(head.weight).dtype
        self.n_logits = len(head.weight)
        self.token_size = 2 * c.n_kv_heads * c.head_dim  # keys and values of a layer
        self.largest = max(x.numel() for x in [*self.kept[1:], head.weight])

    def at_once(self, tokens: Array, place: InPlace, source: InPlaceSource, last: bool) -> Array:
        """The step of tokens (B,T), which are stored -> logits (B,T,V), or (B,1,V) of the last
        token alone. Raises IndexError for a token or position that does not exist."""
        batch, n = tokens.shape
        ids = np.ascontiguousarray(tokens, np.int64).reshape(-1)
        logits = np.empty((batch * (1 if last else n), self.n_logits), self.dtype)
        threads = self._threads(self.token_size * (place.start + n))
        known = self.code.decode(self.model, self.blocks, ids, *place, *source, logits, *threads)
        self._require(known, ids)
        return logits.reshape(batch, -1, self.n_logits)

    def by_layers(self, tokens: Tensor, step: Step, cache: Cache, source: InPlaceSource) -> Tensor:
        """The step of single tokens (B,1) -> logits (B,1,V), where a cache stores and attends in
        its own way. Raises as `at_once`."""
        c, batch, model = self.config, len(tokens), (self.model, self.blocks)
        ids, pos = (
            np.ascontiguousarray(x.numpy(), np.int64).reshape(-1) for x in (tokens, step.q_pos)
        )
        x = np.empty((batch, c.d_model), self.dtype)
        self._require(self.code.embed(self.model, ids, pos, x), ids)
        near, threads = step.within(c.window), self._threads(0)
        n_heads = [c.n_heads, c.n_kv_heads, c.n_kv_heads]
        for i in range(c.n_layers):
            qkv = np.empty((batch, sum(n_heads), c.head_dim), self.dtype)
            self.code.before_attention(*model, i, x, pos, qkv, *threads)
            q, k, v = torch.from_numpy(qkv)[:, :, None].split_with_sizes(n_heads, dim=1)
            seen = near if i >= c.first_window_layer else step
            y = native.array(cache.attend(i, q, k, v, seen)[:, :, 0])
            self.code.after_attention(*model, i, y, x, *source, *threads)
        logits = np.empty((batch, 1, self.n_logits), self.dtype)
        self.code.logits_of(self.model, x, logits[:, 0], *threads)
        return torch.from_numpy(logits)

    def _threads(self, n_read: int) -> tuple[int, int]:
        """How many threads share what reads so many numbers or more: weights of a layer, or keys
        and values, of which `n_read` are read."""
        return native.threads_for(max(self.largest, n_read)), native.LARGE

    def _require(self, known: bool, ids: Array) -> None:
        if not known:
            wrong = ids[(ids < 0) | (ids >= self.model[0]["n_vocab"])].tolist()
            what = f"token {wrong[0]} is" if wrong else f"tokens beyond {self.config.context} are"
            raise IndexError(f"{what} unknown to the model")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def linear_record(layer: Linear | None) -> tuple[int, ...]:
    """As numba_decoder.LINEAR."""
    if layer is None:
        return 0, 0, 0, 0
    return _address(layer.weight), _address(layer.bias), *layer.weight.shape


def norm_record(norm: LayerNorm | RMSNorm | None) -> tuple[float, ...]:
    """As numba_decoder.NORM."""
    if norm is None:
        return 0, 0, 0, 0, 0.0
    centred = isinstance(norm, LayerNorm)
    shift = _address(norm.bias) if isinstance(norm, LayerNorm) else 0
    return _address(norm.weight), shift, len(norm.weight), centred, norm.eps or 0.0


def block_record(block: nn.Module) -> tuple[tuple[float, ...], ...]:
    """As the norms and layers of numba_decoder.BLOCK."""
    assert isinstance(block, Block)
    attn, mlp, cross = block.attn, block.mlp, block.cross
    norms = block.norm1, attn.q_norm, attn.k_norm, block.norm_cross, block.norm2
    of_cross = (None, None) if cross is None else (cross.q, cross.out)
    layers = attn.qkv, attn.out, *of_cross, mlp.up, mlp.down
    return *map(norm_record, norms), *map(linear_record, layers)


def fits_together(decoder: Decoder) -> bool:
    """Whether each layer has the size that the configuration and its neighbours ask for: compiled
    code trusts them, and would read other memory."""
    c, embed = decoder.config, decoder.embed
    learned = None if embed.positions is None else embed.positions.weight
    waves = None if embed.table is None else embed.table.table
    angles = None if decoder.rotary is None else decoder.rotary.table.table
    return (
        all(p.is_contiguous() for p in decoder.parameters())
        and embed.tokens.weight.shape[1:] == (c.d_model,)
        and (learned is None or learned.shape == (c.context, c.d_model))
        and (waves is None or (waves.shape, waves.dtype) == ((c.context, c.d_model), torch.float64))
        and (
            angles is None
            or (angles.shape, angles.dtype) == ((c.context, c.head_dim), torch.float64)
        )
        and all(_block_fits(c, block) for block in decoder.layers if isinstance(block, Block))
        and _norm_fits(decoder.norm, c.d_model)
        and decoder.head.weight.shape[1:] == (c.d_model,)
        and _bias_fits(decoder.head)
        and len(decoder.layers) == c.n_layers
    )


def _block_fits(c: ModelConfig, block: Block) -> bool:
    attn, mlp, cross = block.attn, block.mlp, block.cross
    heads, stored = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    up, down = mlp.up.weight.shape, mlp.down.weight.shape
    linears = [(attn.qkv, heads + 2 * stored, c.d_model), (attn.out, c.d_model, heads)]
    linears += [] if cross is None else [(cross.q, heads, c.d_model), (cross.out, c.d_model, heads)]
    norms = [(norm, c.d_model) for norm in (block.norm1, block.norm2, block.norm_cross)]
    norms += [(attn.q_norm, c.head_dim), (attn.k_norm, c.head_dim)]
    return (
        all(layer.weight.shape == (n_out, n_in) for layer, n_out, n_in in linears)
        and all(_bias_fits(layer) for layer in (*(row[0] for row in linears), mlp.up, mlp.down))
        and all(norm is None or _norm_fits(norm, width) for norm, width in norms)
        and (attn.widths, attn.head_dim) == ([heads, stored, stored], c.head_dim)
        and mlp.activation == c.activation
        and (up[1], up[0]) == (c.d_model, down[1] * (1 + (c.activation == "swiglu")))
        and down[0] == c.d_model
    )


def _bias_fits(layer: Linear | LayerNorm | RMSNorm) -> bool:
    bias = layer._parameters.get("bias")
    return bias is None or bias.shape == layer.weight.shape[:1]


def _norm_fits(norm: LayerNorm | RMSNorm, width: int) -> bool:
    scale = norm._parameters["weight"]
    fits = scale is not None and scale.shape == (width,) and norm.eps is not None
    return fits and _bias_fits(norm)
