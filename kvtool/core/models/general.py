"""A decoder with the settings by which families of today differ from the plain one.

A setting is one mathematical difference, and its default is none: where all are left alone, this is
`Decoder`. They stand apart from it since the compiled step, the flat form and seq2seq know nothing
of them: a step of this family goes through its modules, layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvtool.config import ModelConfig, RopeScaling, check_bool, check_float, check_int
from kvtool.core.cache import Cache, Step
from kvtool.core.cache.cross import CrossCache
from kvtool.core.kernels.default import capped
from kvtool.core.models.attention import SelfAttention
from kvtool.core.models.base import Model, uncached_step
from kvtool.core.models.layers import (
    MLP,
    Dropout,
    LayerNorm,
    Linear,
    RMSNorm,
    TokenEmbedding,
    make_norm,
)
from kvtool.core.models.rope import Rotary
from kvtool.core.native import arrays as native
from kvtool.errors import UsageError
from kvtool.registry import choose

NORM_PLACES = ("before", "after", "both")
AT_LEAST_0 = ("attention_scale", "attention_cap", "logits_cap", "window_theta")
ABOVE_0 = ("embed_scale", "residual_scale", "logits_scale")


@dataclass(frozen=True)
class GeneralConfig(ModelConfig):
    """A ModelConfig, and how a family differs from what that describes.

    A cap c bounds a number x to c tanh(x / c) (Gemma 2, arXiv 2408.00118). Layers are counted from
    0.
    """

    family: str = "general"
    attention_scale: float = 0.0  # of scores; 0: 1 / sqrt(head_dim)
    scale_by_depth: bool = False  # scores of layer i are divided by i + 1, as some GPT-2 have it
    attention_cap: float = 0.0  # of scores; 0: none
    logits_cap: float = 0.0
    logits_scale: float = 1.0
    embed_scale: float = 1.0  # rounded to the model's format, as Gemma's is
    residual_scale: float = 1.0  # of what attention and feed-forward network add
    norm_plus_one: bool = False  # RMSNorm multiplies by 1 + weight
    norm_place: str = "before"  # of attention and feed-forward network: before, after or both
    qk_norm_whole: bool = False  # norms of queries and keys over all heads at once
    rotary_dim: int = 0  # channels of a head that turn, the first ones; 0: all
    full_layers: tuple[int, ...] = ()  # see all, whatever the window
    unrotated_layers: tuple[int, ...] = ()
    window_theta: float = 0.0  # rope_theta of layers that have the window; 0: as of the others
    window_scaling: RopeScaling | None = None  # and their rope_scaling, if they have a theta

    def __post_init__(self) -> None:
        for name in ("full_layers", "unrotated_layers"):
            object.__setattr__(self, name, _layers(name, getattr(self, name)))
        if isinstance(self.window_scaling, Mapping):
            object.__setattr__(self, "window_scaling", RopeScaling(**self.window_scaling))
        check_int("rotary_dim", self.rotary_dim, 0)  # the base asks for rotary_width
        super().__post_init__()
        check_int("rotary_dim", self.rotary_dim, 0, self.head_dim)
        for name in AT_LEAST_0:
            check_float(name, getattr(self, name), 0.0, 1e30)
        for name in ABOVE_0:
            check_float(name, getattr(self, name), 0.0, 1e30, open_low=True)
        for name in ("scale_by_depth", "norm_plus_one", "qk_norm_whole"):
            check_bool(name, getattr(self, name))
        choose(self.norm_place, NORM_PLACES, "norm_place")
        self._check_together()

    def _says_how_to_turn(self) -> bool:
        return bool(self.rotary_dim or self.unrotated_layers or self.window_theta)

    def _check_together(self) -> None:
        if self.n_encoder_layers:
            raise UsageError(f"--family: {self.family} is for decoder-only models")
        if self.norm_plus_one and self.norm != "rmsnorm":
            raise UsageError("norm_plus_one: is for --norm rmsnorm")
        if self.qk_norm_whole and not self.qk_norm:
            raise UsageError("qk_norm_whole: needs qk_norm")
        if self._says_how_to_turn() and self.positions != "rotary":
            raise UsageError("rotary_dim, unrotated_layers, window_theta: need rotary positions")
        if self.rotary_dim % 2:
            raise UsageError(f"rotary_dim: {self.rotary_dim} is odd (expected an even number)")
        if self.window_scaling is not None and not self.window_theta:
            raise UsageError("window_scaling: needs window_theta")
        for name in ("full_layers", "unrotated_layers"):
            for layer in getattr(self, name):
                check_int(name, layer, 0, self.n_layers - 1)

    def first_layers(self, n: int) -> GeneralConfig:
        """As ModelConfig.first_layers."""
        return replace(
            self,
            n_layers=n,
            first_window_layer=min(self.first_window_layer, n),
            full_layers=tuple(layer for layer in self.full_layers if layer < n),
            unrotated_layers=tuple(layer for layer in self.unrotated_layers if layer < n),
        )

    @property
    def rotary_width(self) -> int:
        return self.rotary_dim or self.head_dim

    @property
    def n_turns(self) -> int:
        return 2 if self.window_theta else 1

    def window_of(self, layer: int) -> int:
        """How many positions a token sees in a layer, its own included; 0: all before it."""
        sees_all = layer < self.first_window_layer or layer in self.full_layers
        return 0 if sees_all else self.window

    def turn_of(self, layer: int) -> tuple[float, RopeScaling | None] | None:
        """theta of a layer's rotation and what slows it; None where nothing turns."""
        if self.positions != "rotary" or layer in self.unrotated_layers:
            return None
        if self.window_theta and self.window_of(layer):
            return self.window_theta, self.window_scaling
        return self.rope_theta, self.rope_scaling

    def score_scale(self, layer: int) -> float:
        """What a layer's scores are multiplied by, over 1 / sqrt(head_dim)."""
        scale = self.attention_scale * self.head_dim**0.5 if self.attention_scale else 1.0
        return scale / (layer + 1) if self.scale_by_depth else scale


def _layers(name: str, given: Any) -> tuple[int, ...]:
    if not isinstance(given, (list, tuple)):
        raise UsageError(f"{name}: {given!r} is no list of layers")
    return tuple(given)


class PlusOneRMSNorm(RMSNorm):
    """RMSNorm that multiplies by 1 + weight, a sum in float32 or above (Gemma Team 2024)."""

    by_token = True

    def reset_parameters(self) -> None:
        """As 1 of an RMSNorm."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(...,d) -> (...,d)"""
        wide = x.float() if x.dtype.itemsize < 4 else x
        scale = 1.0 + self.weight.to(wide.dtype)
        assert self.eps is not None
        if native.can_read(wide, scale):
            norm = native.Norm.of(scale, None, self.eps, centred=False)
            return native.on_tensor(native.normalised(norm), wide).to(x.dtype)
        return F.rms_norm(wide, self.normalized_shape, scale, self.eps).to(x.dtype)


def _norm(config: GeneralConfig) -> LayerNorm | RMSNorm:
    """A norm of the family over the width of the model."""
    return _rms_norm(config, config.d_model) if config.norm == "rmsnorm" else make_norm(config)


def _rms_norm(config: GeneralConfig, width: int) -> RMSNorm:
    kind = PlusOneRMSNorm if config.norm_plus_one else RMSNorm
    return kind(width, eps=config.norm_eps)


class GeneralAttention(SelfAttention):
    """SelfAttention whose scores have a scale of their own, and norms over one head or all."""

    by_token = True

    def __init__(self, config: GeneralConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.scale = config.score_scale(layer)
        self.whole = config.qk_norm_whole
        if config.qk_norm:
            widths = self.qkv_widths[:2] if self.whole else [self.head_dim] * 2
            self.q_norm, self.k_norm = (_rms_norm(config, width) for width in widths)

    def normalise(self, qkv: Tensor) -> Tensor:
        """As SelfAttention's; with `whole`, queries or keys of all heads are one vector."""
        if not self.whole or self.q_norm is None or self.k_norm is None:
            return super().normalise(qkv)
        q, k, v = qkv.split(self.qkv_widths, dim=-1)
        return torch.cat([self.q_norm(q), self.k_norm(k), v], dim=-1)

    def placed(
        self, q: Tensor, k: Tensor, pos: Tensor, rotary: Rotary | None
    ) -> tuple[Tensor, Tensor]:
        """As SelfAttention's; the scale goes into queries, so that caches and kernels know none."""
        q, k = super().placed(q, k, pos, rotary)
        return (q if self.scale == 1.0 else q * self.scale), k


class GeneralBlock(nn.Module):
    """Attention and a feed-forward network, each added to its input, with norms where they are."""

    def __init__(self, config: GeneralConfig, layer: int) -> None:
        super().__init__()
        before, after = config.norm_place != "after", config.norm_place != "before"
        self.scale = config.residual_scale
        self.dropout = Dropout(config.dropout)
        self.norm1 = _norm(config) if before else None
        self.attn = self.make_attention(config, layer)
        self.norm1_after = _norm(config) if after else None
        self.norm2 = _norm(config) if before else None
        self.mlp = self.make_mlp(config, layer)
        self.norm2_after = _norm(config) if after else None

    def make_attention(self, config: GeneralConfig, layer: int) -> nn.Module:
        """The layer's attention, called as SelfAttention."""
        return GeneralAttention(config, layer)

    def make_mlp(self, config: GeneralConfig, layer: int) -> nn.Module:
        """The layer's feed-forward network, token by token."""
        return MLP(config)

    def forward(self, x: Tensor, step: Step, cache: Cache | None, rotary: Rotary | None) -> Tensor:
        per_token = step.kernels.per_token
        y = x if self.norm1 is None else per_token(x, self.norm1)
        y = self.attn(y, step, cache, rotary)
        y = y if self.norm1_after is None else per_token(y, self.norm1_after)
        x = self._add(y, x)
        layers = (self.norm2, self.mlp, self.norm2_after)
        return self._add(per_token(x, *(layer for layer in layers if layer is not None)), x)

    def _add(self, y: Tensor, x: Tensor) -> Tensor:
        added: Tensor = self.dropout(y if self.scale == 1.0 else y * self.scale, onto=x)
        return added


class GeneralDecoder(Model):
    """A decoder-only Transformer of a GeneralConfig."""

    config_class: ClassVar[type[ModelConfig]] = GeneralConfig
    tensors_per_layer = 6  # at least: qkv, out, up, down, two norms
    config: GeneralConfig

    def __init__(self, config: GeneralConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = TokenEmbedding(config, config.vocab_size)
        self.dropout = Dropout(config.dropout)
        turns = [config.turn_of(i) for i in range(config.n_layers)]
        kinds = list(dict.fromkeys(turn for turn in turns if turn is not None))
        self.rotaries = nn.ModuleList(self.make_rotary(*kind) for kind in kinds)
        self.rotary_of = [None if turn is None else kinds.index(turn) for turn in turns]
        self.layers = nn.ModuleList(self.make_block(i) for i in range(config.n_layers))
        self.norm = _norm(config)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.tokens.weight

    def make_rotary(self, theta: float, scaling: RopeScaling | None) -> Rotary:
        """A rotation of queries and keys, which the layers that turn alike share."""
        c = self.config
        return Rotary(c.context, c.rotary_width, theta, scaling)

    def make_block(self, layer: int) -> nn.Module:
        """A layer of the model."""
        return GeneralBlock(self.config, layer)

    def forward(
        self,
        tokens: Tensor,
        step: Step | None = None,
        cache: Cache | None = None,
        source: CrossCache | None = None,
        last: bool = False,
    ) -> Tensor:
        if step is None:
            step = uncached_step(tokens, cache)
        c, x = self.config, self.embed(tokens, step.q_pos)
        if c.embed_scale != 1.0:
            x = x * x.new_tensor(c.embed_scale)
        x = self.dropout(x)
        if c.attention_cap:
            step = replace(step, kernels=capped(step.kernels, c.attention_cap))
        steps = {0: step, c.window: step.within(c.window)}
        for i, block in enumerate(self.layers):
            turn = self.rotary_of[i]
            rotary = None if turn is None else self.rotaries[turn]
            x = block(x, steps[c.window_of(i)], cache, rotary)
        return step.kernels.per_token(x[:, -1:] if last else x, self.norm, self.head, self.finish)

    def finish(self, logits: Tensor) -> Tensor:
        """What the family does to the head's logits, token by token."""
        scale, cap = self.config.logits_scale, self.config.logits_cap
        if scale != 1.0:
            logits = logits / scale
        return cap * (logits / cap).tanh() if cap else logits
