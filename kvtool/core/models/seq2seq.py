"""The encoder-decoder Transformer (Vaswani 2017), in pre-norm form."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from kvtool.config import ModelConfig
from kvtool.core.cache import Cache, Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.kernels.default import DEFAULT, Kernels
from kvtool.core.models.attention import CrossAttention
from kvtool.core.models.base import Model
from kvtool.core.models.decoder import Block, Decoder, make_rotary
from kvtool.core.models.layers import Dropout, TokenEmbedding, make_norm


class Encoder(nn.Module):
    """The encoder: each real token of a source attends to all real tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = TokenEmbedding(config, config.source_vocab_size)
        self.dropout = Dropout(config.dropout)
        self.rotary = make_rotary(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_encoder_layers))
        self.norm = make_norm(config)

    def forward(self, tokens: Tensor, mask: Tensor, kernels: Kernels = DEFAULT) -> Tensor:
        """tokens (B,S), mask (B,S) bool with True = real -> (B,S,d)"""
        step = Step.bidirectional(mask, kernels)
        x = self.dropout(self.embed(tokens, step.q_pos))
        for block in self.layers:
            x = block(x, step, rotary=self.rotary)
        return kernels.per_token(x, self.norm)


class Seq2Seq(Model):
    """An encoder-decoder Transformer.

    To decode, call `source = encode(...)` once, then `forward(tokens, step, cache, source)` as for
    a decoder-only model.
    """

    tensors_per_layer = Block.smallest

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config, cross=True)

    def encode(self, tokens: Tensor, mask: Tensor, kernels: Kernels = DEFAULT) -> CrossCache:
        """Encode tokens (B,S) with mask (B,S) bool, True = real -> keys and values for all decoder
        layers."""
        memory = self.encoder(tokens, mask, kernels)
        crosses = [cast(CrossAttention, block.cross) for block in self.decoder.layers]
        return CrossCache([cross.project(memory, kernels) for cross in crosses], mask)

    def forward(
        self,
        tokens: Tensor,
        step: Step | None = None,
        cache: Cache | None = None,
        source: CrossCache | None = None,
        last: bool = False,
    ) -> Tensor:
        """As `Model.forward`, with tokens (B,T) of the target; ValueError without `source`."""
        if source is None:
            raise ValueError("an encoder-decoder model needs the encoded source")
        return self.decoder(tokens, step, cache, source, last)
