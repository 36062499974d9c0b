"""A decoder's step in native code: one call for a few tokens, or one before and after attention."""

from __future__ import annotations

from typing import Any

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

    The same functions in the same order as the modules', so the same bits.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.code, self.config = native.decoder_code(), decoder.config
        c = self.config
        self.kept: list[Any] = []  # what the addresses point to
        blocks = [block for block in decoder.layers if isinstance(block, Block)]
        self.blocks = np.zeros(len(blocks), self.code.BLOCK)
        for i, block in enumerate(blocks):
            self._describe(self.blocks[i], block)
            self.blocks[i]["window"] = c.window if i >= c.first_window_layer else 0
        self.model = np.zeros(1, self.code.MODEL)
        model, embed = self.model[0], decoder.embed
        model["n_vocab"], model["context"] = len(embed.tokens.weight), c.context
        model["n_heads"], model["n_groups"], model["head_dim"] = c.n_heads, c.n_kv_heads, c.head_dim
        model["activation"] = native.number_of(c.activation)
        model["scale"] = embed.scale
        model["tokens"] = self._address(embed.tokens.weight)
        if embed.positions is not None:
            model["positions"] = self._address(embed.positions.weight)
        if embed.table is not None:
            model["sinusoids"] = self._address(embed.table.table)
        if decoder.rotary is not None:
            model["angles"] = self._address(decoder.rotary.table.table)
        model["norm"], model["head"] = self._layer(decoder.norm), self._layer(decoder.head)
        self.dtype = native.array(decoder.head.weight).dtype
        self.n_logits = len(decoder.head.weight)
        self.token_size = 2 * c.n_kv_heads * c.head_dim  # keys and values of a layer
        self.largest = max(m.weight.numel() for m in decoder.modules() if isinstance(m, Linear))

    def _describe(self, record: Any, block: Block) -> None:
        layers = {"norm1": block.norm1, "norm2": block.norm2, "norm_cross": block.norm_cross}
        layers |= {"q_norm": block.attn.q_norm, "k_norm": block.attn.k_norm}
        layers |= {"qkv": block.attn.qkv, "out": block.attn.out}
        layers |= {"up": block.mlp.up, "down": block.mlp.down}
        if block.cross is not None:
            layers |= {"cross_q": block.cross.q, "cross_out": block.cross.out}
        for name, layer in layers.items():
            if layer is not None:
                record[name] = self._layer(layer)

    def _address(self, tensor: Tensor) -> int:
        self.kept.append(native.array(tensor))
        return int(self.kept[-1].ctypes.data)

    def _layer(self, layer: nn.Module) -> tuple[float, ...]:
        assert isinstance(layer, Linear | LayerNorm | RMSNorm)
        self.kept.append(layer.weights())
        return self.kept[-1].record()

    def at_once(self, tokens: Tensor, place: InPlace, source: InPlaceSource, last: bool) -> Tensor:
        """The step of tokens (B,T), which are stored -> logits (B,T,V), or (B,1,V) of the last
        token alone. Raises IndexError for a token or position that does not exist."""
        batch, n = tokens.shape
        ids, n_vocab = tokens.numpy().reshape(-1), self.n_logits
        logits = np.empty((batch, 1 if last else n, n_vocab), self.dtype)
        threads = self._threads(self.token_size * (place.start + n))
        known = self.code.decode(
            self.model, self.blocks, ids, *place, *source, logits.reshape(-1, n_vocab), *threads
        )
        self._require(known, ids)
        return torch.from_numpy(logits)

    def by_layers(self, tokens: Tensor, step: Step, cache: Cache, source: InPlaceSource) -> Tensor:
        """The step of single tokens (B,1) -> logits (B,1,V), where a cache stores and attends in
        its own way. Raises as `at_once`."""
        c, batch, model = self.config, len(tokens), (self.model, self.blocks)
        ids, pos = tokens.numpy().reshape(-1), step.q_pos.numpy().reshape(-1)
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


def fits_together(decoder: Decoder) -> bool:
    """Whether each layer has the size that the configuration and its neighbours ask for: compiled
    code trusts them, and would read other memory."""
    c, embed = decoder.config, decoder.embed
    tables = [(embed.tokens.weight, c.d_model)]
    tables += [(embed.positions.weight, c.d_model)] if embed.positions is not None else []
    tables += [(embed.table.table, c.d_model)] if embed.table is not None else []
    tables += [(decoder.rotary.table.table, c.head_dim)] if decoder.rotary is not None else []
    return (
        all(len(table) >= c.context or table is embed.tokens.weight for table, _ in tables)
        and all(table.shape[1:] == (width,) for table, width in tables)
        and all(_block_fits(c, block) for block in decoder.layers if isinstance(block, Block))
        and _norm_fits(decoder.norm, c.d_model)
        and decoder.head.weight.shape[1:] == (c.d_model,)
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
        and all(norm is None or _norm_fits(norm, width) for norm, width in norms)
        and (attn.widths, attn.head_dim) == ([heads, stored, stored], c.head_dim)
        and mlp.activation == c.activation
        and (up[1], up[0]) == (c.d_model, down[1] * (1 + (c.activation == "swiglu")))
        and down[0] == c.d_model
    )


def _norm_fits(norm: nn.Module, width: int) -> bool:
    weight = vars(norm)["_parameters"].get("weight")
    return weight is not None and weight.shape == (width,) and norm.eps is not None
