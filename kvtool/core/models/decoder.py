"""The decoder: token and position embedding, pre-norm blocks, logits."""

from __future__ import annotations

from torch import Tensor, nn

from kvtool.config import ModelConfig
from kvtool.core.cache import Cache, Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.models.attention import CrossAttention, SelfAttention
from kvtool.core.models.base import Model, uncached_step
from kvtool.core.models.layers import MLP, Dropout, Linear, TokenEmbedding, make_norm
from kvtool.core.models.rope import Rotary


class Block(nn.Module):
    """One layer: attention, then a feed-forward network, each with a norm before it and a residual
    connection around it.

    The norms come first (Xiong 2020), so that training needs no long warm-up. With `cross`,
    cross-attention stands between the two.
    """

    smallest = 6  # tensors at least: two norms, qkv, out, up, down

    def __init__(self, config: ModelConfig, layer: int, cross: bool = False) -> None:
        super().__init__()
        self.dropout = Dropout(config.dropout)
        self.norm1 = make_norm(config)
        self.attn = SelfAttention(config, layer)
        self.norm_cross = make_norm(config) if cross else None
        self.cross = CrossAttention(config, layer) if cross else None
        self.norm2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        step: Step,
        cache: Cache | None = None,
        source: CrossCache | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """x (B,T,d) -> (B,T,d); a block with `cross` reads `source`, if that is given."""
        per_token = step.kernels.per_token
        x = self.dropout(self.attn(per_token(x, self.norm1), step, cache, rotary), onto=x)
        if self.cross is not None and self.norm_cross is not None and source is not None:
            x = self.dropout(
                self.cross(per_token(x, self.norm_cross), source, step.kernels), onto=x
            )
        return self.dropout(per_token(x, self.norm2, self.mlp), onto=x)


def make_rotary(config: ModelConfig) -> Rotary | None:
    """The rotary positions of the configuration; None if its positions are others."""
    if config.positions != "rotary":
        return None
    return Rotary(config.context, config.head_dim, config.rope_theta, config.rope_scaling)


class Decoder(Model):
    """A decoder-only Transformer, or with `cross` the decoder of an encoder-decoder."""

    tensors_per_layer = Block.smallest

    def __init__(self, config: ModelConfig, cross: bool = False) -> None:
        super().__init__()
        self.config = config
        self.embed = TokenEmbedding(config, config.vocab_size)
        self.dropout = Dropout(config.dropout)
        self.rotary = make_rotary(config)
        self.layers = nn.ModuleList(Block(config, i, cross) for i in range(config.n_layers))
        self.norm = make_norm(config)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.tokens.weight

    def forward(
        self,
        tokens: Tensor,
        step: Step | None = None,
        cache: Cache | None = None,
        source: CrossCache | None = None,
        last: bool = False,
    ) -> Tensor:
        """As `Model.forward`: tokens (B,T) -> logits (B,T,V), or (B,1,V) with `last`."""
        if step is None:
            step = uncached_step(tokens, cache)
        x = self.dropout(self.embed(tokens, step.q_pos))
        windowed = step.within(self.config.window)
        for i, block in enumerate(self.layers):
            layer_step = windowed if i >= self.config.first_window_layer else step
            x = block(x, layer_step, cache, source, self.rotary)
        return step.kernels.per_token(x[:, -1:] if last else x, self.norm, self.head)
